"""Particles in chunks: the same numbers as all at once, with masks of every kind."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv

X = torch.tensor([2.0, -1.5, 0.3])
KEEP = torch.tensor([True, True, False])
COLUMNS = torch.tensor([[True, False], [True, True], [False, True]])


def masked_sites(x):
    return lambda loc, scale: dist.Normal(loc, scale).mask(KEEP)


def masked_columns(x):
    return lambda loc, scale: dist.Normal(loc.unsqueeze(-1).expand(*loc.shape, 2), scale).mask(COLUMNS).to_event(1)


def expanded(x):
    return lambda loc, scale: dist.Normal(loc, scale).expand(loc.shape).mask(KEEP)


@pytest.mark.parametrize("make", [masked_sites, masked_columns, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("objective", [pv.IWAE, pv.ELBO], ids=lambda c: c.__name__)
def test_chunks_beside_masks_give_the_same_bound_and_gradient(make, objective):
    masked = make(X)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", masked(torch.zeros(len(x)), 1.0))
            mean = z if z.shape[-1] == len(x) else z.sum(-1)
            keep = KEEP if mean is z else COLUMNS.all(-1)
            pyro.sample("x", dist.Normal(mean, 0.5).mask(keep), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.8))
        with pyro.plate("data", len(x)):
            pyro.sample("z", masked(slope * x, 0.5))

    found = []
    options = {"kl": "monte_carlo"} if objective is pv.ELBO else {}
    for chunk_size in (None, 3):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = objective(8, chunk_size=chunk_size, **options).loss_and_grads(model, guide, X)
        found.append(torch.stack([torch.tensor(loss), pyro.param("slope").grad]))
    # Sums of 8 x 3 terms of order 10 in float32, in two orders.
    assert torch.allclose(*found, rtol=24 * 2**-23, atol=10 * 24 * 2**-23)


def test_chunks_of_a_mask_that_depends_on_the_particle():
    def model(x):
        with pyro.plate("data", len(x)):
            switch = pyro.sample("switch", dist.Bernoulli(0.5))
            with pyro.poutine.mask(mask=switch.bool()):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            switch = pyro.sample("switch", dist.Bernoulli(0.5))
            with pyro.poutine.mask(mask=switch.bool()):
                pyro.sample("z", dist.Normal(0.8 * x, 0.5))

    found = []
    for chunk_size in (None, 3):
        pyro.set_rng_seed(0)
        with torch.no_grad():
            found.append(pv.log_weights(model, guide, X, num_particles=8, chunk_size=chunk_size))
    assert torch.allclose(*found, atol=10 * 2**-22)


STRAIGHT_THROUGH = {
    "Bernoulli": lambda logits: dist.RelaxedBernoulliStraightThrough(torch.tensor(0.7), logits=logits).to_event(1),
    "categorical": lambda logits: dist.RelaxedOneHotCategoricalStraightThrough(torch.tensor(0.7), logits=logits),
}


@pytest.mark.parametrize("family", STRAIGHT_THROUGH)
@pytest.mark.parametrize("gradient", ["pathwise", "stl", "dreg", "vimco"])
def test_straight_through_samples_keep_their_soft_value(family, gradient):
    """In chunks, in views and detached, the density is that of the soft value: the weights are those of one run."""
    make, weights = STRAIGHT_THROUGH[family], torch.randn(4, 2, generator=torch.Generator().manual_seed(0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", make(torch.zeros(4)))
            pyro.sample("x", dist.Normal(z @ weights, 1.0).to_event(1), obs=x)

    def guide(x):
        logits = pyro.param("logits", torch.randn(3, 4))
        with pyro.plate("data", len(x)):
            pyro.sample("z", make(logits))

    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    found = []
    for options in ({"chunk_size": 3}, {}):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        objective = pv.IWAE(8, gradient, **options)
        loss = objective.loss_and_grads(model, guide, x)
        found.append(torch.cat([torch.tensor([loss]), pyro.param("logits").grad.flatten()]))
        pyro.set_rng_seed(0)
        with torch.no_grad():
            weighed = pv.log_weights(model, guide, x, num_particles=8, **options)
        assert -30 < float(weighed.mean()) < 0  # of hard values it would be about 100 nats higher
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
