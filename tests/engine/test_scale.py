"""Minibatches, scales, masks and nested plates: what belongs inside a datum's bound, and what outside."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from itertools import combinations

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import LinearGaussian, z_score
from pyro import poutine

import pyro_vae as pv

OBJECTIVES = [
    pv.ELBO(1, "monte_carlo"),
    pv.ELBO(3, "monte_carlo"),
    pv.IWAE(4),
    pv.IWAE(3, vectorize_particles=False),
]


def _mean_over_minibatches(objective, program, size):
    losses = [
        objective.loss(program.model, program.guide, program.x, subsample=torch.tensor(index))
        for index in combinations(range(len(program.x)), size)
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_minibatch_losses_average_to_the_full_loss(objective, size):
    """With the exact posterior there is no noise: the mean over all minibatches is exact."""
    program = LinearGaussian(3, 2, 6)
    full = objective.loss(program.model, program.guide, program.x)
    assert full == pytest.approx(-program.log_evidence().sum().item(), abs=1e-8)
    assert _mean_over_minibatches(objective, program, size) == pytest.approx(full, abs=1e-8)


@pytest.mark.slow
def test_pyros_renyi_elbo_fails_the_same_test():
    """It puts the scale N / b inside the log-mean-exp, where N / b log w is no log-weight.

    With a zero-variance guide the misplaced scale happens to cancel; any other guide shows it.
    """
    program = LinearGaussian(3, 2, 6, wrong=True)
    # Bounds of 64 copies at once, so that the averages below are sharp.
    program.x = program.x.repeat(64, 1)
    log_evidence = program.log_evidence().sum()

    def average(objective, **subsampling):
        return torch.tensor(
            [objective.loss(program.model, program.guide, program.x, **subsampling) for _ in range(100)],
            dtype=torch.float64,
        )

    renyi = pyro.infer.RenyiELBO(alpha=0, num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    for objective in (pv.ELBO(8), pv.ELBO(8, "monte_carlo"), pv.IWAE(8), renyi):
        full, subsampled = average(objective), average(objective, subsample_size=32)
        error = torch.hypot(full.std(), subsampled.std()) / 100**0.5
        z = (full.mean() - subsampled.mean()).abs() / error
        if objective is renyi:
            assert z > 10
            assert -subsampled.mean() > -full.mean()  # too high, as though the bound were tighter
        else:
            assert z < 4
            assert -subsampled.mean() < log_evidence


def test_bound_of_a_minibatch_is_in_nats_of_one_datum():
    program = LinearGaussian(3, 2, 6)
    index = torch.tensor([4, 1])
    for objective in OBJECTIVES:
        bound = objective.bound(program.model, program.guide, program.x, subsample=index)
        torch.testing.assert_close(bound, program.log_evidence()[index], rtol=0, atol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_a_common_scale_multiplies_the_finished_bound(objective):
    program = LinearGaussian(3, 2, 6, wrong=True)
    per_datum = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
    for scale in (0.25, torch.tensor(3.0), per_datum):
        losses = []
        for model, guide in (
            (program.model, program.guide),
            (poutine.scale(program.model, scale), poutine.scale(program.guide, scale)),
        ):
            pyro.set_rng_seed(1)
            bound = objective.bound(model, guide, program.x)
            pyro.set_rng_seed(1)
            losses.append(objective.loss(model, guide, program.x))
        assert losses[1] == pytest.approx(-(bound * scale).sum().item(), rel=1e-9)
        assert losses[0] == pytest.approx(-bound.sum().item(), rel=1e-9)


@pytest.mark.slow
def test_elbo_loss_takes_a_scale_for_each_site():
    """KL annealing with poutine.scale, as in Pyro's examples: beta times the KL, in both forms."""
    program = LinearGaussian(3, 2, 6, wrong=True)

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.1):
                z = pyro.sample("z", program.prior)
            pyro.sample("x", dist.Normal(z @ program.W.T + program.b, program.sigma).to_event(1), obs=x)

    guide = poutine.scale(program.guide, 0.1)
    q = dist.MultivariateNormal(program.x @ program.A.T + program.c, scale_tril=program.L.tril())
    kl = torch.distributions.kl_divergence(q, program.prior)
    exact = -(program.exact_elbo() + 0.9 * kl).sum()
    for form in ("analytic", "monte_carlo"):
        losses = [pv.ELBO(50, form).loss(model, guide, program.x) for _ in range(200)]
        assert z_score(torch.tensor(losses, dtype=torch.float64), exact) < 4


@pytest.mark.parametrize(
    "objective", [pv.ELBO(2), pv.ELBO(2, "monte_carlo"), pv.IWAE(3), pv.IWAE(3, vectorize_particles=False)], ids=repr
)
def test_a_mask_drops_what_it_masks(objective):
    program = LinearGaussian(3, 2, 6, wrong=True)
    mask = torch.tensor([True, False, True, True, False, True])
    pyro.set_rng_seed(1)
    whole = objective.bound(program.model, program.guide, program.x)
    pyro.set_rng_seed(1)
    masked = objective.bound(poutine.mask(program.model, mask), poutine.mask(program.guide, mask), program.x)
    torch.testing.assert_close(masked, whole * mask)
    pyro.set_rng_seed(1)
    loss = objective.loss(poutine.mask(program.model, mask), poutine.mask(program.guide, mask), program.x)
    assert loss == pytest.approx(-masked.sum().item())


def _pixels(mask=None):
    """z per datum, x with a plate of pixels nested in the batch plate: the same density as with to_event."""
    W, b = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def model(x):
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, 2, dtype=torch.float64), 1.0).to_event(1))
            with pyro.plate("pixels", 4, dim=-1), poutine.mask(mask=True if mask is None else mask):
                pyro.sample("x", dist.Normal((z * W).sum(-1) + b, 0.5), obs=x)

    def event_model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            likelihood = dist.Normal(z @ W.T + b, 0.5)
            pyro.sample("x", likelihood.mask(True if mask is None else mask).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x[:, None, :2], 0.7).to_event(1))

    def event_guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], 0.7).to_event(1))

    return (model, guide), (event_model, event_guide)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "objective",
    [pv.ELBO(), pv.ELBO(3), pv.ELBO(3, "monte_carlo"), pv.IWAE(1), pv.IWAE(5), pv.IWAE(5, vectorize_particles=False)],
    ids=repr,
)
def test_a_plate_nested_in_the_batch_plate_is_summed_over(objective, masked):
    mask = (torch.rand(6, 4) > 0.3) if masked else None
    nested, event = _pixels(mask)
    x = torch.randn(6, 4, dtype=torch.float64)
    bounds, losses = [], []
    for model, guide in (nested, event):
        pyro.set_rng_seed(1)
        bounds.append(objective.bound(model, guide, x))
        pyro.set_rng_seed(1)
        losses.append(objective.loss(model, guide, x))
    assert bounds[0].shape == (6,)
    torch.testing.assert_close(bounds[0], bounds[1])
    assert losses[0] == pytest.approx(losses[1])
    assert losses[0] == pytest.approx(-bounds[0].sum().item())


def test_a_group_of_data_with_its_own_latent_is_one_datum():
    """The batch plate is the outermost that holds every site: here the groups, each with 3 observations."""

    def model(x):
        with pyro.plate("groups", len(x), dim=-2):
            mean = pyro.sample("mean", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0))
            with pyro.plate("members", x.shape[1], dim=-1):
                z = pyro.sample("z", dist.Normal(mean, 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("groups", len(x), dim=-2):
            mean = pyro.sample("mean", dist.Normal(0.7 * x.mean(1, keepdim=True), 0.6))
            with pyro.plate("members", x.shape[1], dim=-1):
                pyro.sample("z", dist.Normal(0.8 * x + 0.2 * mean, 0.45))

    x = torch.randn(5, 3, dtype=torch.float64)
    covariance = torch.ones(3, 3, dtype=torch.float64) + (1 + 0.25) * torch.eye(3, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance).log_prob(x)
    log_w = pv.log_weights(model, guide, x, num_particles=20_000)
    assert log_w.shape == (20_000, 5)
    assert (z_score((log_w - exact).exp(), 1.0) < 4).all()


def test_max_plate_nesting_is_found_once_for_a_program():
    runs = []
    program = LinearGaussian(3, 2, 6)

    def model(x):
        runs.append("model")
        program.model(x)

    objective = pv.IWAE(4)
    for _ in range(3):
        objective.loss(model, program.guide, program.x)
    # One finds the nesting; four show that data and particles are kept apart: a draw, two with other latents in half of
    # the data, and both of these together.
    assert len(runs) == 8
    nested, _ = _pixels()
    objective.loss(*nested, torch.randn(6, 4, dtype=torch.float64))  # another program, nested deeper: found anew
    vae = pv.mlp_vae((3,), latent_dim=2, likelihood="gaussian")
    objective.loss(vae.model, vae.guide, torch.randn(6, 3))
    found = objective._known
    objective.loss(vae.model, vae.guide, torch.randn(6, 3))
    assert objective._known is found


@pytest.mark.parametrize("particles", [1, 4])
def test_a_step_counter_among_the_arguments_is_not_checked_at_each_step(particles):
    runs = []
    program = LinearGaussian(3, 2, 6)

    def model(x, step):
        runs.append(step)
        program.model(x)

    def guide(x, step):
        program.guide(x)

    objective = pv.IWAE(particles)
    for step in range(20):
        objective.differentiable_loss(model, guide, program.x, step)
    checked = [step for step in range(20) if runs.count(step) > 1]
    assert checked == [*range(8), 8, 16]
    for step in (3, 19):  # known, and like the others
        runs.clear()
        objective.loss(model, guide, program.x, step)
        assert runs == [step]


@pytest.mark.parametrize("pack", [lambda levels: levels, lambda levels: {"plates": [levels]}], ids=["", "in a dict"])
def test_plates_may_depend_on_an_integer_argument(pack):
    """Pixels as one event, or in a plate of their own: the same densities."""

    def program(x, packed, *, observed):
        levels = packed if isinstance(packed, int) else packed["plates"][0]
        with ExitStack() as plates:
            plates.enter_context(pyro.plate("data", len(x), dim=-levels))
            if levels == 2:
                plates.enter_context(pyro.plate("pixels", 3, dim=-1))
            z = pyro.sample("z", dist.Normal(torch.zeros(3) if observed else x, 1.0).to_event(2 - levels))
            if observed:
                pyro.sample("x", dist.Normal(z, 1.0).to_event(2 - levels), obs=x)

    x, objective, losses = torch.randn(5, 3), pv.ELBO(4, "monte_carlo"), []
    model, guide = (functools.partial(program, observed=observed) for observed in (True, False))
    for levels in (1, 2, 1):
        pyro.set_rng_seed(0)
        losses.append(objective.loss(model, guide, x, pack(levels)))
    assert losses == pytest.approx([losses[0]] * 3)


def test_finding_the_nesting_takes_no_random_numbers():
    program = LinearGaussian(3, 2, 6, wrong=True)
    bounds = []
    for nesting in (None, 1):
        pyro.set_rng_seed(1)
        bounds.append(pv.IWAE(4, max_plate_nesting=nesting).bound(program.model, program.guide, program.x))
    assert torch.equal(bounds[0], bounds[1])


def test_the_encoder_runs_once_for_all_particles():
    vae = pv.mlp_vae((3,), latent_dim=2, likelihood="gaussian")
    shapes = []
    vae.posterior.encoder.register_forward_hook(lambda module, args, output: shapes.append(args[0].shape))
    pv.log_weights(vae.model, vae.guide, torch.randn(6, 3), num_particles=50, max_plate_nesting=1)
    assert set(shapes) == {(6, 3)}


def test_deterministic_sites_and_auxiliary_sites_count_as_pyro_counts_them():
    def model(x):
        pyro.deterministic("count", torch.tensor(float(len(x))))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.deterministic("double", 2 * z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = pyro.infer.autoguide.AutoNormal(model, init_scale=1.5)
    x = torch.rand(5)
    ours, pyros = pv.ELBO(4, "monte_carlo"), pyro.infer.Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1)
    guide(x)
    losses = []
    for objective in (ours, pyros):
        pyro.set_rng_seed(1)
        losses.append(objective.loss(model, guide, x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    log_w = pv.log_weights(model, guide, x, num_particles=4000).detach()
    z = torch.linspace(1e-4, 60, 400_000)[:, None]
    density = (dist.LogNormal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)).exp()
    exact = torch.trapezoid(density, z, dim=0)
    assert (z_score(log_w.exp(), exact) < 4).all()
