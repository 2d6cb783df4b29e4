"""What is done around every call of a module: it must not show, also in networks under torch.compile."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_networks_under_torch_compile_are_compiled_a_few_times(tmp_path):
    """It compiles anew if a global hook of modules is another one, and gives up after 8 times."""
    torch.compiler.reset()
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    encoder = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 3))
    networks = {"fast": torch.compile(encoder, backend=backend), "plain": encoder}

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x, kind="fast"):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(networks[kind](x), 0.5).to_event(1))

    for _ in range(4):
        pv.ELBO().loss_and_grads(model, guide, X)
    assert len(compiled) == 1
    options = {"validation": X, "checkpoint": tmp_path / "c.pt", "progress": False}
    pv.fit(model, guide, X, pv.ELBO(), epochs=4, batch_size=8, **options)
    assert len(compiled) <= 8
    plain = functools.partial(guide, kind="plain")
    fast, slow = (pv.log_likelihood(model, each, X, 5, seed=0, progress=False).mean for each in (guide, plain))
    assert fast == pytest.approx(slow)  # without dropout
    assert encoder.training and encoder[1].training


@pytest.mark.parametrize(
    "wrap",
    [
        lambda norm: norm,
        lambda norm: dist.transforms.ComposeTransform([norm]),
        lambda norm: dist.transforms.ComposeTransformModule([norm]),
    ],
    ids=["alone", "composed", "composed module"],
)
def test_a_transform_that_is_a_module_is_evaluated_too(wrap):
    """Pyro's batchnorm in a guide that is a function: its statistics stay, and rows do not depend on each other."""
    pyro.clear_param_store()
    norm = dist.transforms.batchnorm(2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("norm", norm)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(x / 2, 0.5**0.5).to_event(1), [wrap(norm)]))

    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    before = norm.moving_mean.clone()
    found = pv.log_likelihood(model, guide, x, 100, seed=0, progress=False).per_datum
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum(-1).double()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-2)  # its variance is 1 + 1e-5
    assert torch.equal(norm.moving_mean, before) and norm.training
    pv.fit(model, guide, x, pv.ELBO(kl="monte_carlo"), epochs=1, batch_size=10, progress=False)
    assert not torch.equal(norm.moving_mean, before)
