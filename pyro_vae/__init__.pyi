"""The public names, for type checkers and for ``__init__.py``, which imports each one at its first use."""

from . import (
    callbacks as callbacks,
    data as data,
    distributed as distributed,
    evaluation as evaluation,
    flows as flows,
    likelihoods as likelihoods,
    networks as networks,
    objectives as objectives,
    pairs as pairs,
    plots as plots,
    posteriors as posteriors,
    priors as priors,
    schedules as schedules,
    testing as testing,
)
from .arviz_io import to_arviz as to_arviz
from .compiled.step import compile_step as compile_step
from .engine.weights import log_weights as log_weights
from .errors import (
    CallbackError as CallbackError,
    MissingCompilerError as MissingCompilerError,
    MissingPackageError as MissingPackageError,
    NoDensityError as NoDensityError,
    NotFiniteError as NotFiniteError,
    NotWrittenError as NotWrittenError,
    OtherRankError as OtherRankError,
    PyroVAEError as PyroVAEError,
)
from .evaluation import (
    AnnealedLikelihood as AnnealedLikelihood,
    Calibration as Calibration,
    Decomposition as Decomposition,
    Estimate as Estimate,
    Evidence as Evidence,
    Expectation as Expectation,
    Gaps as Gaps,
    LogLikelihood as LogLikelihood,
    RefinedGuide as RefinedGuide,
    Sandwich as Sandwich,
    active_units as active_units,
    ais as ais,
    bdmc as bdmc,
    blame as blame,
    calibrate as calibrate,
    compare as compare,
    compare_models as compare_models,
    decompose_elbo as decompose_elbo,
    expect as expect,
    inference_gaps as inference_gaps,
    log_likelihood as log_likelihood,
    pareto_k as pareto_k,
    refine as refine,
)
from .likelihoods import (
    Bernoulli as Bernoulli,
    Categorical as Categorical,
    ContinuousBernoulli as ContinuousBernoulli,
    DiscretizedLogistic as DiscretizedLogistic,
    Gaussian as Gaussian,
    Likelihood as Likelihood,
    LowRankGaussian as LowRankGaussian,
    NegativeBinomial as NegativeBinomial,
    Poisson as Poisson,
    StudentT as StudentT,
)
from .objectives import (
    CIWAE as CIWAE,
    ELBO as ELBO,
    IWAE as IWAE,
    JVI as JVI,
    MIWAE as MIWAE,
    NoClosedFormError as NoClosedFormError,
    Objective as Objective,
    PIWAE as PIWAE,
    RWS as RWS,
    Renyi as Renyi,
    TVO as TVO,
)
from .pairs import (
    Autoencoder as Autoencoder,
    BottomUp as BottomUp,
    ConditionalVAE as ConditionalVAE,
    HierarchicalVAE as HierarchicalVAE,
    Ladder as Ladder,
    SemiSupervisedVAE as SemiSupervisedVAE,
    VAE as VAE,
    conv_vae as conv_vae,
    mlp_autoencoder as mlp_autoencoder,
    mlp_conditional_vae as mlp_conditional_vae,
    mlp_hierarchical_vae as mlp_hierarchical_vae,
    mlp_semi_supervised_vae as mlp_semi_supervised_vae,
    mlp_vae as mlp_vae,
)
from .posteriors import (
    DiagonalNormal as DiagonalNormal,
    FlowPosterior as FlowPosterior,
    FullNormal as FullNormal,
    LowRankNormal as LowRankNormal,
    MixturePosterior as MixturePosterior,
    Posterior as Posterior,
    Unconditional as Unconditional,
)
from .priors import (
    FlowPrior as FlowPrior,
    MixturePrior as MixturePrior,
    StandardNormal as StandardNormal,
    VampPrior as VampPrior,
)
from .training import fit as fit
from .training.calling import Callback as Callback
from .training.checkpoint import load_parameters as load_parameters
from .training.scales import fit_scale as fit_scale

__version__: str
