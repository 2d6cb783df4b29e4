"""Programs without a log-weight per datum: each refused with its own message, where Pyro would give a number."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv

X = torch.linspace(-1, 1, 12).reshape(6, 2)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)


def guide(x):
    loc = pyro.param("loc", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 1.0))


def model_without_plate(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
    pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)


def guide_without_plate(x):
    pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))


def model_with_sequential_plate(x):
    for n in pyro.plate("data", len(x)):
        z = pyro.sample(f"z{n}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x{n}", dist.Normal(z[..., None] + torch.zeros(2), 1.0).to_event(1), obs=x[n])


def guide_with_sequential_plate(x):
    for n in pyro.plate("data", len(x)):
        pyro.sample(f"z{n}", dist.Normal(0.0, 1.0))


def model_with_global_latent(x):
    pyro.sample("shift", dist.Normal(0.0, 1.0))
    model(x)


def guide_with_global_latent(x):
    pyro.sample("shift", dist.Normal(0.0, 1.0))
    guide(x)


def model_with_factor_outside(x):
    model(x)
    pyro.factor("penalty", torch.tensor(-1.0))


def model_with_observation_outside(x):
    model(x)
    pyro.sample("total", dist.Normal(0.0, 1.0), obs=x.sum())


def model_with_two_plates(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)


def guide_with_another_plate(x):
    with pyro.plate("batch", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def model_with_to_event(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z[..., None] + torch.zeros(2), 1.0).to_event(2), obs=x)


def guide_with_to_event(x):
    pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))


def model_with_likelihood_to_event(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z[..., None] + torch.zeros(2), 1.0).to_event(2), obs=x)


def model_with_to_event_in_the_plate(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(2), obs=x)


def guide_with_another_site(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("zeta", dist.Normal(0.0, 1.0))


def empty_guide(x):
    pass


def guide_of_an_observed_site(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def discrete_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)


def discrete_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(0.3))


def model_with_subsampled_pixels(x):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))
        with pyro.plate("pixels", 2, subsample_size=1, dim=-1) as index:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, index])


def guide_with_pixels(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))


def model_with_annealed_prior(x):
    with pyro.plate("data", len(x)):
        with poutine.scale(scale=0.5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)


REFUSED = {
    "no plate": (model_without_plate, guide_without_plate, r"no batch plate: expected one .*got no plate at all.*Put"),
    "sequential": (
        model_with_sequential_plate,
        guide_with_sequential_plate,
        r"no batch plate: .*only the sequential plate \['data'\]",
    ),
    "global latent": (
        model_with_global_latent,
        guide_with_global_latent,
        r"model site 'shift' is a latent site outside the batch plate 'data': expected.*If all data share it, train",
    ),
    "factor": (
        model_with_factor_outside,
        guide,
        r"model site 'penalty' is a factor or observation outside the batch plate 'data'.*shape \(6,\)",
    ),
    "observation": (
        model_with_observation_outside,
        guide,
        r"model site 'total' is a factor or observation outside the batch plate 'data'",
    ),
    "two plates": (
        model_with_two_plates,
        guide,
        r"two different batch plates: expected one.*'data' \(dim -1, size 6\) around model site 'z' and 'rows' .*'x'",
    ),
    "another plate in the guide": (
        model,
        guide_with_another_plate,
        r"two different batch plates: .*'data'.* and 'batch'.*guide site 'z'",
    ),
    "to_event, no plate": (
        model_with_to_event,
        guide_with_to_event,
        r"model site 'x' uses to_event in place of the batch plate: .*\(6, 2\).*plate\('data', 6\).*to_event\(1\)",
    ),
    "to_event outside": (
        model_with_likelihood_to_event,
        guide,
        r"model site 'x' uses to_event in place of the batch plate 'data'",
    ),
    "to_event inside": (
        model_with_to_event_in_the_plate,
        guide,
        r"model site 'x' uses to_event in place of the batch plate 'data'",
    ),
    "missing in the model": (
        model,
        guide_with_another_site,
        r"guide site 'zeta' is missing in the model: expected .*\['z'\]",
    ),
    "missing in the guide": (model, empty_guide, r"model site 'z' is latent and missing in the guide: expected"),
    "observed": (model, guide_of_an_observed_site, r"guide site 'x' is observed in the model: expected a latent"),
    "discrete": (
        discrete_model,
        discrete_guide,
        r"guide site 'z' can't be reparameterised: expected .*rsample, got Bernoulli.*'score'.*'vimco'.*no_grad",
    ),
    "subsampled inside": (
        model_with_subsampled_pixels,
        guide_with_pixels,
        r"plate 'pixels', inside the batch plate 'data', is subsampled \(1 of 2\)",
    ),
}

CALLS = {
    "log_weights K=1": lambda model, guide: pv.log_weights(model, guide, X, num_particles=1),
    "log_weights K=3": lambda model, guide: pv.log_weights(model, guide, X, num_particles=3),
    "log_weights given nesting": lambda model, guide: pv.log_weights(
        model, guide, X, num_particles=3, max_plate_nesting=2
    ),
    "log_weights one by one": lambda model, guide: pv.log_weights(
        model, guide, X, num_particles=3, vectorize_particles=False
    ),
    "ELBO.bound": lambda model, guide: pv.ELBO().bound(model, guide, X),
    "ELBO.bound Monte Carlo": lambda model, guide: pv.ELBO(2, "monte_carlo").bound(model, guide, X),
    "IWAE.bound": lambda model, guide: pv.IWAE(3).bound(model, guide, X),
    "IWAE.loss_and_grads": lambda model, guide: pv.IWAE(3).loss_and_grads(model, guide, X),
    "IWAE.differentiable_loss": lambda model, guide: pv.IWAE(1).differentiable_loss(model, guide, X),
    "IWAE module": lambda model, guide: pv.IWAE(3)(model, guide)(X),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_its_own_message(case, call):
    model, guide, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        CALLS[call](model, guide)


@pytest.mark.parametrize("call", [name for name in CALLS if not name.startswith("log_weights")])
def test_scales_that_differ_are_refused(call):
    message = "scales differ between sites: expected .*got 0.5 at model site 'z' and 1.0 at model site 'x'"
    with pytest.raises(ValueError, match=message):
        CALLS[call](model_with_annealed_prior, guide)


def test_accepted_programs_pass_the_same_calls():
    """The refusals are of the programs, not of the calls."""
    for call in CALLS.values():
        assert torch.isfinite(torch.as_tensor(call(model, guide))).all()


@pytest.mark.parametrize(
    ("model", "guide"),
    [
        (model_with_global_latent, guide_with_global_latent),
        (model_with_factor_outside, guide),
        (model_with_observation_outside, guide),
        (model_with_two_plates, guide),
        (model_with_to_event, guide_with_to_event),
        (model_with_subsampled_pixels, guide_with_pixels),
        (model_with_sequential_plate, guide_with_sequential_plate),
    ],
)
@pytest.mark.parametrize("num_particles", [1, 3])
def test_elbo_loss_serves_them(model, guide, num_particles):
    """It is linear in the log-densities, and agrees with Pyro's."""
    for ours, pyros in (
        (pv.ELBO(num_particles, "monte_carlo"), pyro.infer.Trace_ELBO),
        (pv.ELBO(num_particles), pyro.infer.TraceMeanField_ELBO),
    ):
        losses = []
        for objective in (ours, pyros(num_particles, vectorize_particles=True, max_plate_nesting=2)):
            pyro.set_rng_seed(0)
            losses.append(objective.loss(model, guide, X))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_discrete_guides_have_values_without_gradients():
    with torch.no_grad():
        log_w = pv.log_weights(discrete_model, discrete_guide, X, num_particles=2000)
        bound = pv.IWAE(2000).bound(discrete_model, discrete_guide, X)
    exact = torch.stack([dist.Normal(z, 1.0).log_prob(X).sum(1) for z in (0.0, 1.0)]).logsumexp(0) - torch.log(
        torch.tensor(2.0)
    )
    weights = (log_w - exact).exp()
    assert ((weights.mean(0) - 1).abs() < 4 * weights.std(0) / 2000**0.5).all()
    torch.testing.assert_close(bound, exact, atol=0.1, rtol=0)


def test_no_closed_form_names_the_site_and_the_families():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(3.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"no closed form at site 'z' for KL\(Normal \|\| StudentT\).*monte"):
        pv.ELBO().loss(model, guide, X)
    with pytest.raises(ValueError, match=r"no closed form at site 'z' for KL\(Normal \|\| StudentT\).*monte"):
        pv.ELBO(4).bound(model, guide, X)
    pv.ELBO(4, "monte_carlo").loss(model, guide, X)


def test_an_infinite_kl_names_the_site():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(0.0, 2.0 + 0 * x))

    with pytest.raises(ValueError, match=r"the KL at site 'z' is infinite for KL\(Uniform \|\| Uniform\)"):
        pv.ELBO().loss(model, guide, torch.zeros(3))


def test_closed_form_refuses_what_pyro_gets_silently_wrong():
    def two(first, second):
        def program(x):
            with pyro.plate("data", len(x)):
                a = pyro.sample(first, dist.Normal(0.0, 1.0))
                pyro.sample(second, dist.Normal(a, 1.0))

        return program

    with pytest.raises(ValueError, match=r"one order, got \['a', 'b'\] in the model and \['b', 'a'\] in the guide"):
        pv.ELBO().loss(two("a", "b"), two("b", "a"), X)
    with pytest.raises(ValueError, match=r"one scale at site 'z', got 0.5 in the model and 1.0 in the guide"):
        pv.ELBO().loss(model_with_annealed_prior, guide, X)
    mask = torch.tensor([True, False] * 3)
    with pytest.raises(ValueError, match=r"one mask at site 'z'"):
        pv.ELBO().loss(poutine.mask(model, mask), guide, X)
    with pytest.raises(ValueError, match=r"KL\(Delta \|\| Normal\)"):
        pv.ELBO().loss(model, pyro.infer.autoguide.AutoDelta(model), X)


@pytest.mark.parametrize("num_particles", [1, 3])
def test_a_plate_without_a_size_gives_no_site_one(num_particles):
    """One z for all data, where a plate with a size would draw one for each."""

    def program(loc, obs, *size):
        def run(x):
            with pyro.plate("data", *size):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
                if obs:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return run

    x = X[:, 0]
    message = (
        r"model site 'z' has no value for each row of the batch plate 'data', .*expected .* 6 at dim -1, got .*size"
    )
    for call in (pv.ELBO(num_particles, "monte_carlo").bound, pv.IWAE(num_particles).loss):
        with pytest.raises(ValueError, match=message):
            call(program(0.0, True), program(0.1, False), x)
    with torch.no_grad():
        bound = pv.IWAE(num_particles).bound(program(torch.zeros(6), True), program(torch.zeros(6), False), x)
        assert bound.shape == (6,)
        pyro.set_rng_seed(1)
        sized = pv.IWAE(num_particles).bound(program(torch.zeros(6), True, 6), program(torch.zeros(6), False, 6), x)
        pyro.set_rng_seed(1)
        unsized = pv.IWAE(num_particles).bound(program(torch.zeros(6), True), program(torch.zeros(6), False), x)
    torch.testing.assert_close(unsized, sized)


@pytest.mark.parametrize("number", [0, -1, 2.0, "8", None])
def test_number_of_particles_is_a_positive_integer(number):
    with pytest.raises(ValueError, match="num_particles to be a positive integer"):
        pv.IWAE(number)


def test_unknown_kl():
    with pytest.raises(ValueError, match="'analytic' or 'monte_carlo', got 'closed'"):
        pv.ELBO(kl="closed")


def test_a_program_without_terms():
    with pytest.raises(ValueError, match=r"no sample sites: expected a program whose log-density has terms.*data"):
        pv.IWAE(3).bound(empty_guide, empty_guide, X)


def test_pyros_table_of_shapes_does_not_follow_our_messages():
    class Refusing(dist.Normal):
        def log_prob(self, value):
            raise pv.PyroVAEError("expected ours.")

    def model(x, refuse=True):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if refuse:
                raise pv.PyroVAEError("expected ours.")
            pyro.sample("x", Refusing(z, 1.0), obs=x)

    def guide(x, refuse=True):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.zeros(4)
    for arguments in ((x,), (x, False)):
        with pytest.raises(pv.PyroVAEError) as raised:
            pv.ELBO().loss(model, guide, *arguments)
        assert str(raised.value) == "expected ours."
    with pytest.raises(pv.PyroVAEError) as raised:
        pyro.poutine.trace(model).get_trace(x)
    assert str(raised.value) == "expected ours."


def test_data_without_values_and_complex_data():
    with pytest.raises(pv.PyroVAEError, match=r"^expected data and parameters with values, got a tensor on 'meta'"):
        pv.log_weights(model, guide, X.to("meta"), num_particles=2)
    for call in (pv.IWAE(2).bound, lambda *program: pv.ais(*program, 3, 2, progress=False)):
        with pytest.raises(pv.PyroVAEError, match=r"^expected real numbers at site 'x', got complex ones"):
            call(model, guide, X.to(torch.cfloat))

    def fails(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sum(-1) @ torch.ones(6), 1.0))

    with pytest.raises(pv.PyroVAEError, match=r"^expected data of real numbers, got complex ones, of which"):
        pv.IWAE(2).bound(model, fails, X.to(torch.cfloat))


def test_data_of_another_dtype_than_the_parameters():
    def multiplies(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ torch.ones(2), 1.0))

    with pytest.raises(
        pv.PyroVAEError, match=r"^expected data of torch.float32, as the parameters are, got torch.float64"
    ):
        pv.IWAE(2).bound(model, multiplies, X.double())
