"""The parameters of a program, found by running it once."""

from typing import Any

from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.engine.program import Program
from pyro_vae.errors import PyroVAEError


def find_parameters(program: Program) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters that the model uses, and those that the guide uses; one that both use is in both."""
    model_trace, guide_trace = program.trace()
    return parameters_of(model_trace), parameters_of(guide_trace)


def require_parameters(*traces: Trace) -> dict[str, Tensor]:
    """The parameters in these traces, by name; refuse a program without any."""
    found = {name: value for trace in traces for name, value in parameters_of(trace).items()}
    if not found:
        raise PyroVAEError(
            "expected a program with parameters to train, got none: neither model nor guide has a pyro.param or "
            "pyro.module statement. Register the networks with pyro.module."
        )
    return found


def parameters_of(trace: Trace) -> dict[str, Tensor]:
    """The parameters in a trace, by name: unconstrained, as an optimiser steps them."""
    values: dict[str, Any] = {n: site["value"] for n, site in trace.nodes.items() if site["type"] == "param"}
    # Under Pyro's module_local_params, a module's parameters are unconstrained already.
    return {n: v.unconstrained() if hasattr(v, "unconstrained") else v for n, v in values.items()}
