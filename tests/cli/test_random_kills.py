"""Trainings that signals end at random moments go on, and end with the bits of the unbroken training."""

from __future__ import annotations

import pytest

from tests.helpers.random_kills import differences


@pytest.mark.slow
def test_twenty_signals_at_random_moments():
    assert [
        (setup, found) for setup, found in differences(seed=3, kills=10, terminations=10, compiled=0) if found
    ] == []
