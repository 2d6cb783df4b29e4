"""Programs that are valid though unusual: no batch plate, absent latents, views of data, data by conditioning."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import z_score
from pyro import poutine

import pyro_vae as pv
from pyro_vae.evaluation.pieces import ELEMENTS_AT_ONCE, program_on, rows_at_once

X = torch.tensor([0.5, -1.0, 2.0])


def exact(x):
    """log p(x) where z ~ N(0, 1) and x ~ N(z, 1)."""
    return dist.Normal(0.0, 2**0.5).log_prob(x)


ANY_GUIDE = [
    pv.ELBO(k, kl, g) for kl in ("analytic", "monte_carlo") for k, g in ((1, "score"), (3, "vimco"), (3, "score"))
]


@pytest.mark.parametrize("objective", ANY_GUIDE, ids=repr)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_scores_of_a_global_latent_have_the_exact_mean(objective, scale):
    """The loss is linear in the log-densities: a program without a batch plate is one datum."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("mean", torch.tensor(0.3)), 0.7))

    losses = [objective.differentiable_loss(model, guide, X) for _ in range(150)]
    gradients = torch.stack([torch.autograd.grad(loss, pyro.param("mean"))[0] for loss in losses])
    right = 0.3 - scale * (X - 0.3).sum()
    value = (
        -scale * (dist.Normal(0.3, 1.0).log_prob(X) - 0.5 * 0.7**2).sum() + 0.5 * (0.3**2 + 0.7**2 - 1) - math.log(0.7)
    )
    assert z_score(gradients[:, None], right).abs() < 4
    assert z_score(torch.stack(losses).detach()[:, None], value).abs() < 4
    for other in (objective.bound, pv.IWAE(3, "vimco").differentiable_loss):
        with pytest.raises(pv.PyroVAEError, match="model site 'z' is a latent site outside the batch plate 'data'"):
            other(model, guide, X)


def scenes(weight):
    """An object that may be absent, as in AIR: what it is has no density then, and x does not depend on it."""

    def model(x):
        with pyro.plate("data", len(x)):
            present = pyro.sample("present", dist.Bernoulli(0.4))
            with poutine.mask(mask=present.bool()):
                what = pyro.sample("what", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal((present + weight * (1 - present)) * what, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            present = pyro.sample("present", dist.Bernoulli(torch.full((len(x),), 0.5)))
            with poutine.mask(mask=present.bool()):
                pyro.sample("what", dist.Normal(x / 2, 0.9))

    return model, guide


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"chunk_size": 7_000}, {"vectorize_particles": False}], ids=str)
def test_a_latent_of_an_absent_object_needs_no_mask_around_x(options):
    number = 300 if options.get("vectorize_particles") is False else 20_000
    with torch.no_grad():
        log_w = pv.log_weights(scenes(0.0), X, num_particles=number, **options)
    with_and_without = [math.log(0.6) + dist.Normal(0.0, 1.0).log_prob(X), math.log(0.4) + exact(X)]
    ratio = (log_w - torch.stack(with_and_without).logsumexp(0)).exp()
    assert z_score(ratio, 1.0).abs().max() < 4


@pytest.mark.parametrize("weight", [1.0, 1e-3])
def test_what_x_depends_on_must_be_masked_with_it(weight):
    with torch.no_grad(), pytest.raises(pv.PyroVAEError, match="'what' is masked where the later site 'x' is not"):
        pv.log_weights(scenes(weight), X, num_particles=3)
    with pytest.raises(pv.PyroVAEError, match="'what' is masked where the later site 'x' is not"):
        pv.ELBO(2, "monte_carlo", "score").loss(scenes(weight), X)


@pytest.mark.parametrize("seed", range(6))
def test_a_masked_toss_that_x_depends_on_is_always_refused(seed):
    """Another draw of a rare toss would be the same again."""

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=x > 0):
                toss = pyro.sample("toss", dist.Bernoulli(0.02))
            pyro.sample("x", dist.Normal(toss, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
            pyro.sample("toss", dist.Bernoulli(torch.full((len(x),), 0.02)))

    pyro.set_rng_seed(seed)
    with torch.no_grad(), pytest.raises(pv.PyroVAEError, match="'toss' is masked where the later site 'x' is not"):
        pv.log_weights(model, guide, X, num_particles=1)


def test_a_subsampled_plate_is_refused_where_no_tensor_tells_the_rows():
    def model(number):
        with pyro.plate("data", number, subsample_size=2) as rows:
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=X[rows])

    def guide(number):
        with pyro.plate("data", number, subsample_size=2):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))

    with pytest.raises(pv.PyroVAEError, match=r"'data' is subsampled \(2 of 3\)"):
        pv.log_likelihood(model, guide, 3, 10, progress=False)


@pytest.mark.parametrize("by_handler", [True, False])
def test_what_is_masked_everywhere_has_no_kl(by_handler):
    """Whatever its families are, whose KL has no closed form here."""

    def unseen(family):
        if by_handler:
            with poutine.mask(mask=False):
                pyro.sample("y", family)
        else:
            pyro.sample("y", family.mask(False))

    def model(x):
        with pyro.plate("data", len(x)):
            unseen(dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            unseen(dist.LogNormal(0.0, 1.0))
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    torch.testing.assert_close(pv.IWAE(3).bound(model, guide, X), exact(X))
    kl = (exact(X) - pv.ELBO(2000).bound(model, guide, X)).mean()
    assert abs(kl) < 4 * (0.5 + X.square().max() * 0.5) ** 0.5 / math.sqrt(3 * 2000)


def steps(x, seen=None):
    """A latent, seen in three steps: three sites observe views of one argument."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for t in range(3):
            with poutine.mask(mask=True if seen is None else seen[:, t]):
                pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[:, t])


@pytest.mark.parametrize("masked", [False, True])
def test_bdmc_simulates_views_of_an_argument(masked):
    seen = torch.ones(40, 3).bool()
    if masked:
        seen[::2, 1:] = False
    x = (torch.randn(40, 3), seen) if masked else torch.randn(40, 3)
    found = pv.bdmc(steps, None, x, num_steps=40, num_chains=16, num_leapfrog=4, seed=0, progress=False)
    x = found.x[0] if masked else found.x
    number = seen.sum(-1)
    mean, squares = (x * seen).sum(-1) / number, (x.square() * seen).sum(-1)
    # The sum of squares splits into that around the mean, and the mean, whose variance is 1 + 1 / n.
    around = -0.5 * (squares - number * mean.square()) - 0.5 * (number - 1) * math.log(2 * math.pi) - 0.5 * number.log()
    right = around + dist.Normal(0.0, (1 + 1 / number).sqrt()).log_prob(mean)
    assert z_score((found.lower.log_weights - right).exp().mean(0)[:, None], 1.0).abs() < 4
    assert z_score((right - found.upper_per_datum).exp()[:, None], 1.0).abs() < 4
    if masked:
        assert not torch.equal(x[::2, 1:], torch.zeros(20, 2))


def test_a_sandwich_whose_bounds_cross_says_so():
    found = pv.bdmc(steps, None, torch.randn(4, 3), num_steps=10, num_chains=4, seed=0, progress=False)
    crossed = replace(found, upper_per_datum=found.lower.per_datum - 0.01)
    assert str(crossed).startswith(f"log p(x) is near {found.lower.mean - 0.005:.2f} nats per datum: the bounds cross,")
    assert " <= log p(x) <= " in str(replace(found, upper_per_datum=found.lower.per_datum + 0.01))


@pytest.mark.parametrize("argument", [3, (), None], ids=str)
def test_programs_conditioned_on_their_data_need_no_tensor(argument):
    def model(*_):
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), pyro.param("s", torch.tensor(1.0))))

    def guide(*_):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(X / 2, 0.5**0.5))

    conditioned = pyro.condition(model, data={"x": X})
    found = pv.log_likelihood(conditioned, guide, argument, 10, progress=False)
    torch.testing.assert_close(found.per_datum, exact(X).double(), rtol=0, atol=1e-5)
    annealed = pv.ais(conditioned, None, argument, 40, 64, seed=0, progress=False)
    assert z_score((annealed.log_weights - exact(X)).exp(), 1.0).abs().max() < 4
    assert pv.to_arviz(conditioned, guide, argument, 10)["posterior"]["z"].shape == (1, 10, 3)
    assert len(pv.compare(conditioned, guide, argument, pv.IWAE(2), repeats=2, progress=False)) == 1
    with pytest.raises(pv.PyroVAEError, match="no part of an argument"):
        pv.bdmc(conditioned, None, argument, 10, 4, progress=False)


def test_a_program_without_tensors_runs_for_as_many_particles_as_its_data_allow():
    def wide(number):
        with pyro.plate("data", number):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], torch.ones(1000)).to_event(1))

    program = program_on(pyro.condition(wide, data={"x": torch.zeros(3, 1000)}), None, 3)
    assert rows_at_once(program.args) == ELEMENTS_AT_ONCE // 1000


@pytest.mark.parametrize(
    "run",
    [
        lambda *parts: pv.decompose_elbo(*parts, 10, progress=False),
        lambda *parts: pv.ais(*parts, 10, 3, start="guide", progress=False),
    ],
)
def test_a_flow_without_an_inverse_is_named(run):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    flow = dist.transforms.planar(2)

    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    named = pytest.raises(pv.NoDensityError, match=r"site 'z' .* not at a given value \(a flow without an inverse\)")
    with pytest.warns(UserWarning, match="can't check"), named:
        run(model, guide, X)


@pytest.mark.parametrize("run", [pv.ELBO(kl="monte_carlo").loss, pv.log_likelihood, pv.active_units, pv.to_arviz])
def test_a_distribution_without_a_density_is_named(run):
    """PyTorch's softmax has no determinant of a Jacobian."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(len(x), 3), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, dist.transforms.SoftmaxTransform()))

    with pytest.raises(pv.NoDensityError, match=r"site 'z' \(TransformedDistribution\) has no density: expected"):
        run(model, guide, X)
