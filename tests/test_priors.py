"""Every prior is a normalised density that a VAE learns, and log p(x) under it agrees with quadrature."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import z_score
from torch import nn

import pyro_vae as pv
from pyro_vae.networks import mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*Pareto k-hat")
PRIORS = [
    "standard",
    "mixture",
    "vamp, diagonal",
    "vamp, full",
    "vamp, low rank",
    "vamp, mixture",
    "vamp, iaf",
    "vamp, coupling",
    "flow, coupling",
    "flow, iaf",
    "flow, spline",
]
POSTERIORS = {"full": pv.FullNormal, "low rank": pv.LowRankNormal, "mixture": pv.MixturePosterior}
every = pytest.mark.parametrize("name", PRIORS)
VAMPS = [name for name in PRIORS if "vamp" in name]
vamps = pytest.mark.parametrize("name", VAMPS)


def build(name, likelihood="gaussian", latent_dim=2, spread=0.3):
    """A VAE with this prior and random weights, in float64, and three-dimensional data."""
    kind, _, detail = name.partition(", ")
    x = torch.randn(3, 3, dtype=torch.float64)
    x = x if likelihood == "gaussian" else (x > 0).double()
    family = POSTERIORS.get(detail, pv.DiagonalNormal)
    vae = pv.mlp_vae((3,), latent_dim=latent_dim, hidden_dims=(6,), likelihood=likelihood, posterior=family)
    if detail in ("iaf", "coupling") and kind == "vamp":
        encoder = mlp(3, [6], pv.FlowPosterior.features_for(latent_dim))
        vae.posterior = pv.FlowPosterior(encoder, (3,), latent_dim, flow=detail, hidden_dims=(6,))
    if kind == "mixture":
        vae.prior = pv.MixturePrior(latent_dim, components=4)
    elif kind == "vamp":
        vae.prior = pv.VampPrior(vae.posterior, torch.rand(5, 3))
    elif kind == "flow":
        vae.prior = pv.FlowPrior(latent_dim, detail, length=2, hidden_dims=(6,))
    vae.double()
    with torch.no_grad():
        for parameter in vae.parameters():
            # The tails of a flow grow exponentially with its weights, and the grids are finite.
            parameter += spread / (3 if kind == "flow" else 1) * torch.randn_like(parameter)
    return vae, x


def grid_around(p, points, wide=3.7):
    """A grid over two dimensions, denser around the mean of a distribution, and the areas of its cells."""
    z = p.sample((4000,))
    t = torch.linspace(-wide, wide, points, dtype=z.dtype)
    axes, widths = z.mean(0)[:, None] + z.std(0)[:, None] * t.sinh(), z.std(0)[:, None] * t.cosh() * (t[1] - t[0])
    return torch.cartesian_prod(*axes), torch.cartesian_prod(*widths).prod(-1)


@every
def test_the_density_integrates_to_one_with_the_moments_of_the_samples(name):
    vae, _ = build(name)
    with torch.no_grad():
        p = vae.prior()
        assert p.batch_shape == ()
        assert p.event_shape == (2,)
        grid, cell = grid_around(p, 401 if "spline" in name else 241)
        mass = p.log_prob(grid).exp() * cell
    assert mass.dtype == torch.float64
    assert mass.sum().item() == pytest.approx(1, abs=5e-3 if "spline" in name else 1e-3)
    z = p.sample((20_000,))
    for moment in (lambda t: t, lambda t: t.square(), lambda t: t.prod(-1, keepdim=True), torch.sigmoid):
        exact = (mass[:, None] * moment(grid)).sum(0) / mass.sum()
        assert (z_score(moment(z), exact) < 4.5).all()


@every
def test_an_expanded_prior_has_independent_samples(name):
    """A plate expands the prior, which then has independent samples and a density for each."""
    vae, x = build(name)
    prior = vae.prior().expand((4, 3))
    z = prior.sample()
    assert z.shape == (4, 3, 2)
    assert len(z.flatten(0, 1).unique(dim=0)) == 12
    expected = torch.stack([vae.prior().log_prob(row) for row in z.flatten(0, 1)]).reshape(4, 3)
    torch.testing.assert_close(prior.log_prob(z), expected)
    weights = pv.log_weights(vae.model, vae.guide, x, num_particles=4)
    assert weights.shape == (4, 3)
    assert vae.generate(6).shape == (6, 3)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@every
def test_log_likelihood_is_the_integral(name, likelihood):
    vae, x = build(name, likelihood, spread=0.1 if "spline" in name else 0.3)
    with torch.no_grad():
        last = vae.posterior.encoder[-1]  # these weights make the guide a proposal that covers the prior
        if name in VAMPS:
            last.weight[:2] *= 0.5
            last.weight[2:] *= 0.05
        else:
            last.weight *= 0.1
            z = vae.prior().sample((4000,))
            last.bias.copy_(torch.cat([z.mean(0), (1.3 * z.std(0)).log()]))
        grid, cell = grid_around(vae.prior(), 201, wide=3.2)
        joint = vae.prior().log_prob(grid)[:, None] + vae.likelihood(grid[:, None]).log_prob(x)
        exact = (joint + cell.log()[:, None]).logsumexp(0)
    estimate = pv.log_likelihood(vae.model, vae.guide, x, num_samples=4000, seed=1)
    slack = 5e-3 if "spline" in name else 2e-4
    assert ((estimate.per_datum - exact).abs() < 4 * estimate.per_datum_error + slack).all()
    assert (estimate.per_datum_error < 0.08).all()
    if likelihood == "bernoulli":  # the probabilities of all possible data sum to 1
        data = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)
        estimate = pv.log_likelihood(vae.model, vae.guide, data, num_samples=4000, seed=2)
        total = estimate.per_datum.exp().sum()
        error = (estimate.per_datum.exp() * estimate.per_datum_error).square().sum().sqrt()
        assert abs(total - 1) < 4 * error


@pytest.mark.parametrize("name", ["flow, coupling", "flow, iaf", "flow, spline"])
def test_the_density_of_a_flow_is_a_change_of_variables(name):
    vae, _ = build(name, latent_dim=4)
    p = vae.prior()

    def push(noise):
        for transform in p.transforms:
            noise = transform(noise)
        return noise

    with torch.no_grad():
        noise, step = torch.randn(6, 4, dtype=torch.float64), 1e-6
        unit = step * torch.eye(4, dtype=torch.float64)
        columns = [(push(noise + e) - push(noise - e)) / (2 * step) for e in unit]
        expected = dist.Normal(0.0, 1.0).log_prob(noise).sum(-1) - torch.stack(columns, -1).slogdet()[1]
        z = push(noise)
        torch.testing.assert_close(vae.prior().log_prob(z), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["flow, coupling", "flow, iaf", "flow, spline"])
def test_a_flow_caches_no_earlier_parameters(name):
    """Transforms cache their last result; a density at the same tensor must use the new parameters."""
    vae, _ = build(name)
    z, prior = torch.randn(5, 2, dtype=torch.float64), vae.prior
    with torch.no_grad():
        before = prior().log_prob(z)
    gradients = torch.autograd.grad(prior().log_prob(z).sum(), list(prior.parameters()))
    assert sum(g.abs().sum() for g in gradients) > 0
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.1
    torch.testing.assert_close(prior().log_prob(z), prior().log_prob(z.clone()))
    assert (prior().log_prob(z) != before).all()


@vamps
def test_a_vamp_prior_is_the_mean_of_posteriors(name):
    vae, _ = build(name)
    z = torch.randn(4, 7, 2, dtype=torch.float64)
    expected = torch.stack([vae.posterior(u).log_prob(z).exp() for u in vae.prior.pseudo_inputs]).mean(0).log()
    torch.testing.assert_close(vae.prior().log_prob(z), expected)


@vamps
def test_pseudo_inputs_and_the_shared_encoder_have_both_gradients(name):
    vae, x = build(name)
    parameters = dict(vae.named_parameters())  # a shared parameter is listed once
    assert {"prior.pseudo_inputs", "prior.posterior.encoder.1.weight"} <= parameters.keys()
    assert not any(key.startswith("posterior.") for key in parameters)
    pyro.set_rng_seed(3)
    loss = pv.ELBO(1, "monte_carlo").differentiable_loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(3)
    expected = by_hand(vae, x)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, list(parameters.values())) for value in (loss, expected)]
    for ours, hand in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, hand)
        assert ours.abs().sum() > 0


def by_hand(vae, x):
    """Minus the sampled ELBO of all data, for a VAE with a VampPrior, without Pyro."""
    q = vae.posterior(x)
    z = q.rsample()
    prior = torch.stack([vae.posterior(u[None]).log_prob(z) for u in vae.prior.pseudo_inputs])
    log_p = prior.logsumexp(0) - math.log(len(prior)) + vae.likelihood(z).log_prob(x)
    return -(log_p - q.log_prob(z)).sum()


def loop_by_hand(vae, x, steps):
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    for step in range(steps):
        pyro.set_rng_seed(step)
        optimizer.zero_grad()
        by_hand(vae, x).backward()
        optimizer.step()


def parameters_of(vae):
    return torch.cat([parameter.detach().flatten() for parameter in vae.parameters()])


@pytest.mark.parametrize("name", ["vamp, diagonal", "vamp, iaf"])
def test_svi_steps_each_shared_parameter_once(name):
    found = []
    for by_svi in (True, False):
        pyro.set_rng_seed(0)
        vae, x = build(name)
        if by_svi:
            objective = pv.ELBO(1, "monte_carlo", max_plate_nesting=1)
            svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=objective)
            for step in range(5):
                pyro.set_rng_seed(step)
                svi.step(x)
        else:
            loop_by_hand(vae, x, 5)
        found.append(parameters_of(vae))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["vamp, diagonal", "vamp, full"])
def test_fit_steps_each_shared_parameter_once(name):
    """Adam's first step has the size of the learning rate for all parameters, for any gradient."""
    vae, x = build(name)
    before = parameters_of(vae)
    pv.fit(vae.model, vae.guide, x, pv.ELBO(1, "monte_carlo"), epochs=1, batch_size=len(x), lr=1e-3)
    torch.testing.assert_close((parameters_of(vae) - before).abs(), torch.full_like(before, 1e-3), rtol=1e-3, atol=0)


def test_fit_ends_where_a_loop_by_hand_ends():
    found = []
    for by_fit in (True, False):
        pyro.set_rng_seed(0)
        vae, x = build("vamp, diagonal")
        batches = torch.utils.data.DataLoader(x, batch_size=len(x))
        objective = pv.ELBO(1, "monte_carlo", max_plate_nesting=1)
        if by_fit:
            for step in range(3):  # one step in each call, so that the noise is the same
                pyro.set_rng_seed(step)
                state = {"checkpoint": None, "seed": None, "progress": False}
                pv.fit(vae.model, vae.guide, batches, objective, epochs=1, lr=1e-2, **state)
        else:
            for step in range(3):
                optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
                pyro.set_rng_seed(step)
                next(iter(batches))
                by_hand(vae, x).backward()
                optimizer.step()
                optimizer.zero_grad()
        found.append(parameters_of(vae))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["vamp, diagonal", "vamp, iaf", "flow, iaf", "mixture"])
def test_training_resumes_from_a_checkpoint(name, tmp_path):
    x = torch.randn(20, 3, dtype=torch.float64)

    def train(path, *epochs):
        pyro.set_rng_seed(0)
        vae, _ = build(name)
        for number in epochs:
            objective = pv.ELBO(1, "monte_carlo")
            pv.fit(vae.model, vae.guide, x, objective, epochs=number, batch_size=8, seed=0, checkpoint=path)
        return vae

    whole, broken = train(tmp_path / "a.pt", 4), train(tmp_path / "b.pt", 2)
    assert not torch.equal(parameters_of(whole), parameters_of(broken))
    pyro.set_rng_seed(1)
    resumed, _ = build(name, spread=0.5)  # other initial parameters
    pv.fit(
        resumed.model,
        resumed.guide,
        x,
        pv.ELBO(1, "monte_carlo"),
        epochs=4,
        batch_size=8,
        seed=0,
        checkpoint=tmp_path / "b.pt",
    )
    assert torch.equal(parameters_of(whole), parameters_of(resumed))
    pyro.set_rng_seed(2)
    again, _ = build(name)
    pv.load_parameters(tmp_path / "a.pt", again.model, again.guide, x)
    assert torch.equal(parameters_of(whole), parameters_of(again))
    assert torch.equal(whole.embed(x), again.embed(x))
    z = torch.randn(5, 2, dtype=torch.float64)
    assert torch.equal(whole.prior().log_prob(z), again.prior().log_prob(z))


@pytest.mark.parametrize("name", [name for name in PRIORS if name != "standard"])
def test_a_prior_is_learned_and_has_no_closed_form(name):
    vae, _ = build(name)
    x = 0.2 * torch.randn(96, 3, dtype=torch.float64) + torch.tensor([[-2.0], [2.0]]).double().repeat(48, 3)
    with pytest.raises(pv.NoClosedFormError, match=r"no closed form at site 'z'.*Use kl='monte_carlo'"):
        pv.ELBO().loss(vae.model, vae.guide, x)
    before = {key: value.detach().clone() for key, value in vae.prior.named_parameters()}
    objective = pv.ELBO(1, "monte_carlo")
    history = pv.fit(vae.model, vae.guide, x, objective, epochs=8, batch_size=32, lr=1e-2)
    assert history.train_bound.iloc[-2:].mean() > history.train_bound.iloc[0]
    assert all((before[key] != value).any() for key, value in vae.prior.named_parameters())


def test_a_mixture_prior_by_its_formula():
    prior = pv.MixturePrior(2, components=3).double()
    for parameter in prior.parameters():
        parameter.data = torch.randn_like(parameter)
    z = torch.randn(6, 2, dtype=torch.float64)
    parts = [
        dist.Normal(loc, scale).log_prob(z).sum(-1) for loc, scale in zip(prior.loc, prior.log_scale.exp(), strict=True)
    ]
    expected = (torch.stack(parts, -1) + prior.logits.log_softmax(0)).logsumexp(-1)
    torch.testing.assert_close(prior().log_prob(z), expected)


def test_a_hierarchy_takes_any_prior_at_its_top():
    vae = pv.mlp_hierarchical_vae((3,), latent_dims=(2, 2), hidden_dims=(6,), likelihood="gaussian").double()
    x = torch.randn(4, 3, dtype=torch.float64)
    for prior in (pv.MixturePrior(2, components=3), pv.FlowPrior(2, hidden_dims=(6,))):
        vae.prior = prior.double()
        assert vae.generate(5).shape == (5, 3)
        assert math.isfinite(pv.ELBO(2, "monte_carlo").loss(vae.model, vae.guide, x))


@pytest.mark.parametrize("shape", [(5, 4), (3,), (5, 3, 1)])
def test_pseudo_inputs_of_another_shape(shape):
    vae, _ = build("standard")
    with pytest.raises(ValueError, match=r"expected pseudo_inputs of shape \(K, \*\(3,\)\), got \("):
        pv.VampPrior(vae.posterior, torch.zeros(shape))


def test_pseudo_inputs_on_another_device():
    vae, _ = build("standard")
    u = torch.zeros(5, 3, device="meta", dtype=torch.float64)
    with pytest.raises(pv.PyroVAEError, match="expected pseudo_inputs on cpu, the device of the parameters, got meta"):
        pv.VampPrior(vae.posterior, u)


def test_pseudo_inputs_are_a_copy():
    vae, _ = build("standard")
    u = torch.zeros(5, 3, dtype=torch.float64)
    prior = pv.VampPrior(vae.posterior, u)
    prior.pseudo_inputs.data += 1
    assert (u == 0).all()
    assert isinstance(prior.pseudo_inputs, nn.Parameter)


@pytest.mark.parametrize("kind", ["iaf", "spline"])
def test_a_flow_in_plain_functions_is_restored_from_a_checkpoint(kind, tmp_path):
    def build():
        vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(4,), prior=pv.FlowPrior(2, kind, length=3))
        return vae, lambda x: vae.model(x), lambda x: vae.guide(x)

    vae, model, guide = build()
    x = torch.rand(10, 3).round()
    pv.fit(model, guide, x, pv.ELBO(kl="monte_carlo"), epochs=2, checkpoint=tmp_path / "a.pt")
    pyro.set_rng_seed(5)
    other, model, guide = build()
    pv.load_parameters(tmp_path / "a.pt", model, guide, x)
    z = torch.randn(6, 2)
    assert torch.equal(vae.prior().log_prob(z), other.prior().log_prob(z))


@pytest.mark.slow
@every
def test_pv_testing_accepts_each_prior(name, without_inductor):
    pv.testing.check_prior(build(name)[0].prior, compiled="spline" not in name)
