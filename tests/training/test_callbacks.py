"""What pv.fit tells callbacks, and the callbacks that come with the package, against values of their own."""

from __future__ import annotations

import functools
import math
import sys

import pandas as pd
import pyro
import pytest
import torch
from helpers.training import X, same, small_vae
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader
from tqdm.std import tqdm

import pyro_vae as pv

COMPILED = [False, pytest.param(True, marks=pytest.mark.slow)]


class Recorder(pv.Callback):
    """Keeps what it is told; with a pair, also the KL at the parameters of the loss."""

    def __init__(self, vae=None):
        self.vae, self.calls, self.steps, self.epochs, self.kl, self.norms = vae, [], [], [], [], []

    def on_start(self, record):
        self.calls.append(("start", record.epoch, record.step))

    def before_step(self, record):
        self.calls.append(("before", record.epoch, record.step))
        gradients = [p.grad for p in record.parameters.values()]
        self.norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients)))
        if self.vae is not None:
            q, p = self.vae.posterior(record.batch[0]), self.vae.prior()
            self.kl.append(float(torch.distributions.kl_divergence(q, p).mean().detach()))

    def on_step(self, record):
        self.calls.append(("step", record.epoch, record.step))
        self.steps.append(record.numbers())

    def on_epoch(self, record):
        self.calls.append(("epoch", record.epoch, record.step))
        self.epochs.append(record.numbers())

    def on_end(self, record):
        self.calls.append(("end", record.epoch, record.step))


def test_the_order_of_calls():
    recorder = Recorder()
    pv.fit(small_vae(), X, pv.ELBO(), epochs=2, batch_size=25, callbacks=recorder)
    steps = [("before", 1, 1), ("step", 1, 1), ("before", 1, 2), ("step", 1, 2), ("epoch", 1, 2)]
    later = [(name, epoch + 1, step + 2) for name, epoch, step in steps]
    assert recorder.calls == [("start", 1, 0), *steps, *later, ("end", 2, 4)]


@pytest.mark.parametrize("compile", COMPILED)
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_parts_of_the_elbo(beta, compile):
    vae = small_vae()
    recorder = Recorder(vae)
    history = pv.fit(
        vae, X, pv.ELBO(beta=beta), epochs=2, batch_size=16, callbacks=[recorder], compile=compile, clip_norm=1e6
    )
    assert len(recorder.steps) == 8
    for numbers, kl, norm in zip(recorder.steps, recorder.kl, recorder.norms, strict=True):
        assert numbers["kl"] == pytest.approx(kl, rel=1e-3)  # a difference of two sums of 100 nats, in float32
        assert numbers["bound"] == pytest.approx(numbers["reconstruction"] - beta * numbers["kl"], rel=1e-5)
        assert numbers["gradient_norm"] == pytest.approx(norm, rel=1e-4)
        assert numbers["beta"] == beta
        assert numbers["lr"] == 1e-3
        assert numbers["examples_per_second"] > 0
    assert [e["bound"] for e in recorder.epochs] == history.train_bound.tolist()
    weights = [16, 16, 16, 2]
    mean = sum(w * n["kl"] for w, n in zip(weights, recorder.steps, strict=False)) / 50
    assert recorder.epochs[0]["kl"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("beta", [lambda step: min(1.0, step / 6), 0.0])
@pytest.mark.parametrize("compile", COMPILED)
def test_the_kl_has_no_beta(beta, compile):
    """Also in the first steps of a warm-up, where beta is zero."""
    vae = small_vae()
    recorder = Recorder(vae)
    settings = {"epochs": 2, "batch_size": 16, "callbacks": recorder, "compile": compile}
    pv.fit(vae, X, pv.ELBO(beta=beta), **settings)
    for step, (numbers, kl) in enumerate(zip(recorder.steps, recorder.kl, strict=True)):
        assert numbers["kl"] == pytest.approx(kl, rel=1e-4)
        assert numbers["beta"] == pytest.approx(beta(step) if callable(beta) else beta)


def test_the_step_size_of_an_epoch_is_that_of_its_row():
    recorder = Recorder()
    history = pv.fit(
        small_vae(),
        X,
        pv.ELBO(),
        epochs=3,
        callbacks=recorder,
        lr_scheduler=functools.partial(ExponentialLR, gamma=0.5),
    )
    assert [numbers["lr"] for numbers in recorder.epochs] == history.lr.tolist()


@pytest.mark.parametrize("freeze", [True, False])
def test_a_learned_scale_stays_where_its_part_does(freeze):
    vae = pv.mlp_vae((6,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian", scale="learned")
    seen = []

    class Look(pv.Callback):
        def on_epoch(self, record):
            seen.append(vae.likelihood.log_scale.item())

    options = {"epochs": 3, "batch_size": 25, "lr": 1e-3}
    if freeze:
        pv.fit(vae, 0.1 * X, pv.ELBO(), callbacks=[pv.callbacks.Freeze(vae.likelihood, epochs=2), Look()], **options)
        assert seen[:2] == [0.0, 0.0]
        assert seen[2] < -0.3
    else:
        options.pop("lr")
        make = lambda _: torch.optim.Adam(vae.posterior.parameters(), lr=1e-3)  # noqa: E731
        pv.fit(vae, 0.1 * X, pv.ELBO(), callbacks=Look(), optimizer=make, **options)
        assert seen == [0.0, 0.0, 0.0]


def test_validation_by_step_takes_dictionaries_and_checks_them_first():
    validate = pv.callbacks.Validate({"x": X[:20]}, every=1)
    pv.fit(small_vae(), {"x": X}, pv.ELBO(), epochs=1, batch_size=25, callbacks=validate)
    assert list(validate.bounds) == [1, 2]
    with pytest.raises(pv.CallbackError, match=r"failed in on_start.*finite"):
        pv.fit(small_vae(), X, pv.ELBO(), epochs=1, callbacks=pv.callbacks.Validate(X / 0, every=50))


def test_a_callback_that_fails_at_the_end_leaves_a_checkpoint_that_goes_on(tmp_path):
    class Fails(pv.Callback):
        def on_end(self, record):
            raise RuntimeError("no")

    settings = {"batch_size": 16, "seed": 1, "checkpoint": tmp_path / "run.pt"}
    with pytest.raises(pv.CallbackError, match="failed in on_end"):
        pv.fit(small_vae(), X, pv.ELBO(), steps=3, callbacks=Fails(), **settings)
    again, whole = small_vae(5), small_vae()
    pv.fit(again, X, pv.ELBO(), steps=8, **settings)
    pv.fit(whole, X, pv.ELBO(), steps=8, batch_size=16, seed=1)
    assert same(again, whole)


@pytest.mark.parametrize("compile", COMPILED)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_parts_of_a_bound_of_log_weights(chunk_size, compile):
    """One datum, one particle more than once: log p(x|z) and the KL are read off the same samples as the weights."""
    if compile and chunk_size:
        pytest.skip("compiled code runs all particles at once")
    vae, recorder = small_vae(), Recorder()
    pyro.set_rng_seed(3)
    with torch.no_grad():
        weights = pv.log_weights(vae, X, num_particles=6)
    options = {"epochs": 1, "batch_size": 50, "lr": 1e-12, "seed": 3, "callbacks": recorder, "compile": compile}
    pv.fit(vae, X, pv.IWAE(6, chunk_size=chunk_size), **options)
    (numbers,) = recorder.steps
    assert numbers["reconstruction"] - numbers["kl"] == pytest.approx(float(weights.mean()), rel=1e-5)
    assert numbers["bound"] == pytest.approx(float(weights.logsumexp(0).mean()) - math.log(6), rel=1e-5)
    assert 0 < numbers["kl"] < 3


def test_the_parts_of_pyros_objective_are_not_known():
    recorder = Recorder()
    pv.fit(small_vae(), X, pyro.infer.Trace_ELBO(), epochs=1, callbacks=recorder)
    assert recorder.steps[0].keys() == {"bound", "lr", "gradient_norm", "examples_per_second"}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_callbacks_leave_training_as_it_is(accumulate):
    class Draws(pv.Callback):
        def on_step(self, record):
            torch.randn(3)
            record.numbers()

        def on_epoch(self, record):
            record.validate(X[:10])

    alone, told = small_vae(), small_vae()
    settings = {"epochs": 3, "batch_size": 8, "seed": 1, "accumulate": accumulate}
    first = pv.fit(alone, X, pv.IWAE(2), **settings)
    second = pv.fit(told, X, pv.IWAE(2), callbacks=Draws(), **settings)
    assert same(alone, told)
    assert first.train_bound.equals(second.train_bound)


@pytest.mark.parametrize(("where", "epochs"), [("on_step", 2), ("on_epoch", 1)])
def test_a_callback_ends_training(where, epochs):
    class Stop(pv.Callback):
        def on_step(self, record):
            if where == "on_step" and record.step == 3:
                record.stop()

        def on_epoch(self, record):
            if where == "on_epoch":
                record.stop("enough")

    recorder = Recorder()
    history = pv.fit(small_vae(), X, pv.ELBO(), epochs=9, batch_size=25, callbacks=[Stop(), recorder])
    assert len(history) == epochs
    assert history.attrs["stopped"] == ("a callback ended it" if where == "on_step" else "enough")
    assert recorder.calls[-1][0] == "end"
    assert len(recorder.steps) == (3 if where == "on_step" else 2)


def test_why_a_callback_ended_training_is_shown(monkeypatch, capsys):
    class Stop(pv.Callback):
        def on_epoch(self, record):
            if record.epoch == 2:
                record.stop(self.reason)

    in_terminal = lambda progress, **options: tqdm(disable=not progress, **options)  # noqa: E731
    monkeypatch.setattr(sys.modules["pyro_vae.training.fit"], "progress_bar", in_terminal)
    stop, settings = Stop(), {"epochs": 9, "batch_size": 25}
    stop.reason = "the KL is low"
    history = pv.fit(small_vae(), X, pv.ELBO(), callbacks=stop, **settings)
    assert history.attrs["stopped"] == "the KL is low"
    assert "stopped after 4 steps: the KL is low\n" in capsys.readouterr().err
    pv.fit(small_vae(), X, pv.ELBO(), callbacks=stop, progress=False, **settings)
    assert "stopped" not in capsys.readouterr().err
    assert pv.fit(small_vae(), X, pv.ELBO(), epochs=1).attrs["stopped"] is None
    stop.reason = None
    with pytest.raises(pv.CallbackError, match="expected reason to be a string, got None"):
        pv.fit(small_vae(), X, pv.ELBO(), callbacks=stop, **settings)


@pytest.mark.parametrize("where", ["on_start", "before_step", "on_step", "on_epoch"])
def test_a_callback_that_raises(where, tmp_path):
    class Broken(pv.Callback):
        def fail(self, record):
            if record.step >= 3 or where == "on_start":
                raise KeyError("no such key")

    setattr(Broken, where, Broken.fail)
    path, settings = tmp_path / "run.pt", {"epochs": 3, "batch_size": 25, "seed": 1}
    with pytest.raises(pv.CallbackError, match=f"callback Broken failed in {where}, in epoch .*KeyError") as raised:
        pv.fit(small_vae(), X, pv.ELBO(), checkpoint=path, callbacks=Broken(), **settings)
    assert isinstance(raised.value.__cause__, KeyError)
    assert len(raised.value.history) == {"on_start": 0, "on_epoch": 2}.get(where, 1)
    again, whole = small_vae(5 if path.exists() else 0), small_vae()
    pv.fit(again, X, pv.ELBO(), checkpoint=path, **settings)
    pv.fit(whole, X, pv.ELBO(), **settings)
    assert same(again, whole)


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        (print, "got a builtin_function_or_method"),
        ([lambda record: None], "got a function"),
        (pv.Callback, "got the class Callback"),
        ([pv.callbacks.EMA], "got the class EMA"),
        (3, "got 3"),
        ([pv.Callback(), "log"], "got 'log'"),
    ],
)
def test_what_is_no_callback(callbacks, words):
    with pytest.raises(pv.PyroVAEError, match="expected callbacks to be pv.Callback objects, " + words):
        pv.fit(small_vae(), X, pv.ELBO(), epochs=1, callbacks=callbacks)


def test_a_misnamed_method_is_refused():
    class Lightning(pv.Callback):
        def on_epoch_end(self, record):
            pass

    with pytest.raises(pv.PyroVAEError, match="got Lightning, which defines none of them"):
        pv.fit(small_vae(), X, pv.ELBO(), epochs=1, callbacks=Lightning())


def test_the_history_has_the_epoch_that_has_ended():
    lengths = []

    class Look(pv.Callback):
        def on_epoch(self, record):
            lengths.append((record.epoch, len(record.history), record.history.train_bound.iloc[-1] == record.bound))

    pv.fit(small_vae(), X, pv.ELBO(), epochs=2, callbacks=Look())
    assert lengths == [(1, 1, True), (2, 2, True)]


def test_every():
    class Third(Recorder):
        every = 3

    recorder = Third()
    pv.fit(small_vae(), X, pv.ELBO(), epochs=2, batch_size=16, callbacks=recorder)
    assert [step for name, _, step in recorder.calls if name == "step"] == [3, 6]
    recorder.every = 0
    with pytest.raises(pv.PyroVAEError, match=r"expected Third\.every to be a positive number of steps, got 0"):
        pv.fit(small_vae(), X, pv.ELBO(), epochs=1, callbacks=recorder)


def test_csv_read_back(tmp_path):
    path, recorder = tmp_path / "log.csv", Recorder()
    settings = {"batch_size": 16, "validation": X[:10], "seed": 1, "checkpoint": tmp_path / "run.pt"}
    pv.fit(small_vae(), X, pv.ELBO(), epochs=2, callbacks=[recorder, pv.callbacks.CSV(path, every=2)], **settings)
    table = pd.read_csv(path, float_precision="round_trip")
    assert table.event.tolist() == ["step", "step", "epoch"] * 2
    assert table.step.tolist() == [2, 4, 4, 6, 8, 8]
    assert table.bound[table.event == "step"].tolist() == [n["bound"] for n in recorder.steps[1::2]]
    assert table.kl[table.event == "epoch"].tolist() == [n["kl"] for n in recorder.epochs]
    assert table.validation_bound.notna().tolist() == [False, False, True] * 2
    # A kill after the checkpoint leaves rows that come again.
    with path.open("a") as file:
        file.write(table.iloc[[-1]].assign(step=9).to_csv(index=False, header=False))
    pv.fit(small_vae(), X, pv.ELBO(), epochs=3, callbacks=pv.callbacks.CSV(path, every=2), **settings)
    assert pd.read_csv(path).step.tolist() == [2, 4, 4, 6, 8, 8, 10, 12, 12]
    with pytest.raises(pv.CallbackError, match="expected a new file for a new training"):
        pv.fit(small_vae(), X, pv.ELBO(), epochs=1, callbacks=pv.callbacks.CSV(path))
    pv.fit(small_vae(), X, pv.ELBO(), epochs=1, batch_size=50, callbacks=pv.callbacks.CSV(path, overwrite=True))
    assert pd.read_csv(path).step.tolist() == [1, 1]


def test_tensorboard_read_back(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    vae, recorder = small_vae(), Recorder()
    pictures = {"samples": lambda: vae.generate(4).reshape(4, 1, 2, 3), "figure": lambda: pyplot.figure()}
    board = pv.callbacks.TensorBoard(tmp_path, images=pictures, images_every=2)
    pv.fit(vae, X, pv.ELBO(), epochs=4, batch_size=25, callbacks=[recorder, board], validation=X[:10])
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    steps = events.Scalars("step/bound")
    assert [event.step for event in steps] == list(range(1, 9))
    assert [event.value for event in steps] == pytest.approx([n["bound"] for n in recorder.steps], rel=1e-6)
    bounds = [event.value for event in events.Scalars("epoch/validation_bound")]
    assert bounds == pytest.approx([n["validation_bound"] for n in recorder.epochs], rel=1e-6)
    assert [event.step for event in events.Images("figure")] == [4, 8]
    assert len(events.Images("samples/0") if "samples/0" in events.Tags()["images"] else events.Images("samples")) == 2
    wrong = pv.callbacks.TensorBoard(tmp_path / "other", images={"samples": lambda: vae.generate(4)})
    with pytest.raises(pv.CallbackError, match=r"expected images 'samples' of shape \(N, C, H, W\)"):
        pv.fit(vae, X, pv.ELBO(), epochs=1, callbacks=wrong)


def averaged(vae, decay):
    """The average in a loop of its own: a callback that keeps all parameters."""

    class Keep(pv.Callback):
        def on_start(self, record):
            self.all = [torch.cat([p.detach().double().flatten() for p in record.parameters.values()])]

        def on_step(self, record):
            self.all.append(torch.cat([p.detach().double().flatten() for p in record.parameters.values()]))

    keep = Keep()

    def value():
        mean = keep.all[0]
        for t, own in enumerate(keep.all[1:], 1):
            d = min(decay, (1 + t) / (10 + t))
            mean = d * mean + (1 - d) * own
        return mean

    return keep, value


def test_the_moving_average(tmp_path):
    vae, average = small_vae(), pv.callbacks.EMA(0.5)
    keep, value = averaged(vae, 0.5)
    settings = {"batch_size": 16, "seed": 1, "lr": 1e-2}
    pv.fit(vae, X, pv.ELBO(), epochs=4, callbacks=[average, keep], **settings)
    flat = lambda: torch.cat([average._parameters[n].detach().double().flatten() for n in average.averages])  # noqa: E731
    own = flat()
    with average.in_place():
        torch.testing.assert_close(flat(), value(), rtol=1e-5, atol=1e-7)
    assert torch.equal(flat(), own)
    assert not torch.allclose(own, value(), rtol=1e-5, atol=1e-7)

    again, other = pv.callbacks.EMA(0.5, at_end=True), small_vae()
    pv.fit(other, X, pv.ELBO(), epochs=2, checkpoint=tmp_path / "a", callbacks=pv.callbacks.EMA(0.5), **settings)
    pv.fit(other, X, pv.ELBO(), epochs=4, checkpoint=tmp_path / "a", callbacks=again, **settings)
    for name, mean in average.averages.items():
        assert torch.equal(again.averages[name], mean)
        assert torch.equal(again._parameters[name].detach(), mean)
    with pytest.raises(pv.PyroVAEError, match="other callbacks that have a state: expected EMA, got none"):
        pv.fit(small_vae(), X, pv.ELBO(), epochs=5, checkpoint=tmp_path / "a", **settings)


@pytest.mark.parametrize("compile", COMPILED)
@pytest.mark.parametrize("by_name", [True, False])
def test_a_frozen_part(by_name, compile):
    vae, before, after = small_vae(), small_vae(), []

    class Look(pv.Callback):
        def on_epoch(self, record):
            after.append([p.detach().clone() for p in vae.posterior.parameters()])

    part = "posterior" if by_name else vae.posterior
    decay = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.5)
    callbacks = [pv.callbacks.Freeze(part, epochs=2), Look()]
    pv.fit(vae, X, pv.ELBO(), epochs=3, batch_size=25, optimizer=decay, callbacks=callbacks, compile=compile)
    own = list(before.posterior.parameters())
    assert [all(map(torch.equal, own, each)) for each in after] == [True, True, False]
    assert not same(vae.likelihood, before.likelihood)
    with pytest.raises(pv.CallbackError, match="expected parameters of the part to freeze"):
        pv.fit(vae, X, pv.ELBO(), epochs=1, callbacks=pv.callbacks.Freeze("encoder", epochs=1))


def test_validation_by_step():
    vae, validate = small_vae(), pv.callbacks.Validate(X[:20], every=3)
    recorder = Recorder()
    pv.fit(vae, X, pv.ELBO(), epochs=3, batch_size=25, callbacks=[validate, recorder], validation=X[:20])
    assert list(validate.bounds) == [3, 6]
    assert recorder.steps[2]["validation_bound"] == validate.bounds[3]
    assert "validation_bound" not in recorder.steps[1]
    assert validate.bounds[6] == recorder.epochs[2]["validation_bound"]  # of the same parameters


def test_the_best_epochs(tmp_path):
    vae, best = small_vae(), pv.callbacks.KeepBest(tmp_path, k=2)
    recorder = Recorder()
    settings = {"batch_size": 25, "validation": X[:20], "lr": 0.05}
    pv.fit(vae, X, pv.ELBO(), epochs=6, callbacks=[best, recorder], **settings)
    bounds = {epoch: n["validation_bound"] for epoch, n in enumerate(recorder.epochs, 1)}
    expected = sorted(sorted(bounds, key=bounds.get)[-2:])
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [f"epoch-{epoch:04d}.pt" for epoch in expected]
    other = small_vae(5)
    pv.load_parameters(best.best, other, X)
    found = pv.fit(other, X, pv.ELBO(), epochs=1, lr=1e-12, validation=X[:20]).validation_bound[1]
    assert found == pytest.approx(max(bounds.values()), rel=1e-6)
    with pytest.raises(pv.CallbackError, match="expected validation data, got none"):
        pv.fit(vae, X, pv.ELBO(), epochs=1, callbacks=pv.callbacks.KeepBest(tmp_path))


@pytest.mark.parametrize("settings", [{"patience": 5}, {"lr_scheduler": functools.partial(ExponentialLR, gamma=0.9)}])
def test_files_of_the_best_epochs_serve(settings, tmp_path):
    """Each has the parameters of its own epoch; without patience, training goes on from it."""
    shared = {"batch_size": 25, "validation": X[:20], "seed": 1}
    best, kept = pv.callbacks.KeepBest(tmp_path, k=4), []

    class Keep(pv.Callback):
        def on_epoch(self, record):
            kept.append([p.detach().clone() for p in vae.parameters()])

    vae = small_vae()
    pv.fit(vae, X, pv.ELBO(), epochs=4, callbacks=[best, Keep()], checkpoint=tmp_path / "run.pt", **shared, **settings)
    assert len(best.bounds) == 4
    for epoch, parameters in enumerate(kept, 1):
        other = small_vae(5)
        pv.load_parameters(tmp_path / f"epoch-{epoch:04d}.pt", other, X)
        assert all(map(torch.equal, other.parameters(), parameters))
    if "patience" not in settings:
        again, states = small_vae(5), pv.callbacks.KeepBest(tmp_path / "more", k=4)
        pv.fit(again, X, pv.ELBO(), epochs=4, checkpoint=best._file(2), callbacks=states, **shared, **settings)
        assert same(again, vae)


def test_callbacks_over_a_loader_of_uneven_minibatches():
    recorder = Recorder()
    loader = DataLoader(list(X.split([10, 25, 15])), batch_size=None)
    history = pv.fit(small_vae(), loader, pv.ELBO(), epochs=1, accumulate=2, callbacks=recorder)
    first, second = (numbers["bound"] for numbers in recorder.steps)
    assert (35 * first + 15 * second) / 50 == pytest.approx(history.train_bound[1], rel=1e-6)
