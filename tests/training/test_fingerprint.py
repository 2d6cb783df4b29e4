"""A training goes on with the program, the data and the schedules that it began with, and with no others."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import planar
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pyro_vae as pv
from pyro_vae.training import checkpoint as checkpoints

X = torch.linspace(-1, 1, 60).reshape(20, 3)
W = torch.tensor([[0.5, -1.0, 0.25], [1.0, 0.5, -0.5]])


def program(
    *,
    scale=1.0,
    prior=1.0,
    family=dist.Normal,
    guide_scale=1.0,
    loc=torch.matmul,
    factor=False,
    plate=lambda x, name: pyro.plate(name, len(x)),
    names=("z", "x", "data"),
    dtype=torch.float32,
):
    """A linear program whose parameters have the same names and shapes, whatever its constants are."""
    latent, observed, data = names
    parameters = {"W": W.to(dtype, copy=True), "A": 0.1 * W.T.to(dtype)}

    def model(x, keep=None):
        weights = pyro.param("W", parameters["W"])
        with plate(x, data):
            z = pyro.sample(latent, dist.Normal(torch.zeros(2, dtype=dtype), prior).to_event(1))
            likelihood = family(loc(z, weights), scale)
            pyro.sample(observed, (likelihood if keep is None else likelihood.mask(keep)).to_event(1), obs=x)
            if factor:
                pyro.factor("more", torch.zeros(len(x)))

    def guide(x, keep=None):
        with plate(x, data):
            pyro.sample(latent, dist.Normal(x @ pyro.param("A", parameters["A"]), guide_scale).to_event(1))

    return model, guide


def fit(path, made=None, data=X, epochs=1, objective=None, **options):
    """Train a program as in a session of its own."""
    pyro.clear_param_store()
    if not isinstance(data, DataLoader):
        options = {"batch_size": 8} | options
    objective = objective or pv.ELBO(1, "monte_carlo")
    return pv.fit(made or program(), data, objective, epochs=epochs, seed=0, lr=1e-2, checkpoint=path, **options)


OTHERS = {
    "constant": (program, {"scale": 1.02}, r"expected model site 'x' \(Normal\) to have a log-density of"),
    "likelihood": (program, {"family": dist.Laplace}, r".* 'x' \(Normal\) to have .* got -\d.* \(Laplace\)"),
    "prior": (program, {"prior": 1.02}, r"expected model site 'z' \(Normal\) to have a log-density of"),
    "guide": (program, {"guide_scale": 1.02}, r"expected guide site 'z' \(Normal\) to have a log-density of"),
    "number of data": (
        functools.partial(program, plate=lambda x, name: pyro.plate(name, 20, subsample_size=len(x))),
        {"plate": lambda x, name: pyro.plate(name, 200, subsample_size=len(x))},
        r"expected model site 'z' \(Normal\) to have a log-density of",
    ),
    "factor": (program, {"factor": True}, r"expected no model site 'more', got one \(Unit\)"),
    "no factor": (
        functools.partial(program, factor=True),
        {"factor": False},
        r"expected a model site 'more' .*got none",
    ),
    "name": (program, {"names": ("w", "x", "data")}, r"expected a model site 'z' \(Normal\), got none"),
    "an error": (
        program,
        {"loc": lambda z, weights: (z @ weights).reshape(10, 3)},  # the file holds fewer rows
        r"expected one that runs on the rows and at the latents which the checkpoint keeps, got \w+Error: ",
    ),
    "the whole minibatch": (
        functools.partial(program, plate=lambda x, name: pyro.plate(name, 10)),
        {"scale": 1.1},
        r"expected model site 'x' \(Normal\) to have a log-density of",
    ),
    "float64": (
        functools.partial(program, dtype=torch.float64),
        {"scale": 1 + 1e-6},
        r"expected model site 'x' \(Normal\) to have a log-density of",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_program_is_refused_by_the_name_of_its_site(tmp_path, what):
    make, other, message = OTHERS[what]
    path, data = tmp_path / "run.pt", X.double() if what == "float64" else X
    fit(path, make(), data, batch_size=10)
    before = path.read_bytes()
    with pytest.raises(pv.PyroVAEError, match=rf"run.pt is of another program: {message}"):
        fit(path, make(**other), data, batch_size=10, epochs=2)
    assert path.read_bytes() == before
    assert "W" not in pyro.get_param_store()  # neither those of the checkpoint nor new ones
    assert len(fit(path, make(), data, batch_size=10, epochs=2)) == 2


def test_the_log_densities_are_those_of_the_program_under_the_parameters_in_the_file(tmp_path):
    path = tmp_path / "run.pt"
    fit(path, program(scale=0.5), epochs=2)
    state = checkpoints.load(path)
    kept, weights, z = state["fingerprint"], state["parameters"]["W"], state["fingerprint"]["latents"]["z"]
    assert not torch.equal(weights, W)
    assert torch.equal(kept["rows"][0], X[:4])
    expected = dist.Normal(z @ weights, 0.5).log_prob(X[:4]).sum(-1)
    torch.testing.assert_close(kept["sites"]["model site 'x'"]["value"], expected)
    expected = dist.Normal(X[:4] @ state["parameters"]["A"], 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(kept["sites"]["guide site 'z'"]["value"], expected)


def noisy(z, weights):
    return z @ weights + torch.randn(())


def always_dropping(z, weights):
    return torch.nn.functional.dropout(z @ weights, training=True)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({}, {"names": ("z", "x", "rows")}),
        ({}, {"loc": lambda z, weights: (z @ weights) * (1 + 2**-16)}),  # as another processor rounds
        ({"loc": noisy}, {"loc": noisy}),
        ({"loc": always_dropping}, {"loc": always_dropping}),
    ],
    ids=["plate's name", "rounding", "noise", "dropout"],
)
def test_what_is_no_other_program_goes_on(tmp_path, first, then):
    path = tmp_path / "run.pt"
    fit(path, program(**first))
    assert len(fit(path, program(**then), epochs=2)) == 2
    sites = checkpoints.load(path)["fingerprint"]["sites"]
    assert [name for name, site in sites.items() if site["value"] is None] == ["model site 'x'"] * bool(first)
    if first:  # the sites without that noise are still compared
        with pytest.raises(pv.PyroVAEError, match="another program: expected model site 'z'"):
            fit(path, program(**then, prior=2.0), epochs=3)


def test_a_flow_without_an_inverse_goes_on(tmp_path):
    """The density of the guide's sample can't be computed later; that of the model can."""

    def make(scale=1.0):
        pyro.set_rng_seed(0)
        flow = planar(2)
        model, _ = program(scale=scale)

        def guide(x):
            pyro.module("flow", flow)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow]))

        return model, guide

    path = tmp_path / "run.pt"
    fit(path, make())
    assert len(fit(path, make(), epochs=2)) == 2
    with pytest.raises(pv.PyroVAEError, match="another program: expected model site 'x'"):
        fit(path, make(scale=1.1), epochs=3)


def test_discrete_latents_are_compared(tmp_path):
    def make(logit):
        def model(x):
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(logits=torch.tensor([logit, 0.0])))
                pyro.sample("x", dist.Normal(W[k], 1.0).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("k", dist.Categorical(logits=x @ pyro.param("A", W.T.clone())))

        return model, guide

    path, objective = tmp_path / "run.pt", pv.IWAE(2, gradient="score")
    fit(path, make(0.0), objective=objective)
    with pytest.raises(pv.PyroVAEError, match=r"model site 'k' \(Categorical\) to have a log-density of -0.693147"):
        fit(path, make(0.1), objective=objective, epochs=2)
    assert len(fit(path, make(0.0), objective=objective, epochs=2)) == 2


def test_a_pair_with_another_likelihood_is_refused(tmp_path):
    def make(likelihood, **options):
        pyro.set_rng_seed(0)
        return pv.mlp_vae((3,), latent_dim=2, hidden_dims=(4,), likelihood=likelihood, **options)

    path, x = tmp_path / "run.pt", (X > 0).float()
    fit(path, make("gaussian", scale=1.0), x)
    with pytest.raises(pv.PyroVAEError, match=r"another program: expected model site 'x' \(Normal\) to have"):
        fit(path, make("bernoulli"), x, epochs=2)
    fresh = make("bernoulli")  # parameters of equal names and shapes load into any program
    pv.load_parameters(path, fresh, x)
    saved = checkpoints.load(path)["parameters"]
    assert any(torch.equal(fresh.posterior.encoder[1].weight, value) for value in saved.values())


def test_nothing_of_the_training_notices_the_comparison(tmp_path):
    """Random numbers, dropout and batch norm are those of a training without a checkpoint."""
    ends = []
    for path in (None, tmp_path / "run.pt"):
        pyro.set_rng_seed(0)
        layers = [torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 4)]
        vae = pv.VAE(
            prior=pv.StandardNormal(2),
            likelihood=pv.Gaussian(torch.nn.Linear(2, 3), (3,)),
            posterior=pv.DiagonalNormal(torch.nn.Sequential(*layers), (3,)),
        )
        fit(path, vae, epochs=3, batch_size=10, validation=X[:5])
        ends.append(vae.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_a_program_that_does_not_run_twice_is_told_of(tmp_path):
    ran = []

    def model(x):
        ran.append(len(x))
        if len(ran) in (4, 5):  # after those that find the parameters, and those of each row
            raise RuntimeError("once is enough")
        program()[0](x)

    with pytest.warns(UserWarning, match=r"can't tell this program from another.*once is enough"):
        fit(tmp_path / "run.pt", (model, program()[1]))
    assert ran[:5] == [8, 8, 8, 4, 8]


def test_a_program_that_stops_running_at_its_first_latents_is_told_of(tmp_path):
    """Training goes on, and the file has no record of the program."""
    path = tmp_path / "run.pt"

    def model(x):
        program()[0](x)
        if not torch.is_grad_enabled() and not torch.equal(pyro.param("W"), W):
            raise RuntimeError("trained")

    with pytest.warns(UserWarning, match=r"can't tell this program from another.*any more \(trained"):
        history = fit(path, (model, program()[1]))
    assert len(history) == 1
    assert "sites" not in checkpoints.load(path)["fingerprint"]


class Image(torch.Tensor):
    """Such as those of torchvision, which no file can hold that is read without running code."""


def test_rows_of_a_subclass_of_tensors_are_kept_as_tensors(tmp_path):
    path, x = tmp_path / "run.pt", X.as_subclass(Image)
    fit(path, data=x)
    assert type(checkpoints.load(path)["fingerprint"]["rows"][0]) is torch.Tensor
    assert len(fit(path, data=x, epochs=2)) == 2


# The data ------------------------------------------------------------------------------------------------------------

CHANGED = X.clone()
CHANGED[13, 1] += 0.01


class Rows(Dataset):
    """A data set of the user's own."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


class Stream(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


def masked(x):
    return x, torch.arange(60).reshape(20, 3) % 7 > 0


BEGINNING = "expected the first minibatch to begin with the rows that the checkpoint keeps, got others"
OTHER_DATA = {
    "a value": (X, CHANGED, "expected the weighted sum of row 13 to be"),
    "order": (X, X.flip(0), "expected the weighted sum of row 0 to be"),
    "mask": (masked(X), (X, ~masked(X)[1]), "expected the weighted sum of row 0 of tensor 1 to be"),
    "no mask": (masked(X), X, "expected the number of tensors to be 2, got 1"),
    "tensors": (*(DataLoader(TensorDataset(x), 8, shuffle=True) for x in (X, CHANGED)), "sum of row 13 to be"),
    "list": (DataLoader(list(X), 8), DataLoader(list(CHANGED), 8), "sum of row 13 to be"),
    "length": (DataLoader(X, 8), DataLoader(X[:17], 8), "expected the number of rows to be 20, got 17"),
    "own length": (DataLoader(Rows(X), 8), DataLoader(Rows(X[:17]), 8), "expected the number of rows to be 20, got 17"),
    "own": (DataLoader(Rows(X), 8), DataLoader(Rows(-X), 8), BEGINNING),
    "stream": (DataLoader(Stream(X), 8), DataLoader(Stream(-X), 8), BEGINNING),
}


@pytest.mark.parametrize("kind", OTHER_DATA)
def test_other_data_are_refused(tmp_path, kind):
    path, (first, then, message) = tmp_path / "run.pt", OTHER_DATA[kind]
    fit(path, data=first, epochs=2)
    with pytest.raises(pv.PyroVAEError, match=f"written with other data: .*{message}"):
        fit(path, data=then, epochs=3)
    assert len(fit(path, data=first, epochs=3)) == 3


@pytest.mark.parametrize("kind", [kind for kind in OTHER_DATA if OTHER_DATA[kind][2] != BEGINNING])
def test_other_validation_data_are_refused(tmp_path, kind):
    path, (first, then, message) = tmp_path / "run.pt", OTHER_DATA[kind]
    fit(path, validation=first)
    with pytest.raises(pv.PyroVAEError, match=f"written with other validation data: .*{message}"):
        fit(path, validation=then, epochs=2)
    assert len(fit(path, validation=first, epochs=2)) == 2


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("kind", [TensorDataset, Rows, list])
def test_shuffled_data_go_on(tmp_path, kind, epochs):
    """In another order each time: what a first minibatch has tells nothing."""
    for total in (epochs, epochs + 1):
        history = fit(tmp_path / "run.pt", data=DataLoader(kind(X), 8, shuffle=True), epochs=total)
    assert len(history) == total


def test_data_of_another_processor_go_on(tmp_path):
    path, generator = tmp_path / "run.pt", torch.Generator().manual_seed(0)
    fit(path)
    rounding = torch.rand(X.shape, generator=generator).sub(0.5).mul(2 * torch.finfo(X.dtype).eps)
    assert not torch.equal(X, X * (1 + rounding))
    assert len(fit(path, data=X * (1 + rounding), epochs=2)) == 2


@pytest.mark.parametrize(("first", "then"), [(None, X), (X, None)])
def test_validation_data_are_there_from_the_first_epoch_or_never(tmp_path, first, then):
    path = tmp_path / "run.pt"
    fit(path, validation=first)
    message = r"without validation data: expected none, got some" if first is None else "expected the same, got none"
    with pytest.raises(pv.PyroVAEError, match=message):
        fit(path, validation=then, epochs=2)


def test_binary_images_drawn_anew_are_not_those_drawn_once(tmp_path):
    images = torch.rand(20, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    vae = functools.partial(pv.mlp_vae, (1, 2, 2), latent_dim=1, hidden_dims=(2,), likelihood="gaussian")
    path = tmp_path / "run.pt"
    fit(path, vae(), pv.data.Split(images, None, dynamic=True))
    with pytest.raises(pv.PyroVAEError, match="other data: expected dynamic to be True, got False"):
        fit(path, vae(), pv.data.Split(images, None), epochs=2)
    assert len(fit(path, vae(), pv.data.Split(images, None, dynamic=True), epochs=2)) == 2


# Schedules -----------------------------------------------------------------------------------------------------------


def weighted(beta):
    return pv.ELBO(1, "monte_carlo", beta=beta)


BETAS = (
    lambda step: min(1.0, step / 10),
    lambda step: min(1.0, step / 11),
    lambda step: 0.7 if step >= 9 else min(1.0, step / 10),
)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (BETAS[1], r"expected beta to be 0.1 at step 1 \(epoch 1\), got 0.0909091"),
        (BETAS[2], r"expected beta to be 0.9 at step 9 \(epoch 4\), got 0.7"),
    ],
)
def test_another_function_as_a_schedule_is_refused_also_for_epochs_to_come(tmp_path, other, message):
    """Both are called <lambda>; three steps are an epoch."""
    path = tmp_path / "run.pt"
    fit(path, epochs=5, objective=weighted(BETAS[0]))
    with pytest.raises(pv.PyroVAEError, match=f"another schedule of beta: {message}"):
        fit(path, epochs=6, objective=weighted(other))
    assert len(fit(path, epochs=6, objective=weighted(BETAS[0]))) == 6


def test_another_function_of_the_epoch_as_a_step_size_is_refused(tmp_path):
    def decaying(factor):
        return lambda optimizer: schedulers.LambdaLR(optimizer, lambda epoch: factor**epoch)

    path = tmp_path / "run.pt"
    fit(path, epochs=3, lr_scheduler=decaying(0.5))
    with pytest.raises(pv.PyroVAEError, match=r"another schedule of lr: expected lr to be 0.005 at epoch 2, got 0.004"):
        fit(path, epochs=4, lr_scheduler=decaying(0.4))
    history = fit(path, epochs=4, lr_scheduler=decaying(0.5))
    assert history.lr.tolist() == [0.01 * 0.5**epoch for epoch in range(4)]


def test_a_checkpoint_without_a_fingerprint_goes_on_with_a_warning(tmp_path):
    path = tmp_path / "run.pt"
    fit(path)
    state = checkpoints.load(path)
    del state["fingerprint"], state["steps"]
    torch.save(state, path)
    with pytest.warns(UserWarning, match="written by an earlier version, or by a callback"):
        fit(path, epochs=2)
    with pytest.raises(pv.PyroVAEError, match="another program"):  # it has one from now on
        fit(path, program(scale=2.0), epochs=3)
