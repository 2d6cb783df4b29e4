"""What a failed check tells, and the tolerances of a check: standard errors, or roundings."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import pyro
import torch
from torch import Tensor

MOST_Z = 5.0  # that a mean may be off, which a normal variable exceeds once in 1.7 million draws


def most_z(draws: int) -> float:
    """How many of its own standard errors a mean of normal draws may be off: as rare as `MOST_Z`, by Student's t."""
    z, nu = MOST_Z, draws - 1
    # Cornish and Fisher's expansion of the quantile; Abramowitz and Stegun (1964), 26.7.5.
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / nu + second / nu**2 + third / nu**3


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Draw from `seed`, validate as Pyro does, and leave the random numbers and the parameter store as they were."""
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope(), pyro.validation_enabled(True):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Report:
    """Raises an AssertionError when a check of one part fails.

    Arguments:
        part: the name of the part.
    """

    part: str

    def fail(self, check: str, expected: str, got: str, cause: str) -> NoReturn:
        """Raise the error."""
        raise AssertionError(f"{self.part} fails the check '{check}': expected {expected}, got {got}. {cause}")

    def require(self, holds: bool, check: str, expected: str, got: object, cause: str) -> None:
        """Fail unless a condition holds."""
        if not holds:
            self.fail(check, expected, str(got), cause)

    def close(
        self, check: str, got: Tensor, expected: Tensor, tolerance: Tensor | float, cause: str, what: str = ""
    ) -> None:
        """Fail unless two tensors of one shape differ by no more than a tolerance."""
        if got.shape != expected.shape:
            self.fail(check, f"{what} of shape {tuple(expected.shape)}".strip(), f"{tuple(got.shape)}", cause)
        got, expected = got.detach().double(), expected.detach().double()
        allowed = torch.as_tensor(tolerance, dtype=torch.float64).expand(got.shape)
        error = torch.where(got == expected, 0.0, (got - expected).abs())
        at = _worst(error, allowed)
        if at is not None:
            self.fail(
                check,
                f"{what} {expected[at].item():.8g} within {allowed[at].item():.1e}".strip(),
                f"{got[at].item():.8g}, off by {error[at].item():.1e}",
                cause,
            )

    def z_test(
        self,
        check: str,
        draws: Tensor,
        exact: Tensor,
        cause: str,
        *,
        slack: Tensor | float = 0.0,
        variance: Tensor | None = None,
        what: Callable[[tuple[int, ...]], str] = lambda index: "",
    ) -> None:
        """Fail unless the mean of draws (n, ...) is the exact value within :func:`most_z` of its standard errors.

        Arguments:
            slack: the error of the exact value, which the standard error does not include.
            variance: the draws' exact variance, where it is known; None takes that of the draws.
            what: names the entry at an index in the message.
        """
        draws, exact = draws.detach().double(), exact.detach().double()
        mean, spread = draws.mean(0), draws.var(0) if variance is None else variance.detach().double()
        standard_error = (spread / len(draws)).sqrt()
        most = most_z(len(draws)) if variance is None else MOST_Z
        # An entry without noise has to agree to rounding.
        allowed = most * standard_error + slack + 1e-9 * (1 + exact.abs())
        error = (mean - exact).abs()
        at = _worst(error, allowed)
        if at is not None:
            z = error[at].item() / max(standard_error[at].item(), 1e-300)
            self.fail(
                check,
                f"{what(at)} {exact[at].item():.6g}".strip(),
                f"{mean[at].item():.6g} ± {standard_error[at].item():.2g} (z = {z:.3g}, at most {most:.3g})",
                cause,
            )


def _worst(error: Tensor, allowed: Tensor) -> tuple[int, ...] | None:
    """The index of the entry that is furthest outside, NaN before all others; None where all are inside."""
    outside = ~(error <= allowed)
    if not bool(outside.any()):
        return None
    excess = torch.where(outside, (error / allowed).nan_to_num(nan=math.inf), -1.0)
    return tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
