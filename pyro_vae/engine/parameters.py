"""The parameters of a program, found by running it once."""

from collections.abc import Callable
from typing import Any

import pyro
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.engine.ownership import merged, parameters_of, unconstrained
from pyro_vae.engine.program import Program
from pyro_vae.errors import PyroVAEError


def find_parameters(program: Program) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters that the model uses, and those that the guide uses; one that both use is in both."""
    model_trace, guide_trace = program.trace()
    return parameters_of(model_trace), parameters_of(guide_trace)


def store_as_it_is() -> Callable[[], None]:
    """Remember what Pyro's parameter store holds now; what it returns puts that back, as before a run of a program."""
    held = [vars(pyro.get_param_store())[name] for name in ("_params", "_param_to_name", "_constraints")]
    kept = [dict(each) for each in held]

    def put_back() -> None:
        for each, before in zip(held, kept, strict=True):
            each.clear()
            each.update(before)

    return put_back


def require_parameters(*traces: Trace) -> dict[str, Tensor]:
    """The parameters in these traces, by name; refuse a program without any."""
    found = merged(*map(parameters_of, traces))
    if not found:
        raise PyroVAEError(
            "expected a program with parameters to train, got none: neither model nor guide has a pyro.param or "
            "pyro.module statement, or all parameters are frozen. Register the networks with pyro.module, or unfreeze "
            "some with requires_grad_(True)."
        )
    return found


class NewParameters(Messenger):
    """Around runs of a program: finds the parameters that are not among the known ones, in :attr:`found`.

    A run may take another path than the first one, by its minibatch.
    """

    def __init__(self, known: dict[str, Tensor]) -> None:
        super().__init__()
        self.known = known
        self.found: dict[str, Tensor] = {}

    def _pyro_post_param(self, msg: Any) -> None:
        own = unconstrained(msg["value"])
        if self.known.get(msg["name"]) is not own:
            self.found[msg["name"]] = own


def require_kept(parameters: dict[str, Tensor]) -> None:
    """Refuse a program whose last run had another tensor in place of one of these: no step would reach it."""
    require_same(parameters, dict(pyro.get_param_store().named_parameters()))


def require_same(parameters: dict[str, Tensor], later: dict[str, Tensor]) -> None:
    """Refuse a later parameter that is another tensor than the one of its name among these."""
    for name, value in later.items():
        if parameters.get(name, value) is not value:
            raise PyroVAEError(
                f"parameter '{name}' is another tensor each time the program runs, so that no step can train it: "
                "expected networks that are made once, got one that is made anew inside the model or the guide. Make "
                "it outside of both."
            )
