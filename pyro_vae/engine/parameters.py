"""The parameters of a program, found by running it once."""

from typing import Any

import pyro
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.engine.ownership import TWO_MODULES
from pyro_vae.engine.program import Program
from pyro_vae.errors import PyroVAEError


def find_parameters(program: Program) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters that the model uses, and those that the guide uses; one that both use is in both."""
    model_trace, guide_trace = program.trace()
    return parameters_of(model_trace), parameters_of(guide_trace)


def require_parameters(*traces: Trace) -> dict[str, Tensor]:
    """The parameters in these traces, by name; refuse a program without any."""
    found = merged(*map(parameters_of, traces))
    if not found:
        raise PyroVAEError(
            "expected a program with parameters to train, got none: neither model nor guide has a pyro.param or "
            "pyro.module statement. Register the networks with pyro.module."
        )
    return found


def merged(*found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of model and guide as one dictionary; refuse two modules with one name."""
    both: dict[str, Tensor] = {}
    for parameters in found:
        for name, value in parameters.items():
            if both.setdefault(name, value) is not value:
                raise _two_modules(name)
    return both


def parameters_of(trace: Trace) -> dict[str, Tensor]:
    """The parameters in a trace, by name: unconstrained, as an optimiser steps them."""
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "param"}
    for name, site in sites.items():
        if (site["infer"] or {}).get(TWO_MODULES):
            raise _two_modules(name)
    values: dict[str, Any] = {name: site["value"] for name, site in sites.items()}
    # Under Pyro's module_local_params, a module's parameters are unconstrained already.
    return {n: v.unconstrained() if hasattr(v, "unconstrained") else v for n, v in values.items()}


def require_kept(parameters: dict[str, Tensor]) -> None:
    """Refuse a program whose last run had another tensor in place of one of these: no step would reach it."""
    for name, value in pyro.get_param_store().named_parameters():
        if parameters.get(name, value) is not value:
            raise PyroVAEError(
                f"parameter '{name}' is another tensor each time the program runs, so that no step can train it: "
                "expected networks that are made once, got one that is made anew inside the model or the guide. Make "
                "it outside of both."
            )


def _two_modules(name: str) -> PyroVAEError:
    return PyroVAEError(
        f"expected a name of its own for each network of a program, got two modules with a parameter '{name}', of "
        "which one would be neither trained nor saved. Pass other names to pyro.module; a PyroModule gets its names "
        "from the attributes that hold its parts."
    )
