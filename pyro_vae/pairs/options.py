"""Checks of the likelihood class and the posterior class that a builder gets, and of their options."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from pyro_vae.errors import PyroVAEError
from pyro_vae.likelihoods import BY_NAME, Likelihood
from pyro_vae.posteriors import Posterior

# The arguments that a builder passes itself; the other arguments of a class are its options.
LIKELIHOOD_PARTS = ("decoder", "event_shape")
POSTERIOR_PARTS = ("encoder", "event_shape", "latent_dim")


def find_likelihood(
    likelihood: str | type[Likelihood], options: Mapping[str, Any], posterior: type[Posterior] | None = None
) -> type[Likelihood]:
    """Return the class of a likelihood given by name or class; the posterior's class serves the error message."""
    family = BY_NAME.get(likelihood) if isinstance(likelihood, str) else likelihood
    if not (isinstance(family, type) and issubclass(family, Likelihood)):
        names = ", ".join(map(repr, BY_NAME))
        raise PyroVAEError(
            f"expected likelihood to be one of {names}, or a subclass of pv.Likelihood, got {likelihood!r}. Check the "
            "spelling."
        )
    of_posterior = None if posterior is None else option_names(posterior, POSTERIOR_PARTS)
    check_options(family, options, LIKELIHOOD_PARTS, "Drop it, or pass another likelihood.", of_posterior or ())
    return family


def check_posterior(posterior: Any, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the options as a dict. Raise ValueError for a class or an option that is not a posterior's."""
    if not (isinstance(posterior, type) and issubclass(posterior, Posterior)):
        raise PyroVAEError(
            f"expected posterior to be a subclass of pv.Posterior, such as pv.FullNormal, got {posterior!r}. Pass the "
            "class, with its options in posterior_options. Assign any other module afterwards: vae.posterior = module."
        )
    if options is None:
        return {}
    check_options(posterior, options, POSTERIOR_PARTS, "Drop it, or pass another posterior.")
    return dict(options)


def check_options(
    family: type, options: Mapping[str, Any], parts: tuple[str, ...], fix: str, of_posterior: Sequence[str] = ()
) -> None:
    """Raise ValueError for an option that a class lacks; those `of_posterior` belong in `posterior_options`."""
    known = option_names(family, parts)
    for name, value in options.items():
        if known is not None and name not in known:
            has = f"its options: {', '.join(known)}" if known else "it has no options"
            fix = f"Pass it in posterior_options={{{name!r}: {value!r}}}." if name in of_posterior else fix
            raise PyroVAEError(f"expected an option of {family.__name__} ({has}), got {name}={value!r}. {fix}")


def option_names(family: type, parts: tuple[str, ...]) -> list[str] | None:
    """The names of the options of a class; None if the class takes any keyword argument."""
    parameters = inspect.signature(family).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [p.name for p in parameters if p.name not in parts and p.kind is not p.VAR_POSITIONAL]
