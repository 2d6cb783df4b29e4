"""Programs that are right for one particle, and mix data or particles where several run at once, are refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyro_vae as pv
from pyro_vae.networks import apply_batched

N, Z, D = 6, 3, 4
GENERATOR = torch.Generator().manual_seed(0)
X, W = torch.randn(N, D, generator=GENERATOR), torch.randn(Z, D, generator=GENERATOR)


def program(decode, *, second=None, plate=lambda x: pyro.plate("data", len(x))):
    """A model whose x has the mean ``decode(z)``, and a guide, with a second site of mean ``second(z)`` if given."""

    def model(x):
        with plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(Z), 1.0).to_event(1))
            if second is not None:
                pyro.sample("w", dist.Normal(torch.zeros(Z), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z), 0.5).to_event(1), obs=x)

    def guide(x):
        with plate(x):
            z = pyro.sample("z", dist.Normal(x[:, :Z], 0.5).to_event(1))
            if second is not None:
                pyro.sample("w", dist.Normal(second(z), 0.5).to_event(1))

    return model, guide


MIXING = {
    "normalize over dim 1": lambda z: F.normalize(z, dim=1) @ W,
    "softmax over dim 1": lambda z: z.softmax(1) @ W,
    "a mean over dim 0": lambda z: (z - z.mean(0)) @ W,
    "cumulative over dim 1": lambda z: z.cumsum(1) @ W,
    "group norm": lambda z: nn.GroupNorm(1, z.shape[1], affine=False)(z) @ W,
    "reshaped": lambda z: z.reshape(*z.shape[:-2], Z, -1).transpose(-1, -2).reshape(z.shape).sort(0).values @ W,
}
APART = {
    "over the last dimension": lambda z: F.normalize(z, dim=-1) @ W,
    "wrapped, and over the last": lambda z: apply_batched(nn.Identity(), z, 1).softmax(-1) @ W,
}
CALLS = {
    "bound": lambda *p: pv.IWAE(3).bound(*p, X),
    "loss, nesting given": lambda *p: pv.IWAE(3, max_plate_nesting=1).loss(*p, X),
    "log_weights": lambda *p: pv.log_weights(*p, X, num_particles=3),
    "log_weights, nesting given": lambda *p: pv.log_weights(*p, X, num_particles=3, max_plate_nesting=1),
    "log_likelihood": lambda *p: pv.log_likelihood(*p, X, 30),
    "fit": lambda *p: pv.fit(*p, X, pv.IWAE(3), epochs=1),
    "closed-form ELBO": lambda *p: pv.ELBO(3).loss(*p, X),
}


@pytest.fixture(autouse=True)
def _seeded():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", MIXING)
def test_a_program_that_mixes_is_refused(name, call):
    model, guide = program(MIXING[name])
    guide_with_parameter = lambda x: (pyro.param("p", torch.ones(1)), guide(x))[1]  # noqa: E731
    why = r"another density for a particle alone.*Count from the right \(dim=-1\)|another density for a datum"
    with pytest.raises(ValueError, match=rf"model site 'x' has ({why})"):
        CALLS[call](model, guide_with_parameter)


def test_a_guide_that_mixes_is_refused():
    parts = program(lambda z: z @ W, second=lambda z: F.normalize(z, dim=1))
    with pytest.raises(ValueError, match="guide site 'w' has another density"):
        pv.IWAE(3).loss(*parts, X)
    assert pv.IWAE(3, vectorize_particles=False).loss(*parts, X) > 0


@pytest.mark.parametrize("name", APART)
def test_a_program_that_keeps_particles_apart_is_not(name):
    parts = program(APART[name])
    assert pv.IWAE(3).loss(*parts, X) > 0
    assert pv.log_weights(*parts, X, num_particles=3).isfinite().all()


def normal_in_a_row(couple, *, factor=None, guided=None):
    """A model of N numbers whose x has the mean ``couple(z)``, with a factor, and a guide with a second site."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if guided is not None:
                pyro.sample("w", dist.Normal(0.0, 1.0))
            if factor is not None:
                pyro.factor("f", factor(z))
            pyro.sample("x", dist.Normal(couple(z), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(1)), 1.0))
            if guided is not None:
                pyro.sample("w", dist.Normal(guided(z), 1.0))

    return model, guide


RING = torch.roll(torch.eye(N), 1, 0) + torch.eye(N)
DEPENDENT = {
    "a random walk": normal_in_a_row(lambda z: z.cumsum(-1)),
    "a graph": normal_in_a_row(lambda z: z @ RING),
    "a weak mean": normal_in_a_row(lambda z: z + 0.02 * z.mean(-1, keepdim=True)),
    "a factor": normal_in_a_row(lambda z: z, factor=lambda z: (-(z.sum(-1, keepdim=True) ** 2)).expand(z.shape)),
    "the guide": normal_in_a_row(lambda z: z, guided=lambda z: z.roll(1, -1)),
}


@pytest.mark.parametrize(
    "call",
    [
        lambda *p: pv.IWAE(3).bound(*p, X[:, 0]),
        lambda *p: pv.IWAE(3, vectorize_particles=False).loss(*p, X[:, 0]),
        lambda *p: pv.ELBO(2, "monte_carlo", gradient="vimco").differentiable_loss(*p, X[:, 0]),
        lambda *p: pv.ELBO(1, gradient="score").differentiable_loss(*p, X[:, 0]),
        lambda *p: pv.fit(*p, X[:, 0], pv.ELBO(1, gradient="score"), epochs=1),
        lambda *p: pv.log_weights(*p, X[:, 0], num_particles=1),
        lambda *p: pv.log_likelihood(*p, X[:, 0], 30, vectorize_particles=False),
        lambda *p: pv.ais(*p, X[:, 0], num_steps=3, num_chains=2, start="guide"),
        lambda *p: pv.to_arviz(*p, X[:, 0], 3),
    ],
)
@pytest.mark.parametrize("name", DEPENDENT)
def test_data_that_depend_on_each_others_latents_are_refused(name, call):
    with pytest.raises(ValueError, match=r"has another density for a datum when other data have other latents"):
        call(*DEPENDENT[name])


def test_a_very_weak_dependence_is_said():
    """As of an adaptive solver, which has one step size for all rows."""
    weak = normal_in_a_row(lambda z: z + 1e-4 * z.mean(-1, keepdim=True))
    with pytest.warns(UserWarning, match=r"'x' changes by \S+ nats for a datum when other data have"):
        pv.IWAE(3).loss(*weak, X[:, 0])


def test_weak_dependences_of_a_datum_add_up():
    """Of 1,000 pixels in a nested plate, each changes by less than 0.001."""

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
            with pyro.plate("pixels", 1000, dim=-1):
                pyro.sample("x", dist.Normal(z + 1e-4 * z.mean(-2, keepdim=True), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(1)), 1.0))

    with pytest.raises(pv.PyroVAEError, match="has another density for a datum when other data have other latents"):
        pv.IWAE(3).loss(model, guide, torch.ones(4, 1000))


def test_a_support_may_depend_on_a_discrete_latent():
    """The other draw of z is made at the other value of k."""

    def program(observe):
        def body(x):
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(torch.ones(3)))
                z = pyro.sample("z", dist.Uniform(2.0 * k, 2.0 * k + pyro.param("width", torch.ones(()))))
                if observe:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return body

    for seed in range(4):
        pyro.set_rng_seed(seed)
        with torch.no_grad():
            assert pv.log_weights(program(True), program(False), X[:, 0], num_particles=4).isfinite().all()


@pytest.mark.parametrize("name", DEPENDENT)
def test_a_sum_of_dependent_data_is_not(name):
    """The pathwise ELBO's loss needs no log-weight of each datum."""
    assert pv.ELBO(2, "monte_carlo").loss(*DEPENDENT[name], X[:, 0]) < float("inf")


def test_independent_data_are_compared_once():
    runs = []

    def couple(z):
        runs.append(1)
        return z.exp()

    parts, objective = normal_in_a_row(couple), pv.ELBO(1, gradient="score")
    objective.loss(*parts, X[:, 0])
    first = len(runs)
    objective.loss(*parts, X[:, 0])
    assert len(runs) == first + 1


def test_one_datum_shows_nothing_of_several():
    objective = pv.IWAE(3)
    objective.loss(*DEPENDENT["a random walk"], X[:1, 0])
    with pytest.raises(ValueError, match="when other data have other latents"):
        objective.loss(*DEPENDENT["a random walk"], X[:, 0])


def test_a_random_minibatch_is_replayed():
    """The runs that are compared have the same subsample; each draws another otherwise."""
    rows = lambda x: pyro.plate("data", N, subsample_size=2)  # noqa: E731

    def model(x):
        with rows(x) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(Z), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W, 0.5).to_event(1), obs=x[index])

    def guide(x):
        with rows(x) as index:
            pyro.sample("z", dist.Normal(x[index, :Z], 0.5).to_event(1))

    assert pv.IWAE(3).loss(model, guide, X) > 0


def test_a_program_with_noise_of_its_own_is_told_so():
    model, guide = program(lambda z: (z + torch.randn(z.shape)) @ W)
    with pytest.warns(UserWarning, match="model site 'x' has another density when the program runs again"):
        pv.IWAE(3).loss(model, guide, X)


def test_the_check_comes_once_for_a_program():
    runs = []

    def decode(z):
        runs.append(tuple(z.shape))
        return z @ W

    parts, objective = program(decode), pv.IWAE(3)
    objective.loss(*parts, X)
    first = len(runs)
    objective.loss(*parts, X)
    assert len(runs) == first + 1


@pytest.mark.parametrize("number", [1, 8])
def test_another_subsample_in_the_model_is_refused(number):
    """Replaying would put the guide's rows in place of the model's own, beside the data of the model's."""
    data, index = torch.arange(100.0), torch.arange(10)

    def model(x, index):
        with pyro.plate("data", 100, subsample=index):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 100.0)), 1.0), obs=x[index])

    def guide(x, index):
        with pyro.plate("data", 100, subsample_size=10) as rows:
            pyro.sample("z", dist.Normal(x[rows], 1.0))

    def same(x, index):
        with pyro.plate("data", 100, subsample=index):
            pyro.sample("z", dist.Normal(x[index], 1.0))

    with pytest.raises(
        pv.PyroVAEError, match=r"plate 'data' has other rows.*got rows \[0, 1, 2, 3, 4\] \.\.\. in the model"
    ):
        pv.IWAE(number).loss(model, guide, data, index)
    pv.IWAE(number).loss(model, same, data, index)


@pytest.mark.parametrize("decode", [lambda z: z[:1] @ W, lambda z: z.cumsum(0) @ W], ids=["first", "cumulative"])
def test_the_second_particle_is_compared_too(decode):
    """With one datum, the first particle is the same in both runs."""
    with pytest.raises(ValueError, match=r"model site 'x' has another density for a particle alone"):
        pv.log_weights(*program(decode), X[:1], num_particles=2)


def test_fit_compares_two_different_particles():
    """The trace of its first run is one of them, and the other must not be drawn from the same seed."""
    model, inner = program(lambda z: z[:1] @ W)

    def guide(x):
        pyro.param("p", torch.ones(1))
        inner(x)

    with pytest.raises(ValueError, match=r"model site 'x' has another density for a particle alone"):
        pv.fit(model, guide, X[:1], pv.IWAE(2), epochs=1)


def test_masks_are_compared():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Z), 1.0).to_event(1))
            with pyro.poutine.mask(mask=z.softmax(1)[..., 0] > 1 / 3):
                pyro.sample("x", dist.Normal(z @ W, 0.5).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"model site 'x' has another density for a particle alone"):
        pv.log_weights(model, program(None)[1], X, num_particles=2)


def test_a_flow_without_an_inverse_is_said_to_be_unchecked():
    def guide(x):
        planar = dist.transforms.Planar(Z)
        with pyro.plate("data", len(x)):
            base = dist.Normal(x[:, :Z], 0.5).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [planar]))

    with pytest.warns(
        UserWarning, match=r"flow without an inverse, say\): pyro_vae can't check that the program keeps"
    ):
        pv.log_weights(program(lambda z: z @ W)[0], guide, X, num_particles=2)


def test_another_branch_of_a_program_is_checked_too():
    """A flag chooses what runs. Real numbers, such as a schedule's, do not make a program anew."""
    runs = []

    def model(x, mixing, weight):
        runs.append(mixing)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Z), 1.0).to_event(1))
            z = F.normalize(z, dim=1) if mixing else z
            pyro.sample("x", dist.Normal(z @ W, 0.5).to_event(1), obs=x)

    objective, inner = pv.IWAE(3), program(None)[1]

    def guide(x, mixing, weight):
        inner(x)

    objective.loss(model, guide, X, False, 0.1)
    first = len(runs)
    objective.loss(model, guide, X, False, 0.2)
    assert len(runs) == first + 1
    with pytest.raises(ValueError, match=r"model site 'x' has another density for a particle alone"):
        objective.loss(model, guide, X, True, 0.2)


@pytest.mark.parametrize("guide", [pyro.infer.autoguide.AutoNormal, pyro.infer.autoguide.AutoIAFNormal])
def test_points_of_autoguides_are_computed_again(guide):
    """A Delta at a transformed sample has a density of zero one unit of rounding beside it."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(Z), 1.0).to_event(1))
            pyro.sample("s", dist.Dirichlet(torch.ones(5)))
            pyro.sample("x", dist.Normal(z @ W, 0.5).to_event(1), obs=x)

    x = torch.randn(37, D, generator=torch.Generator().manual_seed(1))
    assert pv.ELBO(7, "monte_carlo").loss(model, guide(model), x) < float("inf")
