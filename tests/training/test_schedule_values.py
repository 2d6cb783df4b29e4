"""The values of schedules that a checkpoint keeps: those that the steps and epochs of a training have."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

import pyro_vae as pv
from pyro_vae.training.schedule_values import difference, learning_rates, scheduled_values


def test_they_are_those_of_three_steps_of_each_epoch():
    objective = pv.ELBO(beta=float)
    assert scheduled_values(objective, steps=10, epochs=2) == {"beta": {k: float(k) for k in (0, 3, 9, 10, 13, 19)}}
    assert objective.step == 0


def test_those_of_a_stream_are_of_steps_further_and_further_apart():
    kept = scheduled_values(pv.ELBO(beta=float), steps=None, epochs=2)["beta"]
    assert list(kept)[:5] == [0, 1, 2, 4, 8]


def test_a_function_may_end_before_the_planned_epochs():
    """Patience may end a training long before."""
    betas = [0.5, 0.7, 1.0]
    assert scheduled_values(pv.ELBO(beta=betas.__getitem__), steps=1, epochs=9) == {"beta": {0: 0.5, 1: 0.7, 2: 1.0}}


def test_random_values_are_left_out_and_the_generators_stay():
    state = torch.get_rng_state()
    objective = pv.ELBO(beta=lambda step: float(torch.rand(())) if step > 0 else 1.0)
    assert scheduled_values(objective, steps=1, epochs=3) == {"beta": {0: 1.0}}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda o: schedulers.ExponentialLR(o, 0.5), {1: 0.1, 2: 0.05, 3: 0.025, 4: 0.0125}),
        (lambda o: schedulers.LambdaLR(o, lambda epoch: 1 / (1 + epoch)), {1: 0.1, 2: 0.05, 3: 0.1 / 3, 4: 0.025}),
        (
            lambda o: schedulers.SequentialLR(
                o, [schedulers.ConstantLR(o, 0.5), schedulers.ExponentialLR(o, 0.5)], [2]
            ),
            {1: 0.05, 2: 0.05, 3: 0.1, 4: 0.05},
        ),
        (lambda o: schedulers.ReduceLROnPlateau(o, threshold_mode="abs"), {1: 0.1}),
        (lambda o: schedulers.LambdaLR(o, lambda epoch: [1.0, 0.5][epoch]), {1: 0.1, 2: 0.05}),
    ],
    ids=["exponential", "lambda", "sequential", "plateau", "ends"],
)
def test_step_sizes_are_found_without_a_step_of_the_scheduler(make, expected):
    optimizer = torch.optim.Adam([torch.zeros(3, requires_grad=True)], lr=0.1)
    scheduler = make(optimizer)
    before = scheduler.last_epoch, optimizer.param_groups[0]["lr"]
    assert learning_rates(scheduler, 4) == pytest.approx(expected, rel=1e-12)
    assert (scheduler.last_epoch, optimizer.param_groups[0]["lr"]) == before
    assert optimizer.param_groups[0]["params"][0].shape == (3,)


def test_the_first_difference_beyond_rounding_is_found():
    assert difference({1: 0.1, 2: 0.2, 3: 0.3}, {1: 0.1 + 1e-17, 2: 0.2 * (1 + 1e-15)}) is None
    assert difference({1: 0.1, 2: 0.2, 3: 0.3}, {1: 0.1, 2: 0.2001, 3: 0.4}) == 2
    assert difference({}, {1: 0.1}) is None
