"""Hierarchical VAEs: log p(x), bounds and guides against quadrature, linear algebra and formulas."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import z_score
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae.networks import mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*Pareto k-hat")
GUIDES = ["ladder", "bottom_up"]
guides = pytest.mark.parametrize("guide", GUIDES)


def build(guide, latent_dims=(1, 1), hidden_dims=(5,), likelihood="gaussian", spread=0.3, **options):
    vae = pv.mlp_hierarchical_vae(
        (2, 2), latent_dims=latent_dims, hidden_dims=hidden_dims, guide=guide, likelihood=likelihood, **options
    ).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += spread * torch.randn_like(parameter)
    return vae


def data(n, binary=False):
    x = torch.randn(n, 2, 2, dtype=torch.float64)
    return (x > 0).double() if binary else x


def widen(vae):
    """Make the guide a proposal that covers the posterior: it depends little on x, and is wider than the prior."""
    ladder = isinstance(vae.posterior, pv.Ladder)
    heads = vae.posterior.heads if ladder else [posterior.encoder[-1] for posterior in vae.posterior.posteriors]
    with torch.no_grad():
        for i, head in enumerate(heads, 1):
            half = len(head.bias) // 2
            head.weight *= 0.3
            head.weight[half:] *= 0.1
            # the product with the model's normal narrows all layers of a ladder but the top
            head.bias[half:] = 1.5 if ladder and i < len(heads) else 0.4
        for layer in vae.layers:
            last = layer.encoder if isinstance(layer.encoder, nn.Linear) else layer.encoder[-1]
            last.weight[len(last.bias) // 2 :] *= 0.1


class Grid:
    """log p(x, z) and log q(z|x) of two latents of one dimension each, on a grid (G, N)."""

    def __init__(self, vae, x, points=401, width=16.0):
        t = torch.linspace(-width, width, points, dtype=torch.float64)
        self.cell = (t[1] - t[0]).item() ** 2
        flat = torch.cartesian_prod(t, t)
        self.z = {"z1": flat[:, None, :1], "z2": flat[:, None, 1:]}
        with torch.no_grad():
            p2 = dist.Normal(0.0, 1.0).log_prob(self.z["z2"][..., 0])
            p1 = vae.layers[0](self.z["z2"]).log_prob(self.z["z1"])
            self.log_prior = p1 + p2
            self.log_p = self.log_prior + vae.likelihood(self.z["z1"]).log_prob(x)
            terms = []

            def draw(name, q):
                terms.append(q.log_prob(self.z[name]))
                return self.z[name]

            vae.posterior(x, vae.layers, draw)
            self.log_q = sum(terms)

    def log_evidence(self):
        return self.log_p.logsumexp(0) + torch.tensor(self.cell).log()

    def elbo(self):
        return (self.log_q.exp() * (self.log_p - self.log_q)).sum(0) * self.cell


@guides
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_log_likelihood_is_the_integral(guide, likelihood):
    vae, x = build(guide, likelihood=likelihood), data(5, likelihood == "bernoulli")
    widen(vae)
    grid = Grid(vae, x)
    for log_density in (grid.log_q, grid.log_prior):
        total = log_density.exp().sum(0) * grid.cell
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-4)
    estimate = pv.log_likelihood(vae.model, vae.guide, x, num_samples=5000, seed=1)
    assert ((estimate.per_datum - grid.log_evidence()).abs() < 4 * estimate.per_datum_error + 1e-6).all()
    assert (estimate.per_datum_error < 0.1).all()


@guides
def test_the_elbo_is_the_integral_however_its_kl_is_computed(guide):
    vae, x = build(guide), data(4)
    exact = Grid(vae, x).elbo()
    for kl in ("analytic", "monte_carlo") if guide == "ladder" else ("monte_carlo",):
        with torch.no_grad():
            draws = pv.ELBO(1, kl).bound(vae.model, vae.guide, x.repeat(5000, 1, 1)).reshape(-1, 4)
        assert (z_score(draws, exact) < 4.5).all()


@pytest.mark.parametrize("latent_dims", [(3, 2), (2, 3, 2)])
def test_the_ladders_closed_form_is_the_mean_of_its_samples(latent_dims):
    vae, x = build("ladder", latent_dims, hidden_dims=(5,)), data(4)
    draws = []
    with torch.no_grad():
        for kl in ("analytic", "monte_carlo"):
            bound = pv.ELBO(1, kl).bound(vae.model, vae.guide, x.repeat(4000, 1, 1))
            draws.append(bound.reshape(-1, 4))
    assert (z_score(draws[0] - draws[1], 0.0) < 4.5).all()
    assert (draws[0].std(0) < draws[1].std(0)).all()


class LinearHierarchy:
    """The linear model z3 ~ N(0, I), z2 = A z3 + a + noise, z1 = B z2 + b + noise, x = C z1 + c + noise, as a pair."""

    def __init__(self, guide, latent_dims=(2, 3, 2)):
        self.vae = pv.mlp_hierarchical_vae(
            (4,), latent_dims=latent_dims, hidden_dims=(6,), guide=guide, likelihood="gaussian", scale=0.8
        )
        low, middle, high = latent_dims
        self.vae.layers = nn.ModuleList(
            [
                pv.DiagonalNormal(nn.Linear(above, 2 * below), (above,))
                for below, above in ((low, middle), (middle, high))
            ]
        )
        self.vae.likelihood = pv.Gaussian(nn.Linear(low, 4), (4,), scale=0.8)
        self.vae.double()
        for layer, size in zip(self.vae.layers, (low, middle), strict=True):
            layer.encoder.weight.data[size:] = 0  # the scale does not depend on the layer above

    def marginal(self):
        mean = torch.zeros(self.vae.layers[-1].event_shape, dtype=torch.float64)
        covariance = torch.eye(len(mean), dtype=torch.float64)
        for layer in reversed(self.vae.layers):
            weight, scale = layer.encoder.weight.chunk(2)[0], layer.encoder.bias.chunk(2)[1].exp()
            mean = weight @ mean + layer.encoder.bias.chunk(2)[0]
            covariance = weight @ covariance @ weight.T + torch.diag(scale**2)
        decoder = self.vae.likelihood.decoder
        mean = decoder.weight @ mean + decoder.bias
        covariance = decoder.weight @ covariance @ decoder.weight.T + 0.8**2 * torch.eye(4, dtype=torch.float64)
        return dist.MultivariateNormal(mean.detach(), covariance.detach())


@guides
def test_a_linear_hierarchy_has_the_evidence_of_linear_algebra(guide):
    program = LinearHierarchy(guide)
    vae, marginal = program.vae, program.marginal()
    widen(vae)
    x = marginal.sample((6,))
    estimate = pv.log_likelihood(vae.model, vae.guide, x, num_samples=20_000, seed=1)
    assert ((estimate.per_datum - marginal.log_prob(x)).abs() < 4 * estimate.per_datum_error).all()
    assert (estimate.per_datum_error < 0.2).all()
    generated = vae.generate(20_000)
    assert (z_score(generated, marginal.mean) < 4.5).all()
    variances = (generated - marginal.mean).square() + 0.8**2
    assert (z_score(variances, marginal.variance) < 4.5).all()


@guides
def test_generate_has_the_mean_of_the_model(guide):
    vae = build(guide, likelihood="bernoulli", spread=0.8)
    widen(vae)
    grid = Grid(vae, data(1, True))
    with torch.no_grad():
        means = vae.likelihood(grid.z["z1"][:, 0]).mean
        exact = (grid.log_prior.exp()[..., None] * means).sum(0) * grid.cell
    generated = vae.generate(20_000)
    assert generated.shape == (20_000, 2, 2)
    assert (z_score(generated, exact) < 4.5).all()
    assert (generated.std(0) > 1e-3).all()


def test_the_ladder_weighs_by_precision():
    vae, x = build("ladder", (2, 3, 4), hidden_dims=(5, 6, 7)), data(6)
    ladder = vae.posterior
    trace = poutine.trace(vae.guide).get_trace(x)
    features, bottom_up = x, []
    for encoder, head in zip(ladder.encoders, ladder.heads, strict=True):
        features = encoder(features)
        bottom_up.append(head(features).chunk(2, -1))
    assert [tuple(loc.shape) for loc, _ in bottom_up] == [(6, 2), (6, 3), (6, 4)]
    top = trace.nodes["z3"]["fn"].base_dist
    torch.testing.assert_close(top.loc, bottom_up[2][0])
    torch.testing.assert_close(top.scale, bottom_up[2][1].exp())
    for layer in (2, 1):
        above = trace.nodes[f"z{layer + 1}"]["value"]
        down_loc, down_log_scale = vae.layers[layer - 1].encoder(above).chunk(2, -1)
        loc, log_scale = bottom_up[layer - 1]
        fn = trace.nodes[f"z{layer}"]["fn"]
        # The density is proportional to the product of the two normals, so differences of log-densities are equal.
        z = torch.randn(5, *loc.shape, dtype=torch.float64)
        product = dist.Normal(loc, log_scale.exp()).log_prob(z) + dist.Normal(down_loc, down_log_scale.exp()).log_prob(
            z
        )
        product = product.sum(-1)
        torch.testing.assert_close(fn.log_prob(z) - fn.log_prob(z[0]), product - product[0])


def test_bottom_up_conditions_each_layer_on_the_layer_below():
    vae, x = build("bottom_up", (2, 3, 4), hidden_dims=(5, 6, 7)), data(6)
    nodes = poutine.trace(vae.guide).get_trace(x).nodes
    for layer, below in enumerate((x, nodes["z1"]["value"], nodes["z2"]["value"]), 1):
        loc, log_scale = vae.posterior.posteriors[layer - 1].encoder(below).chunk(2, -1)
        fn = nodes[f"z{layer}"]["fn"].base_dist
        torch.testing.assert_close(fn.loc, loc)
        torch.testing.assert_close(fn.scale, log_scale.exp())


@guides
def test_sites_order_and_event_dimensions(guide):
    vae, x = build(guide, (2, 3, 4)), data(6)
    model, guided = poutine.trace(vae.model).get_trace(x), poutine.trace(vae.guide).get_trace(x)
    latent = [[n for n in trace.stochastic_nodes if n != "data"] for trace in (model, guided)]
    assert latent[0] == ["z3", "z2", "z1"]
    assert latent[1] == (latent[0] if guide == "ladder" else latent[0][::-1])
    assert model.observation_nodes == ["x"]
    for name, size in (("z1", 2), ("z2", 3), ("z3", 4)):
        for trace in (model, guided):
            site = trace.nodes[name]
            assert [frame.name for frame in site["cond_indep_stack"]] == ["data"]
            assert site["fn"].batch_shape == (6,)
            assert site["fn"].event_shape == (size,)
    assert model.nodes["x"]["fn"].event_shape == (2, 2)
    latents = vae.guide(x)
    assert [tuple(z.shape) for z in latents] == [(6, 2), (6, 3), (6, 4)]
    assert pv.log_weights(vae.model, vae.guide, x, num_particles=4).shape == (4, 6)
    one_at_a_time = pv.log_weights(vae.model, vae.guide, x, num_particles=2, vectorize_particles=False)
    assert one_at_a_time.shape == (2, 6)


@guides
def test_embed_reconstruct_decode(guide):
    vae, x = build(guide, (2, 3, 4)), data(6)
    latents = vae.embed(x)
    assert [tuple(z.shape) for z in latents] == [(6, 2), (6, 3), (6, 4)]
    assert not any(z.requires_grad for z in latents)
    # each value is the guide's mean given the other means
    conditioned = poutine.condition(vae.guide, {f"z{i}": z for i, z in enumerate(latents, 1)})
    nodes = poutine.trace(conditioned).get_trace(x).nodes
    for i, z in enumerate(latents, 1):
        torch.testing.assert_close(nodes[f"z{i}"]["fn"].mean, z)
    torch.testing.assert_close(vae.reconstruct(x), vae.likelihood(latents[0]).mean)
    assert vae.decode(torch.randn(7, 6, 2, dtype=torch.float64)).shape == (7, 6, 2, 2)


@guides
@pytest.mark.parametrize("objective", [pv.ELBO(2, "monte_carlo"), pv.IWAE(3, "dreg")], ids=lambda o: type(o).__name__)
def test_every_parameter_learns(guide, objective):
    vae, x = build(guide, (2, 2), hidden_dims=(5, 4)), data(20)
    before = {name: value.detach().clone() for name, value in vae.named_parameters()}
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=objective)
    svi.step(x)
    for name, value in vae.named_parameters():  # one step of one size, also for parameters that model and guide share
        torch.testing.assert_close((value - before[name]).abs(), torch.full_like(value, 1e-3), rtol=1e-2, atol=0)


@guides
def test_missing_elements(guide):
    """Missing elements of x are not read, and the model's density includes only observed elements."""
    vae, x = build(guide), data(5)
    mask = torch.rand(5, 2, 2) > 0.4
    other = torch.where(mask, x, 7.0)
    bounds = []
    for values in (x, other):
        pyro.set_rng_seed(0)
        bounds.append(pv.ELBO(1, "monte_carlo").bound(vae.model, vae.guide, values, mask))
    torch.testing.assert_close(*bounds)
    nodes = poutine.trace(vae.model).get_trace(x, mask).nodes
    z1, site = nodes["z1"]["value"], nodes["x"]
    expected = (dist.Normal(vae.likelihood(z1).mean, vae.likelihood(z1).stddev).log_prob(x) * mask).sum((-1, -2))
    torch.testing.assert_close(site["fn"].log_prob(site["value"]), expected)
    assert [z.shape for z in vae.embed(x, mask)] == [(5, 1), (5, 1)]


def test_a_closed_form_kl_is_refused_for_a_bottom_up_guide():
    vae, x = build("bottom_up"), data(4)
    message = (
        r"latent sites in one order, got \['z2', 'z1'\] in the model and \['z1', 'z2'\] in the guide.*kl='monte_carlo'"
    )
    with pytest.raises(pv.NoClosedFormError, match=message):
        pv.ELBO().loss(vae.model, vae.guide, x)
    with pytest.raises(pv.NoClosedFormError, match=message):
        pv.ELBO(kl="analytic").bound(vae.model, vae.guide, x)


def normal(inputs, outputs):
    return pv.DiagonalNormal(mlp(inputs, [], 2 * outputs), (inputs,))


def hierarchy(posterior, layers=(1,)):
    return pv.HierarchicalVAE(
        prior=pv.StandardNormal(1),
        layers=[normal(1, 1) for _ in layers],
        likelihood=pv.Gaussian(mlp(1, [], 4), (4,)),
        posterior=posterior,
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hierarchy(pv.BottomUp([normal(4, 1)])), r"guide of 2 layers, for the prior and 1 layers below.*got 1"),
        (
            lambda: hierarchy(pv.Ladder([nn.Linear(4, 3)] * 3, [nn.Linear(3, 2)] * 3, (4,))),
            r"guide of 2 layers.*got 3",
        ),
        (lambda: pv.Ladder([nn.Linear(4, 3)], [], (4,)), r"a head for each encoder, got 1 encoders and 0 heads"),
        (
            lambda: pv.mlp_hierarchical_vae((4,), latent_dims=(2, 1), hidden_dims=(3, 3, 3)),
            r"one hidden width or one for each layer, got latent_dims=\(2, 1\) and hidden_dims=\(3, 3, 3\)",
        ),
        (lambda: pv.mlp_hierarchical_vae((4,), latent_dims=()), r"latent_dims to be a sequence of one or more"),
        (
            lambda: pv.mlp_hierarchical_vae((4,), latent_dims=(2, 0)),
            r"latent_dims to be a sequence of one or more positive integers, got \(2, 0\)",
        ),
        (
            lambda: pv.mlp_hierarchical_vae((4,), latent_dims=(2, 1), guide="top_down"),
            r"guide to be 'ladder' or 'bottom_up', got 'top_down'",
        ),
    ],
)
def test_layers_that_do_not_match(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_ladder_needs_layers_of_independent_normals():
    vae = build("ladder", (2, 2))
    vae.layers[0] = pv.FullNormal(mlp(2, [], 5), (2,)).double()
    with pytest.raises(ValueError, match=r"layers of independent normals.*z1.*got MultivariateNormal.*BottomUp"):
        vae.guide(data(4))
    vae = build("ladder", (2, 2))
    vae.layers[0] = pv.DiagonalNormal(mlp(2, [], 6), (2,)).double()
    with pytest.raises(ValueError, match=r"z1.*3 dimensions.*2"):
        vae.guide(data(4))


@guides
def test_data_of_another_shape(guide):
    vae = build(guide)
    for call in (vae.model, vae.guide, vae.embed, vae.reconstruct):
        with pytest.raises(ValueError, match=r"expected x of shape \(N, 2, 2\), got \(5, 4\)"):
            call(torch.zeros(5, 4, dtype=torch.float64))


@guides
def test_one_layer_is_a_plain_vae(guide):
    vae, x = build(guide, (2,)), data(5)
    assert [z.shape for z in vae.embed(x)] == [(5, 2)]
    with torch.no_grad():
        nodes = poutine.trace(vae.guide).get_trace(x).nodes
        kl = torch.distributions.kl_divergence(nodes["z1"]["fn"], vae.prior().expand((5,)))
        closed, sampled = (pv.ELBO(2000, kl).bound(vae.model, vae.guide, x) for kl in ("analytic", "monte_carlo"))
    assert kl.shape == (5,)
    assert ((closed - sampled).abs() < 0.3).all()
