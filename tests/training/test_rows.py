"""How many data a loss stands for, and which data are trained on: plates and streams of several forms."""

import functools
import random

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
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


@pytest.mark.parametrize("name", ["rows", "a fixed size", "no size"])
def test_a_last_minibatch_of_another_size_counts_by_its_rows(name):
    """20 rows as 8, 8 and 4. Without noise, each minibatch's bound is the mean of its rows' log p(x)."""

    def model(x):
        with PROGRAMS[name][0](x):
            pyro.sample(
                "x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0).expand([len(x), D]).to_event(1), obs=x
            )

    pyro.clear_param_store()
    x = X * torch.arange(1.0, N + 1)[:, None]
    exact = dist.Normal(0.0, 1.0).log_prob(x).sum(-1).mean().item()
    history = pv.fit(
        model, lambda x: None, x, pv.ELBO(), epochs=1, batch_size=8, lr=1e-12, validation=x, progress=False
    )
    # Float32 sums of 100 squares, up to 3,000 each, in three minibatches.
    assert history.iloc[0][["train_bound", "validation_bound"]].tolist() == pytest.approx([exact] * 2, rel=1e-5)


def components(x):
    """Data outside every plate, beside a plate of latents."""
    with pyro.plate("components", 3):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(m.sum(-1), 1.0).expand([len(x), D]).to_event(2), obs=x)


def pixels(x):
    """Columns of x are the data, and each has a plate of the size of the first dimension inside."""
    with pyro.plate("data", x.shape[1], dim=-2), pyro.plate("pixels", x.shape[0], dim=-1):
        pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=x.T)


def labelled(x):
    """A label of each column beside its pixels, whose plate is made first."""
    rows = pyro.plate("pixels", x.shape[0], dim=-1)
    with pyro.plate("data", x.shape[1], dim=-2):
        pyro.sample("y", dist.Delta(torch.zeros(())).expand([x.shape[1], 1]), obs=torch.zeros(x.shape[1], 1))
        with rows:
            pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=x.T)


def subsampled(x):
    """A minibatch of a plate of N rows, beside another plate of the minibatch's size."""
    with pyro.plate("data", N, subsample_size=len(x), dim=-2), pyro.plate("pixels", D, dim=-1):
        pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=x)


@pytest.mark.parametrize("program", [components, pixels, labelled, subsampled])
def test_the_datas_plate_is_the_outermost_around_the_observed_sites(program):
    guide = AutoNormal(program) if program is components else lambda x: None
    x = X.T if program in (pixels, labelled) else X
    batch_size = D if program is subsampled else None
    pyro.clear_param_store()
    history = pv.fit(
        program, guide, x, pyro.infer.Trace_ELBO(), epochs=1, batch_size=batch_size, lr=1e-12, seed=0, progress=False
    )
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    program(x)
    if program is components:
        guide = AutoNormal(program)
        guide(x)
        losses = [pyro.infer.Trace_ELBO(200).loss(program, guide, x) / N for _ in range(5)]
        spread = 200**0.5 * torch.tensor(losses).std().item()
        assert abs(-history.train_bound.iloc[0] - sum(losses) / 5) < 5 * spread
    else:
        exact = dist.Normal(0.0, 1.0).log_prob(X).sum(-1).mean().item()
        assert history.train_bound.iloc[0] == pytest.approx(exact, rel=1e-5)


def sequences(x):
    """Rows are the second dimension of x, after the time."""
    with pyro.plate("sequences", x.shape[1]):
        for t in pyro.markov(range(len(x))):
            pyro.sample(f"x_{t}", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=x[t])


@pytest.mark.parametrize("batch_size", [D, 7, N])  # as many rows as times; fewer times than rows
def test_sequences_with_the_time_first_count_by_their_plate(batch_size):
    pyro.clear_param_store()
    x = X[: N - 1] * torch.arange(1.0, N)[:, None]
    loader = DataLoader(x, batch_size, collate_fn=lambda rows: torch.stack(rows, 1))
    history = pv.fit(
        sequences, lambda x: None, loader, pv.ELBO(), epochs=1, lr=1e-12, validation=loader, progress=False
    )
    exact = dist.Normal(0.0, 1.0).log_prob(x).sum(-1).mean().item()
    assert history.iloc[0][["train_bound", "validation_bound"]].tolist() == pytest.approx([exact] * 2, rel=1e-5)


@pytest.mark.parametrize("batch_size", [D, 7])
def test_of_sequences_with_the_time_first_a_parameter_for_each_row_is_refused(batch_size):
    def model(x):
        with pyro.plate("sequences", x.shape[1]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for t in pyro.markov(range(len(x))):
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[t])

    pyro.clear_param_store()
    loader = DataLoader(X, batch_size, collate_fn=lambda rows: torch.stack(rows, 1), shuffle=True)
    with pytest.raises(pv.PyroVAEError, match=rf"a value for each row of a minibatch of {batch_size}: 'AutoNormal"):
        pv.fit(model, AutoNormal(model), loader, pv.ELBO(), epochs=1, progress=False)


def numbers(x, *present):
    """Each entry of x is a datum, or each one that is present; the guide below is the exact posterior."""
    x = x[present[0]] if present else x.reshape(-1)
    with pyro.plate("numbers", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def numbers_guide(x, *present):
    x = x[present[0]] if present else x.reshape(-1)
    with pyro.plate("numbers", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("c", torch.tensor(0.8)) * x, 0.8**0.5))


COMPILED = pytest.param(False, True, marks=pytest.mark.slow)


@pytest.mark.parametrize(("present", "compile"), [(False, False), (True, False), COMPILED])
@pytest.mark.parametrize("batch_size", [N, 8, 3])
def test_entries_of_an_argument_may_be_the_data(present, compile, batch_size):
    """With missing entries, each minibatch has another number of data."""
    pyro.clear_param_store()
    x, seen = 2 * X, torch.rand(N, D, generator=torch.Generator().manual_seed(1)) < torch.linspace(0.2, 1, N)[:, None]
    seen[:, 0] = True
    data, few = ((x, seen), (x[:4], seen[:4])) if present else (x, x[:4])
    log_p = dist.Normal(0.0, 5**0.5).log_prob(x)
    seen = seen if present else torch.ones_like(seen)
    exact = [log_p[seen].mean().item(), log_p[:4][seen[:4]].mean().item()]
    history = pv.fit(
        numbers,
        numbers_guide,
        data,
        pv.IWAE(4),
        epochs=1,
        batch_size=batch_size,
        lr=1e-12,
        validation=few,
        progress=False,
        compile=compile,
    )
    assert history.iloc[0][["train_bound", "validation_bound"]].tolist() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("objective", [pv.ELBO(), pv.IWAE(2)], ids=["ELBO", "IWAE"])
@pytest.mark.parametrize("batch_size", [4, 10])
def test_minibatches_of_a_dimension_that_no_plate_follows_are_refused(objective, batch_size):
    """Columns are the data, and minibatches would be cut from the times."""

    def model(x):
        with pyro.plate("series", x.shape[1]):
            z = pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
            for t in range(len(x)):
                pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[t])

    def guide(x):
        with pyro.plate("series", x.shape[1]):
            pyro.sample("z", dist.Normal(x.mean(0), 0.2))

    pyro.clear_param_store()
    with pytest.raises(pv.PyroVAEError, match=rf"minibatches are {batch_size} rows of .* plate 'series' has 5 rows in"):
        pv.fit(model, guide, X, objective, epochs=1, batch_size=batch_size)
    pv.fit(model, guide, X, objective, epochs=1, batch_size=N)


def test_a_list_of_sequences_does_not_count_the_data():
    """The first sequence is as long as the minibatch."""

    def model(means, sequences):
        with pyro.plate("data", len(means)):
            pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=means)

    pyro.clear_param_store()
    lengths = [5, 3, 2, 4, 1, 8, 2, 6, 4, 3]
    loader = DataLoader(
        [(X[i, 0], torch.zeros(lengths[i])) for i in range(10)],
        5,
        collate_fn=lambda rows: (torch.stack([mean for mean, _ in rows]), [sequence for _, sequence in rows]),
    )
    history = pv.fit(model, lambda *_: None, loader, pv.ELBO(), epochs=1, lr=1e-12, progress=False)
    exact = dist.Normal(0.0, 1.0).log_prob(X[:10, 0]).mean().item()
    assert history.train_bound.iloc[0] == pytest.approx(exact, rel=1e-5)


def test_the_points_of_one_set_at_a_time_are_data():
    def model(x):
        with pyro.plate("points", x.shape[1]):
            pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=x[0])

    pyro.clear_param_store()
    history = pv.fit(model, lambda x: None, X, pv.ELBO(), epochs=1, batch_size=1, lr=1e-12, progress=False)
    exact = dist.Normal(0.0, 1.0).log_prob(X).mean().item()
    assert history.train_bound.iloc[0] == pytest.approx(exact, rel=1e-5)


def columns_first(x):
    with pyro.plate("columns", x.shape[1]), pyro.plate("rows", x.shape[0]):
        pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=x)


def test_minibatches_are_cut_from_their_own_plate():
    """The sum over data needs no outermost plate; a bound of each row does."""
    pyro.clear_param_store()
    exact = dist.Normal(0.0, 1.0).log_prob(X).sum(-1).mean().item()
    for data in (X, DataLoader(X, 8)):
        fit = functools.partial(pv.fit, columns_first, lambda x: None, data, epochs=1, lr=1e-12)
        options = {} if isinstance(data, DataLoader) else {"batch_size": 8}
        for objective in (pv.ELBO(), pyro.infer.Trace_ELBO()):
            assert fit(objective, **options).train_bound.iloc[0] == pytest.approx(exact, rel=1e-5)
        with pytest.raises(pv.PyroVAEError, match="'columns' has 5 rows, and minibatches are cut from the 8 rows of"):
            fit(pv.IWAE(2), **options)


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
    in_steps = list(dict.fromkeys(tuple(x.tolist()) for x in seen))
    in_steps.remove((3.0, 0.0, 1.0, 2.0))  # by a check, which moves rows
    assert in_steps == [(0.0, 1.0, 2.0, 3.0), (4.0, 5.0, 6.0, 7.0), (8.0, 9.0, 10.0, 11.0)]


class Rows(IterableDataset):
    def __iter__(self):
        return iter(X)


class Shuffled(IterableDataset):
    """A stream in an order of its own each time, by torch's generator, Python's, or the DataLoader's."""

    def __init__(self, by):
        self.by = by

    def __iter__(self):
        order = list(range(N))
        if self.by == "torch":
            order = torch.randperm(N).tolist()
        else:
            random.shuffle(order)
        return iter(X[order])


LOADERS = {
    "in order": lambda: DataLoader(Rows(), batch_size=10),
    "torch": lambda: DataLoader(Shuffled("torch"), batch_size=10),
    "random": lambda: DataLoader(Shuffled("random"), batch_size=10),
    "generator": lambda: DataLoader(Rows(), batch_size=10, generator=torch.Generator().manual_seed(0)),
    "map": lambda: DataLoader(X, batch_size=10, shuffle=True),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_training_on_a_loader_resumes_as_unbroken(loader, tmp_path):
    """A look at the first minibatch leaves the random numbers of the training as they are."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1) * pyro.param("b", torch.tensor(1.0)), 0.4))

    ends = []
    for parts in ((4,), (2, 4)):
        pyro.clear_param_store()
        for epochs in parts:
            model, _ = program(*PROGRAMS["rows"][:2])
            path = tmp_path / f"{len(parts)}.pt"
            pv.fit(
                model,
                guide,
                LOADERS[loader](),
                pv.ELBO(1, "monte_carlo"),
                epochs=epochs,
                lr=1e-2,
                seed=0,
                checkpoint=path,
            )
        ends.append((pyro.param("m").item(), pyro.param("b").item()))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("outer", [True, False])
def test_of_two_plates_around_the_data_it_is_that_of_the_latents_too(outer):
    """Cells with counts of genes: the latents belong to cells, whichever plate is entered first."""
    x, genes = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), 5

    def model(x):
        cells, columns = pyro.plate("cells", len(x), dim=-1), pyro.plate("genes", genes, dim=-2)
        with cells:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with cells if outer else columns, columns if outer else cells:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x):
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("cells", len(x), dim=-1):
            pyro.sample("z", dist.Normal(shift + x.sum(1) / 6, 6**-0.5))  # the posterior

    pyro.clear_param_store()
    covariance = torch.eye(genes) + torch.ones(genes, genes)
    exact = dist.MultivariateNormal(torch.zeros(genes), covariance).log_prob(x).mean().item()
    history = pv.fit(model, guide, x, pv.IWAE(4), epochs=1, batch_size=5, lr=1e-6, progress=False)
    assert history["train_bound"].item() == pytest.approx(
        exact, abs=1e-3
    )  # a shift of 3e-6, and the rounding of float32
