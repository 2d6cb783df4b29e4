"""Families of PyTorch and Pyro whose draws have another density than the one that they state."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.toys import IMPROPER
from torch import tensor

import pyro_vae as pv
from pyro_vae.engine.agreement import draws_otherwise

# Each family at a parameter; the second density is that at another one.
FAMILIES = {
    "AffineBeta": lambda a: dist.AffineBeta(2.0 + a, tensor(3.0), tensor(-1.0), tensor(4.0)),
    "AsymmetricLaplace": lambda a: dist.AsymmetricLaplace(a, tensor(1.0), tensor(2.0)),
    "Beta": lambda a: dist.Beta(2.0 + a, tensor(3.0)),
    "BetaBinomial": lambda a: dist.BetaBinomial(2.0 + a, tensor(3.0), total_count=10),
    "Binomial": lambda a: dist.Binomial(10, 0.3 + a / 4),
    "CoalescentTimes": lambda a: dist.CoalescentTimes(torch.zeros(3), 1.5 + a),
    "ContinuousBernoulli": lambda a: dist.ContinuousBernoulli(0.3 + a / 4),
    "Dirichlet": lambda a: dist.Dirichlet(torch.stack([2.0 + a, tensor(1.0), tensor(3.0)])),
    "DirichletMultinomial": lambda a: dist.DirichletMultinomial(torch.stack([2.0 + a, tensor(1.0)]), total_count=6),
    "FoldedDistribution": lambda a: dist.FoldedDistribution(dist.Normal(0.3 + a, tensor(1.0))),
    "Gamma": lambda a: dist.Gamma(2.0 + a, tensor(1.5)),
    "GammaPoisson": lambda a: dist.GammaPoisson(2.0 + a, tensor(1.5)),
    "Geometric": lambda a: dist.Geometric(0.4 + a / 4),
    "Gumbel": lambda a: dist.Gumbel(a, tensor(1.0)),
    "HalfCauchy": lambda a: dist.HalfCauchy(1.0 + a),
    "HalfNormal": lambda a: dist.HalfNormal(1.0 + a / 2),
    "InverseGamma": lambda a: dist.InverseGamma(3.0 + a, tensor(2.0)),
    "Kumaraswamy": lambda a: dist.Kumaraswamy(2.0 + a, tensor(1.5)),
    "LKJCholesky of 2": lambda a: dist.LKJCholesky(2, 1.5 + a),
    "LKJCholesky": lambda a: dist.LKJCholesky(3, 1.5 + a),
    "Logistic": lambda a: dist.Logistic(a, tensor(1.0)),
    "LogNormal": lambda a: dist.LogNormal(a, tensor(1.0)),
    "MixtureOfDiagNormals": lambda a: dist.MixtureOfDiagNormals(
        torch.stack([torch.stack([a, a]), torch.ones(2)]), torch.ones(2, 2), tensor([0.3, 1.0])
    ),
    "Multinomial": lambda a: dist.Multinomial(5, torch.stack([0.3 + a / 4, tensor(0.3), tensor(0.4)])),
    "MultivariateStudentT": lambda a: dist.MultivariateStudentT(tensor(4.0), torch.stack([a, a]), torch.eye(2)),
    "NegativeBinomial": lambda a: dist.NegativeBinomial(tensor(3.5), 0.4 + a / 4),
    "ProjectedNormal": lambda a: dist.ProjectedNormal(torch.stack([1.0 + a, tensor(0.3), tensor(-0.4)])),
    "RelaxedBernoulli": lambda a: dist.RelaxedBernoulli(tensor(0.7), probs=0.4 + a / 4),
    "RelaxedOneHotCategorical": lambda a: dist.RelaxedOneHotCategorical(tensor(0.7), torch.stack([0.4 + a, 1 - a])),
    "SineBivariateVonMises": lambda a: dist.SineBivariateVonMises(
        a, tensor(-0.5), tensor(3.0), tensor(2.0), weighted_correlation=tensor(0.5)
    ),
    "SineSkewed": lambda a: dist.SineSkewed(dist.VonMises(a[None], tensor([1.5])).to_event(1), tensor([0.4])),
    "SkewLogistic": lambda a: dist.SkewLogistic(a, tensor(1.0), tensor(2.0)),
    "StudentT": lambda a: dist.StudentT(tensor(4.0), a, tensor(1.0)),
    "VonMises": lambda a: dist.VonMises(a, tensor(1.5)),
    "Weibull": lambda a: dist.Weibull(1.0 + a, tensor(1.5)),
    "Wishart": lambda a: torch.distributions.Wishart(4.0 + a, torch.eye(3).to(a)),
    "ZeroInflatedPoisson": lambda a: dist.ZeroInflatedPoisson(2.0 + a, gate=tensor(0.3)),
}
NOT_THEIR_OWN = {"CoalescentTimes", "LKJCholesky", "SineBivariateVonMises"}


@pytest.mark.parametrize("name", FAMILIES)
def test_draws_have_the_density_that_is_stated_or_are_known_not_to(name):
    """E_p[(q / p) f] = E_q[f], with f a function of q / p: neither mean is that of draws of another density."""
    torch.manual_seed(0)
    number = 30_000
    p, q = (FAMILIES[name](tensor(a, dtype=torch.float64)) for a in (0.0, 0.2))
    x, y = p.sample((number,)), q.sample((number,))
    slope_x, slope_y = q.log_prob(x) - p.log_prob(x), q.log_prob(y) - p.log_prob(y)
    weighted = slope_x.exp()
    found = []
    for first, second in (
        (weighted, torch.ones(number)),
        (torch.ones(number), (-slope_y).exp()),
        (weighted * (10 * slope_x).tanh(), (10 * slope_y).tanh()),
    ):
        error = ((first.var() + second.var()) / number).sqrt()
        found.append(float((first.mean() - second.mean()).abs() / error))
    assert (max(found) > 5) == (name in NOT_THEIR_OWN), found
    assert draws_otherwise(p) == draws_otherwise(dist.TransformedDistribution(p, [])) == (name in NOT_THEIR_OWN)


def test_draws_of_a_truncated_polya_gamma_have_another_mean():
    p = dist.TruncatedPolyaGamma(torch.ones(1))
    grid = torch.linspace(1e-3, 2.4999, 20_001)
    density, draws = p.log_prob(grid).exp(), p.sample((100_000,))
    mean = torch.trapezoid(grid * density, grid) / torch.trapezoid(density, grid)
    assert abs(draws.mean() - mean) > 5 * draws.std() / len(draws) ** 0.5
    assert draws_otherwise(p)


def test_a_skewed_family_draws_as_its_base():
    base = FAMILIES["SineBivariateVonMises"](tensor(0.0))
    assert draws_otherwise(dist.SineSkewed(base, tensor([0.4, 0.1])))


def test_draws_of_coalescent_times_have_rate_1():
    """Of three lineages, the first pair meets at rate 3."""
    p = dist.CoalescentTimes(torch.zeros(3), torch.tensor(1.0))
    first = -p.sample((30_000,)).max(-1).values
    assert abs(first.mean() - 1 / 3) < 5 * first.std() / len(first) ** 0.5
    assert not draws_otherwise(p)


X = torch.randn(8, generator=torch.Generator().manual_seed(0))


def correlated(size, wrap=lambda fn: fn, obs=True):
    """A Cholesky factor of correlations, one entry of which is observed with noise; its prior is a guide too."""

    def body(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", wrap(dist.LKJCholesky(size, torch.ones(len(x)))))
            if obs:
                pyro.sample("x", dist.Normal(z[..., 1, 0], 0.5), obs=x)

    return body


def of_normals(x):
    with pyro.plate("data", len(x)):
        normals = dist.Normal(x.new_zeros(len(x), 3), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(normals, dist.transforms.CorrCholeskyTransform()))


@pytest.mark.parametrize(
    "wrap", [lambda fn: fn, lambda fn: dist.TransformedDistribution(fn, [])], ids=["own", "within"]
)
def test_a_guide_of_such_a_family_is_refused(wrap):
    """PyTorch's draws of LKJCholesky(3, 1) have variances of .25, .30 and .30, where each is .25."""
    with torch.no_grad(), pytest.raises(pv.PyroVAEError, match="guide site 'z' draws from LKJCholesky"):
        pv.log_weights(correlated(3), correlated(3, wrap, obs=False), X, num_particles=2)
    with torch.no_grad():
        assert pv.log_weights(correlated(2), correlated(2, wrap, obs=False), X, num_particles=2).isfinite().all()


def test_draws_of_such_a_prior_are_refused_or_left_out():
    with pytest.raises(pv.PyroVAEError, match="model site 'z' draws from LKJCholesky"):
        pv.RWS(2, sleep=0.5).differentiable_loss(correlated(3), of_normals, X)
    groups = pv.to_arviz(correlated(3), of_normals, X, 10)
    children = getattr(groups, "children", None) or groups.groups()
    assert {"posterior", "posterior_predictive"} <= set(children)
    assert not {"prior", "prior_predictive"} & set(children)


def test_draws_of_such_data_are_refused_or_left_out():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.SineBivariateVonMises(z, z, *[torch.ones(())] * 2, torch.zeros(())), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    x = torch.stack([X, X], -1)
    groups = pv.to_arviz(model, guide, x, 10)
    children = getattr(groups, "children", None) or groups.groups()
    assert "prior" in children
    assert not {"posterior_predictive", "prior_predictive"} & set(children)
    with pytest.raises(pv.PyroVAEError, match="model site 'x' draws from SineBivariateVonMises"):
        pv.bdmc(model, guide, x, 3, 2, progress=False)


def test_dreams_of_an_improper_prior_are_refused():
    with pytest.raises(pv.PyroVAEError, match="Use sleep=0"):
        pv.RWS(2, sleep=0.5).differentiable_loss(*IMPROPER, X)
