"""A frozen part with batch norm: its statistics stay, whoever holds it, and however the training ends."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.training import X
from torch import nn

import pyro_vae as pv

COMPILED = [False, pytest.param(True, marks=pytest.mark.slow)]
SETTINGS = {"batch_size": 25, "seed": 1}


def encoder():
    """Batch norm with parameters, batch norm without, and dropout."""
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4), nn.BatchNorm1d(4, affine=False)]
    return nn.Sequential(*layers)


def norm_vae():
    """A pair with that encoder."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    vae = pv.mlp_vae((6,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
    vae.posterior.encoder = encoder()
    return vae


class Program:
    """A program whose network is in the closures of its functions."""

    def __init__(self):
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        network, decoder = encoder(), nn.Linear(2, 6)
        self.network = network

        def model(x):
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

        def guide(x):
            pyro.module("network", network)
            with pyro.plate("data", len(x)):
                loc, scale = network(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

        self.pair = model, guide


class Look(pv.Callback):
    """Keeps the modes and the statistics of a network after each epoch."""

    def __init__(self, network):
        self.network, self.modes = network, []
        self.statistics = [self.now()]

    def now(self):
        return [value.clone() for value in self.network.buffers()]

    def on_step(self, record):
        self.modes.append([module.training for module in self.network])

    def on_epoch(self, record):
        self.statistics.append(self.now())


def moved(network, run):
    """Whether the network's statistics move, in each epoch of a run with a callback that looks at them."""
    look = Look(network)
    run(look)
    pairs = zip(look.statistics, look.statistics[1:], strict=False)
    return [not all(map(torch.equal, before, after)) for before, after in pairs], look.modes


FROZEN = [True, False, True, True, False]  # training mode of the five layers, without batch norm


@pytest.mark.parametrize("compile", COMPILED)
@pytest.mark.parametrize("part", [lambda vae: vae.posterior, lambda vae: "posterior"], ids=["module", "name"])
def test_statistics_of_a_frozen_part_stay(part, compile):
    vae = norm_vae()
    freeze = pv.callbacks.Freeze(part(vae), epochs=2)

    def run(look):
        pv.fit(vae, X, pv.ELBO(), epochs=3, callbacks=[freeze, look], compile=compile, **SETTINGS)

    epochs, modes = moved(vae.posterior.encoder, run)
    assert epochs == [False, False, True]
    assert modes == 4 * [FROZEN] + 2 * [5 * [True]]


def test_of_a_part_by_its_name_in_a_closure():
    program = Program()
    freeze = pv.callbacks.Freeze("network", epochs=1)
    run = functools.partial(pv.fit, program.pair, X, pv.ELBO(), epochs=2, **SETTINGS)
    epochs, modes = moved(program.network, lambda look: run(callbacks=[freeze, look]))
    assert epochs == [False, True]
    assert modes == 2 * [FROZEN] + 2 * [5 * [True]]


def test_a_part_of_a_network_leaves_the_others_moving():
    vae = norm_vae()
    freeze = pv.callbacks.Freeze("posterior.encoder.0", epochs=1)
    epochs, modes = moved(
        vae.posterior.encoder, lambda look: pv.fit(vae, X, pv.ELBO(), epochs=1, callbacks=[freeze, look], **SETTINGS)
    )
    assert epochs == [True]
    assert modes == 2 * [5 * [True]]


def test_the_bound_is_that_of_the_kept_statistics():
    """As in a training whose batch norm the user has put into evaluation mode."""
    first, second = norm_vae(), norm_vae()
    for vae in (first, second):
        vae.posterior.encoder[1].running_mean += 0.3
        vae.posterior.encoder[2].p = 0.0
    bound = pv.fit(first, X, pv.ELBO(), epochs=1, callbacks=pv.callbacks.Freeze(first, epochs=1), **SETTINGS)
    second.eval()
    expected = pv.fit(second, X, pv.ELBO(), epochs=1, callbacks=pv.callbacks.Freeze(second, epochs=1), **SETTINGS)
    assert bound.train_bound[1] == expected.train_bound[1]
    assert first.training
    assert not second.posterior.encoder[1].training  # as it was


@pytest.mark.parametrize("end", ["limit", "error", "interrupt"])
def test_modes_are_put_back_however_training_ends(end):
    class Ends(pv.Callback):
        def on_step(self, record):
            if end != "limit":
                raise {"error": RuntimeError, "interrupt": KeyboardInterrupt}[end]

    vae = norm_vae()
    options = {"epochs": 1, "callbacks": [pv.callbacks.Freeze(vae.posterior, epochs=9), Ends()], **SETTINGS}
    if end == "error":
        with pytest.raises(pv.CallbackError):
            pv.fit(vae, X, pv.ELBO(), **options)
    elif end == "interrupt":
        with pytest.warns(UserWarning, match="training stopped"):
            pv.fit(vae, X, pv.ELBO(), **options)
    else:
        pv.fit(vae, X, pv.ELBO(), **options)
    assert all(module.training for module in vae.modules())


def test_two_that_overlap_each_keep_their_own():
    vae = norm_vae()
    callbacks = [pv.callbacks.Freeze(vae.posterior, epochs=1), pv.callbacks.Freeze(vae.posterior.encoder[:2], epochs=2)]
    _, modes = moved(
        vae.posterior.encoder,
        lambda look: pv.fit(vae, X, pv.ELBO(), epochs=3, callbacks=[*callbacks, look], **SETTINGS),
    )
    assert modes == 2 * [FROZEN] + 2 * [[True, False, True, True, True]] + 2 * [5 * [True]]


def test_it_goes_on_from_a_checkpoint(tmp_path):
    def train(vae, epochs, **settings):
        callbacks = pv.callbacks.Freeze(vae.posterior, epochs=2)
        pv.fit(vae, X, pv.ELBO(), epochs=epochs, callbacks=callbacks, **SETTINGS, **settings)
        return vae.state_dict()

    whole = train(norm_vae(), 4)
    for epochs in (1, 2, 3, 4):
        parts = train(norm_vae(), epochs, checkpoint=tmp_path / "run.pt")
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
