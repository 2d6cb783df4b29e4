"""The default numbers of the evaluations, for the functions, the report and the command line."""

NUM_SAMPLES = 5000  # importance samples for each datum
NUM_STEPS = 1000  # temperatures of annealed importance sampling
NUM_CHAINS = 16  # annealed chains for each datum
