"""Programs on which gradient estimators go wrong elsewhere: scales, masks, flows, dropout, many particles."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from helpers.programs import LinearGaussian, z_score
from helpers.toys import Discrete, Mixed, OneSite, SharedPrior, TwoSites, X
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal

import pyro_vae as pv

GRADIENTS = ["pathwise", "stl", "dreg", "score", "vimco"]
OBJECTIVES = [
    *(lambda g=g, **kw: pv.IWAE(6, g, **kw) for g in GRADIENTS),
    *(lambda g=g, **kw: pv.ELBO(6, "monte_carlo", g, **kw) for g in GRADIENTS),
    lambda **kw: pv.PIWAE(2, 3, **kw),
    lambda **kw: pv.PIWAE(2, 3, "dreg", **kw),
    lambda **kw: pv.TVO(6, 4, "covariance", **kw),
    lambda **kw: pv.JVI(6, 1, "dreg", **kw),
    lambda **kw: pv.RWS(6, **kw),
    lambda **kw: pv.RWS(6, sleep=0.5, **kw),
]


def shown(make):
    return repr(make())


def loss_and_gradient(objective, program, model=None, guide=None, x=None, **kwargs):
    """From one seed, so that two ways to the same number can be compared."""
    parameters = program.parameters() if callable(program.parameters) else program.parameters
    for parameter in parameters:
        parameter.requires_grad_()
    pyro.set_rng_seed(3)
    model, guide = model or program.model, guide or program.guide
    loss = objective.differentiable_loss(model, guide, program.x if x is None else x, **kwargs)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return loss.detach(), torch.cat([g.flatten() for g in gradients])


def assert_same(first, second, **tolerance):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("make", OBJECTIVES, ids=shown)
def test_chunks_give_the_same_value_and_gradient(make):
    program = TwoSites()
    whole = loss_and_gradient(make(), program, x=X)
    for size in (1, 4, 6, 100):
        assert_same(loss_and_gradient(make(chunk_size=size), program, x=X), whole)
    with torch.no_grad():
        weights = []
        for size in (None, 4):
            pyro.set_rng_seed(0)
            weights.append(pv.log_weights(program.model, program.guide, X, num_particles=10, chunk_size=size))
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("make", OBJECTIVES[:-1], ids=shown)
def test_particles_one_by_one_give_the_same_value_and_gradient(make):
    program = TwoSites()
    assert_same(
        loss_and_gradient(make(vectorize_particles=False), program, x=X), loss_and_gradient(make(), program, x=X)
    )


@pytest.mark.parametrize("make", [m for m in OBJECTIVES if "score" not in shown(m)], ids=shown)
def test_a_datum_has_the_same_gradient_in_any_company(make):
    """All but the score function, whose baseline is the company: bounds of data add up, and so do their gradients."""
    program = SharedPrior()
    mask = torch.tensor([True, False])
    masked = loss_and_gradient(
        make(), program, poutine.mask(program.model, mask), poutine.mask(program.guide, mask), x=X
    )
    other = loss_and_gradient(
        make(), program, poutine.mask(program.model, ~mask), poutine.mask(program.guide, ~mask), x=X
    )
    if "sleep" not in shown(make):
        both = loss_and_gradient(make(), program, x=X)
        assert_same([a + b for a, b in zip(masked, other, strict=True)], both)
    assert not torch.allclose(masked[1], other[1])


@pytest.mark.parametrize("make", OBJECTIVES, ids=shown)
def test_a_scale_multiplies_value_and_gradient(make):
    program = LinearGaussian(3, 2, 4, wrong=True)
    plain = loss_and_gradient(make(), program)
    scaled = loss_and_gradient(make(), program, poutine.scale(program.model, 2.5), poutine.scale(program.guide, 2.5))
    assert_same(scaled, [2.5 * value for value in plain])


@pytest.mark.parametrize("make", OBJECTIVES[:-1], ids=shown)
def test_minibatches_take_the_plates_scale(make):
    """Subsampled to the first two data of four: twice their own loss and gradient."""
    program = LinearGaussian(3, 2, 4, wrong=True)
    part = loss_and_gradient(make(), program, subsample=torch.arange(2))
    assert_same(part, [2 * value for value in loss_and_gradient(make(), program, x=program.x[:2])])


class Flow:
    """q(z|x) = N(loc, scale), plainly or as a flow."""

    def __init__(self, flow):
        self.flow = flow
        self.p = torch.tensor([0.3, 0.1, -0.4], dtype=torch.float64)
        self.parameters = [self.p]

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(1.3 * z, 0.7), obs=x)

    def guide(self, x):
        loc, scale = self.p[0] * x + self.p[1], self.p[2].exp()
        with pyro.plate("data", len(x)):
            if self.flow:
                base = dist.Normal(torch.zeros_like(x), 1.0)
                pyro.sample("z", dist.TransformedDistribution(base, [dist.transforms.AffineTransform(loc, scale)]))
            else:
                pyro.sample("z", dist.Normal(loc, scale))


@pytest.mark.parametrize("make", OBJECTIVES[:-1], ids=shown)
def test_a_flow_has_the_gradient_of_the_density_that_it_is(make):
    assert_same(loss_and_gradient(make(), Flow(True), x=X), loss_and_gradient(make(), Flow(False), x=X))


def autoregressive(transform):
    pyro.module("flow", transform)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("flow", transform)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(len(x), 3), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [transform]))

    return model, guide


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stl", "dreg"])
def test_a_learned_flow_with_an_inverse(kind):
    """DReG and pathwise agree in the mean; at one particle STL's difference to pathwise is the score."""
    transform = T.affine_autoregressive(3, [8])
    model, guide = autoregressive(transform)
    x = torch.randn(2000, 3)
    means, errors = [], []
    for gradient in ("pathwise", kind):
        grads = []
        for _ in range(30):
            transform.zero_grad()
            num_particles = 1 if kind == "stl" else 4
            pv.IWAE(num_particles, gradient).loss_and_grads(model, guide, x)
            grads.append(torch.cat([p.grad.flatten() for p in transform.parameters() if p.grad is not None]))
        stacked = torch.stack(grads).double()
        means.append(stacked.mean(0))
        errors.append(stacked.std(0) / 30**0.5)
    moving = errors[0] > 1e-6
    z = (means[0] - means[1]).abs()[moving] / torch.hypot(*errors)[moving]
    assert moving.sum() > 20
    assert z.max() < 4.5


@pytest.mark.filterwarnings("ignore:.*a flow without an inverse")
def test_a_flow_without_an_inverse_is_refused_where_one_is_needed():
    model, guide = autoregressive(T.planar(3))
    pv.IWAE(4).loss_and_grads(model, guide, torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"most likely a flow without an inverse.*gradient='pathwise'"):
        pv.IWAE(4, "dreg").loss_and_grads(model, guide, torch.randn(5, 3))


def test_dropout_between_two_sites_is_refused_and_within_one_is_not():
    drop = torch.nn.Dropout(0.5)

    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(drop(x), 1.0))
            pyro.sample("z2", dist.Normal(z1, 1.0))

    x = X.repeat(10)
    with pytest.raises(ValueError, match=r"guide site 'z1' has another density when the guide runs again.*eval\(\)"):
        pv.IWAE(4, "stl").differentiable_loss(TwoSites().model, guide, x)
    drop.eval()
    pv.IWAE(4, "stl").differentiable_loss(TwoSites().model, guide, x)

    def one(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(drop(x), 1.0))

    drop.train()
    pv.IWAE(4, "dreg").differentiable_loss(OneSite().model, one, x)


@pytest.mark.parametrize("make", OBJECTIVES[:-1], ids=shown)
def test_a_spread_of_ten_thousand_nats_in_float32(make):
    """As float64 has it; in PIWAE a group far below the others still has its own gradient."""
    noise = torch.randn(6, 2)
    found = []
    for dtype in (torch.float64, torch.float32):
        program = Spread(dtype, noise)
        found.append(loss_and_gradient(make(), program, x=program.x))
        log_w = pv.log_weights(program.model, program.guide, program.x, num_particles=6)
        assert (log_w.max(0).values - log_w.min(0).values).max() > 1e4
    assert_same([value.double() for value in found[1]], found[0], rtol=1e-3, atol=1e-3)


class Spread:
    """A likelihood so sharp that particles are 10^4 nats apart; the guide draws the same noise in any precision."""

    def __init__(self, dtype, noise):
        self.x = torch.tensor([0.4, -1.3], dtype=dtype)
        self.p = torch.tensor([0.5, 0.3, 0.2], dtype=dtype)
        self.parameters, self.noise = [self.p], noise.to(dtype)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(self.p[0] * z, 0.005), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", SameNoise(self.p[1] * x, self.p[2].exp().expand(len(x)), self.noise))


class SameNoise(dist.Normal):
    def __init__(self, loc, scale, noise):
        super().__init__(loc, scale)
        self.noise = noise

    def expand(self, batch_shape, _instance=None):
        return SameNoise(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * (self.noise if self.loc.dim() == 2 else self.noise[0])


@pytest.mark.parametrize("kind", ["stl", "dreg"])
def test_convolutions(kind):
    """With a leading dimension of particles and without: one value, one gradient."""
    vae = pv.conv_vae((1, 8, 8), latent_dim=2, channels=(4,)).double()
    x = (torch.rand(3, 1, 8, 8) > 0.5).double()
    found = []
    for vectorize in (True, False):
        vae.zero_grad()
        pyro.set_rng_seed(0)
        loss = pv.IWAE(5, kind, vectorize_particles=vectorize).loss_and_grads(vae.model, vae.guide, x)
        found.append((torch.tensor(loss), torch.cat([p.grad.flatten() for p in vae.parameters()])))
    assert_same(*found)


@pytest.mark.parametrize("toy", [Discrete, Mixed])
def test_discrete_sites_in_chunks_and_bounds_without_gradients(toy):
    program = toy()
    for objective in (pv.IWAE(6, "vimco"), pv.IWAE(6, "score"), pv.RWS(6), pv.TVO(6, 3, "covariance")):
        whole = loss_and_gradient(objective, program, x=X)
        objective.chunk_size = 4
        assert_same(loss_and_gradient(objective, program, x=X), whole)
    with torch.no_grad():
        assert pv.IWAE(6).bound(program.model, program.guide, X).shape == (2,)


MEMORY = """
import torch, pyro, pyro_vae as pv
torch.set_num_threads(1)
def peak():  # of this process; getrusage would count the parent's
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
vae = pv.mlp_vae((784,), latent_dim=10, hidden_dims=(200,))
x = (torch.rand(32, 784) > 0.5).float()
pv.IWAE(4, "dreg", chunk_size=2).loss_and_grads(vae.model, vae.guide, x)
peaks = [peak()]
for chunk in (25, None):
    pv.IWAE(500, "dreg", chunk_size=chunk).loss_and_grads(vae.model, vae.guide, x)
    peaks.append(peak())
print(*[high - low for low, high in zip(peaks[:-1], peaks[1:])])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_chunks_need_less_memory():
    """Megabytes at the peak above an idle process: 25 of 500 particles at a time, then all."""
    # Without the threshold, what is freed stays with the process, and its peak says little about what was needed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, env=environment)
    in_chunks, whole = map(float, run.stdout.split())
    assert in_chunks < 0.3 * (in_chunks + whole), run.stdout


REFUSED = {
    "unknown gradient": (lambda: pv.IWAE(4, "reinforce"), r"one of pathwise, stl, dreg, score, vimco, got 'reinforce'"),
    "covariance elsewhere": (lambda: pv.IWAE(4, "covariance"), "expected gradient to be one of"),
    "vimco alone": (lambda: pv.IWAE(1, "vimco"), r"num_particles to be at least 2, got 1.*gradient='score'"),
    "stl of a closed form": (lambda: pv.ELBO(kl="analytic", gradient="stl"), r"expected kl='monte_carlo' with it"),
    "closed form in chunks": (lambda: pv.ELBO(8, chunk_size=2), r"expected kl='monte_carlo' with chunk_size"),
    "chunks one by one": (
        lambda: pv.IWAE(8, chunk_size=2, vectorize_particles=False),
        r"expected vectorize_particles=True with it, got False",
    ),
    "no chunk": (lambda: pv.IWAE(8, chunk_size=0), "expected chunk_size to be a positive integer or None, got 0"),
    "negative beta": (lambda: pv.ELBO(beta=-1.0), r"expected beta to be a finite number, at least 0.*got -1.0"),
    "negative free bits": (lambda: pv.ELBO(free_bits=-1.0), "expected free_bits to be a number of nats, at least 0"),
    "free bits of stl": (lambda: pv.ELBO(free_bits=1.0, gradient="stl"), "expected gradient='pathwise' with free_bits"),
    "alpha 1": (lambda: pv.Renyi(1, 4), r"other than 1, got 1. Alpha = 1 is pv.ELBO"),
    "alpha infinite": (lambda: pv.Renyi(float("inf"), 4), "expected alpha to be a finite number"),
    "no outer": (lambda: pv.MIWAE(0, 4), "expected num_outer to be a positive integer, got 0"),
    "share": (lambda: pv.CIWAE(1.5, 4), r"from 0 \(IWAE\) to 1 \(ELBO\), got 1.5"),
    "order": (lambda: pv.JVI(4, 4), r"expected order to be an integer from 0 to num_particles - 1.*got 4 and 4"),
    "too many subsets on the way": (lambda: pv.JVI(30, 29), "at most 10,000 subsets"),
    "free bits in chunks": (
        lambda: pv.ELBO(4, "monte_carlo", free_bits=0.1, chunk_size=2),
        "expected vectorize_particles=True and no chunk_size with free_bits",
    ),
    "partitions of no kind": (lambda: pv.TVO(4, 2.5), r"partitions to be an integer or a sequence of numbers, got 2.5"),
    "too many subsets": (lambda: pv.JVI(64, 3), "at most 10,000 subsets"),
    "partitions": (lambda: pv.TVO(4, [0.1, 1.0]), r"points that rise from 0 to 1.*got \(0.1, 1.0\)"),
    "falling partitions": (lambda: pv.TVO(4, [0.0, 0.5, 0.4, 1.0]), "points that rise from 0 to 1"),
    "no partitions": (lambda: pv.TVO(4, 0), "a positive number of intervals"),
    "sleep": (lambda: pv.RWS(4, sleep=2.0), "expected sleep to be a share from 0 to 1, got 2.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_mean_nothing(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_dreams_need_a_place():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=2 * x)

    with pytest.raises(ValueError, match=r"expected model site 'x' to observe an argument as it is.*sleep=0"):
        pv.RWS(4, sleep=0.5).differentiable_loss(model, OneSite().guide, X)

    def transposed(x):
        with pyro.plate("data", x.shape[1]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None] + x.new_zeros(len(x)), 1.0).to_event(1), obs=x.t())

    def guide(x):
        with pyro.plate("data", x.shape[1]):
            pyro.sample("z", dist.Normal(x.mean(0), 1.0))

    with pytest.raises(ValueError, match="to observe an argument as it is"):
        pv.RWS(4, sleep=0.5).differentiable_loss(transposed, guide, torch.randn(2, 3))


def test_half_a_dream_is_refused():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y.double())

    def guide(x, y):
        OneSite().guide(x)

    with pytest.raises(ValueError, match="expected model site 'y' to observe an argument as it is"):
        pv.RWS(4, sleep=0.5).differentiable_loss(model, guide, X, torch.tensor([1, 2]))


@pytest.mark.parametrize("objective", [pv.IWAE(4, g) for g in GRADIENTS[1:]] + [pv.RWS(4)], ids=repr)
def test_points_that_depend_on_parameters_have_no_score(objective):
    """z is a function of auxiliary noise and of parameters: at a fixed z, the noise's density is no score."""
    loc = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def guide(x, loc=loc):
        with pyro.plate("data", len(x)):
            noise = pyro.sample("noise", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(loc + noise))

    with pytest.raises(ValueError, match=r"guide site 'z' is a point \(Delta\) that depends on parameters.*pathwise"):
        objective.differentiable_loss(OneSite().model, guide, X)
    pv.IWAE(4).differentiable_loss(OneSite().model, guide, X).backward()

    def fixed(x, loc=loc):  # as Pyro's autoguides do
        with pyro.plate("data", len(x)):
            noise = pyro.sample("noise", dist.Normal(loc * x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(2 * noise, log_density=-torch.tensor(2.0).log()))

    objective.differentiable_loss(OneSite().model, fixed, X).backward()
    with pytest.raises(ValueError, match="expected a guide without auxiliary sites, got 'noise'"):
        pv.RWS(4, sleep=0.5).differentiable_loss(OneSite().model, fixed, X)


@pytest.mark.parametrize("objective", [pv.IWAE(4, g) for g in GRADIENTS] + [pv.RWS(4)], ids=repr)
@pytest.mark.parametrize("others", ["none", "an observation", "a latent"])
def test_a_mask_around_the_latent_alone_is_refused(objective, others):
    """In values too: log p(x, z) lacks the masked z's prior, and the bound on log p(y) comes out above it."""
    mask = torch.tensor([True, False])

    def masked(x):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                if others == "an observation":
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            if others == "a latent":
                z = pyro.sample("y", dist.Normal(z, 1.0))
            else:
                pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=mask):
                pyro.sample("z", dist.Normal(x, 1.0))
            if others == "a latent":
                pyro.sample("y", dist.Normal(x, 1.0))

    message = "model site 'z' is masked where the later site 'y' is not: expected .*Mask 'y' too"
    with pytest.raises(ValueError, match=message):
        objective.differentiable_loss(masked, guide, X)
    with pytest.raises(ValueError, match=message), torch.no_grad():
        pv.log_weights(masked, guide, X, num_particles=3)
    pv.ELBO(2, "monte_carlo").loss(masked, guide, X)


@pytest.mark.parametrize("objective", [pv.ELBO(4, "monte_carlo", g) for g in ("pathwise", "score", "vimco")], ids=repr)
def test_padded_rows_and_missing_pixels(objective):
    """The latent's mask is the row's, the observation's that and its own: quadrature has value and gradient."""
    p = torch.tensor([0.3, -0.5], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.4, 1.0], [-1.3, 0.2], [0.0, 0.0]], dtype=torch.float64)
    row = torch.tensor([True, True, False])[:, None]
    pixels = torch.tensor([[True, False], [True, True], [True, True]])

    def q(x):
        return dist.Normal(p[0] * x.mean(-1, keepdim=True), p[1].exp())

    def model(x, row, pixels):
        with pyro.plate("data", len(x), dim=-2), poutine.mask(mask=row):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("pixels", 2, dim=-1), poutine.mask(mask=pixels):
                pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    def guide(x, row, pixels):
        with pyro.plate("data", len(x), dim=-2), poutine.mask(mask=row):
            pyro.sample("z", q(x))

    nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(40))
    z = q(x).loc + q(x).scale * nodes
    log_p = (dist.Normal(z[:, None], 0.7).log_prob(x[..., None]) * pixels[..., None]).sum(1)
    log_w = log_p + dist.Normal(0.0, 1.0).log_prob(z) - q(x).log_prob(z)
    exact = ((log_w * weights / weights.sum()).sum(-1) * row[:, 0]).sum()
    found = []
    for _ in range(40):
        args = (part.repeat(250, 1) for part in (x, row, pixels))
        bound = objective.bound(model, guide, *args).sum() / 250
        found.append(torch.cat([bound.detach()[None], torch.autograd.grad(bound, p)[0]]))
    (slope,) = torch.autograd.grad(exact, p)
    assert (z_score(torch.stack(found), torch.cat([exact.detach()[None], slope])) < 4).all()


def test_masks_of_what_no_later_site_depends_on():
    """A missing covariate's latent value is dropped where there is a datum; turns of a sequential plate are apart."""
    seen = torch.tensor([True, False])

    def model(x):
        with pyro.plate("data", len(x)):
            covariate = pyro.sample("c", dist.Normal(x.new_zeros(()), 1.0), obs=x, obs_mask=seen)
            pyro.sample("x", dist.Normal(covariate, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=~seen):
            pyro.sample("c_unobserved", dist.Normal(x / 2, 0.5**0.5))

    exact = torch.stack(
        [
            dist.Normal(0.0, 1.0).log_prob(X[0]) + dist.Normal(X[0], 1.0).log_prob(X[0]),
            dist.Normal(0.0, 2**0.5).log_prob(X[1]),
        ]
    )
    for objective in (pv.IWAE(4), pv.IWAE(4, "vimco")):
        torch.testing.assert_close(objective.bound(model, guide, X), exact)

    def turns(obs):
        def program(x):
            with pyro.plate("data", len(x)):
                for t in pyro.plate("turns", 2):
                    with poutine.mask(mask=seen if t == 0 else ~seen):
                        z = pyro.sample(f"z{t}", dist.Normal(x / 2, 0.5**0.5) if not obs else dist.Normal(0 * x, 1.0))
                        if obs:
                            pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x)

        return program

    torch.testing.assert_close(pv.IWAE(4).bound(turns(True), turns(False), X), dist.Normal(0.0, 2**0.5).log_prob(X))


MOVING = {
    "Uniform": lambda low, high: dist.Uniform(low, high),
    "Pareto": lambda low, high: dist.Pareto((high - low) / 2, torch.full_like(low, 3.0)),
    "MixtureSameFamily": lambda low, high: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Uniform(torch.stack([low, low], -1), torch.stack([high, high], -1))
    ),
    "AffineBeta": lambda low, high: dist.AffineBeta(torch.full_like(low, 2.0), torch.ones_like(low), low, high - low),
    "TransformedDistribution": lambda low, high: dist.TransformedDistribution(
        dist.Uniform(torch.zeros_like(low), 1.0), [dist.transforms.AffineTransform(low, high - low)]
    ),
}
SCORES = [
    *(pv.ELBO(2, "monte_carlo", g) for g in GRADIENTS[1:]),
    *(pv.IWAE(2, g) for g in GRADIENTS[1:]),
    pv.TVO(2, 2, "covariance"),
]


def interval(p, x):
    return p[0] * x - p[1].exp(), p[0] * x + p[1].exp()


def wide_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


@pytest.mark.parametrize("objective", SCORES, ids=repr)
@pytest.mark.parametrize("family", MOVING)
def test_a_support_that_moves_with_parameters_has_no_score(family, objective):
    p = torch.tensor([0.3, 0.2], dtype=torch.float64, requires_grad=True)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", MOVING[family](*interval(p, x)))

    if family != "MixtureSameFamily" or objective.gradient in ("score", "vimco", "covariance"):
        message = (
            rf"guide site 'z' \({family}\) has a support that depends on parameters: expected .*gradient='pathwise'"
        )
        with pytest.raises(ValueError, match=message):
            objective.differentiable_loss(wide_model, guide, X)
    objective.loss(wide_model, guide, X)
    pv.RWS(2).differentiable_loss(wide_model, guide, X).backward()
    p.requires_grad_(False)  # bounds that no one trains stay where they are
    if family != "MixtureSameFamily":
        objective.differentiable_loss(wide_model, guide, X)


def test_the_path_has_the_gradient_of_a_support_that_moves():
    """Alone, and beside a coin whose score is taken: Gauss-Legendre quadrature and enumeration have it exactly."""
    p = torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64, requires_grad=True)

    def model(x, coin):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(torch.full_like(x, 0.5))) if coin else 0.0
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + y, 0.7), obs=x)

    def guide(x, coin):
        with pyro.plate("data", len(x)):
            if coin:
                pyro.sample("y", dist.Bernoulli(logits=p[2] * x))
            pyro.sample("z", dist.Uniform(*interval(p, x)))

    nodes, weights = map(torch.tensor, np.polynomial.legendre.leggauss(40))
    low, high = (end[:, None] for end in interval(p, X))
    z = low + (high - low) * (nodes + 1) / 2
    log_w = torch.stack([dist.Normal(z + y, 0.7).log_prob(X[:, None]) for y in (0.0, 1.0)])
    log_w = log_w + dist.Normal(0.0, 1.0).log_prob(z) + (high - low).log()
    q = dist.Bernoulli(logits=p[2] * X)
    states = torch.stack([torch.zeros_like(X), torch.ones_like(X)])
    elbo = (log_w * weights / 2).sum(-1)
    with_coin = (q.log_prob(states).exp() * (elbo + math.log(0.5) - q.log_prob(states))).sum(0)
    for exact, objective, coin in (
        (elbo[0], pv.ELBO(2, "monte_carlo"), False),
        (with_coin, pv.ELBO(2, "monte_carlo", "score"), True),
    ):
        used = p if coin else p[:2]
        (slope,) = torch.autograd.grad(exact.sum(), p, retain_graph=True)
        found = []
        for _ in range(40):
            bound = objective.bound(model, guide, X.repeat(1000), coin).sum() / 1000
            found.append(torch.autograd.grad(bound, p)[0][: len(used)])
        assert (z_score(torch.stack(found), slope[: len(used)]) < 4).all()


LOGIT = dist.transforms.SigmoidTransform().inv
LOG = dist.transforms.ExpTransform().inv
AFFINE = dist.transforms.AffineTransform
STAYING = {
    "Gumbel": lambda loc, scale: dist.Gumbel(loc, scale),
    "Gumbel by hand": lambda loc, scale: dist.TransformedDistribution(
        dist.Uniform(torch.zeros_like(loc), 1.0), [LOG, AFFINE(0.0, -torch.ones_like(loc)), LOG, AFFINE(loc, -scale)]
    ),
    "logistic by hand": lambda loc, scale: dist.TransformedDistribution(
        dist.Uniform(torch.zeros_like(loc), 1.0), [LOGIT, AFFINE(loc, scale)]
    ),
    "scaled Gamma": lambda loc, scale: dist.TransformedDistribution(
        dist.Gamma(torch.full_like(loc, 2.0), 1.0), [AFFINE(0.0, scale)]
    ),
    "Kumaraswamy": lambda loc, scale: dist.Kumaraswamy(loc.exp(), scale.expand_as(loc)),
    "Weibull": lambda loc, scale: dist.Weibull(loc.exp(), scale),
    "bounds from another site": lambda loc, scale: dist.Uniform(loc.detach(), loc.detach() + 1),
}


@pytest.mark.parametrize("family", STAYING)
@pytest.mark.parametrize("kind", ["score", "stl"])
def test_families_that_parameters_only_move_inside_their_support(family, kind):
    p = torch.tensor([0.3, 0.2], dtype=torch.float64, requires_grad=True)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", STAYING[family](p[0] * x, p[1].exp()))

    pv.ELBO(2, "monte_carlo", kind).differentiable_loss(wide_model, guide, X)


def test_points_of_fewer_dimensions_than_their_noise_are_refused():
    """The weights of q(e) q(f) at z = e + f average no p(x), nor do those of a point that no noise moves."""

    def two(x):
        with pyro.plate("data", len(x)):
            noise = [
                pyro.sample(name, dist.Normal(0 * x, 3.0), infer={"is_auxiliary": True}) for name in ("first", "second")
            ]
            pyro.sample("z", dist.Delta(sum(noise)))

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 0.1))
            b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(a + b, 0.7), obs=x)

    beside = AutoGuideList(model)
    beside.append(AutoDelta(poutine.block(model, expose=["a"])))
    beside.append(AutoNormal(poutine.block(model, expose=["b"])))
    message = (
        r"auxiliary guide sites \['first', 'second'\] and the points \(Delta\) \['z'\] differ in size: .*got 4 and 2"
    )
    with pytest.raises(ValueError, match=message):
        pv.IWAE(4).bound(wide_model, two, X)
    with pytest.raises(ValueError, match=r"\['b_unconstrained'\] and the points \(Delta\) \['a', 'b'\].*got 2 and 4"):
        pv.log_weights(model, beside, X, num_particles=1)
    for objective in (pv.ELBO(2, "monte_carlo"), pv.ELBO(2, "monte_carlo", "stl")):
        objective.differentiable_loss(model, beside, X)


def test_points_on_a_simplex_have_noise_of_one_dimension_less():
    x = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            share = pyro.sample("share", dist.Dirichlet(x.new_ones(2)))
            pyro.sample("x", dist.Bernoulli(share[..., 0]), obs=x)

    autoguide = AutoNormal(model, init_scale=1.5)
    autoguide(x)
    weights = pv.log_weights(model, autoguide, x, num_particles=20_000).detach().exp()
    assert (z_score(weights, 0.5) < 4).all()  # a uniform share gives either outcome one half


def test_a_maximum_a_posteriori_site_beside_a_posterior():
    """The ELBO's loss is linear: STL takes the path through the point m, whose density is a constant."""
    p = torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64, requires_grad=True)

    def model(x):
        m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    def guide(x, log_density=0.0):
        pyro.sample("m", dist.Delta(p[2], log_density=log_density))
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(p[0] * x, p[1].exp()))

    loc, scale = p[0] * X, p[1].exp()
    kl = torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(p[2], 1.0))
    likelihood = dist.Normal(loc, 0.7).log_prob(X) - scale**2 / (2 * 0.7**2)
    loss = (kl - likelihood).sum() - dist.Normal(0.0, 1.0).log_prob(p[2])
    exact = torch.autograd.grad(loss, p)[0]
    objective = pv.ELBO(500, "monte_carlo", "stl")
    found = [torch.autograd.grad(objective.differentiable_loss(model, guide, X), p)[0] for _ in range(60)]
    assert (z_score(torch.stack(found), exact) < 4).all()
    with pytest.raises(ValueError, match=r"guide site 'm' is a point \(Delta\) that depends on parameters"):
        objective.differentiable_loss(model, lambda x: guide(x, -p[1]), X)


def test_folded_families_have_no_closed_form():
    """The KL of their bases is that of other distributions; a Gaussian folded at its mean is the exception."""

    def program(family, obs):
        def run(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", family)
                if obs:
                    pyro.sample("x", dist.Normal(z, 0.7), obs=x)

        return run

    def folded(mean):
        return dist.FoldedDistribution(dist.Normal(torch.tensor(mean, dtype=torch.float64), 1.0))

    def nested(mean):
        return dist.TransformedDistribution(folded(mean), [dist.transforms.ExpTransform()])

    for family in (folded, nested):
        with pytest.raises(pv.NoClosedFormError, match=r"no closed form at site 'z' for KL\((Folded|Transformed)"):
            pv.ELBO().loss(program(family(-1.0), True), program(family(1.0), False), X)
    x, grid = X.abs(), torch.linspace(1e-9, 12, 100_001, dtype=torch.float64)[:, None]
    log_q = folded(1.0).log_prob(grid)
    log_w = dist.Normal(grid, 0.7).log_prob(x) + folded(-1.0).log_prob(grid) - log_q
    exact = torch.trapezoid(log_q.exp() * log_w, grid, dim=0)
    with torch.no_grad():
        sampled = pv.ELBO(1, "monte_carlo").bound(
            program(folded(-1.0), True), program(folded(1.0), False), x.repeat(20_000)
        )
    assert (z_score(sampled.reshape(-1, 2), exact) < 4).all()
    half = [program(dist.HalfNormal(torch.tensor(scale, dtype=torch.float64)), scale == 1.0) for scale in (1.0, 0.5)]
    closed = pv.ELBO(20_000).bound(*half, X)
    torch.testing.assert_close(closed, pv.ELBO(20_000, "monte_carlo").bound(*half, X), atol=0.1, rtol=0)


@pytest.mark.parametrize("where", ["likelihood", "prior"])
def test_dreams_of_a_model_that_looks_at_its_data_are_refused(where):
    """Teacher forcing: the second pixel's mean is the first pixel of the data, not of the dream."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x[:, 0] if where == "prior" else 0 * x[:, 0], 1.0))
            second = z + x[:, 0] if where == "likelihood" else z
            pyro.sample("x", dist.Normal(torch.stack(torch.broadcast_tensors(z, second), -1), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 1], 1.0))

    x = torch.randn(4, 2, dtype=torch.float64)
    site = "x" if where == "likelihood" else "z"
    with pytest.raises(ValueError, match=f"dreams data that model site '{site}' depends on: expected .*sleep=0"):
        pv.RWS(2, sleep=0.5).differentiable_loss(model, guide, x)
    pv.RWS(2).differentiable_loss(model, guide, x)


@pytest.mark.parametrize("module", [True, False])
def test_a_model_with_dropout_may_dream(module):
    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.norm = torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(1).double()

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                normed = self.norm(z.reshape(-1, 1)).reshape(z.shape)
                pyro.sample("x", dist.Normal(10 * self.drop(normed + 3), 1.0), obs=x)

    decoder = Decoder()
    model = decoder if module else lambda x: decoder(x)
    pv.RWS(2, sleep=1.0, max_plate_nesting=1).differentiable_loss(model, OneSite().guide, X.repeat(10))
    assert decoder.training
    if module:
        assert decoder.norm.num_batches_tracked == 2  # once awake, once for the dream


@pytest.mark.parametrize("kind", ["score", "vimco"])
def test_a_weight_of_zero_spoils_no_baseline(kind):
    """Every state of z but one is impossible: the bound is finite unless all particles fell into the others."""
    logit = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full_like(x, 0.5)))
            pyro.factor("x", torch.where(z > 0, 0.0, -math.inf))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logit.expand(len(x))))

    with pyro.validation_enabled(False):
        loss = pv.IWAE(16, kind).differentiable_loss(model, guide, X)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, logit)[0].isfinite()


def test_an_objective_of_ones_own_has_its_own_curvature():
    class Mean(pv.IWAE):
        def reduce(self, log_weights):
            return log_weights.mean(0)

    log_w = torch.randn(4, 3)
    assert (Mean(4).curvature(log_w) == 0).all()
    assert (pv.IWAE(4).curvature(log_w) > 0).all()
    program = OneSite()
    ours = loss_and_gradient(Mean(4, "dreg"), program, x=X)
    assert_same(ours, loss_and_gradient(pv.ELBO(4, gradient="stl"), program, x=X))


def test_a_jackknife_of_high_order_keeps_its_digits_in_float32():
    log_w = torch.randn(14, 3, dtype=torch.float64)
    high = pv.JVI(14, 13)
    torch.testing.assert_close(
        high.reduce(log_w.float()).double(), high.reduce(log_w.float().double()), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("form", ["analytic", "monte_carlo"])
def test_free_bits_need_independent_dimensions_and_no_mask(form):
    program = LinearGaussian(3, 2, 4)
    objective = pv.ELBO(2, form, free_bits=0.1)
    with pytest.raises(ValueError, match=r"expected independent dimensions at site 'z'.*got MultivariateNormal"):
        objective.loss(program.model, program.guide, program.x)
    toy, mask = OneSite(), torch.tensor([True, False])
    with pytest.raises(ValueError, match=r"expected no mask at site 'z', got one"):
        objective.loss(poutine.mask(toy.model, mask), poutine.mask(toy.guide, mask), X)
