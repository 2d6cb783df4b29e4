"""What surrounds the steps of a training: the device and the precision, errors of memory, and the terminal."""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pyro
import torch

from pyro_vae.checks import shown
from pyro_vae.compiled.function import Compiled, OnCompile
from pyro_vae.devices import memory_for, moved
from pyro_vae.engine.first_run import placed
from pyro_vae.engine.minibatches import Minibatches
from pyro_vae.engine.modules import eval_mode
from pyro_vae.engine.program import Program
from pyro_vae.errors import PyroVAEError
from pyro_vae.training.moving import still_moving


def memory_of(objective: Any, batches: Minibatches) -> AbstractContextManager[None]:
    """Says beside an error of memory what to make smaller."""
    names = [name for name in ("chunk_size", "num_particles") if getattr(objective, "num_particles", 1) > 1]
    settings = {"batch_size": batches.batch_size} | {n: getattr(objective, n) for n in names if hasattr(objective, n)}
    given = ", ".join(f"{name} (now {value})" for name, value in settings.items())
    return memory_for("training", f"Pass a smaller {given}.")


def teller(bar: Any, batches: Minibatches) -> OnCompile | None:
    """Shows beside the progress bar that a step is being compiled, and when that pays off; None without a bar."""
    if bar.disable:
        return None
    first = True

    def tell(compiled: Compiled | None) -> None:
        nonlocal first
        bar.set_postfix_str("compiling ..." if compiled is None else "")
        if compiled is None:
            return
        line, now, before = f"compiled in {compiled.seconds:.1f} s", compiled.compiled_seconds, compiled.eager_seconds
        if first and before is not None and now is not None:
            steps = compiled.seconds / (before - now) if before > now else math.inf
            epochs = f", {steps / batches.steps:,.1f} epochs" if batches.steps else ""
            pays = f"pays off after {steps:,.0f} steps{epochs}" if before > now else "never pays off"
            line += f": a step takes {1e3 * now:.3g} ms in place of {1e3 * before:.3g}, which {pays}"
        else:
            line += " for a minibatch of another size"
        first = False
        bar.write(line, file=sys.stderr)

    return tell


def tell_end(bar: Any, epochs: Sequence[dict[str, float]], steps: int, stopped: str | None) -> None:
    """Says beside the progress bar why a callback has ended the training, and what was still moving."""
    if bar.disable:
        return
    why = None if stopped is None else f"stopped after {steps} step{'s' * (steps > 1)}: {stopped}"
    for line in (why, still_moving(epochs)):
        if line is not None:
            bar.write(line, file=sys.stderr)


@contextmanager
def flushing_denormals() -> Iterator[None]:
    """Inside, denormal numbers are zero: arithmetic with them is slow, and an optimiser's moments become so small."""
    smallest = torch.tensor(torch.finfo(torch.float64).tiny, dtype=torch.float64)
    was_on = not bool(smallest / 2 > 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_on)


def device_of(name: Any) -> torch.device:
    """The device of that name; refuse one that is not there."""
    try:
        device = torch.device(name)
        if device.type != "meta":
            torch.empty(1, device=device)
            return device
        why = "its tensors have no values"
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        why = str(error).splitlines()[0]
    raise PyroVAEError(
        f"expected device to be one that this machine has, such as 'cpu' or 'cuda', got {shown(name)} ({why}). Pass "
        "device='cpu', or None, which leaves the program where it is."
    )


def moved_to(device: torch.device, program: Program) -> Program:
    """Move a program's modules and parameters, found by one run, and its arguments to a device."""
    with eval_mode(program.modules()) as called:
        placed(program, lambda it: it.trace())
    for module in dict.fromkeys([*program.modules(), *called]):
        module.to(device)
    for _, parameter in pyro.get_param_store().named_parameters():
        parameter.data = parameter.data.to(device)
    return replace(program, args=moved(program.args, device), device=device)


def precision_on(device: torch.device, precision: str | None) -> AbstractContextManager[Any]:
    """A context in which the layers of networks compute in that precision; it may be entered many times."""
    if precision is None:
        return nullcontext()
    if precision != "bf16":
        raise PyroVAEError(
            f"expected precision to be 'bf16' or None, got {shown(precision)}. 'bf16' runs networks in bfloat16; None "
            "runs them in their own type."
        )
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise PyroVAEError(
            "expected a GPU that computes in bfloat16 with precision='bf16', got "
            f"{torch.cuda.get_device_name(device)}. Pass precision=None."
        )
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
