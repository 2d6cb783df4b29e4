"""What changes while pv.fit trains: beta, the step size, and when it stops; each as a loop by hand does it."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from helpers.quick import slow_but
from helpers.training import shuffled
from torch.optim import lr_scheduler as schedulers

import pyro_vae as pv
from pyro_vae.training import checkpoint as checkpoints

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
BOUNDS = ["train_bound", "validation_bound"]


def make_vae(batch_norm=False):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    norm = [torch.nn.BatchNorm1d(8)] if batch_norm else []
    return pv.VAE(
        prior=pv.StandardNormal(2),
        likelihood=pv.Gaussian(torch.nn.Linear(2, 6), (6,)),
        posterior=pv.DiagonalNormal(torch.nn.Sequential(torch.nn.Linear(6, 8), *norm, torch.nn.Linear(8, 4)), (6,)),
    )


def fit(vae, objective=None, **options):
    settings = {"epochs": 6, "batch_size": 16, "seed": 3, "lr": 1e-2} | options
    return pv.fit(vae.model, vae.guide, X, objective or pv.ELBO(), **settings)


def check_same(first, second):
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def validation_bound(vae, objective=None):
    vae.eval()
    pyro.set_rng_seed(0)
    bound = -(objective or pv.ELBO()).loss(vae.model, vae.guide, HELD_OUT) / len(HELD_OUT)
    vae.train()
    return bound


def train_by_hand(vae, objective, epochs, end_epoch=lambda optimizer: None):
    """What fit does, in Pyro's and PyTorch's words: minibatches of 16 in a new order, Adam on the mean."""
    pyro.set_rng_seed(3)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2, fused=True)
    scheduler, step = end_epoch(optimizer), 0
    for epoch in range(epochs):
        for index in shuffled(50, 3, epoch + 1, 16):
            optimizer.zero_grad()
            (objective(step).differentiable_loss(vae.model, vae.guide, X[index]) / len(index)).backward()
            optimizer.step()
            step += 1
        if scheduler is not None:
            scheduler()


# Schedules of beta ---------------------------------------------------------------------------------------------------


def test_warm_up_is_a_line_and_then_constant():
    beta = pv.schedules.warm_up(4, start=0.5, stop=2.5)
    assert [beta(step) for step in range(7)] == [0.5, 1.0, 1.5, 2.0, 2.5, 2.5, 2.5]
    assert [pv.schedules.warm_up(1)(step) for step in range(3)] == [0.0, 1.0, 1.0]
    assert pv.schedules.warm_up(3, stop=0.1)(3) == 0.1  # and no rounding of it
    assert [pv.schedules.warm_up(2, 4.0, 1.0)(step) for step in range(3)] == [4.0, 2.5, 1.0]


def test_cycles_rise_from_zero_and_end_at_stop():
    beta = pv.schedules.cyclical(8, cycles=2, ramp=0.5, stop=2.0)
    cycle = [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    assert [beta(step) for step in range(20)] == [*cycle, *cycle, 2.0, 2.0, 2.0, 2.0]
    assert [pv.schedules.cyclical(4, ramp=1.0)(step) for step in (0, 3, 4, 15, 16)] == [0.0, 0.75, 0.0, 0.75, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: pv.schedules.warm_up(0),
            "steps to be a positive integer, got 0. For a number of epochs, multiply it by",
        ),
        (lambda: pv.schedules.warm_up(2.5), "steps to be an integer, got 2.5"),
        (
            lambda: pv.schedules.warm_up(2, start=-0.1),
            "start to be a finite number, at least 0, got -0.1. Beta is never",
        ),
        (lambda: pv.schedules.warm_up(2, stop=math.inf), "stop to be a finite number, at least 0, got inf"),
        (lambda: pv.schedules.cyclical(0), "period to be a positive integer, got 0"),
        (lambda: pv.schedules.cyclical(9, cycles=0), r"cycles to be a positive integer, got 0\.$"),
        (lambda: pv.schedules.cyclical(9, ramp=0), "ramp to be a fraction of the cycle.*got 0. Divide steps by period"),
        (lambda: pv.schedules.cyclical(9, ramp=3), "above 0 and at most 1, got 3"),
        (lambda: pv.schedules.cyclical(9, stop=math.nan), "stop to be a finite number.*got nan"),
    ],
)
def test_schedules_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("beta", [pv.schedules.warm_up(13), pv.schedules.cyclical(5, cycles=3)], ids=repr)
def test_a_fit_with_a_schedule_is_a_loop_with_its_betas(beta):
    fit(fitted := make_vae(), pv.ELBO(beta=beta))
    by_hand = make_vae()
    train_by_hand(by_hand, lambda step: pv.ELBO(beta=beta(step)), epochs=6)
    check_same(fitted, by_hand)


def test_a_run_goes_on_with_the_same_schedule_alone(tmp_path):
    fit(whole := make_vae(), pv.ELBO(beta=pv.schedules.warm_up(15)))
    path = tmp_path / "checkpoint.pt"
    for epochs in (2, 6):  # the line ends between the two
        broken = make_vae()
        fit(broken, pv.ELBO(beta=pv.schedules.warm_up(15)), epochs=epochs, checkpoint=path)
    check_same(whole, broken)
    for other in (pv.schedules.warm_up(16), pv.schedules.cyclical(15), 1.0):
        with pytest.raises(
            ValueError, match=r"other settings: expected objective=.ELBO\(beta=warm_up\(steps=15, start=0.0, stop=1.0\)"
        ):
            fit(make_vae(), pv.ELBO(beta=other), epochs=7, checkpoint=path)


# The step size -------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "exponential": functools.partial(schedulers.ExponentialLR, gamma=0.7),
    "cosine": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, T_max=6),
    "restarts": lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, T_0=2),
    "milestones": lambda optimizer: schedulers.MultiStepLR(optimizer, [2, 4]),
    "a function": lambda optimizer: schedulers.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
    "one cycle": lambda optimizer: schedulers.OneCycleLR(optimizer, 5e-2, total_steps=6),
    "cyclic": lambda optimizer: schedulers.CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=2, cycle_momentum=False),
    "in a row": lambda optimizer: schedulers.SequentialLR(
        optimizer,
        [schedulers.LinearLR(optimizer, 0.1, total_iters=2), schedulers.ExponentialLR(optimizer, 0.8)],
        [3],
    ),
    "chained": lambda optimizer: schedulers.ChainedScheduler(
        [schedulers.LinearLR(optimizer, 0.1, total_iters=2), schedulers.ExponentialLR(optimizer, 0.8)]
    ),
    "plateau": lambda optimizer: schedulers.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=0, threshold=2.0, threshold_mode="abs"
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_steps_after_each_epoch_as_in_a_loop(name):
    used = []
    history = fit(fitted := make_vae(), lr_scheduler=SCHEDULERS[name], validation=HELD_OUT)
    by_hand = make_vae()

    def end_epoch(optimizer):
        scheduler = SCHEDULERS[name](optimizer)
        used.append(optimizer.param_groups[0]["lr"])

        def end():
            state = torch.get_rng_state()
            measured = [-validation_bound(by_hand)] if name == "plateau" else []
            torch.set_rng_state(state)
            scheduler.step(*measured)
            used.append(optimizer.param_groups[0]["lr"])

        return end

    train_by_hand(by_hand, lambda step: pv.ELBO(), 6, end_epoch)
    check_same(fitted, by_hand)
    assert history.lr.tolist() == used[:6]
    assert len(set(used[:6])) > 1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_with_a_scheduler_goes_on_bit_for_bit(tmp_path, name):
    options = {"validation": HELD_OUT, "lr_scheduler": SCHEDULERS[name]}
    history = fit(whole := make_vae(), **options)
    for epochs in (1, 4, 6):
        resumed = fit(broken := make_vae(), epochs=epochs, checkpoint=tmp_path / "checkpoint.pt", **options)
    check_same(whole, broken)
    assert history[[*BOUNDS, "lr"]].equals(resumed[[*BOUNDS, "lr"]])


def test_a_plateau_is_not_looked_for_while_beta_moves():
    """The bound falls as beta rises, which is no reason for smaller steps."""
    plateau = functools.partial(schedulers.ReduceLROnPlateau, factor=0.5, patience=0, threshold_mode="abs")
    beta = pv.schedules.warm_up(24, stop=20.0)  # six epochs of four steps
    history = fit(make_vae(), pv.ELBO(beta=beta), validation=HELD_OUT, lr_scheduler=plateau, lr=1e-5, epochs=8)
    assert history.validation_bound.iloc[:6].is_monotonic_decreasing
    assert set(history.lr) == {1e-5}


def test_another_scheduler_is_no_way_to_go_on(tmp_path):
    path = tmp_path / "checkpoint.pt"
    fit(make_vae(), epochs=1, checkpoint=path, lr_scheduler=functools.partial(schedulers.ExponentialLR, gamma=0.7))
    message = r"other settings: expected lr_scheduler='ExponentialLR\(gamma=0.7.*', got lr_scheduler="
    for other in (None, SCHEDULERS["cosine"], functools.partial(schedulers.ExponentialLR, gamma=0.6)):
        with pytest.raises(ValueError, match=message):
            fit(make_vae(), checkpoint=path, lr_scheduler=other)


def test_checkpoints_of_before_there_were_schedulers_go_on(tmp_path):
    path = tmp_path / "checkpoint.pt"
    whole = fit(make_vae())
    fit(make_vae(), epochs=2, checkpoint=path)
    state = checkpoints.load(path)
    del state["settings"]["lr_scheduler"], state["settings"]["compile"]
    for later in ("scheduler", "best", "steps", "fingerprint"):
        del state[later]
    torch.save(state, path)
    with pytest.warns(UserWarning, match="written by an earlier version"):
        assert fit(make_vae(), checkpoint=path).train_bound.equals(whole.train_bound)


@pytest.mark.parametrize("name", slow_but(["plateau"], ["exponential", "plateau"]))
def test_compiled_steps_follow_the_scheduler(name, monkeypatch):
    monkeypatch.setattr("pyro_vae.compiled.function._inductor", lambda graph, inputs: graph)
    histories = []
    for compile in (False, True):
        vae = make_vae()
        objective = pv.ELBO(beta=pv.schedules.warm_up(6))
        options = {"lr_scheduler": SCHEDULERS[name], "validation": HELD_OUT, "patience": 5, "compile": compile}
        histories.append(fit(vae, objective, **options))
    assert histories[0].lr.equals(histories[1].lr)
    np.testing.assert_allclose(*[history[BOUNDS] for history in histories], rtol=1e-5)


# When to stop --------------------------------------------------------------------------------------------------------

TOO_FAST = {"lr": 0.1, "epochs": 40, "validation": HELD_OUT}  # the validation bound soon goes up and down


@pytest.mark.parametrize("batch_norm", [False, True])
def test_patience_ends_training_and_gives_back_the_best_epoch(batch_norm):
    history = fit(vae := make_vae(batch_norm), patience=3, **TOO_FAST)
    endless = fit(make_vae(batch_norm), **TOO_FAST)
    best = history.validation_bound.idxmax()
    assert best > 1
    assert len(history) == best + 3 < 40
    assert endless.iloc[: len(history)][BOUNDS].equals(history[BOUNDS])
    fit(until_best := make_vae(batch_norm), **TOO_FAST | {"epochs": int(best)})
    check_same(vae, until_best)
    assert validation_bound(vae) == history.validation_bound.max()


def test_the_best_epoch_comes_back_where_all_epochs_ran():
    history = fit(vae := make_vae(), patience=39, **TOO_FAST)
    assert len(history) == 40 > history.validation_bound.idxmax()
    assert validation_bound(vae) == history.validation_bound.max()


@pytest.mark.parametrize(
    "scheduler", slow_but([SCHEDULERS["plateau"]], [None, SCHEDULERS["exponential"], SCHEDULERS["plateau"]])
)
def test_an_early_stop_is_the_same_broken_and_unbroken(tmp_path, scheduler):
    options = TOO_FAST | {"patience": 4, "lr_scheduler": scheduler}
    history = fit(whole := make_vae(True), **options)
    best, path = int(history.validation_bound.idxmax()), tmp_path / "checkpoint.pt"
    for epochs in (best - 1, best + 2, 40, 40):  # before the best epoch, after it, to the end, and beyond
        resumed = fit(vae := make_vae(True), checkpoint=path, **options | {"epochs": epochs})
    assert history[BOUNDS].equals(resumed[BOUNDS])
    check_same(whole, vae)
    before = path.read_bytes()
    assert fit(make_vae(True), checkpoint=path, **options).equals(resumed)  # nothing is left to train
    assert path.read_bytes() == before
    loaded = make_vae(True)
    pv.load_parameters(path, loaded.model, loaded.guide, X)
    check_same(whole, loaded)


def test_a_larger_patience_goes_on_where_it_would_have_come_to(tmp_path):
    path = tmp_path / "checkpoint.pt"
    whole = fit(vae := make_vae(), patience=6, **TOO_FAST)
    fit(make_vae(), patience=2, checkpoint=path, **TOO_FAST)
    resumed = fit(again := make_vae(), patience=6, checkpoint=path, **TOO_FAST)
    assert whole[BOUNDS].equals(resumed[BOUNDS])
    check_same(vae, again)


@pytest.mark.parametrize(("first", "then"), [(None, 3), (3, None)])
def test_patience_is_there_from_the_first_epoch_or_never(tmp_path, first, then):
    path = tmp_path / "checkpoint.pt"
    options = {"validation": HELD_OUT, "checkpoint": path}
    fit(make_vae(), epochs=1, patience=first, **options)
    message = rf"was written {'without' if first is None else 'with'} patience: expected .*, got patience={then}"
    with pytest.raises(ValueError, match=message):
        fit(make_vae(), patience=then, **options)


def test_patience_waits_until_beta_stands_still():
    """The bound falls as beta rises: its maximum is of the first epoch, which has learned nothing."""
    beta = pv.schedules.warm_up(20, stop=5.0)  # five epochs of four steps
    history = fit(vae := make_vae(), pv.ELBO(beta=beta), patience=2, **TOO_FAST | {"lr": 1e-4, "epochs": 9})
    assert history.validation_bound.idxmax() == 1
    assert len(history) >= 7
    best = history.validation_bound.loc[5:].max()
    assert validation_bound(vae, pv.ELBO(beta=5.0)) == best


def test_a_validation_bound_that_is_no_number_is_never_the_best(monkeypatch):
    bounds = iter([math.nan, -9.0, -7.0, math.nan, -7.0, -8.0])
    monkeypatch.setattr("pyro_vae.training.loop.Loop._validate", lambda self: next(bounds))
    assert len(fit(make_vae(), patience=3, epochs=9, validation=HELD_OUT)) == 6


def test_ctrl_c_leaves_what_was_learned_and_keeps_the_best_in_the_checkpoint(tmp_path):
    class Interrupting:
        uses = 0

        def __len__(self):
            return len(X)

        def __getitem__(self, index):
            self.uses += 1
            if self.uses == 4 * 10 + 2:  # four steps an epoch, and one look before the first
                raise KeyboardInterrupt
            return X[index]

    path, vae = tmp_path / "checkpoint.pt", make_vae()
    options = TOO_FAST | {"batch_size": 16, "seed": 3, "patience": 30, "checkpoint": path}
    with pytest.warns(
        UserWarning, match=r"are those of the last step, not those of the best epoch, \d; the ch.* holds epoch 10"
    ):
        history = pv.fit(vae.model, vae.guide, Interrupting(), pv.ELBO(), **options)
    assert validation_bound(vae) == history.validation_bound.iloc[-1] < history.validation_bound.max()
    pv.load_parameters(path, vae.model, vae.guide, X)
    assert validation_bound(vae) == history.validation_bound.max()


# What is refused before any work -------------------------------------------------------------------------------------

ELSEWHERE = schedulers.ConstantLR(torch.optim.SGD([torch.zeros(1)], lr=1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"patience": 0, "validation": HELD_OUT},
            "patience to be a positive integer, a number of epochs, got 0. None never stops",
        ),
        ({"patience": 1.5, "validation": HELD_OUT}, "patience to be an integer or None, got 1.5"),
        ({"patience": 3}, "expected validation data with it, got none. Pass validation=..., or drop patience"),
        ({"patience": 3, "validation": HELD_OUT[:0]}, "expected validation data with it, got none"),
        (
            {"lr_scheduler": SCHEDULERS["plateau"]},
            "ReduceLROnPlateau waits.*expected validation data with it, got none",
        ),
        (
            {
                "lr_scheduler": functools.partial(schedulers.ReduceLROnPlateau, mode="max", threshold_mode="abs"),
                "validation": HELD_OUT,
            },
            "expected mode='min', got 'max'. Drop the mode",
        ),
        ({"lr_scheduler": "cosine"}, "expected lr_scheduler to be a function that makes.*, got str. Pass, say, lambda"),
        ({"lr_scheduler": ELSEWHERE}, "got ConstantLR of another optimizer. Pass, say, lambda optimizer"),
        ({"lr_scheduler": lambda optimizer: ELSEWHERE}, "got one that makes ConstantLR of another optimizer"),
        ({"lr_scheduler": lambda optimizer: 0.1}, "got one that makes float. Pass"),
        (
            {"lr_scheduler": lambda o: schedulers.ExponentialLR(o, np.float64(0.9)), "checkpoint": "checkpoint.pt"},
            r"expected lr_scheduler of tensors and plain Python values, got .*Pass float\(...\)",
        ),
    ],
)
def test_what_fit_refuses(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae = make_vae()
    before = [parameter.detach().clone() for parameter in vae.parameters()]
    with pytest.raises(ValueError, match=message):
        fit(vae, **options)
    assert all(torch.equal(b, p) for b, p in zip(before, vae.parameters(), strict=True))
    assert list(Path.cwd().iterdir()) == []


def test_a_step_size_of_numpy_goes_into_a_checkpoint_that_can_be_read(tmp_path):
    for epochs in (1, 2):
        history = fit(make_vae(), lr=np.float64(1e-2), epochs=epochs, checkpoint=tmp_path / "checkpoint.pt")
    assert len(history) == 2


def test_patience_begins_anew_while_beta_cycles_within_an_epoch():
    vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(4,), likelihood="gaussian")
    x = torch.randn(20, 3)
    cyclical = pv.ELBO(beta=pv.schedules.cyclical(period=4, cycles=5))  # both ends of each epoch are at beta = 0
    history = pv.fit(vae.model, vae.guide, x, cyclical, epochs=5, batch_size=5, lr=1e-9, validation=x, patience=1)
    assert len(history) == 5


def test_a_plateau_by_ratio_is_refused():
    vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(4,), likelihood="gaussian")
    x = torch.randn(20, 3)
    with pytest.raises(ValueError, match=r"expected threshold_mode='abs', got 'rel'"):
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
        pv.fit(vae.model, vae.guide, x, pv.ELBO(), epochs=5, validation=x, lr_scheduler=plateau)
