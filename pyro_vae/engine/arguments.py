"""A program as an argument: a model and a guide, or one thing that has both."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import pyro.infer
from pyro.contrib.easyguide import EasyGuide
from torch import nn

from pyro_vae.checks import converter, shown
from pyro_vae.devices import OtherDeviceError, note_memory
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.ownership import forget, names_in_store
from pyro_vae.engine.precision import single_precision
from pyro_vae.engine.threads import ONE_THREAD
from pyro_vae.errors import PyroVAEError

T = TypeVar("T")


def takes_program(function: Callable[..., T]) -> Callable[..., T]:
    """Let a function with the arguments `model` and `guide` also take one thing that has both, in their place.

    If `model` is a tuple, it is ``(model, guide)``. Else, if the argument after `model` is callable or None, the two
    are model and guide. Else `model` has the attributes `model` and `guide`, as a model/guide pair has.

    Autocast, where it is on, is off inside but in layers of ``torch.nn``; see :mod:`pyro_vae.engine.precision`.
    """
    parameters = inspect.signature(function).parameters
    place, names = list(parameters).index("model"), ("model", "guide")
    guide_optional = type(None) in get_args(parameters["guide"].annotation)  # as annealing from the prior has it

    convert = converter(function, without=(*names, "args", "kwargs"))

    @functools.wraps(function)
    def with_program(*args: Any, **kwargs: Any) -> T:
        if "guide" in kwargs and len(args) > place and isinstance(args[place], tuple):
            raise PyroVAEError(
                f"{function.__name__} expected a tuple (model, guide), or a model and a guide, got a tuple and a "
                "guide. Pass one of the two."
            )
        if "guide" not in kwargs:
            given = args[place : place + 2]
            if "model" in kwargs:
                kwargs["model"], kwargs["guide"] = _both(kwargs["model"])
            elif given and (isinstance(given[0], tuple) or len(given) == 1 or not _may_be_guide(*given)):
                args = (*args[:place], *_both(given[0]), *args[place + 1 :])
        for name, each in (*zip(names, args[place:], strict=False), *((n, kwargs[n]) for n in names if n in kwargs)):
            _check_function(name, each, function.__name__, name == "guide" and guide_optional)
        args, kwargs = convert(args, kwargs)
        before = names_in_store()
        try:
            with ONE_THREAD, single_precision():
                return function(*args, **kwargs)
        except OtherDeviceError:
            forget(names_in_store() - before)  # some were made from the data, on the data's device
            raise
        except RuntimeError as error:
            note_memory(error, function.__name__, _smaller(args[:place], kwargs))
            raise

    return with_program


def _check_function(name: str, function: Any, caller: str, optional: bool) -> None:
    if function is None and not optional:
        fix = "; only pv.ais and pv.bdmc need none" if name == "guide" else ""
        raise PyroVAEError(f"{caller} expected a {name}, got None. Pass one{fix}.")
    if function is not None and not callable(function):
        raise PyroVAEError(
            f"{caller} expected a {name}, a function of Pyro, got {shown(function)}. Pass the function, or a pair."
        )
    if isinstance(function, nn.Module) and type(function).__call__ is nn.Module.__call__:
        if getattr(function.forward, "__func__", None) is not nn.Module.forward:
            return
        raise PyroVAEError(
            f"{caller} expected a {name} that can be called, got a {type(function).__name__} without forward. Pass a "
            "pair's vae.model and vae.guide; functions of this package take the pair alone too."
        )


def _smaller(objective: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What to make smaller where memory is short: the settings of an objective, or arguments."""
    found = [kwargs, *map(vars, objective)]
    settings = {n: each[n] for n in ("chunk_size", "num_particles") for each in found if n in each}
    if settings.get("num_particles", 1) == 1:
        return "Pass fewer rows of data."
    given = " or ".join(f"{name} (now {value})" for name, value in settings.items())
    return f"Pass a smaller {given}, or fewer rows of data."


def _may_be_guide(model: Any, value: Any) -> bool:
    """Whether the argument after a model is a guide, or None in its place; an objective is callable too."""
    if value is None:  # after a pair, it stands for data
        return isinstance(model, EasyGuide) or not (hasattr(model, "model") and hasattr(model, "guide"))
    return callable(value) and not isinstance(value, pyro.infer.ELBO | type)


def _both(program: Any) -> tuple[PyroFunction, PyroFunction]:
    """The model and the guide of one thing that has both."""
    if isinstance(program, EasyGuide):  # whose own `guide` is only a part of what it does when it is called
        return program.model, program
    if isinstance(program, tuple) and len(program) == 2:
        model, guide = program
    else:
        model, guide = getattr(program, "model", None), getattr(program, "guide", None)
    if isinstance(program, type):
        raise PyroVAEError(f"expected a model and a guide, got the class {program.__name__}. Pass an instance of it.")
    if not callable(model) or not (callable(guide) or (guide is None and isinstance(program, tuple))):
        got = f"the function {program.__name__} alone" if inspect.isroutine(program) else type(program).__name__
        raise PyroVAEError(
            "expected a model and a guide, or one thing that has both, such as pv.mlp_vae(...) or a tuple (model, "
            f"guide), got {got}. Pass the guide after the model."
        )
    return model, guide
