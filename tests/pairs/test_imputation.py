"""Imputation and missing elements: against quadrature and linear algebra, and the refusals."""

from __future__ import annotations

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import z_score

import pyro_vae as pv


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
def test_impute_is_the_posterior_mean_or_mode(likelihood):
    options = {"categories": 3} if likelihood == "categorical" else {}
    vae = pv.mlp_vae((4,), latent_dim=1, hidden_dims=(8,), likelihood=likelihood, **options).double()
    vae.likelihood.decoder[-1].weight.data *= 2
    x = torch.randint(3, (6, 4)).double()
    mask = torch.rand(6, 4) > 0.5
    found = torch.stack(
        [vae.impute(x.where(mask, torch.nan), mask, 3000) for _ in range(20)]
    )  # more samples than one call of the decoder takes
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None, None]
    log_joint = dist.Normal(0.0, 1.0).log_prob(grid[..., 0]) + vae.likelihood(grid, mask=mask).log_prob(x)
    statistic = vae.likelihood.statistic(vae.likelihood(grid))
    weights = log_joint.softmax(0).reshape(4001, 6, *[1] * (statistic.dim() - 2))
    exact = vae.likelihood.from_statistic((weights * statistic).sum(0))
    assert torch.equal(found[0][mask], x[mask])
    if likelihood == "categorical":
        assert (found == exact.where(~mask, x)).double().mean() > 0.97
    else:
        assert z_score(found, exact)[~mask].max() < 4
        assert (found.mean(0) - exact)[~mask].abs().max() < 0.1


def test_pandas_tables_and_missing_values():
    vae = pv.mlp_vae((2,), latent_dim=2, hidden_dims=(8,), likelihood="poisson")
    table = pd.DataFrame({"a": [1, 2, 0, 4], "b": [1, 0, 3, 5]})
    for use in (vae.reconstruct, lambda x: pv.fit(vae.model, vae.guide, x, pv.ELBO(), epochs=1)):
        with pytest.raises(ValueError, match=r"torch.tensor\(x.to_numpy\(\), dtype=torch.float32\)"):
            use(table)
    x = torch.tensor(table.to_numpy(), dtype=torch.float32)
    x[0, 1] = torch.nan
    with pytest.raises(ValueError, match=r"pass \(x.nan_to_num\(\), ~x.isnan\(\)\)"):
        pv.fit(vae.model, vae.guide, x, pv.ELBO(), epochs=1)
    with pytest.raises(ValueError, match=r"got nan. For missing values, pass a mask"):
        pv.ELBO().bound(vae.model, vae.guide, x)
    pv.fit(vae.model, vae.guide, (x.nan_to_num(), ~x.isnan()), pv.ELBO(), epochs=1)
    assert vae.impute(x, ~x.isnan(), 10).isfinite().all()


def test_missing_elements_are_imputed_given_correlated_elements():
    vae = pv.mlp_vae((4,), latent_dim=1, hidden_dims=(8,), likelihood="low_rank_gaussian", rank=2).double()
    with torch.no_grad():
        vae.likelihood.factor.normal_()
        vae.likelihood.decoder[-1].weight.zero_()  # x does not depend on z, so few samples are enough
    x, mask = torch.randn(5, 4).double(), torch.tensor([[True, False, True, False]] * 5)
    loc, factor = vae.decode(torch.zeros(1, 1).double())[0], vae.likelihood.factor.detach()
    scale = torch.nn.functional.softplus(vae.likelihood.raw_scale.detach()) + vae.likelihood.min_scale
    covariance = factor @ factor.T + scale.square().diag()
    on, off = [0, 2], [1, 3]
    gain = covariance[off][:, on] @ torch.linalg.inv(covariance[on][:, on])
    torch.testing.assert_close(vae.impute(x, mask, 3)[:, off], loc[off] + (x[:, on] - loc[on]) @ gain.T)


def test_imputation_is_refused_if_all_weights_are_zero():
    class Uniform(pv.Likelihood):
        filler = 0.5

        def pixel_distribution(self, loc):
            return dist.Uniform(loc, loc + 1e-6, validate_args=False)

    vae = pv.mlp_vae((2,), latent_dim=1, hidden_dims=(4,), likelihood=Uniform)
    with pytest.raises(
        ValueError, match="expected importance weights above zero for each datum, got 10 weights of zero for 3 data"
    ):
        vae.impute(torch.full((3, 2), 9.0), torch.tensor([[True, False]] * 3), 10)


def test_missing_elements_if_zero_is_outside_the_support():
    class LogNormal(pv.Likelihood):
        filler = 1.0

        def pixel_distribution(self, loc):
            return dist.LogNormal(loc, 1.0)

    vae = pv.mlp_vae((2,), latent_dim=1, hidden_dims=(4,), likelihood=LogNormal)
    x, mask = torch.rand(6, 2).exp(), torch.rand(6, 2) > 0.4
    pv.ELBO().loss_and_grads(vae.model, vae.guide, x, mask)
    assert all(parameter.grad.isfinite().all() for parameter in vae.parameters())
    full = pv.ELBO(kl="monte_carlo")
    pyro.set_rng_seed(0)
    one = full.bound(vae.model, vae.guide, x, mask)
    pyro.set_rng_seed(0)
    torch.testing.assert_close(one, full.bound(vae.model, vae.guide, x.where(mask, 7.0), mask))
