"""Callbacks for :func:`pyro_vae.fit`: logs, averages of the weights, frozen parts, more validation, the best epochs.

Each is passed in ``callbacks=[...]``. For anything else, write a subclass of :class:`pyro_vae.Callback`.
"""

from pyro_vae.training.callbacks import EMA, Freeze, KeepBest, Validate
from pyro_vae.training.calling import Callback
from pyro_vae.training.loggers import CSV, TensorBoard
from pyro_vae.training.record import Record

__all__ = ["CSV", "EMA", "Callback", "Freeze", "KeepBest", "Record", "TensorBoard", "Validate"]
