"""Each check of pyro_vae.testing catches a part that is broken in the way that it looks for, and passes sound ones."""

from __future__ import annotations

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions.transforms import AffineTransform
from torch.nn.functional import softplus

import pyro_vae as pv
from pyro_vae.networks import mlp
from pyro_vae.testing.programs import BernoulliProgram, NormalProgram


def fails(check, part="", cause=""):
    """The message of a failed check: its name, the expected value, the value found, and the likely cause."""
    pattern = f"{re.escape(part)}.* fails the check '{check}': expected (.|\n)*, got (.|\n)*{cause}"
    return pytest.raises(AssertionError, match=pattern)


# Objectives


class Bound(pv.Objective):
    """IWAE, with something broken in each subclass."""

    family = "bound"

    def reduce(self, log_weights):
        return log_weights.logsumexp(0) - math.log(len(log_weights))


class OverData(Bound):
    def reduce(self, log_weights):
        return log_weights.mean(1)


class Mixes(Bound):
    def reduce(self, log_weights):
        return super().reduce(log_weights) + 0.1 * (log_weights - log_weights.mean(1, keepdim=True)).mean(0)


class NoConstant(Bound):
    def reduce(self, log_weights):
        return log_weights.logsumexp(0)


class Twice(Bound):
    def reduce(self, log_weights):
        return 2 * super().reduce(log_weights)


class Contraharmonic(Bound):
    def reduce(self, log_weights):
        return log_weights.square().sum(0) / log_weights.sum(0)


class Detached(Bound):
    def reduce(self, log_weights):
        return (log_weights.softmax(0).detach() * log_weights).sum(0)


class WrongCurvature(Bound):
    def curvature(self, log_weights):
        return log_weights.softmax(0)


class Underflows(Bound):
    def reduce(self, log_weights):
        return log_weights.exp().mean(0).log()


class WideConstant(Bound):
    def reduce(self, log_weights):
        return super().reduce(log_weights) + torch.zeros(1, dtype=torch.float64)


class Shifted(Bound):
    def bound(self, *args, **kwargs):
        return super().bound(*args, **kwargs) + 0.03


class OtherLoss(Bound):
    def differentiable_loss(self, *args, **kwargs):
        return 1.001 * super().differentiable_loss(*args, **kwargs)


class SteeperLoss(Bound):
    def differentiable_loss(self, *args, **kwargs):
        loss = super().differentiable_loss(*args, **kwargs)
        return loss.detach() + 1.05 * (loss - loss.detach())


class FollowsTheModel(pv.PIWAE):
    """A guide that follows the model's bound and not its own."""

    def __init__(self, num_particles, gradient="pathwise"):
        super().__init__(2, num_particles, gradient)

    def differentiable_loss(self, *args, **kwargs):
        return pv.IWAE(2 * self.num_particles, self.gradient).differentiable_loss(*args, **kwargs)


class InChunks(Bound):
    def differentiable_loss(self, *args, **kwargs):
        return super().differentiable_loss(*args, **kwargs) + (0.0 if self.chunk_size is None else 1e-5)


class OneByOne(Bound):
    def differentiable_loss(self, *args, **kwargs):
        return super().differentiable_loss(*args, **kwargs) * (1.0 if self.vectorize_particles else 1.001)


class ByValue(Bound):
    def reduce(self, log_weights):
        return super().reduce(log_weights) if log_weights.max() > -1e9 else log_weights.mean(0)


OBJECTIVES = {
    OverData: ("shapes", "first dimension"),
    Mixes: ("columns", "keeps data apart"),
    NoConstant: ("equal weights", "-log K"),
    Twice: ("equal weights", "factor"),
    Contraharmonic: ("constant factor", "tight=False"),
    Detached: ("slope", "detached"),
    WrongCurvature: ("curvature", "another reduction"),
    Underflows: ("float32", "logsumexp"),
    WideConstant: ("float32", "type of the log-weights"),
    Shifted: ("mean", "term left out"),
    OtherLoss: ("loss", "another number"),
    SteeperLoss: ("gradient pathwise", r"biased=\('pathwise',\)"),
    FollowsTheModel: ("gradient pathwise", "biased by design"),
    InChunks: ("chunks", "at once"),
    OneByOne: ("chunks", "at once"),
}


@pytest.mark.parametrize("family", OBJECTIVES, ids=lambda family: family.__name__)
def test_a_broken_objective(family):
    check, cause = OBJECTIVES[family]
    with fails(check, family.__name__, cause):
        pv.testing.check_objective(family(2))


def test_a_sound_objective_passes_and_leaves_the_random_numbers_alone():
    pyro.param("mine", torch.tensor(1.0))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    pv.testing.check_objective(Bound(3, "dreg"))
    assert torch.equal(torch.rand(1), expected)
    assert list(pyro.get_param_store()) == ["mine"]


def test_an_estimator_that_is_biased_for_the_guide_alone():
    """STL leaves the score out: biased for the guide of IWAE, exact for its model."""
    with fails("gradient stl", "IWAE", r"biased=\('stl',\)"):
        pv.testing.check_objective(pv.IWAE(2), biased=())

    class BiasedForTheModel(Bound):
        def differentiable_loss(self, *args, **kwargs):
            loss = super().differentiable_loss(*args, **kwargs)
            return loss.detach() + (1.05 if self.gradient == "stl" else 1.0) * (loss - loss.detach())

    with pytest.raises(AssertionError, match=r"'gradient stl'.*the derivative by (mean|slope|offset) "):
        pv.testing.check_objective(BiasedForTheModel(2))


def test_a_bound_that_is_not_its_reduction_comes_with_an_exact_one():
    class Penalised(Bound):
        def bound(self, *args, **kwargs):
            return super().bound(*args, **kwargs) - 0.5

        def differentiable_loss(self, model, guide, x):
            return super().differentiable_loss(model, guide, x) + 0.5 * len(x)

    with fails("mean"):
        pv.testing.check_objective(Penalised(2))
    pv.testing.check_objective(Penalised(2), exact=lambda x, p, q: Penalised(2).reduce(x + p - q) - 0.5)
    pv.testing.check_objective(Twice(2), tight=False)


def test_each_gradient_needs_a_program():
    with fails("mean", cause="programs"):
        pv.testing.check_objective(pv.ELBO(free_bits=0.0, kl="analytic"), programs=[MixtureProgram()])
    with fails("gradient pathwise", cause="programs"):
        pv.testing.check_objective(Bound(2), programs=[BernoulliProgram()])


class MixtureProgram(NormalProgram):
    """A normal guide and a mixture as prior, whose KL has no closed form."""

    def prior(self, p, name, z):
        locs = torch.stack([p["mean"], -p["mean"]], -1)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones_like(locs)), dist.Normal(locs, torch.ones_like(locs)))


@pytest.mark.slow
def test_a_compiled_objective(without_inductor):
    pv.testing.check_objective(Bound(2), compiled=True)
    pv.testing.check_objective(pv.IWAE(2, "score"), compiled=True)
    with fails("compiled", "ByValue", "by values"):
        pv.testing.check_objective(ByValue(2), compiled=True)


@pytest.mark.slow
def test_an_objective_by_the_compiler():
    pv.testing.check_objective(Bound(2), compiled=True)


@pytest.mark.slow
def test_an_objective_that_a_function_makes():
    class Renamed(Bound):
        def __init__(self, count, **options):
            super().__init__(count, **options)

    with pytest.raises(
        pv.PyroVAEError, match=r"expected Renamed to keep its argument 'count'.* got none\. Write self\.co"
    ):
        pv.testing.check_objective(Renamed(2))
    pv.testing.check_objective(lambda **options: Renamed(2, **options))
    pv.testing.check_objective(lambda gradient="pathwise": Renamed(2, gradient=gradient))
    pv.testing.check_objective(lambda: Renamed(2))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (pv.IWAE(64), "expected an objective of few samples.*got 64 samples of 1 latents. Check it with num_particles"),
        (pv.ELBO(free_bits=0.1), "expected a bound of each datum alone, got free_bits=0.1"),
        (3, r"expected an objective such as pv.IWAE\(3\), got 3"),
        (dict, r"expected a function that gives an objective, got one that gives \{\}"),
    ],
)
def test_arguments_that_are_no_objective(objective, message):
    with pytest.raises(pv.PyroVAEError, match=message):
        pv.testing.check_objective(objective)


# Likelihoods


class Real(pv.Likelihood):
    """Normal elements with a scale of their own, with something broken in each subclass."""

    num_features = 2
    family: type = dist.Normal

    def pixel_distribution(self, loc, raw):
        return self.family(loc, softplus(raw) + 0.1)


class NoNormaliser(Real):
    class family(dist.Normal):
        def log_prob(self, value):
            return -0.5 * ((value - self.loc) / self.scale).square()


class OtherMean(Real):
    class family(dist.Normal):
        @property
        def mean(self):
            return self.loc + 0.01


class OtherVariance(Real):
    class family(dist.Normal):
        @property
        def variance(self):
            return self.scale


class WiderSamples(Real):
    class family(dist.Normal):
        def sample(self, sample_shape=()):
            return self.loc + 1.05 * (super().sample(sample_shape) - self.loc)


class DetachedScale(Real):
    class family(dist.Normal):
        def log_prob(self, value):
            return dist.Normal(self.loc, self.scale.detach()).log_prob(value)


class Cancels(Real):
    def pixel_distribution(self, loc, raw):
        return super().pixel_distribution((1e4 + loc) - 1e4, raw)


class WideTensor(Real):
    def pixel_distribution(self, loc, raw):
        return super().pixel_distribution(loc + torch.zeros(1, dtype=torch.float64), raw)


class Overflows(Real):
    def pixel_distribution(self, loc, raw):
        return dist.Normal(loc, (4 * raw).exp())


class IgnoresMasks(Real):
    def event_distribution(self, *features, mask):
        return self.pixel_distribution(*features).to_event(len(self.event_shape))


class TooFewEvents(Real):
    def event_distribution(self, *features, mask):
        return self.pixel_distribution(*features).to_event(1)


class OtherWidth(Real):
    @classmethod
    def features_for(cls, **options):
        return 3


class ByElement(Real):
    def pixel_distribution(self, loc, raw):
        return super().pixel_distribution(loc, raw * (2.0 if raw.sum().item() > 0 else 1.0))


class Counts(pv.Likelihood):
    """Poisson counts, with something broken in each subclass."""

    def pixel_distribution(self, log_rate):
        return dist.Poisson(log_rate.exp())

    def check(self, x):
        if not bool(((x >= 0) & (x % 1 == 0)).all()):
            raise ValueError("expected counts. Pass counts.")


class AcceptsHalves(Counts):
    def check(self, x):
        if not bool((x >= 0).all()):
            raise ValueError("expected counts. Pass counts.")


class RefusesZeros(Counts):
    def check(self, x):
        if not bool((x > 0).all()):
            raise ValueError("expected positive counts. Pass others.")


class FillsByHalves(Counts):
    filler = 0.5


class Halves(Counts):
    class family(dist.Poisson):
        def sample(self, sample_shape=()):
            return super().sample(sample_shape) + 0.5

    def pixel_distribution(self, log_rate):
        return self.family(log_rate.exp())


class Codes(pv.Likelihood):
    num_features = 3

    def pixel_distribution(self, *logits):
        return dist.Categorical(logits=torch.stack(logits, -1))


class Reversed(pv.Categorical):
    def pixel_distribution(self, *logits):
        sound = super().pixel_distribution(*logits)

        class Other(type(sound)):
            def sample(self, sample_shape=()):
                return 3 - super().sample(sample_shape)

        return Other(logits=sound.logits)


class Correlated(pv.Likelihood):
    """Elements that share a noise; where one is missing, its mean takes its place, which is no marginal density."""

    def event_distribution(self, loc, *, mask):
        shape = self.event_shape

        class Filled(dist.TorchDistribution):
            arg_constraints = {}
            support = dist.constraints.independent(dist.constraints.real, len(shape))

            def __init__(self, loc):
                self.loc = loc
                flat = loc.flatten(loc.dim() - len(shape))
                cov = torch.eye(flat.shape[-1], dtype=loc.dtype) + 0.8
                self.normal = dist.MultivariateNormal(flat, cov)
                super().__init__(flat.shape[:-1], shape)

            def expand(self, batch_shape, _instance=None):
                return Filled(self.loc.expand(*batch_shape, *shape))

            def sample(self, sample_shape=()):
                return self.normal.sample(sample_shape).unflatten(-1, shape)

            def log_prob(self, value):
                value = value if mask is None else torch.where(mask, value, self.loc)
                return self.normal.log_prob(value.flatten(value.dim() - len(shape)))

            @property
            def mean(self):
                return self.loc

        return Filled(loc)


LIKELIHOODS = {
    NoNormaliser: ("density", "normaliser"),
    OtherMean: ("mean", "`mean`"),
    OtherVariance: ("variance", "`variance`"),
    WiderSamples: ("samples", "its scale"),
    DetachedScale: ("slope", "detached"),
    Cancels: ("float32", "cancel"),
    WideTensor: ("float32", "features' type"),
    Overflows: ("finite", "overflows"),
    IgnoresMasks: ("mask", "left in"),
    Correlated: ("mask", "left in"),
    TooFewEvents: ("shapes", "batch"),
    OtherWidth: ("shapes", "width"),
    AcceptsHalves: ("check", "agree"),
    RefusesZeros: ("check", "agree"),
    FillsByHalves: ("check", "filler"),
    Codes: ("samples", "Convert"),
}


@pytest.mark.parametrize("family", LIKELIHOODS, ids=lambda family: family.__name__)
def test_a_broken_likelihood(family):
    check, cause = LIKELIHOODS[family]
    with fails(check, family.__name__, cause):
        pv.testing.check_likelihood(family)


def test_samples_outside_the_support_and_of_other_probabilities():
    with fails("check", "Halves", "agree"):
        pv.testing.check_likelihood(Halves)
    with fails("samples", "Reversed"):
        pv.testing.check_likelihood(Reversed, categories=4)


def test_a_compiled_likelihood(without_inductor):
    pv.testing.check_likelihood(Real, compiled=True)
    with fails("compiled", "ByElement", "by values"):
        pv.testing.check_likelihood(ByElement, compiled=True)


class Angles(pv.Likelihood):
    num_features = 3

    def pixel_distribution(self, a, b, log_concentration):
        return dist.VonMises(torch.atan2(b, a), log_concentration.clamp(-5, 5).exp())

    def from_statistic(self, statistic):
        return torch.atan2(statistic.sin(), statistic.cos())


class Positive(pv.Likelihood):
    num_features = 2
    filler = 1.0

    def pixel_distribution(self, log_mean, raw_shape):
        shape = softplus(raw_shape) + 0.1
        return dist.Gamma(shape, shape * (-log_mean).exp())


class Shares(pv.Likelihood):
    num_features = 2
    filler = 0.5

    def pixel_distribution(self, a, b):
        return dist.Beta(softplus(a) + 0.5, softplus(b) + 0.5)


class Draws(pv.Likelihood):
    def pixel_distribution(self, logits):
        return dist.Binomial(7, logits=logits)


class HeavyTails(pv.Likelihood):
    def pixel_distribution(self, loc):
        return dist.Cauchy(loc, 0.5)


class TwoModes(pv.Likelihood):
    num_features = 6

    def pixel_distribution(self, *features):
        logits, loc, raw = torch.stack(features, -1).chunk(3, -1)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(loc, softplus(raw) + 0.05))


SOUND = [Real, Counts, Positive, Shares, Draws, HeavyTails, TwoModes]


@pytest.mark.parametrize("family", SOUND, ids=lambda family: family.__name__)
def test_a_sound_likelihood(family):
    pv.testing.check_likelihood(family)


def test_a_support_that_the_distribution_does_not_state():
    with fails("density"):
        pv.testing.check_likelihood(Angles)
    pv.testing.check_likelihood(Angles, support=(-math.pi, math.pi))
    with pytest.raises(
        pv.PyroVAEError, match=r"expected a discrete support of integers, got .* Pass the values: support"
    ):
        pv.testing.check_likelihood(pv.DiscretizedLogistic, levels=5)
    pv.testing.check_likelihood(pv.DiscretizedLogistic, levels=5, support=torch.arange(5) / 4)


def test_an_instance_keeps_its_parameters_and_its_decoder():
    likelihood = pv.Gaussian(mlp(3, [4], 6), (6,), scale="learned")
    likelihood.log_scale.data.fill_(0.7)
    before = {name: value.clone() for name, value in likelihood.state_dict().items()}
    pv.testing.check_likelihood(likelihood)
    assert all(torch.equal(before[name], value) for name, value in likelihood.state_dict().items())
    with pytest.raises(pv.PyroVAEError, match=r"expected an event of at most two elements.*got \(6,\) of dependent"):
        pv.testing.check_likelihood(pv.LowRankGaussian(mlp(3, [4], 6), (6,), rank=1))
    pv.testing.check_likelihood(pv.LowRankGaussian(mlp(3, [4], 2), (2,), rank=1))
    with pytest.raises(pv.PyroVAEError, match=r"expected no options next to an instance, got {'scale': 2.0}"):
        pv.testing.check_likelihood(likelihood, scale=2.0)
    with pytest.raises(
        pv.PyroVAEError, match=r"expected a subclass of pyro_vae.Likelihood or an instance, got 'gaussian'"
    ):
        pv.testing.check_likelihood("gaussian")


# Posteriors


class Diagonal(pv.Posterior):
    """A diagonal normal, with something broken in each subclass."""

    family: type = dist.Normal

    @classmethod
    def features_for(cls, latent_dim, **options):
        return 2 * latent_dim

    def latent_distribution(self, features):
        loc, log_scale = features.chunk(2, -1)
        return self.family(loc, log_scale.exp()).to_event(1)


class NoJacobian(Diagonal):
    class Stretch(AffineTransform):
        def log_abs_det_jacobian(self, x, y):
            return torch.zeros_like(x)

    def latent_distribution(self, features):
        loc, log_scale = features.chunk(2, -1)
        base = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc))
        return dist.TransformedDistribution(base, [self.Stretch(loc, 1 + log_scale.exp())]).to_event(1)


class DetachedSamples(Diagonal):
    class family(dist.Normal):
        def rsample(self, sample_shape=()):
            return super().rsample(sample_shape).detach()


class DetachedLocation(Diagonal):
    class family(dist.Normal):
        def rsample(self, sample_shape=()):
            return super().rsample(sample_shape) - self.loc + self.loc.detach()


class PyrosMixture(pv.MixturePosterior):
    """Of Pyro's own mixture, whose pathwise derivative is biased in the logits."""

    def latent_distribution(self, features):
        ours = super().latent_distribution(features)
        return dist.MixtureOfDiagNormals(ours.locs, ours.coord_scale, ours.component_logits)


class WiderPosterior(Diagonal):
    class family(dist.Normal):
        def rsample(self, sample_shape=()):
            return self.loc + 1.05 * (super().rsample(sample_shape) - self.loc)

        def sample(self, sample_shape=()):
            return self.rsample(sample_shape).detach()


class MeanOfPosterior(Diagonal):
    family = OtherMean.family


class VarianceOfPosterior(Diagonal):
    family = OtherVariance.family


class NoEvent(Diagonal):
    def latent_distribution(self, features):
        return super().latent_distribution(features).base_dist


class OverTheBatch(Diagonal):
    def latent_distribution(self, features):
        return super().latent_distribution(
            features - 0.1 * features.flatten(0, -2).mean(0) if features.dim() > 1 else features
        )


class SlopeOfPosterior(Diagonal):
    family = DetachedScale.family


class CancelsInPosterior(Diagonal):
    def latent_distribution(self, features):
        return super().latent_distribution((1e4 + features) - 1e4)


class Remembers(Diagonal):
    class family(dist.Normal):
        last = None

        def rsample(self, sample_shape=()):
            self.last = super().rsample(sample_shape)
            return self.last

        def sample(self, sample_shape=()):
            self.last = super().sample(sample_shape)
            return self.last

        def log_prob(self, value):
            return super().log_prob(value) + (1e-5 if value is self.last else 0.0)


class PosteriorByValue(Diagonal):
    def latent_distribution(self, features):
        return super().latent_distribution(features if features.sum().item() > 0 else 2 * features)


POSTERIORS = {
    NoJacobian: ("density", "Jacobian"),
    WiderPosterior: ("samples", "its scale"),
    MeanOfPosterior: ("mean", "`mean`"),
    VarianceOfPosterior: ("variance", "`variance`"),
    NoEvent: ("shapes", "to_event"),
    OverTheBatch: ("shapes", "leading dimensions"),
    Remembers: ("log_prob", "cache"),
    SlopeOfPosterior: ("slope", "detached"),
    DetachedSamples: ("path", "detached"),
    DetachedLocation: ("path", "detached"),
    PyrosMixture: ("path", "another derivative"),
    CancelsInPosterior: ("float32", "cancel"),
}


@pytest.mark.parametrize("family", POSTERIORS, ids=lambda family: family.__name__)
def test_a_broken_posterior(family):
    check, cause = POSTERIORS[family]
    with fails(check, family.__name__, cause):
        pv.testing.check_posterior(family)


class OnOff(Diagonal):
    """Bernoulli latents."""

    @classmethod
    def features_for(cls, latent_dim, **options):
        return latent_dim

    def latent_distribution(self, features):
        return dist.Bernoulli(logits=features).to_event(1)


class OnSimplex(OnOff):
    def latent_distribution(self, features):
        return dist.Dirichlet(0.5 + features.exp())


class LogNormal(Diagonal):
    family = dist.LogNormal


class Laplace(Diagonal):
    family = dist.Laplace


@pytest.mark.parametrize(
    ("family", "latent_dim"), [(Diagonal, 1), (Diagonal, 2), (Laplace, 2), (LogNormal, 2), (OnOff, 2), (OnSimplex, 3)]
)
def test_a_sound_posterior(family, latent_dim):
    pv.testing.check_posterior(family, latent_dim=latent_dim)


@pytest.mark.slow
def test_a_compiled_posterior(without_inductor):
    pv.testing.check_posterior(Diagonal, compiled=True)
    pv.testing.check_posterior(OnOff, compiled=True)
    with fails("compiled", "PosteriorByValue", "by values"):
        pv.testing.check_posterior(PosteriorByValue, compiled=True)


class Plain(nn.Module):
    """A posterior that is a module of one's own."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(3, 4)

    def forward(self, x):
        loc, log_scale = self.network(x).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


def test_a_posterior_that_is_a_module_and_arguments_that_are_none():
    pv.testing.check_posterior(Plain(), event_shape=(3,))
    with pytest.raises(pv.PyroVAEError, match=r"expected Plain to have an event_shape, got none. Pass event_shape"):
        pv.testing.check_posterior(Plain())
    with pytest.raises(pv.PyroVAEError, match=r"expected one or two dimensions.*got 3. Check a part with latent_dim=2"):
        pv.testing.check_posterior(Diagonal, latent_dim=3)
    with pytest.raises(pv.PyroVAEError, match=r"expected a subclass of pyro_vae.Posterior or a module, got .*Plain"):
        pv.testing.check_posterior(Plain)
    with pytest.raises(pv.PyroVAEError, match=r"expected a posterior to be a torch.nn.Module, got 3"):
        pv.testing.check_posterior(3)
    with pytest.raises(pv.PyroVAEError, match=r"expected no options next to an instance, got {'rank': 2}"):
        pv.testing.check_posterior(Plain(), event_shape=(3,), rank=2)


# Priors


class Prior(nn.Module):
    """A normal prior, with something broken in each subclass."""

    family: type = dist.Normal

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(2))

    def forward(self):
        return self.family(torch.zeros_like(self.log_scale), self.log_scale.exp()).to_event(1)


class UnnormalisedPrior(Prior):
    family = NoNormaliser.family


class WiderPrior(Prior):
    family = WiderSamples.family


class BatchOfPriors(Prior):
    def forward(self):
        return super().forward().expand((1,))


class OneForAll(Prior):
    class family(dist.Normal):
        def sample(self, sample_shape=()):
            z = super().sample(sample_shape)
            return z[..., :1, :1, :].expand_as(z) if z.dim() > 2 else z

        rsample = sample
        has_rsample = False


class DetachedPrior(Prior):
    family = DetachedSamples.family


class SlopeOfPrior(Prior):
    family = DetachedScale.family


PRIORS = {
    UnnormalisedPrior: ("density", "normaliser"),
    WiderPrior: ("samples", "its scale"),
    BatchOfPriors: ("shapes", "no batch"),
    OneForAll: ("shapes", "no batch"),
    SlopeOfPrior: ("slope", "detached"),
    DetachedPrior: ("path", "detached"),
}


@pytest.mark.parametrize("family", PRIORS, ids=lambda family: family.__name__)
def test_a_broken_prior(family):
    check, cause = PRIORS[family]
    with fails(check, family.__name__, cause):
        pv.testing.check_prior(family())


def test_a_sound_prior(without_inductor):
    pv.testing.check_prior(Prior(), compiled=True)
    with pytest.raises(pv.PyroVAEError, match=r"expected a prior to be a torch.nn.Module, got <class"):
        pv.testing.check_prior(Prior)


@pytest.mark.slow
def test_parts_by_the_compiler():
    pv.testing.check_likelihood(Real, compiled=True)
    pv.testing.check_posterior(Diagonal, compiled=True)
    pv.testing.check_prior(Prior(), compiled=True)
