"""Pairs refuse wrong data, sizes and parts, each with a message that names the fix."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.autoname import scope
from pyro.infer import SVI, Trace_ELBO

import pyro_vae as pv


def binary(n=10):
    """A VAE of binary vectors of length 7, and data."""
    vae = pv.mlp_vae((7,), latent_dim=3, hidden_dims=(8, 6))
    return vae, torch.rand(n, 7).round()


@pytest.mark.parametrize(
    ("event_shape", "shape", "fix"),
    [
        ((3, 4, 5), (10, 4, 5, 3), r"The channels come first: x.permute\(0, 3, 1, 2\)"),
        ((3, 4, 4), (10, 4, 4, 3), r"The channels come first: x.permute\(0, 3, 1, 2\)"),
        ((1, 4, 5), (10, 4, 5), r"Reshape it: x.reshape\(-1, 1, 4, 5\)"),
        ((3, 4, 5), (10, 60), r"Reshape it: x.reshape\(-1, 3, 4, 5\)"),
        ((60,), (10, 3, 4, 5), r"Reshape it: x.reshape\(-1, 60\)"),
        ((3, 4, 5), (10, 4, 3, 5), "Build the VAE with the event_shape of your data"),
        ((3, 4, 5), (10, 12, 5), "Build the VAE with the event_shape of your data"),
    ],
)
def test_the_fix_of_a_shape_never_mixes_axes(event_shape, shape, fix):
    vae = pv.mlp_vae(event_shape, latent_dim=2, hidden_dims=(4,), likelihood="gaussian")
    with pytest.raises(ValueError, match=fix):
        vae.model(torch.zeros(shape))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.zeros(10, 28),
            r"expected x of shape \(N, 7\), got \(10, 28\). Build the VAE with the event_shape of your",
        ),
        (torch.zeros(10, 1, 7), r"expected x of shape \(N, 7\), got \(10, 1, 7\). Reshape it: x.reshape\(-1, 7\)"),
        (torch.zeros(7), r"expected x of shape \(N, 7\), got \(7,\). For one datum, pass x\[None\]"),
        (
            torch.zeros(10, 7, dtype=torch.float64),
            r"expected x of torch.float32, the dtype of the networks, got torch.float64",
        ),
        (torch.zeros(10, 7).numpy(), r"expected x to be a dense tensor, got an ndarray"),
        (torch.zeros(10, 7, dtype=torch.uint8), r"expected x of floating point, got torch.uint8. Convert it"),
        (torch.full((10, 7), 0.5), r"Bernoulli likelihood expected x of zeros and ones, got values from 0.5 to 0.5"),
    ],
)
def test_bad_data(x, message):
    vae, _ = binary()
    for call in (
        lambda: vae.model(x),
        lambda: vae.guide(x),
        lambda: pv.ELBO().loss(vae.model, vae.guide, x),
        lambda: pv.IWAE(3).loss(vae.model, vae.guide, x),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pv.mlp_vae((4,), latent_dim=0), r"expected latent_dim to be a positive integer, got 0"),
        (lambda: pv.mlp_vae((4, -1), latent_dim=2), r"event_shape to be a sequence of one or more positive integers"),
        (
            lambda: pv.mlp_vae((4,), latent_dim=2, likelihood="bernouli"),
            r"one of 'bernoulli', 'gaussian'.*, got 'bernouli'",
        ),
        (
            lambda: pv.mlp_vae((4,), latent_dim=2, scale="learned"),
            r"an option of Bernoulli \(it has no options\), got scale='learned'",
        ),
        (
            lambda: pv.mlp_vae(5, latent_dim=2),
            r"event_shape to be a sequence of one or more positive integers, got 5. Write \(5,\)",
        ),
        (
            lambda: pv.mlp_vae((), latent_dim=2),
            r"event_shape to be a sequence of one or more positive integers, got \(\)",
        ),
        (
            lambda: pv.mlp_vae((4,), latent_dim=2, hidden_dims=20),
            r"hidden_dims to be a sequence of positive integers, got 20",
        ),
        (
            lambda: pv.mlp_vae((4,), latent_dim=2, likelihood="gaussian", scale=0),
            r"positive number, 'learned' .*'per_column'",
        ),
        (lambda: pv.mlp_vae((4,), latent_dim=2, likelihood="gaussian", scale="fixed"), r"got 'fixed'"),
        (lambda: pv.conv_vae((28, 28, 3), latent_dim=2), r"channels first, got \(28, 28, 3\).*Pass \(3, 28, 28\)"),
        (lambda: pv.conv_vae((28, 28), latent_dim=2), r"expected an event_shape \(C, H, W\).*use mlp_vae"),
        (lambda: pv.conv_vae((1, 28, 28), latent_dim=2, channels=()), r"channels to be a sequence of one or more"),
    ],
)
def test_bad_architecture(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_decoder_with_the_wrong_number_of_outputs():
    likelihood = pv.Gaussian(torch.nn.Linear(2, 4), (4,), scale="per_pixel")
    with pytest.raises(
        ValueError, match=r"expected a decoder with 8 outputs for each datum \(2 for each element of \(4,\)\)"
    ):
        likelihood(torch.randn(5, 2))


def test_labels_in_place_of_a_mask_are_refused():
    vae, x = binary()
    with pytest.raises(
        ValueError, match=r"mask to be booleans of x's shape \(10, 7\).*got torch.int64 of shape \(10,\).*labels"
    ):
        pv.fit(vae.model, vae.guide, (x, torch.arange(10)), pv.ELBO(), epochs=1)


class _Eventful(pv.Likelihood):
    def pixel_distribution(self, loc):
        return dist.Normal(loc, 1.0).to_event(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pv.Bernoulli(torch.nn.Linear, (4,)), r"decoder to be a torch.nn.Module, got <class"),
        (
            lambda: pv.Bernoulli(torch.nn.Linear(2, 4), 4),
            r"event_shape to be a sequence of positive integers, got 4. Write \(4,\)",
        ),
        (
            lambda: _Eventful(torch.nn.Linear(2, 4), (4,))(torch.zeros(5, 2)),
            r"batch shape \(5, 4\) and event shape \(\), got \(5,\) and \(4,\)\. Drop to_event",
        ),
        (
            lambda: pv.VAE(prior=pv.StandardNormal(2), likelihood=pv.Bernoulli, posterior=pv.Unconditional(2, (4,))),
            r"likelihood to be a pv.Likelihood, got <class",
        ),
        (
            lambda: pv.VAE(
                prior=pv.StandardNormal(2),
                likelihood=pv.Bernoulli(torch.nn.Linear(2, 4), (4,)),
                posterior=pv.Unconditional(2, (3,)),
            ),
            r"posterior of the likelihood's event_shape \(4,\), got \(3,\)",
        ),
    ],
)
def test_parts_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: pv.mlp_vae((4,), latent_dim=2, posterior="full"),
            r"posterior to be a subclass of pv.Posterior.*got 'full'",
        ),
        (
            lambda: pv.mlp_vae((4,), latent_dim=2, posterior=pv.Unconditional(2, (4,))),
            r"Assign any other module afterwards: vae.posterior =",
        ),
        (
            lambda: pv.mlp_vae((4,), latent_dim=2, prior=pv.MixturePrior),
            r"prior to be a torch.nn.Module( or None)?, got <class",
        ),
        (
            lambda: setattr(pv.mlp_vae((4,), latent_dim=2), "prior", dist.Normal(0, 1)),
            r"prior to be a torch.nn.Module, got Normal",
        ),
        (
            lambda: pv.VampPrior(pv.Unconditional(2, (4,)), torch.ones(3, 4, dtype=torch.long)),
            r"floating point, got torch.int64",
        ),
        (lambda: pv.FlowPrior(100, hidden_dims=(64,)), r"of width latent_dim=100 or more, got hidden_dims=\(64,\)"),
        (
            lambda: pv.mlp_conditional_vae((4,), latent_dim=2, label_dim=3).generate(3),
            r"expected y to be a dense tensor, got 3",
        ),
        (
            lambda: pv.mlp_conditional_vae((4,), latent_dim=2, label_dim=3).generate(torch.zeros(2, 1)),
            r"expected y of torch.float32 and shape \(2, 3\), got torch.float32 of shape \(2, 1\)",
        ),
        (
            lambda: pv.mlp_semi_supervised_vae((4,), latent_dim=2, num_classes=3).generate(torch.tensor([7])),
            r"labels from 0 to 2, got 7 to 7",
        ),
    ],
)
def test_common_mistakes_are_refused(make, message):
    with pyro.validation_enabled(True), pytest.raises(ValueError, match=message):
        make()


def test_two_pairs_in_one_program_are_refused():
    pairs = [pv.mlp_vae((3,), latent_dim=2, hidden_dims=(4,)) for _ in range(2)]
    scoped = [[scope(program, prefix=str(i)) for program in (p.model, p.guide)] for i, p in enumerate(pairs)]
    x = torch.rand(5, 3).round()
    svi = SVI(
        lambda x: [model(x) for model, _ in scoped],
        lambda x: [guide(x) for _, guide in scoped],
        pyro.optim.Adam({"lr": 1e-3}),
        loss=Trace_ELBO(),
    )
    with pytest.raises(ValueError, match="expected one pair in a program, got two pairs with a parameter named"):
        svi.step(x)
