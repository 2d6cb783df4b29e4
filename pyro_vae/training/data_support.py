"""Checks that data are in the support of the sites that observe them: only the first training step validates."""

from typing import Any

import pyro
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.engine.minibatches import Minibatches
from pyro_vae.engine.modules import PyroFunction, find_modules
from pyro_vae.engine.program import sample_sites
from pyro_vae.engine.sites import masks, validates
from pyro_vae.engine.supports import interval, plain, support_of
from pyro_vae.errors import PyroVAEError


class DataSupport:
    """Refuses data outside the support of the site that observes them.

    It checks supports that are the same for all data, at sites with validation and without masks. It also calls the
    `check_data` of a module that the program is a method of, as this package's model/guide pairs have. It checks tensors
    at once, and minibatches of a DataLoader one by one.
    """

    def __init__(self, model: PyroFunction, model_trace: Trace, batch: tuple[Any, ...], batches: Minibatches) -> None:
        owners = [owner for owner in find_modules(model) if hasattr(owner, "check_data")]
        self.unseen_by: list[Any] = [owner.check_data for owner in owners]
        self.unseen: list[tuple[int, str, Any]] = []
        for name, site in sample_sites(model_trace).items():
            support = support_of(site["fn"])
            moves = any(isinstance(end, Tensor) for end in interval(support) or ())
            if not validates(site) or masks(site) or moves or constraints.is_dependent(support):
                continue
            for column, argument in enumerate(batch):
                if site["value"] is argument:
                    self.unseen.append((column, name, plain(support)))
        for seen in [entry for entry in self.unseen if batches.at_hand(entry[0]) is not None]:
            self._check(*seen[1:], batches.at_hand(seen[0]))
            self.unseen.remove(seen)
        columns = [batches.at_hand(column) for column in range(len(batch))]
        if all(column is not None for column in columns):
            self._ask(tuple(columns))
            self.unseen_by = []

    def check(self, batch: tuple[Any, ...]) -> None:
        """Check a minibatch of data that were not checked at once."""
        for column, name, support in self.unseen:
            self._check(name, support, batch[column])
        self._ask(batch)

    def _ask(self, batch: tuple[Any, ...]) -> None:
        with pyro.validation_enabled(True):
            for check in self.unseen_by:
                check(*batch)

    def _check(self, name: str, support: Any, data: Any) -> None:
        bad = ~support.check(data).reshape(len(data), -1).all(-1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise PyroVAEError(
                f"expected data in the support of model site '{name}', {support}, got {int(bad.sum())} of {len(data)} "
                f"outside, row {row} with values from {data[row].min():.3g} to {data[row].max():.3g}. Convert those data, "
                "drop them, or choose another distribution."
            )
