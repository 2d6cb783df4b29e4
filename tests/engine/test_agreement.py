"""Models and guides that disagree, and densities that are none: refused, where a number would be no bound."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import LinearGaussian, z_score
from pyro import poutine
from pyro.distributions.testing import rejection_gamma
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae.engine.particles import DrawAsOneOf

X = torch.tensor([-1.0, 0.3, 2.0, 0.5, -0.2, 1.1])
KEEP = torch.tensor([True, True, False, True, False, True])


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def masked_observation(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=KEEP)


def guide_with_auxiliary(x):
    with pyro.plate("data", len(x)):
        pyro.sample("noise", dist.Uniform(0.0, 1000.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


PER_DATUM = {
    "log_weights": lambda model, guide: pv.log_weights(model, guide, X, num_particles=3),
    "ELBO.bound": lambda model, guide: pv.ELBO(2, "monte_carlo").bound(model, guide, X),
    "IWAE.differentiable_loss": lambda model, guide: pv.IWAE(3).differentiable_loss(model, guide, X),
}
ANY = PER_DATUM | {
    "ELBO.differentiable_loss": lambda model, guide: pv.ELBO().differentiable_loss(model, guide, X),
    "ELBO.differentiable_loss Monte Carlo": lambda model, guide: pv.ELBO(3, "monte_carlo").differentiable_loss(
        model, guide, X
    ),
}


@pytest.mark.parametrize("call", ANY)
def test_shapes_that_differ(call):
    def timed_model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("time", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, None].expand(-1, 3))

    def guide_without_time(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x[:, None] / 2, 0.5))

    with pytest.raises(ValueError, match=r"shape of site 'z': .*\(6, 3\) and \(\) in the model, \(6, 1\) and \(\)"):
        ANY[call](timed_model, guide_without_time)
    vae = pv.VAE(
        prior=pv.StandardNormal(2),
        likelihood=pv.Gaussian(torch.nn.Linear(1, 1), (1,)),
        posterior=pv.DiagonalNormal(torch.nn.Linear(1, 2), (1,)),
    )
    with pytest.raises(ValueError, match=r"\(6,\) and \(2,\) in the model, \(6,\) and \(1,\) in the guide"):
        ANY[call](lambda x: vae.model(x[:, None]), lambda x: vae.guide(x[:, None]))


@pytest.mark.parametrize("call", PER_DATUM)
@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (poutine.mask(model, KEEP), guide, "masks differ at site 'z': expected model and guide to mask the same data"),
        (model, poutine.mask(guide, KEEP), "masks differ at site 'z'"),
        (masked_observation, AutoNormal(masked_observation), "masks differ at site 'x_unobserved'"),
        (model, guide_with_auxiliary, "guide site 'noise' is auxiliary beside sampled latent sites: expected"),
        (model, AutoDelta(model), r"guide site 'z' is a point \(Delta\): expected a density"),
    ],
    ids=["model masked", "guide masked", "obs_mask", "auxiliary", "point"],
)
def test_no_density_of_the_latents(model, guide, message, call):
    with pytest.raises(ValueError, match=message):
        PER_DATUM[call](model, guide)


@pytest.mark.parametrize("call", ANY)
@pytest.mark.parametrize(
    "handler", [lambda f: poutine.mask(f, KEEP[:, None]), lambda f: poutine.scale(f, X[:, None] ** 2)]
)
def test_a_mask_or_scale_wider_than_its_site(handler, call):
    with pytest.raises(ValueError, match=r"the (mask|scale) at model site 'z' does not fit it: .*got \(6, 1\)"):
        ANY[call](handler(model), handler(guide))


@pytest.mark.parametrize("call", ANY)
def test_data_observed_in_the_guide(call):
    def observing(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match="guide site 'x' is observed in the guide: expected a latent site"):
        ANY[call](model, observing)


@pytest.mark.parametrize("call", ANY)
def test_densities_without_a_whole_pathwise_gradient(call):
    def positive(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def rejecting(family):
        def program(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", family(torch.full((6,), 2.0), torch.ones(6)))

        return program

    for family in (rejection_gamma.RejectionGamma, rejection_gamma.ShapeAugmentedGamma):
        with pytest.raises(
            ValueError, match=r"guide site 'z' can't be reparameterised.*Gamma, which samples by rejection"
        ):
            ANY[call](positive, rejecting(family))
    ANY[call](positive, rejecting(dist.Gamma))


def test_masked_distributions_have_no_closed_form_when_masked_differently():
    def masked(mask, loc):
        def program(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, 1.0).mask(mask))

        return program

    with pytest.raises(ValueError, match="one mask at site 'z'"):
        pv.ELBO().loss(masked(KEEP, 0.0), masked(~KEEP, 1.0), X)
    kl = pv.ELBO().loss(masked(KEEP, 0.0), masked(KEEP, 1.0), X)
    assert kl == pytest.approx(0.5 * KEEP.sum().item())


@pytest.mark.parametrize("inside", [False, True])
def test_a_handler_and_a_distribution_may_mask_one_site_in_closed_form(inside):
    def masked(loc, by_handler):
        def function(x):
            q = dist.Normal(torch.full((len(X), 2), loc), 1.0)
            with pyro.plate("data", len(X)):
                if by_handler:
                    with poutine.mask(mask=KEEP):
                        pyro.sample("z", q.to_event(1))
                else:
                    pyro.sample("z", q.mask(KEEP[:, None]).to_event(1) if inside else q.to_event(1).mask(KEEP))

        return function

    for by_handler in (True, False):
        kl = pv.ELBO().loss(masked(0.0, by_handler), masked(1.0, not by_handler), X)
        assert kl == pytest.approx(2 * 0.5 * KEEP.sum().item())


def test_scales_and_masks_of_another_type_are_the_same():
    scaled = poutine.scale(model, torch.tensor(2.0)), poutine.scale(guide, 2.0)
    assert pv.IWAE(2).loss(*scaled, X) == pytest.approx(-2 * dist.Normal(0.0, 2**0.5).log_prob(X).sum().item())
    pv.ELBO().loss(poutine.mask(model, mask=True), guide, X)


def test_a_constant_observation_as_long_as_the_batch_is_no_missing_plate():
    def constrained(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample(
                "constraint", dist.Normal(z[..., None].expand(*z.shape, 6), 1.0).to_event(1), obs=torch.zeros(6)
            )

    log_w = pv.log_weights(constrained, guide, X, num_particles=2)
    assert log_w.shape == (2, 6)


def test_to_event_in_a_subsampled_plate():
    def swallowing(x):
        with pyro.plate("data", len(x), subsample_size=3):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.zeros(6), 1.0).to_event(1), obs=x)

    def half(x):
        with pyro.plate("data", len(x), subsample_size=3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="uses to_event in place of the batch plate"):
        pv.log_weights(swallowing, half, X, num_particles=2)


def _flow_guide():
    flow = dist.transforms.Planar(2)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow]))

    return guide


@pytest.mark.filterwarnings("ignore:.*a flow without an inverse")
def test_particles_one_after_another_through_a_flow_that_remembers():
    def flow_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    guide = _flow_guide()
    weights = []
    for vectorize in (True, False):
        pyro.set_rng_seed(1)
        weights.append(pv.log_weights(flow_model, guide, X, num_particles=3, vectorize_particles=vectorize))
    torch.testing.assert_close(weights[0], weights[1])


def test_particles_one_after_another_are_independent_whatever_the_family():
    """Gamma's sampler rejects as its parameters say, and dropout is no site: neither may repeat its numbers."""

    def gamma_model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            g = pyro.sample("g", dist.Gamma(a.exp(), 1.0))
            kept = torch.nn.functional.dropout(torch.ones(len(x)), 0.5)
            pyro.sample("x", dist.Normal(g + kept, 1.0), obs=x)

    seen = []

    def gamma_guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            g = pyro.sample("g", dist.Gamma(a.exp(), 1.0))
            uniform = torch.special.gammainc(a.exp(), g)
            seen.append(torch.stack([uniform.detach(), torch.nn.functional.dropout(torch.ones(len(x)), 0.5)]))

    with pytest.warns(UserWarning, match="noisy outside of its sample sites"):
        pv.log_weights(gamma_model, gamma_guide, torch.zeros(4000), num_particles=2, vectorize_particles=False)
    first, second = seen[-2:]  # after those of the check of rows
    for i in range(2):
        correlation = torch.corrcoef(torch.stack([first[i], second[i]]))[0, 1]
        assert correlation.abs() < 4 / 4000**0.5


def test_sites_that_only_some_particles_have():
    def branching(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if z.sum() > 0:
                pyro.sample("extra", dist.Normal(0.0, 1.0))

    log_w = pv.log_weights(branching, branching, X, num_particles=8, vectorize_particles=False)
    torch.testing.assert_close(log_w, torch.zeros(8, 6))


@pytest.mark.slow
def test_sites_after_a_branch_draw_noise_of_their_own():
    """The first run draws twelve numbers where others draw one: what they draw next must not be of those twelve."""
    seen = []

    def body(x, obs):
        with pyro.plate("data", 1):
            branch = pyro.sample("branch", dist.Bernoulli(torch.tensor([0.5])))
            wide = None
            if branch.item():
                total = pyro.sample("narrow", dist.Normal(torch.zeros(1), 1.0))
            else:
                wide = pyro.sample("wide", dist.Normal(torch.zeros(1, 12), 1.0).to_event(1))
                total = wide.sum(-1)
            last = pyro.sample("last", dist.Normal(torch.zeros(1), 1.0))
            if obs:
                pyro.sample("x", dist.Normal(total + last, 1.0), obs=x)
            else:
                seen.append((wide, last))

    with torch.no_grad():
        for _ in range(20):
            seen.clear()
            pv.log_weights(
                lambda x: body(x, True), lambda x: body(x, False), X[:1], num_particles=16, vectorize_particles=False
            )
            numbers = torch.cat([part.flatten() for pair in seen for part in pair if part is not None])
            assert len(numbers.unique()) == len(numbers)


@pytest.mark.parametrize("site", ["name", "family"])
def test_sites_of_another_name_or_family_draw_noise_of_their_own(site):
    draws = []

    def program(x):
        with pyro.plate("data", len(x)):
            first = len(draws) % 3 == 0
            kind = dist.Laplace if site == "family" and not first else dist.Normal
            z = pyro.sample("other" if site == "name" and not first else "z", kind(torch.zeros(6), 1.0))
            draws.append(torch.stack([z, pyro.sample("w", dist.Normal(torch.zeros(6), 1.0))]))

    for particle, last in ((0, True), (1, False), (2, False)):
        if particle == 0:
            draws_alone = DrawAsOneOf(3)
        with draws_alone.of(particle):
            program(X)
        assert draws_alone.as_first == last
    assert len(torch.cat(draws).unique()) == 36


def test_a_subsample_is_one_for_all_particles_whatever_their_branches():
    rows = []

    def program(x):
        z = None
        if len(rows) % 4 % 2:
            with pyro.plate("extra", 2):
                z = pyro.sample("extra_noise", dist.Normal(torch.zeros(2), 1.0))
        with pyro.plate("data", 6, subsample_size=3) as index:
            rows.append(index)
            pyro.sample("z", dist.Normal(0.0, 1.0) if z is None else dist.Normal(z.mean(), 1.0))

    apart = DrawAsOneOf(4)
    for particle in range(4):
        with apart.of(particle):
            program(X)
    assert all(torch.equal(index, rows[0]) for index in rows)


def test_initial_values_are_not_drawn_again_as_noise():
    def program(x):
        pyro.param("w", lambda: torch.randn(6))
        with pyro.plate("data", len(x)):
            seen.append(pyro.sample("z", dist.Normal(0.0, 1.0)))

    seen = []
    pv.log_weights(program, program, X, num_particles=2)
    assert not torch.isclose(seen[-1], pyro.param("w")).any()


def test_autoguides_and_factors_of_the_guide_are_served():
    positive = LinearGaussian(1, 1, 6)

    def lognormal(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    autoguide = AutoNormal(lognormal, init_scale=1.5)
    x = positive.x[:, 0].float().abs()
    weights = pv.log_weights(lognormal, autoguide, x, num_particles=4000).detach()
    grid = torch.linspace(1e-4, 60, 200_000)[:, None]
    exact = torch.trapezoid(
        (dist.LogNormal(0.0, 1.0).log_prob(grid) + dist.Normal(grid, 1.0).log_prob(x)).exp(), grid, dim=0
    )
    assert (z_score(weights.exp(), exact) < 4).all()

    def with_factor(x):
        with pyro.plate("data", len(x)):
            loc = pyro.param("loc", torch.zeros(()), constraint=constraints.real)
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.factor("more", 0.1 * z, has_rsample=True)

    for kl in ("analytic", "monte_carlo"):
        losses = []
        for factor in (with_factor, poutine.block(with_factor, hide=["more"])):
            pyro.set_rng_seed(1)
            losses.append(pv.ELBO(1, kl).loss(model, factor, X))
        pyro.set_rng_seed(1)
        z = poutine.trace(with_factor).get_trace(X).nodes["z"]["value"]
        assert losses[0] - losses[1] == pytest.approx(0.1 * z.sum().item(), abs=1e-4)


def test_shared_modules_are_stepped_once_and_trained_anew():
    """A prior that holds the posterior, as a VampPrior does."""

    class Aggregate(torch.nn.Module):
        def __init__(self, posterior):
            super().__init__()
            self.posterior, self.inputs = posterior, torch.nn.Parameter(torch.randn(1, 6))

        def forward(self):
            q = self.posterior(self.inputs)
            return dist.Normal(q.mean[0], q.stddev[0]).to_event(1)

    for _ in range(2):
        vae = pv.mlp_vae((6,), latent_dim=2, likelihood="gaussian")
        vae.prior = Aggregate(vae.posterior)
        before = {name: value.detach().clone() for name, value in vae.named_parameters()}
        x = torch.randn(16, 6)
        pv.fit(vae.model, vae.guide, x, pv.ELBO(1, "monte_carlo"), epochs=1, batch_size=16, lr=1e-3)
        for name, value in vae.named_parameters():
            assert (value - before[name]).abs().max().item() == pytest.approx(1e-3, rel=0.01), name  # Adam's first step


def test_module_local_parameters():
    with pyro.settings.context(module_local_params=True):

        class Local(pyro.nn.PyroModule):
            def __init__(self):
                super().__init__()
                self.loc = torch.nn.Parameter(torch.zeros(()))

            def forward(self, x):
                with pyro.plate("data", len(x)):
                    pyro.sample("z", dist.Normal(self.loc, 1.0))

        local = Local()
        pv.fit(model, local, X, pv.ELBO(), epochs=2)
        assert local.loc.item() != 0


@pytest.mark.slow
def test_a_guide_with_a_parameter_for_each_datum():
    """All data in one minibatch keep their order, and compare looks at them all."""
    autoguide = AutoNormal(model)
    pv.fit(model, autoguide, X, pv.ELBO(10, "monte_carlo"), epochs=800, lr=3e-2)
    table = pv.compare(model, autoguide, X, [pv.IWAE(50)], repeats=3)
    exact = dist.Normal(0.0, 2**0.5).log_prob(X).mean().item()
    assert table.bound.item() == pytest.approx(exact, abs=0.05)
    torch.testing.assert_close(autoguide.median(X)["z"], X / 2, atol=0.2, rtol=0)


def test_initial_values_of_an_autoguide_are_not_drawn_again_as_noise():
    autoguide = AutoNormal(model, init_loc_fn=pyro.infer.autoguide.init_to_sample)
    seen = []

    def recording(x):
        seen.append(autoguide(x)["z"])

    pv.log_weights(model, recording, X, num_particles=2)
    noise = (seen[-1] - autoguide.locs.z) / autoguide.scales.z
    assert not torch.isclose(noise, autoguide.locs.z, atol=1e-4).any()


def test_networks_without_a_leading_dimension_are_told_of_the_way_out():
    linear = torch.nn.Linear(2, 1)

    def narrow_guide(x):
        pyro.module("linear", linear)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("w", dist.Normal(linear(torch.stack([x, z], -1)).squeeze(-1), 1.0))

    def narrow_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

    with pytest.raises(RuntimeError) as caught:
        pv.IWAE(3).loss(narrow_model, narrow_guide, X)
    assert any("leading dimension of 3" in note for note in caught.value.__notes__)
    pv.IWAE(3, vectorize_particles=False).loss(narrow_model, narrow_guide, X)


@pytest.mark.parametrize(
    ("family", "same"),
    [
        (lambda x: dist.LogNormal(x, 1.0), True),
        (lambda x: dist.Gumbel(x, 1.0), True),
        (lambda x: dist.Laplace(x, 1.0), True),
        (lambda x: dist.StudentT(5.0, x, 1.0), False),
        (lambda x: dist.ExpandedDistribution(dist.Normal(torch.zeros(()), 1.0), x.shape), False),
    ],
    ids=["LogNormal", "Gumbel", "Laplace", "StudentT", "Expanded"],
)
def test_particles_one_after_another_draw_anew_at_each_call(family, same):
    def any_model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.StudentT(3.0))

    def any_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", family(x))

    def draw(vectorize):
        return pv.log_weights(any_model, any_guide, X, num_particles=3, vectorize_particles=vectorize)

    pyro.set_rng_seed(1)
    together = draw(True)
    pyro.set_rng_seed(1)
    apart, again = draw(False), draw(False)
    assert not torch.isclose(apart, again).any()
    assert len(apart.unique()) == 18
    assert torch.allclose(together, apart) == same


def test_a_point_beside_dropout_draws_anew_at_each_call():
    def noisy(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.nn.functional.dropout(z + 1, 0.5), 1.0), obs=x)

    objective = pv.ELBO(2, "monte_carlo", vectorize_particles=False)
    point = AutoDelta(noisy)
    assert len({objective.loss(noisy, point, X) for _ in range(3)}) == 3
