"""Whether a training was still moving at its end: the trend of the bound, the KL and learned scales."""

from collections.abc import Sequence

import numpy as np

FEWEST = 6  # epochs in a trend
PART = 3  # of all epochs, the last third
SURE = 4.0  # standard errors of a slope
LEAST = {"bound": 0.02, "KL": 0.02}  # nats an epoch that matter; of a scale, the share LEAST_SHARE
LEAST_SHARE = 0.002


def trend(values: Sequence[float]) -> tuple[float, float]:
    """The slope of a straight line through the values, and its standard error."""
    y = np.asarray(values, dtype=float)
    t = np.arange(len(y)) - (len(y) - 1) / 2
    slope = (t * y).sum() / (t * t).sum()
    residual = y - y.mean() - slope * t
    return float(slope), float(np.sqrt((residual**2).sum() / (len(y) - 2) / (t * t).sum()))


def still_moving(epochs: Sequence[dict[str, float]]) -> str | None:
    """A sentence on what was still moving in the last third of the epochs; None if nothing was, or it is not known."""
    last = epochs[-max(FEWEST, len(epochs) // PART) :]
    if len(last) < FEWEST:
        return None
    found = []
    for name in last[-1]:
        values = [row.get(name, np.nan) for row in last]
        if not np.isfinite(values).all():
            continue
        slope, error = trend(values)
        least = LEAST.get(name, LEAST_SHARE * abs(values[-1]))
        if abs(slope) > max(least, SURE * error):
            unit = f"{slope:+.2g} nats" if name in LEAST else f"{slope / values[-1]:+.1%}"
            found.append(f"{name} ({unit} an epoch)")
    if not found:
        return None
    return f"still moving at the end: {', '.join(found)}. More epochs would change it."
