"""Pairs are ordinary Pyro programs: Pyro's objectives and handlers work on them and agree with the package."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import z_score
from helpers.quick import slow_but
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)

import pyro_vae as pv

LIKELIHOODS = {
    "bernoulli": {"likelihood": "bernoulli"},
    "gaussian, fixed": {"likelihood": "gaussian", "scale": 0.5},
    "gaussian, learned": {"likelihood": "gaussian", "scale": "learned"},
    "gaussian, per column": {"likelihood": "gaussian", "scale": "per_column"},
    "gaussian, per pixel": {"likelihood": "gaussian", "scale": "per_pixel"},
}
NETWORKS = {
    "vectors": lambda **kwargs: pv.mlp_vae((7,), latent_dim=3, hidden_dims=(8, 6), **kwargs),
    "images": lambda **kwargs: pv.mlp_vae((1, 6, 5), latent_dim=3, hidden_dims=(8,), **kwargs),
    "conv": lambda **kwargs: pv.conv_vae((2, 7, 6), latent_dim=3, channels=(4, 5), **kwargs),
}
networks = pytest.mark.parametrize("network", NETWORKS)
likelihoods = pytest.mark.parametrize("likelihood", LIKELIHOODS)


def build(network, likelihood="bernoulli"):
    vae = NETWORKS[network](**LIKELIHOODS[likelihood])
    x = torch.rand(10, *vae.event_shape)
    return vae, (x > 0.5).float() if likelihood == "bernoulli" else x


@networks
@likelihoods
def test_sites_plates_and_event_dimensions(network, likelihood):
    vae, x = build(network, likelihood)
    model, guide = poutine.trace(vae.model).get_trace(x), poutine.trace(vae.guide).get_trace(x)
    assert [n for n in model.stochastic_nodes if n != "data"] == ["z"]
    assert model.observation_nodes == ["x"]
    assert [n for n in guide.stochastic_nodes if n != "data"] == ["z"]
    for site in (model.nodes["z"], model.nodes["x"], guide.nodes["z"]):
        assert [frame.name for frame in site["cond_indep_stack"]] == ["data"]
        assert site["fn"].batch_shape == (10,)
    assert guide.nodes["z"]["fn"].event_shape == model.nodes["z"]["fn"].event_shape == (3,)
    assert guide.nodes["z"]["fn"].has_rsample
    assert model.nodes["x"]["fn"].event_shape == vae.event_shape


@networks
@likelihoods
@pytest.mark.parametrize(
    "objective",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=3),
        Trace_ELBO(num_particles=3, vectorize_particles=True),
        TraceMeanField_ELBO(),
        TraceGraph_ELBO(),
        JitTrace_ELBO(ignore_jit_warnings=True),
        RenyiELBO(alpha=0, num_particles=3, vectorize_particles=True),
        pv.ELBO(),
        pv.ELBO(3, "monte_carlo"),
        pv.IWAE(3),
        pv.IWAE(3, vectorize_particles=False),
    ],
    ids=lambda objective: repr(objective).split(" object")[0],
)
def test_svi_reaches_every_parameter(network, likelihood, objective):
    vae, x = build(network, likelihood)
    before = {name: value.detach().clone() for name, value in vae.named_parameters()}
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=type(objective)(**_arguments(objective)))
    losses = [svi.step(x) for _ in range(2)]
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert all((before[name] != value).any() for name, value in vae.named_parameters())
    assert torch.isfinite(torch.tensor(svi.evaluate_loss(x)))


def _arguments(objective):
    """Arguments to build an objective again, since Pyro's objectives cache results of the previous program."""
    arguments = {"num_particles": objective.num_particles, "vectorize_particles": objective.vectorize_particles}
    if isinstance(objective, pv.ELBO):
        arguments["kl"] = objective.kl
    if isinstance(objective, JitTrace_ELBO):
        arguments["ignore_jit_warnings"] = True
    return arguments | ({"alpha": 0} if isinstance(objective, RenyiELBO) else {})


@networks
@likelihoods
@pytest.mark.parametrize("num_particles", [1, 2, 5])
def test_same_seed_same_value_as_pyro(network, likelihood, num_particles):
    vae, x = build(network, likelihood)
    vectorised = {"num_particles": num_particles, "vectorize_particles": True, "max_plate_nesting": 1}
    cases = [
        (pv.ELBO(num_particles, "monte_carlo"), Trace_ELBO(**vectorised)),
        (pv.ELBO(num_particles), TraceMeanField_ELBO(**vectorised)),
    ]
    if num_particles > 1:  # Pyro's IWAE refuses one particle
        cases.append((pv.IWAE(num_particles), RenyiELBO(alpha=0, **vectorised)))
    for ours, pyros in cases:
        values, gradients = [], []
        for objective in (ours, pyros):
            vae.zero_grad()
            pyro.set_rng_seed(7)
            values.append(objective.loss(vae.model, vae.guide, x))
            pyro.set_rng_seed(7)
            objective.loss_and_grads(vae.model, vae.guide, x)
            gradients.append(torch.cat([p.grad.flatten() for p in vae.parameters()]))
        assert values[0] == pytest.approx(values[1], rel=1e-5)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)


def test_torch_optimiser_on_the_objective_as_a_module():
    vae, x = build("vectors", "gaussian, fixed")
    loss = pv.IWAE(4)(vae.model, vae.guide)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    values = []
    for _ in range(100):
        optimizer.zero_grad()
        values.append(loss(x))
        values[-1].backward()
        optimizer.step()
    assert sum(values[-10:]) < sum(values[:10])


@networks
def test_predictive_and_handlers(network):
    vae, x = build(network)
    from_prior = Predictive(poutine.uncondition(vae.model), num_samples=6)(x)
    assert from_prior["x"].shape == (6, 10, *vae.event_shape)
    posterior = Predictive(poutine.uncondition(vae.model), guide=vae.guide, num_samples=6, parallel=True)(x)
    assert posterior["z"].shape == (6, 10, 3)
    assert posterior["x"].shape == (6, 10, *vae.event_shape)
    z = torch.randn(10, 3)
    trace = poutine.trace(poutine.condition(vae.model, {"z": z})).get_trace(x)
    trace.compute_log_prob()
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum() + vae.likelihood(z).log_prob(x).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


SCALED = [pv.ELBO(2), pv.IWAE(3), Trace_ELBO(), TraceMeanField_ELBO()]


@networks
@pytest.mark.parametrize("objective", slow_but(SCALED[:2], SCALED), ids=lambda o: type(o).__name__)
def test_a_subsampled_plate_scales_to_all_data(network, objective):
    vae, x = build(network, "gaussian, fixed")
    with torch.no_grad():
        full = torch.tensor([objective.loss(vae.model, vae.guide, x) for _ in range(100)])
        part = torch.tensor([objective.loss(vae.model, vae.guide, x, subsample_size=4) for _ in range(300)])
    assert z_score(part, full.mean()) < 4
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=objective)
    svi.step(x, subsample_size=4)


def test_two_vaes_in_one_process_each_learn():
    """With pyro.module alone, the second VAE would share the first VAE's entries in the store and never learn."""
    for _ in range(2):
        vae, x = build("vectors")
        before = [p.detach().clone() for p in vae.parameters()]
        SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=pv.ELBO()).step(x)
        assert all((b != p).any() for b, p in zip(before, vae.parameters(), strict=True))
        stored = pyro.get_param_store()
        assert stored["likelihood$$$decoder.1.weight"] is vae.likelihood.decoder[1].weight


@networks
def test_embed_decode_reconstruct_generate(network):
    vae, x = build(network)
    z = vae.embed(x)
    torch.testing.assert_close(z, vae.posterior(x).mean)
    torch.testing.assert_close(vae.reconstruct(x), vae.likelihood(z).mean)
    assert not vae.reconstruct(x).requires_grad
    assert vae.decode(torch.randn(4, 5, 3)).shape == (4, 5, *vae.event_shape)
    generated = vae.generate(8)
    assert generated.shape == (8, *vae.event_shape)
    assert ((generated > 0) & (generated < 1)).all()


def test_conv_decoder_gives_each_particle_its_own_image():
    vae, _ = build("conv")
    z = torch.randn(4, 3, 3)
    one_by_one = torch.stack([vae.decode(row) for row in z])
    torch.testing.assert_close(vae.decode(z), one_by_one)


def test_gaussian_scales():
    for scale, expected in ((0.25, 0.25), ("learned", 1.0), ("per_column", 1.0)):
        vae = pv.mlp_vae((4,), latent_dim=2, likelihood="gaussian", scale=scale)
        torch.testing.assert_close(vae.likelihood(torch.randn(3, 2)).stddev, torch.full((3, 4), expected))
    per_pixel = pv.conv_vae((3, 8, 8), latent_dim=2, likelihood="gaussian", scale="per_pixel")
    z = torch.randn(5, 2)
    features = per_pixel.likelihood.decoder(z)
    fitted = per_pixel.likelihood(z)
    torch.testing.assert_close(fitted.mean, features[:, :3])
    torch.testing.assert_close(fitted.stddev, torch.nn.functional.softplus(features[:, 3:]) + 0.01)
    assert fitted.stddev.flatten().unique().numel() > 100


def test_a_vae_converts_to_float64():
    vae, x = build("images")
    vae.double()
    assert pv.ELBO().bound(vae.model, vae.guide, x.double()).dtype == torch.float64


def test_methods_of_a_trained_pair_change_no_state():
    encoder = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(), torch.nn.Linear(8, 4)
    )
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 4))
    vae = pv.VAE(
        prior=pv.StandardNormal(2), likelihood=pv.Gaussian(decoder, (4,)), posterior=pv.DiagonalNormal(encoder, (4,))
    )
    x = torch.randn(10, 4)
    pv.fit(vae.model, vae.guide, x, pv.ELBO(), epochs=2, batch_size=5)
    assert vae.training
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    torch.testing.assert_close(
        vae.reconstruct(x)[:1], vae.reconstruct(x[:1])
    )  # no batch statistics of one row, and no dropout
    vae.generate(5), vae.impute(x, torch.rand(10, 4) > 0.5, 10)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    assert vae.training


def test_a_frozen_part_stays_frozen_after_an_earlier_pair():
    x = torch.randn(10, 3)
    first, second = (pv.mlp_vae((3,), latent_dim=2, hidden_dims=(4,), likelihood="gaussian") for _ in range(2))
    pv.fit(first.model, first.guide, x, pv.ELBO(), epochs=1)
    second.likelihood.requires_grad_(False)
    before = [parameter.clone() for parameter in second.likelihood.parameters()]
    pv.fit(second.model, second.guide, x, pv.ELBO(), epochs=2)
    assert all(map(torch.equal, before, second.likelihood.parameters()))
    assert not any(parameter.requires_grad for parameter in second.likelihood.parameters())


def test_labels_of_any_integer_type_and_decoding_of_particles():
    vae = pv.mlp_conditional_vae((4,), latent_dim=2, label_dim=3)
    y = torch.tensor([0, 1, 2])
    z = torch.randn(5, 3, 2)
    assert torch.equal(vae.decode(z, y.to(torch.uint8)), vae.decode(z, y))
    torch.testing.assert_close(vae.decode(z, y)[4], vae.decode(z[4], y))


@pytest.mark.parametrize("shape", [(103, 3, 3), (10, 28, 4), (5, 4, 4), (5, 8, 2)])
def test_images_of_many_channels_are_channels_first(shape):
    """Hyperspectral patches and narrow images: only a square image with its channels last is taken for one."""
    assert pv.conv_vae(shape, latent_dim=2, likelihood="gaussian").generate(2).shape == (2, *shape)
