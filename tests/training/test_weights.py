"""pv.fit with a weight for each datum: the gradient of the weighted mean, for each objective."""

from __future__ import annotations

import functools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.quick import slow_but
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NOISE = torch.randn(30, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
WEIGHTS = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0], dtype=torch.float64).repeat(6)
SGD = functools.partial(torch.optim.SGD, lr=0.1)
OBJECTIVES = {
    "ELBO": pv.ELBO(),
    "ELBO, K = 2": pv.ELBO(2, kl="monte_carlo"),
    "STL": pv.ELBO(2, "monte_carlo", "stl"),
    "IWAE": pv.IWAE(3),
    "DReG": pv.IWAE(3, "dreg"),
    "chunks": pv.IWAE(4, chunk_size=2),
    "Renyi": pv.Renyi(0.5, 3),
    "RWS": pv.RWS(3),
    "Trace_ELBO": pyro.infer.Trace_ELBO(),
}
COMPILED = [False, pytest.param(True, marks=pytest.mark.slow)]


def start():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.param("W", 0.5 * torch.randn(2, 3, dtype=torch.float64))
    pyro.param("A", 0.3 * torch.randn(3, 2, dtype=torch.float64))


class Chosen(dist.Normal):
    """A normal whose draws are a column of the data, so that no noise depends on which data are beside a datum."""

    def __init__(self, loc, scale, noise):
        self.noise = noise
        super().__init__(loc, scale, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Chosen(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)

    def rsample(self, sample_shape=()):
        noise = self.noise[..., 0, :] if self.loc.dim() == 2 else self.noise.movedim(1, 0)[: len(self.loc)]
        return self.loc + self.scale * noise.reshape(self.loc.shape)

    def sample(self, sample_shape=()):
        return self.rsample().detach()


def model(x, noise, dim=-1):
    W = pyro.param("W")
    with pyro.plate("rows", len(x), dim=dim):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W, 0.7).to_event(1), obs=x)


def guide(x, noise):
    A = pyro.param("A")
    with pyro.plate("rows", len(x)):
        pyro.sample("z", Chosen(x @ A, torch.full((len(x), 2), 0.5, dtype=x.dtype), noise).to_event(1))


def trained(data, objective, **options):
    start()
    with pyro.validation_enabled(False):
        history = pv.fit(model, guide, data, objective, optimizer=SGD, epochs=2, seed=0, **options)
    return {name: pyro.param(name).detach().clone() for name in "WA"}, history.train_bound.tolist()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("compile", COMPILED)
def test_a_weight_of_two_is_a_datum_twice(name, compile):
    """The gradient of whole weights is that of repeated rows, with the noise of the datum."""
    if compile and name in ("chunks", "Trace_ELBO"):
        pytest.skip("is not compiled")
    repeats = (2 * WEIGHTS).long()
    rows = torch.arange(30).repeat_interleave(repeats)
    objective = OBJECTIVES[name]
    found, bounds = trained((X, NOISE), objective, batch_size=30, weights=WEIGHTS, compile=compile)
    expected, its = trained((X[rows], NOISE[rows]), objective, batch_size=len(rows), compile=compile)
    for parameter, value in expected.items():
        torch.testing.assert_close(found[parameter], value, rtol=1e-9, atol=1e-11)
    assert bounds == pytest.approx(its, rel=1e-9)
    unweighed, _ = trained((X, NOISE), objective, batch_size=30, compile=compile)
    assert not torch.allclose(found["W"], unweighed["W"], rtol=1e-3)


def test_accumulated_minibatches_have_the_mean_over_the_sum_of_weights():
    whole, _ = trained((X, NOISE), pv.IWAE(3), batch_size=30, weights=WEIGHTS)
    for batch_size, accumulate in ((7, 5), (1, 30)):  # some minibatches of one datum weigh nothing
        parts, _ = trained((X, NOISE), pv.IWAE(3), batch_size=batch_size, weights=WEIGHTS, accumulate=accumulate)
        for parameter, value in whole.items():
            torch.testing.assert_close(parts[parameter], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_minibatches_without_weight(accumulate):
    weights = torch.zeros(30)
    weights[:2] = 1.0

    class Numbers(pv.Callback):
        def on_step(self, record):
            record.numbers()

    vae = pv.mlp_vae((3,), latent_dim=1, hidden_dims=(4,), likelihood="gaussian")
    settings = {"epochs": 2, "batch_size": 4, "weights": weights, "accumulate": accumulate, "callbacks": Numbers()}
    history = pv.fit(vae, X.float(), pv.ELBO(), **settings)
    assert history.train_bound.notna().all()


def test_a_subsampled_plate():
    """Where the loss is scaled to all data, weights of one change nothing, and others are those of the mean."""

    def scaled(x):
        with pyro.plate("data", 40, subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(3, dtype=x.dtype)), 1.0).to_event(1), obs=x)

    pyro.clear_param_store()
    pv.fit(scaled, lambda x: None, X, pv.ELBO(), steps=1, batch_size=30, optimizer=SGD, weights=WEIGHTS)
    mean = (WEIGHTS[:, None] * X).sum(0) / WEIGHTS.sum()
    torch.testing.assert_close(pyro.param("loc").detach(), 0.1 * mean, rtol=1e-9, atol=1e-12)


def test_a_learned_scale_is_that_of_the_weighed_residuals():
    vae = pv.mlp_vae((3,), latent_dim=1, hidden_dims=(4,), likelihood="gaussian", scale="learned")
    x = X.float().clone()
    x[:15] *= 100.0
    weights = (torch.arange(30) >= 15).float()
    pv.fit(vae, x, pv.ELBO(), steps=1, batch_size=30, weights=weights, lr=1e-9)
    assert vae.likelihood.log_scale.exp().item() < 3
    pv.fit(vae, x, pv.ELBO(), steps=1, batch_size=30, lr=1e-9)
    assert vae.likelihood.log_scale.exp().item() > 30


def test_it_resumes_and_validates_and_recognises_the_weights(tmp_path):
    def fit(epochs, weights=WEIGHTS, **options):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae = pv.mlp_vae((3,), latent_dim=1, hidden_dims=(4,), likelihood="gaussian")
        settings = {"batch_size": 8, "seed": 0, "validation": X.float()[:9]} | options
        return pv.fit(vae, X.float(), pv.ELBO(), epochs=epochs, weights=weights, **settings)

    whole = fit(4)
    fit(2, checkpoint=tmp_path / "run.pt")
    again = fit(4, checkpoint=tmp_path / "run.pt")
    assert again[["train_bound", "validation_bound"]].equals(whole[["train_bound", "validation_bound"]])
    with pytest.raises(pv.PyroVAEError, match="written with other data"):
        fit(5, weights=WEIGHTS + 1, checkpoint=tmp_path / "run.pt")


def outside(x):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def guide_outside(x):
    pyro.sample("loc", dist.Normal(pyro.param("m", torch.zeros(3, dtype=x.dtype)), 1.0).to_event(1))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (torch.ones(29), "expected weights to be 30 finite numbers"),
        (torch.ones(30, 1), "expected weights to be 30 finite numbers"),
        (-torch.ones(30), "expected weights to be 30 finite numbers"),
        (torch.zeros(30), "expected weights to be 30 finite numbers"),
        (torch.full((30,), float("nan")), "expected weights to be 30 finite numbers"),
        (2.0, "expected weights to be 30 finite numbers"),
        ("w", "expected weights to be 30 finite numbers"),
        (torch.ones(30, device="meta"), "expected weights to be 30 finite numbers.*on meta"),
        (torch.ones(30).to_sparse(), "expected weights to be 30 finite numbers"),
    ],
)
def test_other_weights(weights, words):
    start()
    with pytest.raises(pv.PyroVAEError, match=words):
        pv.fit(model, guide, (X, NOISE), pv.ELBO(), epochs=1, weights=weights)


def test_what_takes_no_weights():
    vae = pv.mlp_vae((3,), latent_dim=1, hidden_dims=(4,), likelihood="gaussian")
    x = X.float()
    with pytest.raises(pv.PyroVAEError, match="expected free_bits=0 with weights"):
        pv.fit(vae, x, pv.ELBO(free_bits=0.1), epochs=1, weights=WEIGHTS)
    with pytest.raises(pv.PyroVAEError, match="got a DataLoader"):
        pv.fit(vae, DataLoader(TensorDataset(x)), pv.ELBO(), epochs=1, weights=WEIGHTS)
    with pytest.raises(pv.PyroVAEError, match="expected every site inside the data's plate 'data', got 'loc'"):
        pv.fit(outside, guide_outside, X, pv.ELBO(), epochs=1, batch_size=30, weights=WEIGHTS)


@pytest.mark.parametrize("weights", [WEIGHTS.numpy(), WEIGHTS.tolist(), (2 * WEIGHTS).long(), np.ones(30, dtype="f4")])
def test_kinds_of_weights(weights):
    vae = pv.mlp_vae((3,), latent_dim=1, hidden_dims=(4,), likelihood="gaussian")
    history = pv.fit(vae, X.float(), pv.IWAE(2), epochs=1, batch_size=8, weights=weights)
    assert history.train_bound.notna().all()


def masked_model(x, mask):
    with pyro.plate("data", len(x), dim=-2):
        u = pyro.sample("u", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("columns", 3, dim=-1), pyro.poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(u, 1.0))
            pyro.sample("x", dist.Normal(z + pyro.param("loc", x.new_zeros(3)), 1.0), obs=x)


def masked_guide(x, mask):
    with pyro.plate("data", len(x), dim=-2):
        mean = (x * mask).mean(1, keepdim=True)
        pyro.sample("u", dist.Normal(mean * pyro.param("slope", x.new_ones(())), 0.8))
        with pyro.plate("columns", 3, dim=-1), pyro.poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(x / 2, 0.9))


PLATED = [pv.ELBO(), pv.ELBO(2, "monte_carlo"), pv.IWAE(3), pv.IWAE(3, "vimco")]


@pytest.mark.parametrize("objective", slow_but([PLATED[0], PLATED[2]], PLATED), ids=repr)
def test_a_plate_around_another_one_with_a_mask(objective):
    """The bound and the gradient are the mean over the weights of those of each datum, with the same noise."""
    mask = torch.rand(30, 3, generator=torch.Generator().manual_seed(2)) < 0.6

    class Keep(pv.Callback):
        def before_step(self, record):
            self.found = [record.bound, *(p.grad.clone() for _, p in sorted(record.parameters.items()))]

    def measured(weights):
        start()
        keep = Keep()
        pv.fit(masked_model, masked_guide, (X, mask), objective, steps=1, weights=weights, callbacks=keep, seed=3)
        return torch.cat([torch.as_tensor(each, dtype=X.dtype).flatten() for each in keep.found])

    each = torch.stack([measured(row) for row in torch.eye(30)])
    torch.testing.assert_close(measured(WEIGHTS), WEIGHTS @ each / WEIGHTS.sum())
