"""Claims about likelihoods, guides and masks on small problems, each as a statistical test on held-out data."""

from __future__ import annotations

import pyro
import torch

import pyro_vae as pv


def in_standard_errors(values: torch.Tensor) -> float:
    """The mean of differences, of shape (N,), divided by its standard error."""
    difference = pv.Estimate.of(values)
    return difference.value / difference.standard_error


def neighbours(x: torch.Tensor) -> float:
    """The correlation of neighbouring pixels in a row, over images (N, 1, H, W) centred at their means."""
    x = x - x.mean(0)
    return (x[..., 1:] * x[..., :-1]).sum().item() / (x[..., 1:].norm() * x[..., :-1].norm()).item()


def test_a_low_rank_gaussian_learns_noise_that_pixels_share():
    side = 6
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    noise = torch.distributions.MultivariateNormal(
        torch.zeros(side**2), 0.2**2 * (-torch.cdist(grid, grid).square() / 8).exp() + 0.05**2 * torch.eye(side**2)
    )
    waves = torch.stack([(grid @ torch.tensor([1.0, 0.5])).sin(), (grid @ torch.tensor([0.5, -1.0])).cos()])
    clean = torch.randn(1500, 2).tanh() @ waves
    x = (clean + noise.sample((1500,))).reshape(-1, 1, side, side)
    train, test = x[:1200], x[1200:]

    def learn(likelihood, **options):
        pyro.set_rng_seed(0)
        vae = pv.mlp_vae((1, side, side), latent_dim=2, hidden_dims=(32,), likelihood=likelihood, **options)
        pv.fit(vae.model, vae.guide, train, pv.ELBO(), epochs=20, batch_size=100, lr=1e-2, progress=False)
        found = pv.IWAE(100).bound(vae.model, vae.guide, test).detach()
        with torch.no_grad():
            given = vae.likelihood(torch.randn(300, 2))
            return found, neighbours(given.sample() - given.mean)

    independent, grain = learn("gaussian", scale="learned")
    low_rank, smooth = learn(pv.LowRankGaussian, rank=8)
    assert in_standard_errors(low_rank - independent) > 10
    truth = neighbours((x - clean.reshape(x.shape))[1200:])
    assert abs(grain) < 0.05  # the standard error is 1 / sqrt(300 * 30), about 0.01
    assert smooth > 0.7 * truth > 0.5


def test_imputation_is_nearer_than_one_reconstruction_and_than_means():
    digits = pv.data.load("digits", validation=0)
    train, x = digits.train.x, digits.test.x
    seen, mask = torch.rand_like(train) < 0.5, torch.rand_like(x) < 0.5
    vae = pv.mlp_vae(digits.event_shape, latent_dim=8, hidden_dims=(64,), likelihood="gaussian", scale="learned")
    pv.fit(vae.model, vae.guide, (train, seen), pv.IWAE(5), epochs=20, batch_size=64, lr=5e-3, progress=False)

    def error(filled):
        """The root mean square error of the missing pixels of each image."""
        return (torch.where(mask, 0.0, filled - x).square().flatten(1).sum(1) / (~mask).flatten(1).sum(1)).sqrt()

    # Missing elements may have any value, even NaN, since they are never read.
    hidden = torch.where(mask, x, torch.nan)
    imputed = vae.impute(hidden, mask, num_samples=300)
    assert torch.equal(imputed[mask], x[mask])
    with torch.no_grad():
        unweighted = vae.decode(vae.posterior(torch.where(mask, x, 0.0)).sample((300,))).mean(0)
    means = torch.where(seen, train, 0.0).sum(0) / seen.sum(0)
    for other in (means, vae.reconstruct(hidden, mask), unweighted):
        assert in_standard_errors(error(other) - error(imputed)) > 4


def test_a_guide_that_ignores_x_collapses():
    digits = pv.data.load("digits", binarize="dynamic", validation=0)
    x, mean_image = digits.test.x, digits.train.images.mean(0)
    parts, bounds, outputs = [], [], []
    for conditional in (True, False):
        pyro.set_rng_seed(0)
        vae = pv.mlp_vae(digits.event_shape, latent_dim=2, hidden_dims=(64,))
        if not conditional:
            vae.posterior = pv.Unconditional(2, digits.event_shape)
        pv.fit(
            vae.model, vae.guide, digits.train, pv.ELBO(), epochs=20, batch_size=100, lr=1e-2, progress=False,
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
        )  # fmt: skip
        parts.append(pv.decompose_elbo(vae.model, vae.guide, x, 10, progress=False))
        bounds.append(pv.ELBO(20).bound(vae.model, vae.guide, x).detach())
        outputs.append(vae.decode(torch.randn(500, 2)))
    informative, collapsed = (p.mutual_information for p in parts)
    # Each term log q(z|x_n) - log q(z) is 0 up to float32 rounding of a few nats, so there is no sampling error.
    assert abs(collapsed.value) < 3 * collapsed.standard_error + 1e-6
    assert collapsed.standard_error < 1e-6
    assert informative.value / informative.standard_error > 20
    assert in_standard_errors(bounds[0] - bounds[1]) > 5
    spread = [each.std(0).mean().item() for each in outputs]
    assert spread[1] < 0.2 * spread[0]
    # The collapsed decoder returns the mean image, to twice the standard error of the mean of these binary images.
    error = (mean_image * (1 - mean_image)).mean().div(len(digits.train)).sqrt()
    assert (outputs[1] - mean_image).square().mean().sqrt() < 2 * error
    assert (outputs[0] - mean_image).square().mean().sqrt() > 5 * error
