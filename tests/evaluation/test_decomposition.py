"""pv.decompose_elbo against the explicit mixture, and at its limits."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import LinearGaussian

import pyro_vae as pv


def mixture_log_prob(components, z):
    """log q(z) at z (S, N, D), summed over the N components of the mixture."""
    each = torch.stack([c.log_prob(z) for c in components])
    return each.logsumexp(0) - math.log(len(components))


@pytest.mark.parametrize("full", [False, True])
def test_decomposition_is_that_of_the_mixture(full):
    """Each part matches many samples of the explicit mixture, and the parts add up to the exact ELBO."""
    program = LinearGaussian(4, 2, 25, wrong=True)
    loc = program.x @ program.A.T + program.c
    scale = program.L.diagonal() if not full else None
    if full:
        guide, components = program.guide, [dist.MultivariateNormal(m, scale_tril=program.L.tril()) for m in loc]
        deviations = (program.L.tril() @ program.L.tril().T).diagonal().sqrt()
    else:
        deviations = scale
        components = [dist.Normal(m, scale).to_event(1) for m in loc]

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x @ program.A.T + program.c, scale).to_event(1))

    parts = pv.decompose_elbo(program.model, guide, program.x, 100, seed=0)
    z = torch.stack([c.sample((4000,)) for c in components], 1)
    own = torch.stack([c.log_prob(z[:, n]) for n, c in enumerate(components)], 1)
    mixed = mixture_log_prob(components, z)
    prior = dist.Normal(0.0, 1.0).log_prob(z)
    each = torch.stack([dist.Normal(m, deviations).log_prob(z) for m in loc]).logsumexp(0) - math.log(25)
    likelihood = dist.Normal(z @ program.W.T + program.b, program.sigma).log_prob(program.x).sum(-1)
    for estimate, values in (
        (parts.mutual_information, own - mixed),
        (parts.marginal_kl, mixed - prior.sum(-1)),
        (parts.dimension_wise_kl, (each - prior).sum(-1)),
        (parts.reconstruction, likelihood),
    ):
        reference = values.mean(0).mean().item()
        noise = math.sqrt((values.var(0) / 4000).sum()) / 25
        assert abs(estimate.value - reference) < 4 * math.hypot(estimate.standard_error, noise)
        # the standard error is that of stratified samples
        assert estimate.standard_error == pytest.approx(noise * math.sqrt(40), rel=0.15)
    total = parts.reconstruction.value - parts.mutual_information.value - parts.marginal_kl.value
    assert total == pytest.approx(parts.elbo.value)
    if full:
        assert abs(parts.elbo.value - program.exact_elbo().mean().item()) < 4 * parts.elbo.standard_error


def test_decomposition_at_its_ends():
    """The mutual information is 0 for a guide that ignores x, and log N for components that do not overlap."""
    program = LinearGaussian(3, 2, 16)

    def blind(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    parts = pv.decompose_elbo(program.model, blind, program.x)
    for estimate in (parts.mutual_information, parts.marginal_kl, parts.dimension_wise_kl):
        assert abs(estimate.value) < 1e-12

    def far(x):
        with pyro.plate("data", len(x)):
            places = 1e3 * torch.arange(float(len(x)), dtype=torch.float64)[:, None].expand(-1, 2)
            pyro.sample("z", dist.Normal(places, 1.0).to_event(1))

    parts = pv.decompose_elbo(program.model, far, program.x)
    assert parts.mutual_information.value == pytest.approx(math.log(16))


def test_decomposition_in_pieces_and_of_several_sites(monkeypatch):
    from pyro_vae.evaluation import decomposition, pieces

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            b = pyro.sample("b", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(a + b.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(0.3 * x, 0.8))
            pyro.sample("b", dist.Normal(torch.stack([x, -x], -1) / 3, 0.6).to_event(1))

    x = torch.randn(23, dtype=torch.float64)
    whole = pv.decompose_elbo(model, guide, x, 60, seed=0)
    monkeypatch.setattr(decomposition, "DENSITIES_AT_ONCE", 100)
    monkeypatch.setattr(decomposition, "DATA_AT_ONCE", 5)
    monkeypatch.setattr(pieces, "ELEMENTS_AT_ONCE", 200)
    in_pieces = pv.decompose_elbo(model, guide, x, 60, seed=1)
    for name in ("elbo", "reconstruction", "mutual_information", "marginal_kl", "dimension_wise_kl"):
        first, second = getattr(whole, name), getattr(in_pieces, name)
        assert abs(first.value - second.value) < 4 * math.hypot(first.standard_error, second.standard_error)

    def chained(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.3 * x, 0.8))
            pyro.sample("b", dist.Normal(torch.stack([a, -x.expand(a.shape)], -1) / 3, 0.6).to_event(1))

    monkeypatch.undo()
    parts = pv.decompose_elbo(model, chained, x, 10)
    assert parts.dimension_wise_kl is None
    assert "dimension-wise unknown" in str(parts)
    with pytest.raises(ValueError, match="num_samples to be an integer, at least 2"):
        pv.decompose_elbo(model, guide, x, 1)


def test_of_one_datum_the_aggregate_posterior_is_the_posterior():
    program = LinearGaussian(4, 2, 1, wrong=True)
    parts = pv.decompose_elbo(program.model, program.guide, program.x, 400, seed=0)
    assert parts.mutual_information.value == 0
    q = dist.MultivariateNormal(program.x @ program.A.T + program.c, scale_tril=program.L.tril())
    kl = torch.distributions.kl_divergence(q, program.prior).item()
    assert abs(parts.marginal_kl.value - kl) < 4 * parts.marginal_kl.standard_error
    assert abs(parts.elbo.value - program.exact_elbo().item()) < 4 * parts.elbo.standard_error
