"""Pyro's handlers and its store are the process's: a second thread is refused, and neither training is wrong."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pyro
import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK

import pyro_vae as pv

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))


def pair() -> pv.VAE:
    torch.manual_seed(0)
    return pv.mlp_vae((4,), latent_dim=2, hidden_dims=(5,), likelihood="gaussian")


def train(vae: pv.VAE) -> list[float]:
    return pv.fit(vae, X, pv.ELBO(), epochs=2, batch_size=32, seed=0, progress=False).train_bound.tolist()


def test_a_second_thread_is_refused_while_the_first_one_trains():
    entered, leave = threading.Event(), threading.Event()

    def model(x):
        entered.set()
        assert leave.wait(60)
        return vae.model(x)

    vae, other = pair(), pair()
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(pv.ELBO().bound, model, vae.guide, X)
        assert entered.wait(60)
        for call in (
            lambda: train(other),
            lambda: pv.log_likelihood(other, X, 30),
            lambda: pv.IWAE(3).loss(other, X),
            lambda: other.embed(X),
            lambda: pv.ELBO()(other)(X),
        ):
            with pytest.raises(
                pv.PyroVAEError, match=r"expected one thread at a time.*got a program that runs in another"
            ):
                call()
        leave.set()
        training.result(60)
    assert _PYRO_STACK == []
    assert train(other) == train(pair())


def test_a_pair_serves_several_threads():
    vae = pair().eval()
    expected = vae.embed(X)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(vae.embed, [X] * 50))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_process_that_another_thread_forks_has_a_lock_of_its_own():
    entered, leave = threading.Event(), threading.Event()
    vae, other = pair(), pair()

    def model(x):
        entered.set()
        assert leave.wait(60)
        return vae.model(x)

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(pv.ELBO().bound, model, vae.guide, X)
        assert entered.wait(60)
        child = os.fork()
        if child == 0:
            os._exit(0 if other.embed(X).shape == (64, 2) else 1)
        leave.set()
        training.result(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("number", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_trainings_in_two_threads_are_right_or_refused(number):
    expected = train(pair())

    def attempt(vae: pv.VAE) -> list[float] | str:
        try:
            return train(vae)
        except pv.PyroVAEError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(attempt, [pair() for _ in range(number)]))
    numbers = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    assert numbers
    assert all(outcome == expected for outcome in numbers)
    assert all("one thread at a time" in outcome for outcome in outcomes if isinstance(outcome, str))
    assert _PYRO_STACK == []
    assert train(pair()) == expected


def test_steps_of_svi_in_two_threads_are_right_or_refused():
    def steps(vae: pv.VAE) -> str | None:
        svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), loss=pv.ELBO())
        try:
            for _ in range(20):
                svi.step(X)
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(2) as pool:
        errors = [error for error in pool.map(steps, [pair() for _ in range(10)]) if error is not None]
    assert all("one thread at a time" in error or "bottom of the stack" in error for error in errors)
