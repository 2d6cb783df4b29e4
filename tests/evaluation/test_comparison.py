"""pv.compare: each column against its exact value on a linear-Gaussian program."""

from __future__ import annotations

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import LinearGaussian
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.engine import bars
from pyro_vae.evaluation import pieces
from pyro_vae.evaluation.measured import _signal_to_noise


def parametrised(program):
    """The program with its matrices as Pyro parameters: W and b of the model, A of the guide."""

    def model(x):
        W, b = pyro.param("W", program.W), pyro.param("b", program.b)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", program.prior)
            pyro.sample("x", dist.Normal(z @ W.T + b, program.sigma).to_event(1), obs=x)

    def guide(x):
        A = pyro.param("A", program.A)
        with pyro.plate("data", len(x)):
            loc = x @ A.T + program.c
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=program.L.tril()))

    return model, guide


def test_bounds_errors_and_deviations():
    program = LinearGaussian(3, 2, 300, wrong=True)
    model, guide = parametrised(program)
    objectives = [pv.ELBO(), pv.ELBO(1, "monte_carlo"), pv.ELBO(16, "monte_carlo"), pv.IWAE(1), pv.IWAE(64)]
    table = pv.compare(model, guide, program.x, objectives, repeats=40, seed=0)
    assert list(table.columns) == [
        "bound", "bound_se", "estimator_std", "grad_snr_model", "grad_snr_guide", "grad_bias_z", "milliseconds",
        "gap", "gap_se", "pareto_k", "is_bound",
    ]  # fmt: skip
    assert table.index.names == ["objective", "particles"]
    exact = program.exact_elbo()
    for key in [("ELBO, closed-form KL", 1), ("ELBO, Monte Carlo KL", 1), ("ELBO, Monte Carlo KL", 16), ("IWAE", 1)]:
        row = table.loc[key]
        noise = row.estimator_std / math.sqrt(40 * 300)
        assert abs(row.bound - exact.mean()) < 4 * noise
        # the variance over data is that of the exact bounds plus the noise of 40 repeats
        expected = math.sqrt((exact.var().item() + row.estimator_std**2 / 40) / 300)
        assert row.bound_se == pytest.approx(expected, rel=0.02)
    one, sixteen = table.loc[("ELBO, Monte Carlo KL", 1)], table.loc[("ELBO, Monte Carlo KL", 16)]
    assert one.estimator_std / sixteen.estimator_std == pytest.approx(4, rel=0.05)
    assert table.bound["IWAE", 64] > table.bound["IWAE", 1]
    assert table.bound["IWAE", 64] < program.log_evidence().mean() + 4 * table.bound_se["IWAE", 64]
    assert (table.milliseconds > 0).all()


@pytest.mark.slow
def test_gap_is_to_the_best_estimate_of_log_evidence():
    program = LinearGaussian(3, 2, 300)
    program.c = program.c + 0.3 * program.L.diagonal()
    program.L = 1.2 * program.L
    model, guide = parametrised(program)
    objectives = [pv.ELBO(), pv.IWAE(4)]
    table = pv.compare(model, guide, program.x, objectives, repeats=5, seed=0)
    row = table.loc["ELBO, closed-form KL", 1]
    exact = program.log_evidence() - program.exact_elbo()
    noise = math.hypot(row.estimator_std / math.sqrt(5 * 300), 1 / math.sqrt(1000 * 300))
    assert abs(row.gap - exact.mean()) < 4 * noise
    assert (table.gap + table.bound).std() < 1e-9  # all rows share one estimate of log p(x)
    assert table.pareto_k.nunique() == 1
    assert table.pareto_k.iloc[0] < 0.3
    for evidence, better in ((pv.ais(model, None, program.x, 30, 2), False), (annealed_above(program), True)):
        other = pv.compare(model, guide, program.x, objectives, repeats=5, seed=0, log_likelihood=evidence)
        moved = evidence.mean - (table.gap + table.bound).iloc[0] if better else 0.0
        assert other.gap.iloc[0] - table.gap.iloc[0] == pytest.approx(moved, abs=1e-9)
    with pytest.raises(ValueError, match="log_likelihood to be of the same data, got 300 of them for 10"):
        pv.compare(model, guide, program.x[:10], objectives, repeats=2, log_likelihood=annealed_above(program))


def annealed_above(program):
    """An estimate that is higher than any other."""
    right = LinearGaussian(3, 2, 300)
    evidence = pv.log_likelihood(right.model, right.guide, program.x, 2)
    return dataclasses.replace(evidence, per_datum=evidence.per_datum + 1)


def test_zero_variance_has_zero_deviation():
    program = LinearGaussian(3, 2, 20)
    table = pv.compare(*parametrised(program), program.x, [pv.IWAE(4)], repeats=3)
    assert table.estimator_std.item() < 1e-9
    assert table.bound.item() == pytest.approx(program.log_evidence().mean().item(), abs=1e-9)


def jumping(loc, low=None):
    def model(x):
        prior = dist.Normal(0.0, 1.0) if low is None else dist.Uniform(low, 1.0)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc(pyro.sample("z", prior)), 1.0), obs=x)

    def guide(x):
        shift = pyro.param("shift", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(shift + x / 2, 0.8) if low is None else dist.Uniform(low - 0 * shift, 1.0))

    return model, guide


PATHS = [pv.ELBO(), pv.ELBO(2, "monte_carlo", "stl"), pv.IWAE(8), pv.IWAE(8, "dreg"), pv.TVO(4, [0.0, 0.3, 1.0])]
NO_PATHS = [pv.IWAE(8, "score"), pv.IWAE(8, "vimco"), pv.RWS(8), pv.ELBO(free_bits=0.1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smooth", "threshold"])
def test_a_gradient_along_paths_is_measured_beside_the_score_function(name):
    loc = {"smooth": lambda z: z, "threshold": lambda z: torch.where(z > 0, 2.0, -1.0)}[name]
    program, x = jumping(loc), torch.randn(500)
    table = pv.compare(program, x, PATHS + NO_PATHS, repeats=20, seed=0)
    z = table.grad_bias_z.to_numpy()
    assert all(map(math.isnan, z[len(PATHS) :]))
    assert (abs(z[: len(PATHS)]) < 4).all() if name == "smooth" else (abs(z[: len(PATHS)]) > 4).all()


def test_sticking_the_landing_is_biased_for_iwae_alone():
    table = pv.compare(jumping(lambda z: z), torch.randn(500), [pv.IWAE(8, "stl")], repeats=20, seed=0)
    assert abs(table.grad_bias_z.item()) > 10
    exact = LinearGaussian(3, 2, 100)  # the exact posterior: both gradients are zero but for rounding
    table = pv.compare(parametrised(exact), exact.x, [pv.IWAE(4, "stl"), pv.ELBO(4, gradient="stl")], seed=0)
    assert (table.grad_bias_z.abs() < 4).all()


def test_no_score_function_leaves_the_bias_of_a_gradient_open():
    """The guide's support depends on a parameter."""
    table = pv.compare(jumping(lambda z: z, low=-1.0), torch.randn(50), [pv.IWAE(4)], repeats=2, seed=0)
    assert math.isnan(table.grad_bias_z.item())


@pytest.mark.slow
def test_gradient_signal_to_noise_is_that_of_many_gradients():
    """Against the mean and covariance of many gradients by plain autograd, without the package."""
    program = LinearGaussian(3, 2, 5, wrong=True)
    model, guide = parametrised(program)
    table = pv.compare(model, guide, program.x, [pv.IWAE(4)], repeats=1500, seed=0)
    W, b, A = (t.clone().requires_grad_() for t in (program.W, program.b, program.A))
    gradients = []
    for _ in range(1500):
        z = program.x @ A.T + program.c + torch.randn(4, 5, 2, dtype=torch.float64) @ program.L.tril().T
        q = dist.MultivariateNormal(program.x @ A.T + program.c, scale_tril=program.L.tril())
        log_w = dist.Normal(z @ W.T + b, program.sigma).log_prob(program.x).sum(-1)
        log_w = log_w + program.prior.log_prob(z) - q.log_prob(z)
        gradients.append(torch.autograd.grad(log_w.logsumexp(0).mean(), (W, b, A)))
    for column, parts in (("grad_snr_model", (0, 1)), ("grad_snr_guide", (2,))):
        stacked = torch.stack([torch.cat([g[i].flatten() for i in parts]) for g in gradients])
        expected = stacked.mean(0).norm() / stacked.var(0).sum().sqrt()
        assert table[column].item() == pytest.approx(expected.item(), rel=0.07)


def test_signal_to_noise_of_pure_noise_is_not_overstated():
    ratios = []
    for _ in range(200):
        ratios.append(_signal_to_noise(torch.randn(5, 1000)) ** 2)
    # without the correction the mean would be 1 / 5
    assert sum(ratios) / len(ratios) < 0.02


def test_large_batches_are_measured_in_parts(monkeypatch):
    program = LinearGaussian(3, 2, 30)
    whole = pv.compare(*parametrised(program), program.x, [pv.IWAE(4)], repeats=2)
    monkeypatch.setattr("pyro_vae.evaluation.measured.ROWS_AT_ONCE", 28)
    parts = pv.compare(*parametrised(program), program.x, [pv.IWAE(4)], repeats=2)
    # with the exact posterior as guide, neither bound has noise
    assert whole.bound.item() == pytest.approx(parts.bound.item(), abs=1e-9)
    assert whole.bound_se.item() == pytest.approx(parts.bound_se.item(), abs=1e-9)


@pytest.mark.slow
def test_the_default_table():
    digits = pv.data.load("digits", binarize="fixed")
    vae = pv.mlp_vae(digits.event_shape, latent_dim=2, hidden_dims=(50,))
    pv.fit(vae.model, vae.guide, digits.train, pv.ELBO(), epochs=5, batch_size=64, lr=3e-3)
    table = pv.compare(vae.model, vae.guide, digits.test, repeats=5, seed=0)
    assert list(table.index) == [
        ("ELBO, closed-form KL", 1), ("ELBO, Monte Carlo KL", 1), ("ELBO, Monte Carlo KL", 16),
        ("IWAE", 1), ("IWAE", 4), ("IWAE", 16), ("IWAE", 64), ("IWAE", 256),
    ]  # fmt: skip
    assert table.bound["IWAE"].is_monotonic_increasing
    # all rows have one seed, so IWAE with one particle equals the Monte Carlo ELBO up to rounding
    assert table.bound["IWAE", 1] == pytest.approx(table.bound["ELBO, Monte Carlo KL", 1], rel=1e-5)
    closed, sampled = table.loc[("ELBO, closed-form KL", 1)], table.loc[("ELBO, Monte Carlo KL", 1)]
    noise = math.hypot(closed.estimator_std, sampled.estimator_std) / math.sqrt(5 * len(digits.test))
    assert abs(closed.bound - sampled.bound) < 4 * noise


def test_measuring_leaves_no_gradient_and_repeats_with_a_seed():
    vae = pv.mlp_vae((4,), latent_dim=2, likelihood="gaussian")
    x = torch.randn(20, 4)
    state = torch.get_rng_state()
    tables = [pv.compare(vae.model, vae.guide, x, [pv.IWAE(3)], repeats=3, seed=5) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    columns = ["bound", "bound_se", "estimator_std", "grad_snr_model", "grad_snr_guide"]
    assert tables[0][columns].equals(tables[1][columns])
    assert all(p.grad is None for p in vae.parameters())


def test_programs_without_a_closed_form_lose_that_row_and_say_so():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(5.0))
            pyro.sample("x", dist.Normal(z * pyro.param("w", torch.ones(())), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.ones(())) * x, 1.0))

    with pytest.warns(UserWarning, match=r"no row 'ELBO, closed-form KL'.*site 'z'.*StudentT"):
        table = pv.compare(model, guide, torch.randn(10), repeats=2)
    assert "ELBO, closed-form KL" not in table.index.get_level_values("objective")
    assert len(table) == 7


def test_names_and_bad_arguments():
    vae = pv.mlp_vae((4,), latent_dim=2, likelihood="gaussian")
    x = torch.randn(20, 4)
    table = pv.compare(vae.model, vae.guide, x, {"mine": pv.IWAE(3), "yours": pv.IWAE(3)}, repeats=2)
    assert list(table.index) == [("mine", 3), ("yours", 3)]
    with pytest.raises(ValueError, match=r"different names or particles.*dictionary"):
        pv.compare(vae.model, vae.guide, x, [pv.IWAE(3), pv.IWAE(3)])
    with pytest.raises(ValueError, match=r"repeats to be an integer, at least 2, .*got 1"):
        pv.compare(vae.model, vae.guide, x, repeats=1)
    assert len(pv.compare(vae.model, vae.guide, x, pv.IWAE(2), repeats=2)) == 1
    with pytest.raises(ValueError, match="expected objectives of pyro_vae, which have a bound per datum, got <pyro"):
        pv.compare(vae.model, vae.guide, x, [pyro.infer.Trace_ELBO()])
    program = LinearGaussian(3, 2, 20)
    with pytest.raises(ValueError, match="expected a program with parameters, whose gradients can be measured"):
        pv.compare(program.model, program.guide, program.x, [pv.IWAE(2)])


def test_one_datum_has_a_bound_without_an_error_over_data():
    vae = pv.mlp_vae((4,), latent_dim=2, likelihood="gaussian")
    one = pv.compare(vae, torch.randn(1, 4), pv.IWAE(3), repeats=3).iloc[0]
    assert math.isfinite(one.bound)
    assert math.isnan(one.bound_se)


@pytest.mark.slow
def test_particles_one_by_one_beside_compiled_code():
    vae = pv.mlp_vae((4,), latent_dim=2, likelihood="gaussian")
    x, objectives = torch.randn(20, 4), pv.ELBO(1, "monte_carlo", vectorize_particles=False)
    tables = [pv.compare(vae, x, objectives, repeats=2, compile=each, seed=0) for each in (False, True)]
    assert tables[0].bound.item() == pytest.approx(tables[1].bound.item(), rel=1e-5)


def test_programs_of_two_arguments():
    vae = pv.mlp_vae((4,), latent_dim=2, likelihood="gaussian")
    x, shift = torch.randn(20, 4), torch.randn(20, 4)

    def model(x, shift):
        vae.model(x - shift)

    def guide(x, shift):
        vae.guide(x - shift)

    both = pv.compare(model, guide, (x, shift), pv.IWAE(2), repeats=2, seed=0)
    one = pv.compare(vae.model, vae.guide, x - shift, pv.IWAE(2), repeats=2, seed=0)
    assert both.bound.item() == pytest.approx(one.bound.item())


def test_compiled_code_is_refused_where_each_sample_must_be_checked(without_inductor):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(pyro.param("rate", torch.tensor(1.0))))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.1))

    x = torch.tensor([2.0, 3.0])  # no sample is below zero
    assert math.isfinite(pv.compare(model, guide, x, pv.IWAE(4), repeats=2, seed=0).bound.item())
    with pytest.raises(ValueError, match="compiled code does not check samples"):
        pv.compare(model, guide, x, pv.IWAE(4), repeats=2, compile=True, seed=0)


@pytest.mark.slow
def test_a_bar_over_all_data_that_are_read(monkeypatch):
    """As pv.log_likelihood has it; data in memory have the bars of their rows alone."""
    made, own = [], bars.progress_bar

    def keep(progress, **options):
        bar = own(progress, **options)
        if progress and options.get("desc") == "x":
            made.append(options | {"seen": 0})
            bar.update = lambda n=1: made[-1].update(seen=made[-1]["seen"] + n)
        return bar

    monkeypatch.setattr(bars, "progress_bar", keep)
    monkeypatch.setattr(pieces, "ELEMENTS_AT_ONCE", 60)  # 20 rows of 3
    program = LinearGaussian(3, 2, 50)
    loader = DataLoader(TensorDataset(program.x), batch_size=10)
    for x, seen in ((loader, [50]), (program.x, [])):
        made.clear()
        pv.compare(*parametrised(program), x, pv.ELBO(), repeats=2, seed=0)
        assert [bar["seen"] for bar in made] == [bar["total"] for bar in made] == seen
