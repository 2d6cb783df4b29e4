"""The default numbers of the evaluations, also for the help of the command line, which does not import torch."""

NUM_SAMPLES = 5000  # importance samples for each datum: log_likelihood, inference_gaps
NUM_STEPS = 1000  # temperatures of annealed importance sampling: ais, bdmc
NUM_CHAINS = 16  # annealed chains for each datum: ais, bdmc
NUM_LEAPFROG = 10  # leapfrog steps of a Hamiltonian transition: ais, bdmc
STEP_SIZE = 0.3  # leapfrog step size before adaptation: ais, bdmc
GAPS_STEPS = 1000  # steps of Adam: inference_gaps
GAPS_LR = 0.02  # first step size of Adam: inference_gaps
DECOMPOSITION_SAMPLES = 10  # samples from each q(z|x_n): decompose_elbo
ACTIVE_SAMPLES = 10  # samples from each q(z|x_n): active_units
ACTIVE_THRESHOLD = 0.01  # variance of a posterior mean above which its dimension is active, as Burda et al. chose it
COMPARE_REPEATS = 10  # repeats of each bound and its gradient: compare
COMPARE_SAMPLES = 1000  # importance samples for compare's own estimate of log p(x)
REFINE_STEPS = 250  # steps of Adam: refine
REFINE_PARTICLES = 8  # samples for each gradient: refine
REFINE_LR = 0.05  # first step size of Adam, in standard deviations of the guide: refine
REFINE_PILOT = 1000  # draws that show k-hat: refine
REFINE_ROUNDS = 3  # components that may be added: refine
BLAME_SAMPLES = 100  # draws of the guide for each datum: blame
CALIBRATION_SAMPLES = 100  # draws of the guide for each simulated datum: calibrate
REPORT_ANNEALED = 100  # number of data for the slow estimates of the report; the others use all data
REPORT_STEPS = 50  # temperatures of the report, from a refined proposal, which is near the posterior
MAX_SEED = 2**32 - 1  # of NumPy's generator, which Pyro seeds too
