"""Evaluations of what is read, part by part: exact values, one pass, little memory, one warning for all data."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from helpers.arrays import OnDisk
from helpers.programs import LinearGaussian, wide
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyro_vae as pv
from pyro_vae.evaluation import parts
from pyro_vae.evaluation.moments import Moments

N = 29  # of which 8 rows are in a part, and 5 in the last one
PROGRAM = wide((4, 2, N))
X, EXACT = PROGRAM.x, PROGRAM.log_evidence()
SIMPLE = dist.Normal(0.0, 2**0.5)  # p(x) of the program below


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "rows_at_once", lambda args: 8)


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


KINDS = {
    "loader": lambda: DataLoader(X, batch_size=3),
    "one by one": lambda: DataLoader(X),
    "larger minibatches": lambda: DataLoader(X, batch_size=20),
    "data set": lambda: DataLoader(TensorDataset(X), batch_size=8),
    "workers": lambda: DataLoader(X, batch_size=3, num_workers=2),
    "dictionaries": lambda: DataLoader([{"x": row} for row in X], batch_size=8),
    "labels": lambda: DataLoader([{"label": 0, "x": row} for row in X], batch_size=8, collate_fn=pv.data.collate("x")),
    "own batches": lambda: DataLoader(X, batch_sampler=[range(10), range(10, 11), range(11, N)]),
    "some without rows": lambda: DataLoader([X[:5], X[:0], X[5:20], X[20:], X[:0]], batch_size=None),
    "stream": lambda: DataLoader(Stream(X), batch_size=7),
    "read once": lambda: DataLoader(Stream(iter(X)), batch_size=7),
    "NumPy": lambda: X.numpy(),
    "on disk": lambda: OnDisk(X.numpy()),
    "dictionary": lambda: {"x": OnDisk(X.numpy())},
    "csr": lambda: scipy.sparse.csr_array(X.numpy()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_log_p_of_each_datum_in_the_order_of_reading(kind):
    result = pv.log_likelihood(PROGRAM, KINDS[kind](), 400, seed=0)
    assert len(result.per_datum) == N
    assert (((result.per_datum - EXACT) / result.per_datum_error).abs() < 4.5).all()


def test_log_p_over_a_shuffled_loader():
    loader = DataLoader(X, batch_size=8, shuffle=True)
    result = pv.log_likelihood(PROGRAM, loader, 400, seed=0)
    assert abs(result.mean - EXACT.mean().item()) < 4 * result.monte_carlo_error
    assert abs(result.standard_error - pv.Estimate.of(EXACT).standard_error) < 0.02
    state = torch.get_rng_state()
    assert torch.equal(result.per_datum, pv.log_likelihood(PROGRAM, loader, 400, seed=0).per_datum)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(result.per_datum, pv.log_likelihood(PROGRAM, loader, 400, seed=1).per_datum)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"refine": True}, {"error": 0.02}, {"error": 0.005, "error_of": "mean"}])
def test_log_p_by_other_numbers_of_samples(options):
    result = pv.log_likelihood(PROGRAM, DataLoader(X, batch_size=8), 200, seed=0, **options)
    assert abs(result.mean - EXACT.mean().item()) < 4 * result.monte_carlo_error
    if "error" in options:
        found = result.monte_carlo_error if "error_of" in options else result.per_datum_error.max()
        assert found < 1.3 * options["error"]


@pytest.mark.slow
def test_annealing():
    for start in ("prior", "guide"):
        result = pv.ais(PROGRAM, DataLoader(X, batch_size=16), 15, 64, start=start, num_leapfrog=3, seed=0)
        assert result.log_weights.shape == (64, N)
        assert (((result.per_datum - EXACT) / result.per_datum_error).abs() < 4.5).all()
        assert len(result.acceptance) == 14
        assert 0.5 < result.acceptance.mean() < 1
    sandwich = pv.bdmc(PROGRAM, DataLoader(X, batch_size=16), 15, 64, start="guide", num_leapfrog=3, seed=0)
    like_x = LinearGaussian(4, 2, N)
    like_x.x = sandwich.x
    errors = (sandwich.lower.per_datum - like_x.log_evidence()) / sandwich.lower.per_datum_error
    assert (errors.abs() < 4.5).all()
    above = pv.Estimate.of(sandwich.upper_per_datum - like_x.log_evidence())
    assert -4 * above.standard_error < above.value < 0.1


@pytest.mark.parametrize("kind", ["loader", "stream", "on disk"])
def test_the_parts_of_the_elbo(kind):
    found, whole = (pv.decompose_elbo(PROGRAM, x, 100, seed=1) for x in (KINDS[kind](), X))
    assert found.num_data == N
    assert abs(found.elbo.value - PROGRAM.exact_elbo().mean().item()) < 4 * found.elbo.standard_error
    for name in ("reconstruction", "mutual_information", "marginal_kl"):
        one, other = getattr(found, name), getattr(whole, name)
        assert abs(one.value - other.value) < 4 * np.hypot(one.standard_error, other.standard_error)
    # the same samples in other portions
    again = pv.decompose_elbo(PROGRAM, DataLoader(X.flip(0), batch_size=5), 100, seed=1)
    assert abs(again.mutual_information.value - found.mutual_information.value) < 0.05


def diagonal(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, :2] * 0.5 + 1, torch.tensor([0.5, 2.0]).double()).to_event(1))


@pytest.mark.parametrize("kind", ["loader", "workers", "on disk", "csr"])
def test_active_units_are_those_of_all_data(kind):
    table = pv.active_units(PROGRAM.model, diagonal, KINDS[kind](), seed=0)
    whole = pv.active_units(PROGRAM.model, diagonal, X, seed=0)
    means = X[:, :2] * 0.5 + 1
    assert table.variance.tolist() == pytest.approx(means.var(0).tolist(), rel=1e-9)
    squares = (means - means.mean(0)).square()
    assert table.variance_se.tolist() == pytest.approx((squares.std(0) / N**0.5).tolist(), rel=1e-9)
    sd = torch.tensor([0.5, 2.0]).double()
    kl = 0.5 * (means.square() + sd.square() - 1) - sd.log()
    if table.kl.notna().all():
        assert table.kl.tolist() == pytest.approx(kl.mean(0).tolist())
        assert table.kl_se.tolist() == pytest.approx((kl.std(0) / N**0.5).tolist())
    for name in whole:
        assert table[name].tolist() == pytest.approx(whole[name].tolist(), nan_ok=True)


def parametrised(program):
    """The same program with a parameter, which gradients need."""

    def guide(x):
        shift = pyro.param("shift", torch.zeros(2, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x @ program.A.T + program.c + shift, scale_tril=program.L.tril()))

    return program.model, guide


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["read once", "on disk"])
def test_the_table_of_objectives(kind):
    objectives = {"elbo": pv.ELBO(2, "monte_carlo"), "iwae": pv.IWAE(8)}
    table = pv.compare(parametrised(PROGRAM), KINDS[kind](), objectives, repeats=40, seed=0)
    row = table.loc["elbo", 2]
    elbo = PROGRAM.exact_elbo()
    assert abs(row.bound - elbo.mean().item()) < 4 * row.estimator_std / (40 * N) ** 0.5
    assert row.gap == pytest.approx((EXACT - elbo).mean().item(), abs=0.02)
    assert row.bound_se == pytest.approx(pv.Estimate.of(elbo).standard_error, rel=0.05)
    whole = pv.compare(parametrised(PROGRAM), X, objectives, repeats=40, seed=1)
    for name in ("estimator_std", "bound_se"):
        assert table[name].tolist() == pytest.approx(whole[name].tolist(), rel=0.25)
    assert row.grad_snr_guide == pytest.approx(whole.grad_snr_guide["elbo", 2], rel=0.4)
    assert (table.bound - whole.bound).abs().max() < 0.05
    assert (table.grad_bias_z.abs() < 4).all()


def test_groups_of_arviz():
    exact = LinearGaussian(4, 2, N)  # whose guide is the posterior, so that each log-weight is log p(x)
    for x in (DataLoader(exact.x, batch_size=8), OnDisk(exact.x.numpy())):
        groups = pv.to_arviz(exact, x, 10, seed=0)
        assert dict(groups["posterior"]["z"].sizes) == {"chain": 1, "draw": 10, "data": N, "latent": 2}
        assert np.allclose(groups["observed_data"]["x"].values, exact.x.numpy())
        assert np.allclose(groups["sample_stats"]["log_weight"].values, exact.log_evidence().numpy())
        assert groups["prior_predictive"]["x"].shape == (1, 10, N, 4)
    coords = {"data": np.arange(N) + 100}
    assert pv.to_arviz(exact, DataLoader(exact.x), 2, coords=coords)["posterior"]["data"].values[-1] == 100 + N - 1


@pytest.mark.slow
@pytest.mark.parametrize("refine", [False, True])
def test_posterior_means(refine):
    exact = LinearGaussian(4, 2, N)
    found = pv.expect(PROGRAM, DataLoader(X, batch_size=8), "z", 400, refine=refine, seed=0)
    truth = X @ exact.A.T + exact.c
    assert (((found.value - truth) / found.standard_error).abs() < 4.5).all()


@pytest.mark.slow
def test_the_other_evaluations():
    loader = DataLoader(X, batch_size=8)
    gaps = pv.inference_gaps(PROGRAM, loader, 100, num_steps=20, seed=0)
    assert gaps.elbo.mean().item() == pytest.approx(PROGRAM.exact_elbo().mean().item(), abs=0.1)
    total = (EXACT - PROGRAM.exact_elbo()).mean().item()
    found = pv.calibrate(PROGRAM, loader, 50, seed=0)
    assert len(found.ranks) == N == len(found.x)
    assert found.gap.value > -3 * found.gap.standard_error
    table = pv.blame(PROGRAM, loader, 50, num_samples=100, seed=0)
    assert table.kl.sum() == pytest.approx(total, abs=0.1)
    refined = pv.refine(PROGRAM, loader, num_steps=20, seed=0)
    ll = pv.log_likelihood(PROGRAM.model, refined, loader, 200, seed=0)
    assert abs(ll.mean - EXACT.mean().item()) < 4 * ll.monte_carlo_error


@pytest.mark.parametrize("kind", ["loader", "labels", "read once", "on disk", "dictionary"])
def test_models_are_compared_on_the_same_rows(kind):
    models = {"wide": PROGRAM, "exact": LinearGaussian(4, 2, N)}
    table = pv.compare_models(models, KINDS[kind](), 200, refine=False, seed=0)
    assert (table.log_likelihood - EXACT.mean().item()).abs().max() < 4 * table.difference_mc.max()
    assert table.difference_se.max() < 0.05  # of rows in another order, it would be that of both means
    shuffled = pv.compare_models(models, DataLoader(X, batch_size=8, shuffle=True), 200, refine=False, seed=0)
    assert shuffled.difference_se.max() < 0.05


EVALUATIONS = {
    "log_likelihood": lambda program, x: pv.log_likelihood(*program, x, 30, seed=0),
    "ais": lambda program, x: pv.ais(*program, x, 5, 2, seed=0),
    "bdmc": lambda program, x: pv.bdmc(*program, x, 5, 2, seed=0),
    "decompose_elbo": lambda program, x: pv.decompose_elbo(*program, x, 3, seed=0),
    "active_units": lambda program, x: pv.active_units(*program, x, 3, seed=0),
    "compare": lambda program, x: pv.compare(*program, x, [pv.IWAE(2)], repeats=2, seed=0),
    "to_arviz": lambda program, x: pv.to_arviz(program, x, 5, seed=0),
    "expect": lambda program, x: pv.expect(*program, x, "z", 30, seed=0),
    "inference_gaps": lambda program, x: pv.inference_gaps(*program, x, 30, num_steps=3, seed=0),
    "calibrate": lambda program, x: pv.calibrate(*program, x, 5, seed=0),
    "blame": lambda program, x: pv.blame(*program, x, 3, num_samples=30, seed=0),
    "refine": lambda program, x: pv.refine(*program, x, num_steps=3, seed=0),
    "compare_models": lambda program, x: pv.compare_models({"a": program, "b": program}, x, 30, refine=False, seed=0),
}
LONG = ("blame", "calibrate", "compare_models")
every = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in EVALUATIONS]
)


@every
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_few_rows_are_read_at_a_time_and_each_row_once(name):
    """`refine` keeps the rows; `decompose_elbo` compares each sample with all data, and each model reads them."""
    array = OnDisk(X.numpy())
    EVALUATIONS[name](parametrised(PROGRAM), array)
    assert array.most <= (N if name == "refine" else 64 if name == "compare_models" else 8)
    assert array.given <= N * {"decompose_elbo": 2, "compare_models": 3}.get(name, 1) + 2


def simple(rows):
    """A program with other names, for single numbers."""
    shift = pyro.param("shift", torch.zeros(()))
    with pyro.plate("rows", len(rows)):
        z = pyro.sample("z", dist.Normal(shift, 1.0))
        pyro.sample("seen", dist.Normal(z, 1.0), obs=rows)


def simple_guide(rows):
    with pyro.plate("rows", len(rows)):
        pyro.sample("z", dist.Normal(rows / 2, 0.5**0.5))


def own_parameters(rows):
    loc = pyro.param("loc", lambda: rows / 2)
    with pyro.plate("rows", len(rows)):
        pyro.sample("z", dist.Normal(loc, 0.5**0.5))


ROWS = torch.linspace(-2, 2, 25)
SIMPLE_PROGRAM = simple, simple_guide


@every
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (lambda: DataLoader(ROWS[:0], batch_size=4), "expected (a datum|at least 2 data)"),
        (lambda: DataLoader(torch.where(ROWS > 1.9, torch.nan, ROWS), batch_size=4), "x to be finite, got NaN"),
        (lambda: OnDisk(torch.where(ROWS > 1.9, torch.inf, ROWS).numpy()), "x to be finite, got infinity"),
        (
            lambda: DataLoader([{"row": r} for r in ROWS], batch_size=4),
            r"takes as arguments, \['rows'\], got \['row'\]",
        ),
        (lambda: {"rows": ROWS, "y": ROWS}, r"takes as arguments, \['rows'\], got \['y'\]"),
        (lambda: DataLoader(["a", "b"]), "begin with a str|begins? with a list|dense tensor"),
    ],
    ids=["empty", "nan", "infinity", "key", "dictionary", "words"],
)
def test_these_are_refused(name, x, message):
    settings = pyro.settings.get("validate_distributions_pyro")
    with pytest.raises(pv.PyroVAEError, match=message) as caught:
        EVALUATIONS[name](SIMPLE_PROGRAM, x())
    assert "\n" not in str(caught.value)
    assert pyro.settings.get("validate_distributions_pyro") == settings


@every
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_datum(name):
    few = name in ("active_units", "blame", "calibrate")
    for x in (DataLoader(ROWS[:1]), OnDisk(ROWS[:1].numpy())):
        if few:
            with pytest.raises(pv.PyroVAEError, match="at least 2 data"):
                EVALUATIONS[name](SIMPLE_PROGRAM, x)
        else:
            EVALUATIONS[name](SIMPLE_PROGRAM, x)


@pytest.mark.parametrize("name", [name for name in EVALUATIONS if name not in ("refine", "compare_models", "blame")])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_parameters_for_each_datum_need_all_data(name):
    message = "expected a program that gives a datum the same densities in every minibatch.* Pass x as a tensor"
    evaluation = EVALUATIONS[name]
    if name in ("ais", "bdmc"):
        evaluation = lambda program, x: getattr(pv, name)(*program, x, 5, 2, start="guide")  # noqa: E731
    with pytest.raises(pv.PyroVAEError, match=message):
        evaluation((simple, own_parameters), DataLoader(ROWS, batch_size=8))
    pyro.clear_param_store()
    evaluation((simple, own_parameters), ROWS)


class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        return ROWS[i] + torch.rand(())


def test_the_aggregate_posterior_needs_the_same_data_twice():
    with pytest.raises(pv.PyroVAEError, match="got a DataLoader that can be read only once"):
        pv.decompose_elbo(*SIMPLE_PROGRAM, DataLoader(Stream(iter(ROWS)), batch_size=8), 3)
    with pytest.raises(pv.PyroVAEError, match=r"got 25 and 25 rows, with other numbers\. Pass a DataLoader"):
        pv.decompose_elbo(*SIMPLE_PROGRAM, DataLoader(Noisy(), batch_size=8), 3)
    shuffled = DataLoader(ROWS, batch_size=8, shuffle=True)
    assert pv.decompose_elbo(*SIMPLE_PROGRAM, shuffled, 3).num_data == 25


def test_arguments_that_do_not_fit_what_is_read():
    stream = DataLoader(Stream(ROWS), batch_size=8)
    with pytest.raises(pv.PyroVAEError, match=r"got a DataLoader that does not say\. Pass"):
        pv.log_likelihood(*SIMPLE_PROGRAM, stream, error=0.1, error_of="mean")
    ll = pv.log_likelihood(*SIMPLE_PROGRAM, ROWS[:8], 30)
    for x in (stream, OnDisk(ROWS.numpy())):
        for call in (lambda x: pv.compare(*SIMPLE_PROGRAM, x, [pv.IWAE(2)], repeats=2, log_likelihood=ll),):
            with pytest.raises(pv.PyroVAEError, match="to be of the same data, got 8 of them for 25 data"):
                call(x)
        with pytest.raises(pv.PyroVAEError, match="to be of the same data, got 8 of them for 25 data"):
            pv.inference_gaps(*SIMPLE_PROGRAM, x, 30, num_steps=2, log_likelihood=ll)
    sideways = DataLoader(range(4), batch_size=2, collate_fn=lambda rows: (torch.zeros(2), torch.zeros(3)))
    with pytest.raises(pv.PyroVAEError, match="minibatches to be tensors with a row for each datum, got"):
        pv.log_likelihood(lambda a, b: simple(a), lambda a, b: simple_guide(a), sideways, 30)


def test_a_row_outside_the_support_is_refused_when_it_is_read():
    def counts(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    x = torch.ones(25)
    x[-1] = -2
    with pytest.raises(ValueError, match="log_prob at site 'x'"):
        pv.log_likelihood(counts, simple_guide, DataLoader(x, batch_size=8), 30)


def test_what_is_wrong_on_any_data_is_said_of_the_first_part():
    def other(x):
        with pyro.plate("others", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(pv.PyroVAEError, match="plate") as caught:
        pv.log_likelihood(simple, other, ROWS, 30)
    with pytest.raises(pv.PyroVAEError, match=re.escape(str(caught.value).split(":")[0])):
        pv.log_likelihood(simple, other, DataLoader(ROWS, batch_size=8), 30)


@pytest.mark.parametrize("x", [ROWS, DataLoader(ROWS, batch_size=8)], ids=["tensor", "loader"])
def test_one_warning_for_all_data(x):
    def narrow(rows):
        with pyro.plate("rows", len(rows)):
            pyro.sample("z", dist.Normal(torch.where(rows < 0, 4.0, rows / 2), 0.2))

    def bounded(rows):
        with pyro.plate("rows", len(rows)):
            pyro.sample("z", dist.Categorical(torch.tensor([1.0, 0.0])))

    def discrete(rows):
        with pyro.plate("rows", len(rows)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("seen", dist.Normal(z.float(), 1.0), obs=rows)

    for model, guide, number, what in ((simple, narrow, 500, "k-hat above 0.7"), (discrete, bounded, 30, "the guide")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = pv.log_likelihood(model, guide, x, number, seed=0)
        said = [str(each.message) for each in caught]
        assert len(said) == 1, said
        assert what in said[0]
        if number == 500:
            assert said[0].startswith(f"{result.share_high_k:.1%} of the data")


def test_an_error_in_a_later_part_leaves_everything_as_it_was():
    vae = pv.mlp_vae((4,), latent_dim=2, hidden_dims=(5,), likelihood="gaussian")
    calls = []

    def fails(z):
        calls.append(z)
        if len(calls) > 3:
            raise RuntimeError("stop")
        return z

    before, validation = torch.get_rng_state(), pyro.settings.get("validate_distributions_pyro")
    with pytest.raises(RuntimeError, match="stop"):
        pv.expect(vae, DataLoader(X.float(), batch_size=8), fails, 30, seed=0)
    assert vae.training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert pyro.settings.get("validate_distributions_pyro") == validation


def test_masks_by_name():
    vae = pv.mlp_vae((4,), latent_dim=2, hidden_dims=(5,), likelihood="gaussian")
    x, mask = X.float(), X > -0.5
    rows = [{"mask": m, "x": row} for row, m in zip(x, mask, strict=True)]
    loader = DataLoader(rows, batch_size=8)
    whole = pv.log_likelihood(vae, (x, mask), 2000, seed=0)
    for data in (loader, {"mask": mask, "x": x}):
        found = pv.log_likelihood(vae, data, 2000, seed=1)
        error = torch.hypot(found.per_datum_error, whole.per_datum_error)
        assert (((found.per_datum - whole.per_datum) / error).abs() < 4.5).all()


def test_moments_of_parts_are_those_of_all_rows():
    values = torch.randn(41, 3, dtype=torch.float64).exp()
    moments = Moments()
    for part in values.split([1, 2, 30, 8]):
        moments.add(part)
    squares = (values - values.mean(0)).square()
    assert torch.allclose(moments.mean, values.mean(0), rtol=1e-12)
    assert torch.allclose(moments.variance, values.var(0), rtol=1e-12)
    assert torch.allclose(moments.standard_error, values.std(0) / 41**0.5, rtol=1e-12)
    assert torch.allclose(moments.variance_error, squares.std(0) / 41**0.5, rtol=1e-10)


def test_what_fits_in_memory_is_one_part(monkeypatch):
    monkeypatch.undo()
    array = OnDisk(X.numpy())
    on_disk, whole = (pv.log_likelihood(PROGRAM, x, 100, seed=0) for x in (array, X))
    assert torch.equal(on_disk.per_datum, whole.per_datum)
    assert str(on_disk).startswith("log p(x) = ")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_code_serves_all_parts(without_inductor):
    loader = DataLoader(X, batch_size=8)
    found = pv.log_likelihood(PROGRAM, loader, 400, compile=True, seed=0)
    assert (((found.per_datum - EXACT) / found.per_datum_error).abs() < 4.5).all()
    annealed = pv.ais(PROGRAM, loader, 10, 32, compile=True, num_leapfrog=2, seed=0)
    assert (((annealed.per_datum - EXACT) / annealed.per_datum_error).abs() < 4.5).all()
    table = pv.compare(parametrised(PROGRAM), loader, [pv.IWAE(4)], repeats=5, compile=True, seed=0)
    assert table.gap.item() == pytest.approx(0.0, abs=0.1)


def test_a_real_data_set_of_hugging_face():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"x": X.tolist(), "label": [*range(N)]}).with_format(
        "torch", dtype=torch.float64
    )
    loader = DataLoader(table, batch_size=8, collate_fn=pv.data.collate("x"))
    found = pv.log_likelihood(PROGRAM, loader, 400, seed=0)
    assert (((found.per_datum - EXACT) / found.per_datum_error).abs() < 4.5).all()
