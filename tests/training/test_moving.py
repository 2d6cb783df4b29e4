"""What pv.fit says at the end of a training that was still moving."""

from __future__ import annotations

import numpy as np
import pytest

from pyro_vae.training.moving import still_moving, trend


def test_the_trend_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    slopes = []
    for _ in range(2000):
        slope, error = trend(0.5 * np.arange(20) + rng.normal(size=20))
        slopes.append((slope - 0.5) / error)
    assert abs(np.mean(slopes)) < 4 / 2000**0.5
    assert np.std(slopes) == pytest.approx((18 / 16) ** 0.5, rel=4 / 4000**0.5 * 2)  # Student's t, 18 degrees


def rows(bound, kl=None, sigma=None):
    return [
        {"bound": b, "KL": 5.0 if kl is None else kl[i], "sigma": 0.5 if sigma is None else sigma[i]}
        for i, b in enumerate(bound)
    ]


def test_what_moves_is_named():
    rng = np.random.default_rng(0)
    noise, t = rng.normal(size=30), np.arange(30)
    assert still_moving(rows(-100 + 0.1 * noise)) is None
    assert still_moving(rows(-100 + 0.001 * t)) is None  # too little to matter
    assert still_moving(rows(-100 + 0.3 * t)).startswith("still moving at the end: bound (+0.3 nats an epoch). More")
    assert "bound (+0." in still_moving(rows(-100 + 0.3 * t + 0.1 * noise))
    assert "KL (-0.2 nats an epoch)" in still_moving(rows(-100 + 0.1 * noise, kl=9 - 0.2 * t))
    assert "sigma (-6" in still_moving(rows(-100 + 0.1 * noise, sigma=0.95**t))
    assert still_moving(rows(-100 + 0.3 * t)[:5]) is None  # too few to tell
    assert "bound" not in still_moving(rows(np.full(30, np.nan), sigma=0.95**t))
