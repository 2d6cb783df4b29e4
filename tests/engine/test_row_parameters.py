"""Parameters with a value for each row of a minibatch are refused where the rows move; all others are trained."""

import collections
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoIAFNormal, AutoNormal, AutoNormalMessenger
from pyro.infer.autoguide.effect import AutoRegressiveMessenger
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, Sampler, TensorDataset

import pyro_vae as pv

N, B = 12, 4
X = 3 * torch.randn(N, generator=torch.Generator().manual_seed(0))
INDEX = torch.arange(N)
REFUSED = "value for each row of a minibatch"


class Whole(Sampler):
    """The only minibatch, in a random order."""

    def __iter__(self):
        return iter([torch.randperm(N).tolist()])

    def __len__(self):
        return 1


def fit(model, guide, data, batch_size=B, objective=None):
    size = {} if isinstance(data, DataLoader) else {"batch_size": batch_size}
    return pv.fit(model, guide, data, objective or pv.ELBO(kl="monte_carlo"), epochs=1, progress=False, seed=0, **size)


def model(x, *_):
    with pyro.plate("rows", len(x)):
        pyro.sample("obs", dist.Normal(pyro.sample("u", dist.Normal(0.0, 3.0)), 0.5), obs=x)


def guide_of(loc, scale=lambda *_: 0.5):
    def guide(*args):
        with pyro.plate("rows", len(args[0])):
            pyro.sample("u", dist.Normal(loc(*args), scale(*args)))

    return guide


def of_size(x, *_):
    return pyro.param("centre", lambda: torch.zeros(len(x), dtype=x.dtype))


def positive_of_size(x):
    return pyro.param("width", lambda: torch.ones(len(x)), constraint=constraints.positive)


class Places(nn.Module):
    """A module with a parameter for each row."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(B))

    def forward(self, x):
        pyro.module("places", self)
        return self.loc


def with_offset(x):
    offset = of_size(x)
    with pyro.plate("rows", len(x)):
        pyro.sample("obs", dist.Normal(pyro.sample("u", dist.Normal(0.0, 3.0)) + offset, 0.5), obs=x)


def shared(x, *_):
    return pyro.param("slope", torch.tensor(0.5)) * x


def in_drawn_rows(x):
    with pyro.plate("rows", N, subsample_size=len(x)):
        pyro.sample("u", dist.Normal(pyro.param("all", lambda: torch.zeros(N), event_dim=0), 0.5))


def drawn_rows(x):
    with pyro.plate("rows", N, subsample_size=len(x)):
        pyro.sample("obs", dist.Normal(pyro.sample("u", dist.Normal(0.0, 3.0)), 0.5), obs=x)


PER_ROW = {
    "a pyro.param": (model, guide_of(of_size), "'centre' of shape"),
    "a positive one": (model, guide_of(shared, positive_of_size), "'width' of shape"),
    "the first rows of a longer one": (model, guide_of(lambda x: of_size(X)[: len(x)]), r"'centre' of shape \(12,\)"),
    "a parameter for each place": (
        model,
        guide_of(lambda x: torch.stack([pyro.param(f"centre{i}", torch.tensor(0.0)) for i in range(len(x))])),
        "'centre0' of shape .*'centre3'",
    ),
    "a value for each two rows": (
        model,
        guide_of(lambda x: of_size(x[::2]).repeat_interleave(2)),
        r"'centre'.* \(2,\)",
    ),
    "a value for each of some rows": (
        model,
        guide_of(lambda x: torch.cat([of_size(x[:2]), x[2:]])),
        "'centre' of shape",
    ),
    "the model's": (with_offset, guide_of(shared), "'centre' of shape"),
    "rows of a subsample that is not the minibatch": (drawn_rows, in_drawn_rows, "'all' of shape"),
}


@pytest.mark.parametrize("name", PER_ROW)
def test_a_value_for_each_row_is_refused_by_name(name):
    model, guide, words = PER_ROW[name]
    with pytest.raises(pv.PyroVAEError, match=f"{REFUSED} of 4: {words}"):
        fit(model, guide, X)


def test_a_modules_parameter_for_each_row_is_refused():
    with pytest.raises(pv.PyroVAEError, match=r"'places\$\$\$loc' of shape \(4,\)"):
        fit(model, guide_of(Places()), X)


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoDiagonalNormal, AutoIAFNormal, AutoDelta])
def test_an_autoguide_of_the_first_minibatch_is_refused(autoguide):
    with pytest.raises(pv.PyroVAEError, match=f"{REFUSED} of 4: '{autoguide.__name__}"):
        fit(model, autoguide(model), X)


@pytest.mark.parametrize("autoguide", [AutoNormalMessenger, AutoRegressiveMessenger])
def test_so_is_a_guide_that_runs_the_model(autoguide):
    with pytest.raises(pv.PyroVAEError, match=f"{REFUSED} of 4: 'locs.u' of shape .4,., 'scales.u' of shape"):
        fit(model, autoguide(model), X)
    fit(model, autoguide(model, amortized_plates=("rows",)), X)


@pytest.mark.parametrize(
    "data",
    [
        X.double(),
        X[:10],
        torch.ones(N),
        DataLoader(TensorDataset(X), B),
        DataLoader(TensorDataset(X), N, shuffle=True),
        DataLoader(TensorDataset(X), batch_sampler=Whole()),
    ],
    ids=[
        "float64",
        "a smaller last minibatch",
        "equal data",
        "a loader",
        "a loader that moves rows",
        "a sampler that does",
    ],
)
def test_whatever_the_data(data):
    with pytest.raises(pv.PyroVAEError, match=REFUSED):
        fit(model, guide_of(of_size), data)


def test_a_first_minibatch_of_equal_rows_does_not_hide_them():
    with pytest.raises(pv.PyroVAEError, match=f"{REFUSED} of 4: 'AutoDelta.u'"):
        fit(model, AutoDelta(model), torch.ones(N))


def test_a_sharp_likelihood_does_not_hide_them():
    def sharp(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("obs", dist.Normal(pyro.sample("u", dist.Normal(0.0, 3.0)), 1e-3), obs=x)

    with pytest.raises(pv.PyroVAEError, match=f"{REFUSED} of 4: 'centre'"):
        fit(sharp, guide_of(of_size), X)


@pytest.mark.parametrize("objective", [pyro.infer.Trace_ELBO(), pv.IWAE(3, gradient="score")], ids=["Pyro's", "score"])
def test_whatever_the_objective(objective):
    with pytest.raises(pv.PyroVAEError, match=REFUSED):
        fit(model, guide_of(of_size), X, objective=objective)


@pytest.mark.parametrize(
    "data",
    [X, DataLoader(TensorDataset(X), N), DataLoader(TensorDataset(X), N, sampler=[*range(N)[::-1]])],
    ids=["a tensor", "a loader", "a loader with an order of its own"],
)
def test_rows_in_one_order_may_have_parameters(data):
    fit(model, guide_of(of_size), data, batch_size=N)
    assert bool(pyro.param("centre").ne(0).all())
    pv.log_likelihood(model, guide_of(of_size), X, num_samples=10)


def test_one_datum_at_a_time_has_a_value_that_all_share():
    fit(model, guide_of(of_size), X, batch_size=1)
    assert pyro.param("centre").shape == (1,)


def subsampled(x, index):
    with pyro.plate("rows", N, subsample=index):
        pyro.sample("obs", dist.Normal(pyro.sample("u", dist.Normal(0.0, 3.0)), 0.5), obs=x)


def in_rows(x, index):
    with pyro.plate("rows", N, subsample=index):
        pyro.sample("u", dist.Normal(pyro.param("all", lambda: torch.zeros(N), event_dim=0), 0.5))


def by_index(x, index):
    with pyro.plate("rows", N, subsample=index):
        pyro.sample("u", dist.Normal(pyro.param("all", lambda: torch.zeros(N))[index], 0.5))


@pytest.mark.slow
def test_parameters_of_all_data_are_trained_each_with_its_datum():
    autoguide = AutoNormal(subsampled, create_plates=lambda x, index: pyro.plate("rows", N, subsample=index))
    for guide in (in_rows, by_index, autoguide):
        pyro.clear_param_store()
        pv.fit(subsampled, guide, (X, INDEX), pv.ELBO(kl="monte_carlo"), epochs=60, batch_size=B, lr=0.1, seed=0)
        found = autoguide.locs.u if guide is autoguide else pyro.param("all")
        # The posterior's mean is 0.973 x. Adam moves each by at most 0.1 a step, 180 steps in all.
        assert torch.corrcoef(torch.stack([found.detach(), X]))[0, 1] > 0.9


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Running(nn.Module):
    """Each row's value depends on the rows before."""

    def forward(self, x):
        return x.cumsum(0) / 4


def network(*layers):
    net = nn.Sequential(nn.Linear(1, B), *layers, nn.Tanh(), nn.Linear(B, 2))

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            loc, log_scale = net(x[:, None]).unbind(-1)
            pyro.sample("u", dist.Normal(loc, log_scale.exp()))

    return guide


def halves(size):
    """A network of its own for each half of a minibatch, such as labelled and unlabelled data, or every other row."""
    nets = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])

    def guide(x):
        pyro.module("nets", nets)
        first = torch.arange(len(x)) % 2 == 0 if size is None else torch.arange(len(x)) < size
        with pyro.plate("rows", len(x)):
            loc = torch.where(first, *(net(x[:, None])[:, 0] for net in nets))
            pyro.sample("u", dist.Normal(loc, 0.5))

    return guide


def between_pixels(size, turned=False):
    """A plate of as many pixels beside that of the rows, and a parameter for each pixel, or for each row."""

    dims = (-2, -1) if turned else (-1, -2)

    def model(x):
        with pyro.plate("pixels", B, dim=dims[0]), pyro.plate("rows", len(x), dim=dims[1]):
            pyro.sample("obs", dist.Normal(pyro.sample("u", dist.Normal(0.0, 3.0)), 0.5), obs=x.T if turned else x)

    def guide(x):
        with pyro.plate("pixels", B, dim=dims[0]), pyro.plate("rows", len(x), dim=dims[1]):
            slope = pyro.param("slope", lambda: torch.ones(size))
            pyro.sample("u", dist.Normal(slope * (x.T if turned else x), 0.5))

    return model, guide


def embedded(x, index):
    table = pyro.param("table", lambda: torch.zeros(N))
    with pyro.plate("rows", len(x)):
        pyro.sample("u", dist.Normal(nn.functional.embedding(index, table[:, None])[:, 0], 0.5))


def embedded_with_noise(x, index):
    table = pyro.param("table", lambda: torch.zeros(N))
    with pyro.plate("rows", len(x)):
        pyro.sample("u", dist.Normal(table[index] * torch.rand(len(x)), 0.5))


SHARED = {
    "a scalar": (model, guide_of(shared), X),
    "a network as wide as the minibatch": (model, network(), X),
    "batch norm": (model, network(nn.BatchNorm1d(B)), X),
    "dropout": (model, network(nn.Dropout(0.5)), X),
    "noise outside of sample sites": (model, network(Noise()), X),
    "a network that depends on the rows' order": (model, network(Running()), X),
    "a network for half of the rows": (model, halves(B // 2), X),
    "a network for every other row": (model, halves(None), X),
    "a network for two rows": (model, halves(2), X),
    "as many pixels as rows": (*between_pixels(B), X[:, None] * torch.arange(1.0, B + 1)),
    "as many pixels before rows": (*between_pixels((B, 1), True), X[:, None] * torch.arange(1.0, B + 1)),
    "as many pixels as rows, all equal": (*between_pixels(B), torch.ones(N, B)),
    "an embedding of indices": (model, embedded, (X, INDEX)),
    "an embedding with noise": (model, embedded_with_noise, (X, INDEX)),
    "a constant for each place": (model, guide_of(lambda x: shared(x) + torch.arange(len(x)) / 9), X),
}


@pytest.mark.parametrize("name", SHARED)
def test_parameters_that_data_share_are_trained(name):
    assert fit(*SHARED[name]).train_bound.map(math.isfinite).all()


def test_rows_are_told_from_as_many_pixels():
    with pytest.raises(pv.PyroVAEError, match=r"'slope' of shape \(4, 1\)"):
        fit(*between_pixels((B, 1)), X[:, None] * torch.arange(1.0, B + 1))


def test_the_check_leaves_random_numbers_and_statistics_alone(monkeypatch):
    found = []
    for checked in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        if not checked:
            monkeypatch.setattr("pyro_vae.engine.minibatches.Minibatches.moves_rows", False)
        batch_norm = nn.BatchNorm1d(B)
        history = fit(model, network(batch_norm), X)
        found.append((history.train_bound.item(), batch_norm.running_mean.tolist()))
    assert found[0] == found[1]


def test_a_minibatch_may_hold_a_named_tuple():
    """Which has as many items as the minibatch has rows, and none of them is a row."""
    pair = collections.namedtuple("pair", "low high")

    def model(x, limits):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), float(limits.high)), obs=x)

    pyro.clear_param_store()
    loader = DataLoader(torch.arange(6.0), 2, collate_fn=lambda rows: (torch.stack(rows), pair(0, 1)), shuffle=True)
    history = pv.fit(model, lambda *_: None, loader, pv.ELBO(), epochs=1, lr=1e-12, progress=False)
    exact = dist.Normal(0.0, 1.0).log_prob(torch.arange(6.0)).mean().item()
    assert history.train_bound.iloc[0] == pytest.approx(exact, rel=1e-5)
