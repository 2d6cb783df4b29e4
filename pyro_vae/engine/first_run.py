"""What the first run of a program shows: the device of its parameters, and whether it takes its arguments."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from pyro_vae.checks import misfit
from pyro_vae.devices import OtherDeviceError, moved
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.ownership import forget, names_in_store
from pyro_vae.engine.program import Program
from pyro_vae.errors import PyroVAEError

T = TypeVar("T")


def placed(program: Program, first: Callable[[Program], T], *, whole: bool = True) -> tuple[Program, T]:
    """The program on its parameters' device, if its first run needs that, and the result of that run.

    It runs as it is first, since it may move data itself, or look them up on another device. Unless `whole`, its own
    arguments stay where they are: they are more than one run takes, and :meth:`Program.on` moves those that each gets.
    """
    before = names_in_store()
    try:
        return program, first(program)
    except OtherDeviceError as error:
        forget(names_in_store() - before)  # made from the data, some may be on the data's device
        args = moved(program.args, error.device) if whole else program.args
        program = replace(program, args=args, device=error.device)
    return program, first(program)


def refusal(function: PyroFunction, args: tuple[Any, ...]) -> TypeError | None:
    """The error of a model or guide that does not take so many arguments."""
    found = misfit(function, args)
    if found is None:
        return None
    try:  # functools.wraps shows the signature of the function inside
        Program(function, lambda *_: None, args).trace()
    except OtherDeviceError:
        return None  # it has taken them
    except TypeError:
        return found
    except PyroVAEError as error:
        return found if isinstance(error.__cause__, TypeError) else None
    return None
