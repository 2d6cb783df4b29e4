"""pv.fit: it learns, repeats, resumes bit for bit, and stops with a message before anything is lost."""

from __future__ import annotations

import functools
import math
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import LinearGaussian
from helpers.training import X, same, small_vae
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.engine.minibatches import Minibatches
from pyro_vae.training import checkpoint as checkpoints


def linear_program():
    """A linear-Gaussian program with parameters, started away from the optimum, and data from a known one."""
    truth = LinearGaussian(3, 2, 400)
    start = {"W": torch.randn(3, 2), "b": torch.zeros(3), "A": torch.zeros(2, 3), "c": torch.zeros(2)}

    def model(x):
        W, b = pyro.param("W", start["W"]), pyro.param("b", start["b"])
        sigma = pyro.param("sigma", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.T + b, sigma).to_event(1), obs=x)

    def guide(x):
        A, c = pyro.param("A", start["A"]), pyro.param("c", start["c"])
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ A.T + c, scale).to_event(1))

    return model, guide, truth


def test_it_reaches_the_maximum_of_the_likelihood():
    """Probabilistic PCA's maximum is known; a diagonal guide reaches it, since some rotation of z has one."""
    model, guide, truth = linear_program()
    x = truth.x.float()
    history = pv.fit(model, guide, x, pv.ELBO(), epochs=150, batch_size=50, lr=2e-2)
    pv.fit(model, guide, x, pv.ELBO(10), epochs=30, batch_size=200, lr=2e-3)
    centred = truth.x - truth.x.mean(0)
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred / len(x)).flip(0)
    sigma_squared = eigenvalues[2:].mean()
    log_determinant = eigenvalues[:2].log().sum() + sigma_squared.log()
    best = -0.5 * (3 * math.log(2 * math.pi) + log_determinant + 3)
    bound = pv.IWAE(100).bound(model, guide, x).mean()
    assert best - 0.03 < bound < best + 0.005
    assert history.train_bound.iloc[-1] > history.train_bound.iloc[0]
    torch.testing.assert_close(pyro.param("sigma").double() ** 2, sigma_squared, rtol=0.15, atol=0)


def test_history_states_mean_bounds_per_datum():
    vae = small_vae()
    before = torch.stack([pv.ELBO(50).bound(vae.model, vae.guide, X).mean() for _ in range(20)]).mean().item()
    history = pv.fit(vae.model, vae.guide, X, pv.ELBO(), epochs=3, batch_size=16, lr=1e-9, validation=X[:20])
    assert list(history.index) == [1, 2, 3]
    assert history.index.name == "epoch"
    assert history.train_bound.mean() == pytest.approx(before, abs=0.6)
    assert (history.seconds > 0).all()
    held_out = torch.stack([pv.ELBO(50).bound(vae.model, vae.guide, X[:20]).mean() for _ in range(20)]).mean()
    assert history.validation_bound.mean() == pytest.approx(held_out.item(), abs=1.0)
    # the same noise for each epoch: hardly anything moves at this learning rate
    assert history.validation_bound.std() < 1e-4 < history.train_bound.std()


def test_two_runs_agree_bit_for_bit_and_validation_does_not_touch_them():
    vaes = []
    for seed, validation in ((3, None), (3, X[:7]), (4, None)):
        vae = small_vae()
        pv.fit(vae.model, vae.guide, X, pv.IWAE(3), epochs=3, batch_size=16, seed=seed, validation=validation)
        vaes.append(vae)
    assert same(vaes[0], vaes[1])
    assert not same(vaes[0], vaes[2])


@pytest.mark.parametrize(
    ("data", "batch_size"),
    [(X, 16), ((X,), 16), ([X], 16), (DataLoader(X, 16, shuffle=True), None), (DataLoader(TensorDataset(X), 16), None)],
    ids=["tensor", "tuple", "list", "loader", "loader of tuples"],
)
def test_each_kind_of_data_is_seen_whole_once_an_epoch(data, batch_size):
    vae, seen = small_vae(), []

    def model(x):
        seen.append(x)
        vae.model(x)

    pv.fit(model, vae.guide, data, pv.ELBO(), epochs=2, batch_size=batch_size)
    epochs = torch.cat(seen[-8:]).split(50)  # before them come the looks at the first minibatch
    for epoch in epochs:
        assert [len(x) for x in seen[-8:]] == [16, 16, 16, 2] * 2
        torch.testing.assert_close(epoch.sort(0).values, X.sort(0).values, rtol=0, atol=0)


def test_programs_of_two_arguments():
    seen = set()

    def model(x, y):
        seen.add((x.shape[1:], y.shape[1:]))
        w = pyro.param("w", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(w * x[:, 0] + z, 1.0), obs=y)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(())), 1.0))

    y = 2 * X[:, 0]
    pv.fit(model, guide, (X, y), pv.ELBO(), epochs=100, batch_size=25, lr=5e-2)
    assert seen == {((6,), ())}
    assert pyro.param("w").item() == pytest.approx(2.0, abs=0.3)


def test_a_split_drawn_anew_for_each_minibatch():
    digits = pv.data.load("digits", binarize="dynamic")
    vae = pv.mlp_vae(digits.event_shape, latent_dim=2, hidden_dims=(20,))
    history = pv.fit(
        vae.model, vae.guide, digits.train, pv.ELBO(), epochs=3, batch_size=64, lr=3e-3, validation=digits.validation
    )
    assert history.validation_bound.is_monotonic_increasing


@pytest.mark.parametrize("objective", [pyro.infer.Trace_ELBO(), pyro.infer.TraceMeanField_ELBO()])
def test_pyros_objectives_train_too(objective):
    vae = small_vae()
    before = [p.detach().clone() for p in vae.parameters()]
    pv.fit(vae.model, vae.guide, X, objective, epochs=1)
    assert all((b != p).any() for b, p in zip(before, vae.parameters(), strict=True))


def fit_with_checkpoint(path, epochs, data=X, **kwargs):
    vae = small_vae()
    settings = {"batch_size": 16, "seed": 5, "checkpoint": path, "validation": X[:9]} | kwargs
    if isinstance(data, DataLoader):
        del settings["batch_size"]
    return vae, pv.fit(vae.model, vae.guide, data, pv.ELBO(), epochs=epochs, **settings)


@pytest.mark.parametrize("kind", ["tensor", "loader", "loader with its own generator"])
def test_going_on_from_a_checkpoint_ends_where_an_unbroken_run_ends(tmp_path, kind):
    def data():
        if kind == "tensor":
            return X
        generator = torch.Generator().manual_seed(8) if "own" in kind else None
        return DataLoader(X, batch_size=16, shuffle=True, generator=generator)

    unbroken, history = fit_with_checkpoint(tmp_path / "unbroken.pt", 5, data())
    fit_with_checkpoint(tmp_path / "broken.pt", 2, data())
    torch.rand(3)  # what happens between sessions doesn't matter
    resumed, resumed_history = fit_with_checkpoint(tmp_path / "broken.pt", 5, data())
    assert same(unbroken, resumed)
    assert history[["train_bound", "validation_bound"]].equals(resumed_history[["train_bound", "validation_bound"]])
    again, _ = fit_with_checkpoint(tmp_path / "broken.pt", 5, data())
    assert same(unbroken, again)


def batch_norm_vae():
    pyro.set_rng_seed(0)
    layers = [torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 4)]
    return pv.VAE(
        prior=pv.StandardNormal(2),
        likelihood=pv.Gaussian(torch.nn.Linear(2, 6), (6,)),
        posterior=pv.DiagonalNormal(torch.nn.Sequential(*layers), (6,)),
    )


def test_batch_norm_statistics_are_kept_and_validation_leaves_them(tmp_path):
    settings = {"objective": pv.ELBO(), "batch_size": 25, "seed": 1}
    unbroken, broken, validated = (batch_norm_vae() for _ in range(3))
    pv.fit(unbroken.model, unbroken.guide, X, epochs=4, **settings)
    for epochs in (2, 4):
        broken = batch_norm_vae()
        pv.fit(broken.model, broken.guide, X, epochs=epochs, checkpoint=tmp_path / "checkpoint.pt", **settings)
    history = pv.fit(validated.model, validated.guide, X, epochs=4, validation=X[:9], **settings)
    for other in (broken, validated):
        for name, value in unbroken.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    assert all(part.training for part in validated.modules())
    # the last epoch's validation is that of the final parameters, without dropout
    validated.eval()
    pyro.set_rng_seed(0)
    bound = pv.ELBO().bound(validated.model, validated.guide, X[:9]).mean()
    assert history.validation_bound.iloc[-1] == pytest.approx(bound.item(), rel=1e-5)


def test_a_checkpoint_loads_without_running_code_and_gives_back_the_parameters(tmp_path):
    path = tmp_path / "run" / "checkpoint.pt"
    vae, _ = fit_with_checkpoint(path, 2)
    state = torch.load(path, weights_only=True)
    assert state["format"].startswith("pyro_vae")
    fresh = small_vae(seed=9)
    pv.load_parameters(path, fresh.model, fresh.guide, X[:2])
    assert same(vae, fresh)
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]


KILLED = ["first epoch", "third epoch", "validation", "half-written", "before the move", "after the move"]


@pytest.mark.slow
def test_a_killed_run_started_again_ends_bit_for_bit_where_an_unbroken_run_ends(tmp_path):
    folder = tmp_path
    command = [sys.executable, Path(__file__).parents[1] / "helpers" / "killed_runs.py", folder, *KILLED]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    lines = [line.split("|") for line in finished.stdout.splitlines()]
    unbroken = torch.load(folder / "nowhere.pt")
    assert len(unbroken["bounds"]) == 4
    for place in KILLED:
        checkpoint = [] if place == "first epoch" else [f"{place}.ckpt"]
        assert [place, place, str(-signal.SIGKILL), *checkpoint] in lines
        assert [place, "nowhere", "0", f"{place}.ckpt", f"{place}.pt"] in lines
        resumed = torch.load(folder / f"{place}.pt")
        assert unbroken["bounds"] == resumed["bounds"], place
        for name, value in unbroken["parameters"].items():
            assert torch.equal(value, resumed["parameters"][name]), (place, name)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]  # neither locks nor half a file


def test_ctrl_c_keeps_what_was_learned(tmp_path):
    path = tmp_path / "checkpoint.pt"

    class Interrupting:
        def __init__(self):
            self.uses = 0

        def __len__(self):
            return len(X)

        def __getitem__(self, index):
            self.uses += 1
            if self.uses == 11:  # four steps an epoch, and one look before the first
                raise KeyboardInterrupt
            return X[index]

    vae, start = small_vae(), small_vae()
    with pytest.warns(UserWarning, match=r"Ctrl-C in epoch 3, step 1: .*keep.*holds epoch 2"):
        history = pv.fit(
            vae.model, vae.guide, Interrupting(), pv.ELBO(), epochs=9, batch_size=16, seed=5, checkpoint=path
        )
    assert len(history) == 2
    assert not same(vae, start)
    assert len(checkpoints.load(path)["history"]) == 2


def test_a_loss_that_is_not_finite_stops_and_leaves_the_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    fit_with_checkpoint(path, 2)
    before = path.read_bytes()

    class TurningBad:
        uses = 0

        def __len__(self):
            return len(X)

        def __getitem__(self, index):
            TurningBad.uses += 1
            return X[index] * (math.nan if TurningBad.uses == 7 else 1.0)

    message = r"the loss is nan in epoch 4, step 2.*learning rate.*as it was after epoch 3"
    with pytest.raises(FloatingPointError, match=message):
        fit_with_checkpoint(path, 5, TurningBad())
    assert path.read_bytes() != before
    assert len(checkpoints.load(path)["history"]) == 3
    assert all(torch.isfinite(value).all() for value in checkpoints.load(path)["parameters"].values())


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    """A gradient can be NaN where the loss is finite: the square root at 0."""

    def model(x):
        w = pyro.param("w", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(w.abs().sqrt() * 0, 1.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(FloatingPointError, match=r"parameter 'w' is not finite in epoch 1, step 1"):
        pv.fit(model, guide, X, pv.ELBO(), epochs=1, checkpoint=tmp_path / "checkpoint.pt")
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_of_something_else_are_refused_untouched(tmp_path):
    path = tmp_path / "checkpoint.pt"
    fit_with_checkpoint(path, 2)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"other settings: expected lr=0.001, got lr=0.01. Pass the same"):
        fit_with_checkpoint(path, 3, lr=1e-2)
    with pytest.raises(ValueError, match=r"other settings: expected batch_size=16, got batch_size=8"):
        fit_with_checkpoint(path, 3, batch_size=8)
    with pytest.raises(ValueError, match=r"holds 2 epochs: expected at least as many in all, got epochs=1"):
        fit_with_checkpoint(path, 1)
    pyro.clear_param_store()
    other = pv.mlp_vae((6,), latent_dim=3, hidden_dims=(8,), likelihood="gaussian")
    with pytest.raises(ValueError, match=r"of another program: expected parameter 'likelihood"):
        pv.load_parameters(path, other.model, other.guide, X)
    assert path.read_bytes() == before
    for content in (before[: len(before) // 2], b"", b"not a checkpoint", b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"can't be read as a checkpoint: it is truncated"):
            fit_with_checkpoint(path, 3)
        assert path.read_bytes() == content
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"expected .* to be a 'pyro_vae checkpoint 1', got None"):
        fit_with_checkpoint(path, 3)
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint at .*Train first"):
        pv.load_parameters(tmp_path / "none.pt", other.model, other.guide, X)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"epochs": 0}, "epochs to be a positive integer"),
        ({"lr": 0.0}, "lr to be positive"),
        ({"lr": math.nan}, "lr to be positive"),
        ({"batch_size": 0}, "batch_size to be a positive integer, got 0"),
        ({"epochs": 2.5}, "epochs to be a positive integer"),
        ({"data": TensorDataset(X)}, "got a TensorDataset. Pass a DataLoader"),
        ({"data": X.numpy().astype("float64")}, "expected x of torch.float32, the dtype of the networks"),
        ({"data": DataLoader([{"y": X[0]}, {"y": X[1]}])}, "expected minibatches with keys that the model takes"),
        ({"data": X[:0]}, "expected data to train on, got none"),
        ({"data": (X, X[:3])}, r"tensors of one length, got lengths \[50, 3\]"),
        ({"data": torch.full((5, 6), math.nan)}, "expected data to be finite"),
        ({"validation": torch.full((5, 6), math.inf)}, "expected validation to be finite"),
        (
            {"data": 3},
            "expected data to be a dense tensor of one row or more, a split of pv.data, .*, got 3",
        ),
        ({"data": DataLoader(X), "batch_size": 5}, "expected no batch_size with a DataLoader"),
        ({"data": X[:, :5]}, r"expected x of shape \(N, 6\)"),
    ],
)
def test_bad_arguments(kwargs, message):
    vae = small_vae()
    arguments = {"data": X, "objective": pv.ELBO(), "epochs": 1} | kwargs
    before = [p.detach().clone() for p in vae.parameters()]
    with pytest.raises(ValueError, match=message):
        pv.fit(vae.model, vae.guide, **arguments)
    assert all(torch.equal(b, p) for b, p in zip(before, vae.parameters(), strict=True))


def test_a_program_without_parameters():
    program = LinearGaussian(6, 2, 5)
    with pytest.raises(ValueError, match="expected a program with parameters to train, got none"):
        pv.fit(program.model, program.guide, program.x, pv.ELBO(), epochs=1)


def test_trying_the_program_takes_no_random_numbers_from_the_training():
    generator = torch.Generator().manual_seed(1)
    digits = pv.data.load("digits", binarize="dynamic")
    for data in (digits.train, DataLoader(X, shuffle=True), DataLoader(X, shuffle=True, generator=generator)):
        batches = Minibatches(data, None, "data")
        states = torch.get_rng_state(), generator.get_state()
        batches.example()
        assert torch.equal(torch.get_rng_state(), states[0])
        assert torch.equal(generator.get_state(), states[1])


def test_what_would_count_once_for_each_minibatch_is_refused():
    """A global latent's KL, or a factor: with all data in one minibatch, or a plate scaled to them, it is right."""

    def model(x, size=None):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("data", size or len(x), subsample_size=len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x, size=None):
        loc = pyro.param("loc", torch.zeros(()))
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        pyro.sample("mean", dist.Normal(loc, scale))

    x = 3 + torch.randn(40)
    with pytest.raises(
        ValueError, match=r"minibatches add up.*site 'mean' outside the data's plate of size 10.*batch_size=N"
    ):
        pv.fit(model, guide, x, pv.ELBO(), epochs=1, batch_size=10)
    scaled = (lambda x: model(x, 40)), (lambda x: guide(x, 40))
    pv.fit(*scaled, x, pv.ELBO(10), epochs=200, batch_size=10, lr=3e-2)
    exact = torch.sum(x) / (40 + 0.01)
    assert pyro.param("loc").item() == pytest.approx(exact.item(), abs=0.1)
    assert pyro.param("scale").item() == pytest.approx(40**-0.5, rel=0.3)
    pyro.clear_param_store()
    pv.fit(model, guide, x, pv.ELBO(10), epochs=300, batch_size=40, lr=3e-2)
    assert pyro.param("loc").item() == pytest.approx(exact.item(), abs=0.1)


@pytest.mark.parametrize("objective", [pv.ELBO, "elbo", pyro.infer.RenyiELBO()])
def test_what_is_no_objective(objective):
    vae = small_vae()
    with pytest.raises(ValueError, match=r"expected an objective with a differentiable loss, such as pv.ELBO\(\)"):
        pv.fit(vae.model, vae.guide, X, objective, epochs=1)


def test_pyros_objectives_resume_and_other_settings_do_not(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for epochs in (1, 2):  # a new object each time, as in a new session
        vae = small_vae()
        pv.fit(vae.model, vae.guide, X, pyro.infer.Trace_ELBO(), epochs=epochs, checkpoint=path, seed=1)
    for other in (pyro.infer.Trace_ELBO(num_particles=2), pv.ELBO(), pv.ELBO(1, "monte_carlo")):
        with pytest.raises(ValueError, match=r"objective='Trace_ELBO\(num_particles=1\)', got objective="):
            pv.fit(vae.model, vae.guide, X, other, epochs=3, checkpoint=path, seed=1)


def test_two_plates_of_the_data_add_up():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z * pyro.param("w", torch.ones(())), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    assert len(pv.fit(model, guide, X[:, 0], pv.ELBO(), epochs=2, batch_size=10)) == 2


def test_pyros_enumerating_objective_is_validated():
    """Its differentiable loss refuses to run without gradients; its loss does not."""

    def model(x):
        logit = pyro.param("logit", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=logit), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pass

    objective = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
    history = pv.fit(model, guide, X[:, 0], objective, epochs=2, batch_size=10, validation=X[:9, 0])
    assert history.validation_bound.notna().all()


def test_looking_at_a_program_leaves_batch_norm_alone():
    vae = batch_norm_vae()
    pv.fit(vae.model, vae.guide, X, pv.IWAE(3), epochs=1, batch_size=50)
    statistics = vae.posterior.encoder[1]
    assert statistics.num_batches_tracked == 1
    before = statistics.running_mean.clone()
    tables = [pv.compare(vae.model, vae.guide, X, pv.IWAE(3), repeats=2, seed=0).iloc[:, :5] for _ in range(2)]
    assert torch.equal(statistics.running_mean, before)
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("objective", [pv.ELBO(), pv.IWAE(4, "dreg")], ids=repr)
def test_the_model_runs_a_few_times_up_to_the_first_step(objective):
    """Once to find its parameters and plates, and once for the first loss, which is validated.

    Where each datum needs a log-weight, two more runs, with other latents in half of the data, show that the data are
    apart, and one of both together that particles are.
    """
    program, runs = LinearGaussian(2, 1, 8), 0
    weights = torch.nn.Parameter(program.W)

    def model(x):
        nonlocal runs
        runs += 1
        program.W = pyro.param("W", weights)
        program.model(x)

    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    hook = register_optimizer_step_pre_hook(stop)
    try:
        with pytest.raises(Stopped):
            pv.fit(model, program.guide, program.x, objective, epochs=1, progress=False)
    finally:
        hook.remove()
    assert runs == (2 if objective.num_particles == 1 else 5)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("given", ["tensor", "loader", "validation"])
def test_data_outside_the_support_are_refused(given, compile, without_inductor, tmp_path):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = z @ pyro.param("W", torch.ones(2, 3))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ pyro.param("A", torch.zeros(3, 2)), 1.0).to_event(1))

    good = (torch.rand(20, 3) > 0.5).float()
    bad = good.clone()
    bad[17, 1] = 0.5  # in the second minibatch: the first one is validated by Pyro
    data = {"tensor": bad, "loader": DataLoader(TensorDataset(bad), batch_size=10), "validation": good}[given]
    options = {"batch_size": None if given == "loader" else 10, "validation": bad if given == "validation" else None}
    path = tmp_path / "state.pt"
    with pytest.raises(pv.PyroVAEError, match=r"data in the support of model site 'x'.*got 1 of .* row \d+ has"):
        pv.fit(model, guide, data, pv.ELBO(), epochs=1, compile=compile, checkpoint=path, **options)
    assert not path.exists()
    if given != "loader":
        assert torch.equal(pyro.param("W"), torch.ones(2, 3))  # no step was taken


@pytest.mark.parametrize("given", ["tensor", "loader"])
def test_a_support_that_depends_on_the_minibatch_is_that_of_each(given):
    """As in Pyro's ProdLDA, whose Multinomial takes the largest total of the minibatch."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Multinomial(int(x.sum(-1).max()), logits=z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ pyro.param("A", torch.zeros(3, 3)), 1.0).to_event(1))

    counts = torch.arange(30.0).reshape(10, 3)
    for bad in (counts, counts.index_fill(0, torch.tensor([8]), -1.0)):
        data = DataLoader(TensorDataset(bad), batch_size=4) if given == "loader" else bad
        with nullcontext() if bad is counts else pytest.raises(pv.PyroVAEError, match=r"Multinomial\(\), got 1 of"):
            pv.fit(model, guide, data, pv.ELBO(), epochs=2, batch_size=None if given == "loader" else 4)


def test_rows_outside_the_support_beside_strings():
    """In a minibatch of more rows than the first, whose names come as a list of strings."""

    class Named(torch.utils.data.Dataset):
        def __getitem__(self, i):
            return float(i if i < 8 else -i), f"row {i}"

    def model(x, names):
        with pyro.plate("data", len(names)):
            pyro.sample("x", dist.Poisson(pyro.param("rate", torch.tensor(1.0))).expand([len(x)]), obs=x)

    loader = DataLoader(Named(), batch_sampler=[[0, 1], [2, 3, 4, 5, 8]])
    with pytest.raises(pv.PyroVAEError, match=r"data in the support of model site 'x'.* 1 of 5 rows outside; row 4"):
        pv.fit(model, lambda x, names: None, loader, pv.ELBO(), epochs=1)


SHAPED, AFFINE = dist.TransformedDistribution, dist.transforms.AffineTransform
OBSERVED = {
    "permutation": SHAPED(dist.Gamma(torch.ones(2), 1.0).to_event(1), [dist.transforms.Permute(torch.tensor([1, 0]))]),
    "reshape": SHAPED(dist.Gamma(torch.ones(2), 1.0).to_event(1), [dist.transforms.ReshapeTransform((2,), (1, 2))]),
    "integers": SHAPED(dist.Poisson(torch.ones(2)).to_event(1), [AFFINE(0.0, 0.5)]),
    "flow": SHAPED(dist.Gamma(torch.ones(2), 1.0).to_event(1), [dist.transforms.affine_autoregressive(2)]),
    "mixture": dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2, 2)), dist.Uniform(torch.zeros(2, 2), torch.tensor([2.0, 3.0]))
    ).to_event(1),
    "mixture of betas": dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2, 2)),
        SHAPED(dist.Beta(torch.ones(2, 2), 1.0), [AFFINE(0.0, torch.tensor([2.0, 3.0]))]),
    ).to_event(1),
    "spline": SHAPED(dist.Uniform(torch.zeros(2), 1.0).to_event(1), [dist.transforms.Spline(2)]),
}


def test_a_column_may_be_a_list_of_strings():
    """Rows and their names are shuffled together; a table of values by name is no value for each row of a minibatch."""
    x, names = torch.arange(10.0), list("abcdefghij")
    seen = []

    def model(x, names):
        seen.extend(zip(x.tolist(), names, strict=True))
        table = pyro.param("table", torch.zeros(10))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(table[["abcdefghij".index(name) for name in names]], 1.0), obs=x)

    pv.fit(model, lambda x, names: None, (x, names), pv.ELBO(), epochs=1, batch_size=4, seed=0)
    assert set(seen) == set(zip(x.tolist(), names, strict=True))


@pytest.mark.parametrize("name", OBSERVED)
def test_data_at_a_site_whose_support_is_not_known_are_not_checked(name):
    observed = OBSERVED[name]

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", observed, obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(1.0)), 1.0))

    with torch.no_grad():
        draws = torch.stack([observed.sample() for _ in range(10)])
    data = torch.rand(10, 2) if "mixture" in name else draws  # Pyro takes only values that all components can have
    pv.fit(model, guide, data, pv.ELBO(), epochs=1, batch_size=4, seed=0, progress=False)
    assert pyro.param("loc").item() < 1


def test_validation_data_that_the_model_can_not_take_are_refused():
    vae = pv.mlp_conditional_vae((3,), label_dim=2, latent_dim=2, hidden_dims=(4,), likelihood="gaussian")
    x, y = torch.randn(10, 3), torch.randint(2, (10,))
    with pytest.raises(pv.PyroVAEError, match=r"the model takes as its arguments, got a tuple of 1 .*'y'"):
        pv.fit(vae, (x, y), pv.ELBO(), epochs=1, validation=x)


def test_validation_data_may_leave_out_what_is_optional():
    vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(4,), likelihood="gaussian")
    x, mask = torch.randn(20, 3), torch.rand(20, 3) > 0.3
    for data, validation in (((x, mask), x), (x, (x, mask))):
        history = pv.fit(vae, data, pv.ELBO(), epochs=1, batch_size=10, validation=validation)
        assert history.validation_bound.notna().all()


def test_a_wrapper_around_a_pairs_method_sees_its_own_data():
    """The pair checks the data that reach it; what a wrapper is given may be other data, or other arguments."""
    grey = torch.rand(20, 3)
    vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(4,))

    @functools.wraps(vae.model)
    def model(x):
        return vae.model((x > 0.5).float())

    @functools.wraps(vae.guide)
    def guide(x):
        return vae.guide((x > 0.5).float())

    histories = [pv.fit(model, guide, grey, pv.ELBO(), epochs=1, batch_size=10)]
    y = torch.zeros(20, dtype=torch.long)
    conditional = pv.mlp_conditional_vae((3,), label_dim=2, latent_dim=2, hidden_dims=(4,), likelihood="gaussian")
    program = functools.partial(conditional.model, y=y), functools.partial(conditional.guide, y=y)
    histories.append(pv.fit(program, grey, pv.ELBO(), epochs=1, batch_size=20))

    class Weighted(type(vae)):
        def weighted(self, x, weights):
            return self.model(x)

        def weighted_guide(self, x, weights):
            return self.guide(x)

    vae.__class__ = Weighted
    data = grey.round(), torch.rand(20)
    histories.append(pv.fit(vae.weighted, vae.weighted_guide, data, pv.ELBO(), epochs=1, batch_size=10))
    assert all(history.train_bound.notna().all() for history in histories)
