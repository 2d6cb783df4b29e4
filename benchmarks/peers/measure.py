"""Times that a noisy machine can't bend: contestants take turns, and ratios are taken within a turn."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Clock = Callable[[], float]  # measures once; returns seconds


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles over rounds."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.lower:.3g} to {self.upper:.3g})"


def seconds(function: Callable[[], object], repeats: int = 1) -> float:
    """Processor time, over all threads: a second thread does not make it less, and waiting does not make it more."""
    started = time.process_time()
    for _ in range(repeats):
        function()
    return (time.process_time() - started) / repeats


def clock(function: Callable[[], object], block: float) -> Clock:
    """Measures a call by as many as fill a block of so many seconds."""
    once = max(seconds(function, 3), 1e-6)
    repeats = max(1, round(block / once))
    return lambda: seconds(function, repeats)


def alternate(clocks: dict[str, Clock], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, in an order that changes from round to round."""
    order, times = list(clocks), {name: [] for name in clocks}
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(clocks[name]())
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> Spread:
    """Of two contestants' times, round by round, since what slows one round down slows both."""
    return Spread.of([a / b for a, b in zip(times[above], times[below], strict=True)])


def check_same(name: str, values: Sequence[float], others: Sequence[float], most: float = 4.0) -> float:
    """How many standard errors apart two means are; refuses more than `most`.

    Raises:
        ValueError: they are further apart: the contestants don't compute the same.
    """
    variance = sum(statistics.variance(sample) / len(sample) for sample in (values, others))
    # Beside noise there is float32's rounding, which differs between libraries.
    rounding = 2e-6 * abs(statistics.fmean(others))
    z = (statistics.fmean(values) - statistics.fmean(others)) / (variance + rounding**2) ** 0.5
    # So few values make the error uncertain itself: Student's quantile in place of the normal's, to first order.
    most *= 1 + (most**2 + 1) / (4 * (len(values) + len(others) - 2))
    if not abs(z) <= most:
        raise ValueError(
            f"{name} computes something else: expected a mean loss of {statistics.fmean(others):.6g}, as pyro_vae's, "
            f"got {statistics.fmean(values):.6g}, {z:.1f} standard errors away."
        )
    return z


def check_reached(name: str, value: float, other: float, tolerance: float = 0.08) -> None:
    """Refuse a contestant whose loss, after as many steps, is another.

    With other noise along the way some percent are chance; another learning rate or scale is far off.

    Raises:
        ValueError: it is off by more than the tolerance.
    """
    if not abs(value / other - 1) <= tolerance:
        raise ValueError(
            f"{name} trains differently: expected a loss of about {other:.6g}, as pyro_vae's, got {value:.6g}."
        )
