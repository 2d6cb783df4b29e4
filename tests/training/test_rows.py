"""How many data a loss stands for, and which data are trained on: plates and streams of several forms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import pyro_vae as pv

N, D = 20, 5
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def program(plate, rows):
    """z ~ N(0, 1), x_d ~ N(z, 1), with the data's plate and the rows (n, D) of the argument from functions."""

    def model(x):
        with plate(x):
            z = pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0).expand([len(rows(x))]))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([*z.shape, D]).to_event(1), obs=rows(x))

    def guide(x):
        with plate(x):
            pyro.sample("z", dist.Normal(rows(x).mean(-1), 0.4))

    return model, guide


def elbo(x):
    """The exact ELBO of `program`, averaged over data, with the mean of x as the guide's mean and 0.4 as its scale."""
    mean, variance = x.mean(-1, keepdim=True), 0.4**2
    log_p = dist.Normal(mean, 1.0).log_prob(x).sum(-1) - D * variance / 2
    kl = torch.distributions.kl_divergence(dist.Normal(mean[:, 0], 0.4), dist.Normal(0.0, 1.0))
    return (log_p - kl).mean().item()


PROGRAMS = {
    "rows": (lambda x: pyro.plate("data", len(x)), lambda x: x, X),
    "columns": (lambda x: pyro.plate("data", x.shape[1]), lambda x: x.T, X.T),
    "a fixed size": (lambda x: pyro.plate("data", N, subsample_size=len(x)), lambda x: x, X),
    "no size": (lambda x: pyro.plate("data"), lambda x: x, X),
}


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["uncompiled", "compiled"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_bounds_are_of_one_datum(name, compile):
    plate, rows, x = PROGRAMS[name]
    pyro.clear_param_store()
    batch_size = None if name == "columns" else 10
    model, guide = program(plate, rows)
    history = pv.fit(
        model, guide, x, pv.ELBO(100), epochs=30, batch_size=batch_size, lr=1e-12, seed=0, validation=x, compile=compile
    )
    spread = history.train_bound.std()
    assert abs(history.train_bound.mean() - elbo(X)) < 4.5 * spread / len(history) ** 0.5
    assert abs(history.validation_bound.iloc[0] - elbo(X)) < 4.5 * spread  # its noise is the same in each epoch


def test_the_step_is_that_of_the_mean_bound():
    """A fixed plate's loss is scaled to all data; its gradient is divided by their number."""
    gradients = []
    for name in ("rows", "a fixed size"):
        plate, rows, x = PROGRAMS[name]
        pyro.clear_param_store()
        pv.fit(*program(plate, rows), x[:10], pv.ELBO(), epochs=1, batch_size=10, seed=0)
        gradients.append(pyro.param("m").grad.item())
    assert gradients[0] == pytest.approx(gradients[1], rel=2**-20)


class Stream(IterableDataset):
    """Rows that come once."""

    def __init__(self, x):
        self.rows = iter(x)

    def __iter__(self):
        return self.rows


def test_a_stream_is_trained_on_from_its_first_minibatch():
    seen = []

    def model(x):
        seen.append(x)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0).expand([len(x)]), obs=x)

    pyro.clear_param_store()
    loader = DataLoader(Stream(torch.arange(12.0)), batch_size=4)
    pv.fit(model, lambda x: None, loader, pv.ELBO(), epochs=1, seed=0)
    in_steps = list(dict.fromkeys(tuple(sorted(x.tolist())) for x in seen))  # a check moves rows
    assert in_steps == [(0.0, 1.0, 2.0, 3.0), (4.0, 5.0, 6.0, 7.0), (8.0, 9.0, 10.0, 11.0)]


def test_a_stream_that_begins_again_ends_where_it_did(tmp_path):
    """A look at the first minibatch leaves the random numbers of the training as they are: resumed as unbroken."""

    class Rows(IterableDataset):
        def __iter__(self):
            return iter(X)

    ends = []
    for parts in ((4,), (2, 4)):
        pyro.clear_param_store()
        for epochs in parts:
            model, guide = program(*PROGRAMS["rows"][:2])
            loader = DataLoader(Rows(), batch_size=10)
            path = tmp_path / f"{len(parts)}.pt"
            pv.fit(model, guide, loader, pv.ELBO(), epochs=epochs, lr=1e-2, seed=0, checkpoint=path)
        ends.append(pyro.param("m").item())
    assert ends[0] == ends[1]
