"""pv.fit with a user's optimiser, clipping, accumulated minibatches, steps, and schedulers by step."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.training import X, same, shuffled, small_vae
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

OPTIMIZERS = {
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "SGD": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=1e-3),
    "plain SGD": functools.partial(torch.optim.SGD, lr=1e-2),
}


def by_hand(vae, make, *, epochs=10**9, steps=10**9, batch_size=16, clip_norm=None, schedule=None):
    """The loop that a user of PyTorch would write."""
    pyro.set_rng_seed(3)
    parameters = list(dict(sorted(vae.named_parameters())).values())  # a norm is summed up in their order
    optimizer, objective, taken = make(parameters), pv.ELBO(), 0
    scheduler = schedule(optimizer) if schedule else None
    for epoch in range(epochs):
        for rows in shuffled(len(X), 3, epoch + 1, batch_size):
            optimizer.zero_grad()
            (objective.differentiable_loss(vae.model, vae.guide, X[rows]) / len(rows)).backward()
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            taken += 1
            if scheduler is not None:
                scheduler.step()
            if taken == steps:
                return vae
    return vae


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_trains_as_in_a_loop_by_hand(name):
    expected = by_hand(small_vae(), OPTIMIZERS[name], epochs=3)
    vae = small_vae()
    pv.fit(vae, X, pv.ELBO(), epochs=3, batch_size=16, optimizer=OPTIMIZERS[name], seed=3)
    assert same(vae, expected)


def test_clipping_is_pytorchs():
    expected = by_hand(small_vae(), OPTIMIZERS["SGD"], epochs=3, clip_norm=0.5)
    vae, free = small_vae(), small_vae()
    pv.fit(vae, X, pv.ELBO(), epochs=3, batch_size=16, optimizer=OPTIMIZERS["SGD"], clip_norm=0.5, seed=3)
    pv.fit(free, X, pv.ELBO(), epochs=3, batch_size=16, optimizer=OPTIMIZERS["SGD"], seed=3)
    assert same(vae, expected)
    assert not same(vae, free)


@pytest.mark.parametrize("steps", [1, 4, 7, 8])
def test_a_number_of_steps(steps):
    vae, ended = small_vae(), []

    class Epochs(pv.Callback):
        def on_epoch(self, record):
            ended.append(record.epoch)

    settings = {"optimizer": OPTIMIZERS["AdamW"], "seed": 3, "callbacks": Epochs()}
    history = pv.fit(vae, X, pv.ELBO(), steps=steps, batch_size=16, **settings)
    assert len(history) == math.ceil(steps / 4)
    assert len(ended) == steps // 4
    assert history.train_bound.notna().all()
    assert same(vae, by_hand(small_vae(), OPTIMIZERS["AdamW"], steps=steps))


def test_a_scheduler_by_step():
    cycle = functools.partial(OneCycleLR, max_lr=1e-2, total_steps=8)
    vae = small_vae()
    settings = {"optimizer": OPTIMIZERS["SGD"], "lr_scheduler": cycle, "scheduler_every": "step"}
    history = pv.fit(vae, X, pv.ELBO(), epochs=2, batch_size=16, seed=3, **settings)
    assert same(vae, by_hand(small_vae(), OPTIMIZERS["SGD"], epochs=2, schedule=cycle))
    assert history.lr.iloc[-1] < history.lr.iloc[0]
    with pytest.raises(pv.PyroVAEError, match="ReduceLROnPlateau reads the validation bound"):
        plateau = functools.partial(ReduceLROnPlateau, threshold_mode="abs")
        pv.fit(vae, X, pv.ELBO(), epochs=2, validation=X, lr_scheduler=plateau, scheduler_every="step")


def test_groups_by_name():
    seen = []

    def make(named_parameters):
        seen.extend(name for name, _ in named_parameters)
        decoder = [value for name, value in named_parameters if name.startswith("likelihood")]
        encoder = [value for name, value in named_parameters if name.startswith("posterior")]
        return torch.optim.SGD([{"params": decoder, "lr": 1e-2}, {"params": encoder, "lr": 0.0}])

    vae, before = small_vae(), small_vae()
    pv.fit(vae, X, pv.ELBO(), epochs=2, batch_size=16, optimizer=make)
    assert seen == sorted(name for name, _ in vae.named_parameters())
    assert same(vae.posterior, before.posterior)
    assert not same(vae.likelihood, before.likelihood)


def test_names_go_to_an_optimizer_that_takes_them():
    vae = small_vae()
    pv.fit(vae, X, pv.ELBO(), epochs=1, optimizer=lambda named_parameters: torch.optim.AdamW(named_parameters, lr=1e-3))
    assert not same(vae, small_vae())


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_parameters_that_it_leaves_out_stay(compile):
    vae, before = small_vae(), small_vae()
    make = lambda _: torch.optim.AdamW(vae.posterior.parameters(), lr=1e-2)  # noqa: E731
    pv.fit(vae, X, pv.ELBO(), epochs=2, batch_size=25, optimizer=make, compile=compile)
    assert same(vae.likelihood, before.likelihood)
    assert not same(vae.posterior, before.posterior)


def noiseless(scaled):
    """A program without latents: its loss has no noise. With `scaled`, that of a minibatch estimates the whole."""

    def model(x):
        loc = pyro.param("loc", torch.zeros(6, dtype=torch.float64))
        full = {"size": len(X), "subsample": torch.arange(len(x))} if scaled else {"size": len(x)}
        with pyro.plate("data", **full):
            pyro.sample("x", dist.Normal(loc.tanh(), 1.0).to_event(1), obs=x)

    return model, lambda x: None


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_accumulated_minibatches_are_one_minibatch(scaled, compile):
    """An epoch of 50 rows in minibatches of 16, 16, 16 and 2, or four times 4 for each of 16."""
    found = []
    for batch_size, accumulate in ((16, 1), (4, 4)):
        pyro.clear_param_store()
        settings = {"optimizer": OPTIMIZERS["SGD"], "seed": 3, "compile": compile}
        history = pv.fit(
            *noiseless(scaled),
            X.double(),
            pv.ELBO(),
            epochs=3,
            batch_size=batch_size,
            accumulate=accumulate,
            **settings,
        )
        found.append((pyro.param("loc").detach().clone(), history.train_bound.iloc[0]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=1e-14)
    # The bounds differ from the second minibatch of an epoch on, by the steps between them.
    assert not torch.equal(found[0][0], torch.zeros(6, dtype=torch.float64))


def test_accumulated_minibatches_of_uneven_sizes_have_the_mean_over_data():
    sizes = [3, 20, 7, 20]
    batches = list(X.double().split(sizes))
    pyro.clear_param_store()
    make = functools.partial(torch.optim.SGD, lr=0.1)
    loader = DataLoader(batches, batch_size=None)
    pv.fit(*noiseless(False), loader, pv.ELBO(), epochs=1, accumulate=4, optimizer=make)
    torch.testing.assert_close(pyro.param("loc").detach(), 0.1 * X.double().mean(0), rtol=1e-12, atol=1e-15)


def test_a_shared_tensor_is_accumulated_once():
    """One tensor under two names."""
    shared = torch.nn.Linear(6, 6, bias=False).double()
    start, found = shared.weight.detach().clone(), []

    def model(x):
        pyro.module("m", shared)
        pyro.module("g", shared)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(shared(x.flip(1)), 1.0).to_event(1), obs=x)

    for batch_size, accumulate in ((50, 1), (10, 5)):
        pyro.clear_param_store()
        with torch.no_grad():
            shared.weight.copy_(start)
        options = {"batch_size": batch_size, "accumulate": accumulate, "optimizer": OPTIMIZERS["plain SGD"]}
        pv.fit(model, lambda x: None, X.double(), pv.ELBO(), epochs=1, **options)
        found.append(shared.weight.detach().clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)
    assert not torch.equal(found[0], start)


@pytest.mark.parametrize("patience", [None, 3])
def test_the_best_of_whole_epochs_is_left_and_loaded(patience, tmp_path):
    vae, other, path = small_vae(), small_vae(5), tmp_path / "run.pt"
    settings = {"batch_size": 16, "validation": X[:20], "patience": patience, "checkpoint": path}
    pv.fit(vae, X, pv.ELBO(), steps=7, **settings)
    pv.load_parameters(path, other, X)
    assert same(vae, other)


def test_what_a_checkpoint_can_not_keep_is_refused_first(tmp_path):
    import numpy as np

    make = lambda p: torch.optim.AdamW(p, lr=np.float64(1e-3))  # noqa: E731
    with pytest.raises(pv.PyroVAEError, match="expected optimizer of tensors and plain Python values"):
        pv.fit(small_vae(), X, pv.ELBO(), epochs=1, optimizer=make, checkpoint=tmp_path / "run.pt")


def test_a_later_minibatch_may_add_parameters_to_the_groups():
    pyro.clear_param_store()

    def model(x, labelled):
        loc = pyro.param("loc", torch.zeros(6))
        shift = pyro.param("shift", torch.zeros(6)) if bool(labelled.any()) else torch.zeros(6)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc + shift, 1.0).to_event(1), obs=x)

    def make(named_parameters):
        groups = {"loc": [], "shift": []}
        for name, value in named_parameters:
            groups[name].append(value)
        return torch.optim.SGD([{"params": groups["loc"], "lr": 0.0}, {"params": groups["shift"], "lr": 0.1}])

    labelled = torch.arange(50) >= 25
    loader = DataLoader(TensorDataset(X, labelled), batch_size=25)
    pv.fit(model, lambda *_: None, loader, pv.ELBO(), epochs=2, optimizer=make)
    assert pyro.param("loc").abs().max() == 0
    assert pyro.param("shift").abs().max() > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_resumes_bit_for_bit(name, tmp_path):
    settings = {"batch_size": 16, "optimizer": OPTIMIZERS[name], "clip_norm": 1.0, "accumulate": 2, "seed": 3}
    whole, parts = small_vae(), small_vae()
    pv.fit(whole, X, pv.ELBO(), epochs=4, **settings)
    pv.fit(parts, X, pv.ELBO(), epochs=2, checkpoint=tmp_path / "run.pt", **settings)
    again = small_vae(5)
    history = pv.fit(again, X, pv.ELBO(), epochs=4, checkpoint=tmp_path / "run.pt", **settings)
    assert len(history) == 4
    assert same(again, whole)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"optimizer": OPTIMIZERS["SGD"]}, "expected optimizer=.AdamW"),
        ({"optimizer": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.2)}, "weight_decay=0.1"),
        ({"optimizer": None}, "expected optimizer=.AdamW"),
        ({"clip_norm": 2.0}, "clip_norm=1.0"),
        ({"accumulate": 3}, "accumulate=2"),
        ({"precision": "bf16"}, "precision=None"),
        ({"lr_scheduler": functools.partial(ExponentialLR, gamma=0.5)}, "lr_scheduler=None"),
    ],
)
def test_a_checkpoint_of_other_settings(changed, words, tmp_path):
    settings = {"batch_size": 16, "optimizer": OPTIMIZERS["AdamW"], "clip_norm": 1.0, "accumulate": 2}
    settings |= {"checkpoint": tmp_path / "run.pt", "epochs": 1}
    pv.fit(small_vae(), X, pv.ELBO(), **settings)
    with pytest.raises(pv.PyroVAEError, match="written with other settings.*" + words.replace("(", r"\(")):
        pv.fit(small_vae(), X, pv.ELBO(), **(settings | changed))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)}, "got a SGD"),
        (
            {"optimizer": pyro.optim.Adam({"lr": 1e-3})},
            r"got one of pyro.optim \(PyroLRScheduler|got one of pyro.optim",
        ),
        ({"optimizer": "adam"}, "got 'adam'"),
        ({"optimizer": lambda p: None}, "got one that makes None"),
        ({"optimizer": lambda: None}, "expected optimizer to be a function of"),
        ({"optimizer": torch.optim.LBFGS}, "got LBFGS, which runs the loss several times"),
        ({"optimizer": lambda p: torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)}, "got 1 others"),
        ({"optimizer": torch.optim.AdamW, "lr": 1e-3}, "got lr=0.001 with one"),
        ({"lr": -1.0}, "lr to be positive"),
        ({"clip_norm": 0.0}, "clip_norm to be a positive number, got 0.0"),
        ({"clip_norm": math.nan}, "clip_norm to be a positive number, got nan"),
        ({"accumulate": 0}, "accumulate to be a positive integer"),
        ({"steps": 3}, "expected one of epochs and steps, got epochs=1 and steps=3"),
        ({"epochs": None}, "expected one of epochs and steps, got none"),
        ({"device": "cuda:99"}, "expected device to be one that this machine has"),
        ({"device": "meta"}, "its tensors have no values"),
        ({"device": "a GPU"}, "expected device to be one that this machine has"),
        ({"precision": "fp8"}, "expected precision to be 'bf16' or None, got 'fp8'"),
        ({"checkpoint_every": 5}, "expected a checkpoint with checkpoint_every"),
        ({"checkpoint_every": 0, "checkpoint": "run.pt"}, "checkpoint_every to be a positive integer"),
    ],
)
def test_refusals(settings, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae, before = small_vae(), small_vae()
    with pytest.raises(pv.PyroVAEError, match=words):
        pv.fit(vae, X, pv.ELBO(), **({"epochs": 1} | settings))
    assert same(vae, before)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bfloat16_networks_train_alike(compile):
    """A product in bfloat16 has a relative error of 2^-9, and a step of SGD moves a parameter by lr times it."""
    exact, rounded = small_vae(), small_vae()
    settings = {"epochs": 2, "batch_size": 25, "optimizer": OPTIMIZERS["plain SGD"], "seed": 3, "compile": compile}
    expected = pv.fit(exact, X, pv.ELBO(), **settings)
    history = pv.fit(rounded, X, pv.ELBO(), precision="bf16", **settings)
    assert not same(exact, rounded)
    assert all(parameter.dtype == torch.float32 for parameter in rounded.parameters())
    moved = torch.cat([(a - b).flatten() for a, b in zip(exact.parameters(), small_vae().parameters(), strict=True)])
    off = torch.cat([(a - b).flatten() for a, b in zip(exact.parameters(), rounded.parameters(), strict=True)])
    assert off.norm() < 0.05 * moved.norm()
    assert abs(history.train_bound - expected.train_bound).max() < 0.05


def test_training_goes_on_after_a_number_of_steps_in_the_middle_of_an_epoch(tmp_path):
    settings = {"batch_size": 16, "optimizer": OPTIMIZERS["AdamW"], "seed": 3, "validation": X[:10]}
    path, vae = tmp_path / "run.pt", small_vae()
    first = pv.fit(vae, X, pv.ELBO(), steps=6, checkpoint=path, **settings)
    assert len(first) == 2
    again = small_vae(5)
    same_again = pv.fit(again, X, pv.ELBO(), steps=6, checkpoint=path, **settings)
    assert same(again, vae)
    assert same_again.train_bound.equals(first.train_bound)
    more = small_vae(5)
    history = pv.fit(more, X, pv.ELBO(), epochs=3, checkpoint=path, **settings)
    whole = small_vae()
    expected = pv.fit(whole, X, pv.ELBO(), epochs=3, **settings)
    assert same(more, whole)
    assert history[["train_bound", "validation_bound"]].equals(expected[["train_bound", "validation_bound"]])
