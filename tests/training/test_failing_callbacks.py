"""What a callback that fails leaves to the others, and to the checkpoint."""

from __future__ import annotations

import pytest
import torch
from helpers.training import X, same, small_vae

import pyro_vae as pv


class Fails(pv.Callback):
    """Fails in a method, once, at a step or an epoch."""

    def __init__(self, where, number, error=RuntimeError):
        self.where, self.number, self.error = where, number, error

    def _fail(self, where, number):
        if where == self.where and number == self.number:
            self.number = None
            raise self.error("no")

    def before_step(self, record):
        self._fail("before_step", record.step)

    def on_step(self, record):
        self._fail("on_step", record.step)

    def on_epoch(self, record):
        self._fail("on_epoch", record.epoch)

    def on_end(self, record):
        self._fail("on_end", record.epoch)


class Counts(pv.Callback):
    """Keeps in the checkpoint how often it was called."""

    def __init__(self):
        self.calls = {"on_step": 0, "on_epoch": 0, "on_end": 0}

    def on_step(self, record):
        self.calls["on_step"] += 1

    def on_epoch(self, record):
        self.calls["on_epoch"] += 1

    def on_end(self, record):
        self.calls["on_end"] += 1

    def state_dict(self):
        return self.calls

    def load_state_dict(self, state):
        self.calls = dict(state)


@pytest.mark.parametrize(("where", "number"), [("before_step", 5), ("on_step", 5), ("on_epoch", 2)])
def test_callbacks_beside_one_that_fails_go_on_in_step(where, number, tmp_path):
    """On either side of it: the checkpoint has their states at its own step, so that training ends as unbroken."""
    settings = {"epochs": 3, "batch_size": 16, "seed": 1}
    whole, average = small_vae(), pv.callbacks.EMA(0.5)
    pv.fit(whole, X, pv.ELBO(), callbacks=average, **settings)
    settings |= {"checkpoint": tmp_path / "run.pt"}
    callbacks = [Counts(), pv.callbacks.EMA(0.5), Fails(where, number), Counts(), pv.callbacks.EMA(0.5)]
    with pytest.raises(pv.CallbackError, match=f"callback Fails failed in {where}.*RuntimeError: no"):
        pv.fit(small_vae(), X, pv.ELBO(), callbacks=callbacks, **settings)
    again = small_vae(5)
    callbacks = [Counts(), pv.callbacks.EMA(0.5), Fails("", 0), Counts(), pv.callbacks.EMA(0.5)]
    pv.fit(again, X, pv.ELBO(), callbacks=callbacks, **settings)
    assert same(again, whole)
    assert [c.calls for c in callbacks if isinstance(c, Counts)] == 2 * [{"on_step": 12, "on_epoch": 3, "on_end": 1}]
    for each in (c for c in callbacks if isinstance(c, pv.callbacks.EMA)):
        assert all(torch.equal(each.averages[name], mean) for name, mean in average.averages.items())


def test_the_first_of_several_failures_is_raised():
    class Other(Fails):
        pass

    with pytest.raises(pv.CallbackError, match="callback Fails failed in on_step, in epoch 1, step 1") as raised:
        callbacks = [Fails("on_step", 1), Other("on_step", 1, KeyError)]
        pv.fit(small_vae(), X, pv.ELBO(), epochs=1, callbacks=callbacks)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert raised.value.__notes__ == ["After it, callback Other failed in on_step, in epoch 1, step 1: KeyError: 'no'"]


def test_an_interrupt_inside_of_a_callback_reaches_the_others_first(tmp_path):
    settings = {"epochs": 2, "batch_size": 25, "seed": 1, "checkpoint": tmp_path / "run.pt"}
    counts = Counts()
    with pytest.warns(UserWarning, match="training stopped by Ctrl-C"):
        pv.fit(small_vae(), X, pv.ELBO(), callbacks=[Fails("on_epoch", 1, KeyboardInterrupt), counts], **settings)
    assert counts.calls == {"on_step": 2, "on_epoch": 1, "on_end": 0}
    again = Counts()
    pv.fit(small_vae(5), X, pv.ELBO(), callbacks=again, **settings)
    assert again.calls == {"on_step": 4, "on_epoch": 2, "on_end": 1}


def test_a_failure_at_the_end_leaves_no_callback_out():
    counts, average = Counts(), pv.callbacks.EMA(0.5, at_end=True)
    with pytest.raises(pv.CallbackError, match="failed in on_end"):
        pv.fit(small_vae(), X, pv.ELBO(), epochs=1, callbacks=[Fails("on_end", 1), counts, average])
    assert counts.calls["on_end"] == 1
    assert all(torch.equal(average._parameters[name], mean) for name, mean in average.averages.items())


@pytest.mark.parametrize("step", [0, 2])
def test_a_state_that_fails_names_the_callback(step, tmp_path):
    class Broken(Counts):
        def state_dict(self):
            if self.calls["on_step"] == step:
                raise KeyError("no such key")
            return super().state_dict()

    settings = {"epochs": 1, "batch_size": 25, "checkpoint": tmp_path / "run.pt"}
    with pytest.raises(
        pv.CallbackError, match="callback Broken failed in state_dict: KeyError: 'no such key'"
    ) as raised:
        pv.fit(small_vae(), X, pv.ELBO(), callbacks=Broken(), **settings)
    assert len(raised.value.history) == (step == 2)

    class Counter(Counts):
        def load_state_dict(self, state):
            raise TypeError("no")

    Counter.__name__ = "Counts"
    pv.fit(small_vae(), X, pv.ELBO(), callbacks=Counts(), **settings)
    with pytest.raises(pv.CallbackError, match="callback Counts failed in load_state_dict: TypeError: no"):
        pv.fit(small_vae(), X, pv.ELBO(), callbacks=Counter(), **(settings | {"epochs": 2}))
