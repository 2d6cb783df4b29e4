"""Whether data lie where the sites that observe them have a density: what compiled code no longer asks."""

from __future__ import annotations

from typing import Any

from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.agreement import interval, masks, plain, support_of, validates
from pyro_vae.minibatches import Minibatches
from pyro_vae.runs import sample_sites


class Supports:
    """Refuses data that a site which observes them gives no density, in place of the checks that compiled code leaves out.

    It looks at supports that are the same for all data, where validation is not turned off and nothing is masked: at
    tensors whole, before training, at others as they come.
    """

    def __init__(self, model_trace: Trace, batch: tuple[Any, ...], batches: Minibatches) -> None:
        self.unseen: list[tuple[int, str, Any]] = []
        for name, site in sample_sites(model_trace).items():
            ends = interval(support_of(site["fn"])) if validates(site) and not masks(site) else None
            if ends is None or any(isinstance(end, Tensor) for end in ends):
                continue
            for column, argument in enumerate(batch):
                if site["value"] is argument:
                    self.unseen.append((column, name, plain(support_of(site["fn"]))))
        for seen in [entry for entry in self.unseen if batches.at_hand(entry[0]) is not None]:
            self._check(*seen[1:], batches.at_hand(seen[0]))
            self.unseen.remove(seen)

    def check(self, batch: tuple[Any, ...]) -> None:
        """Look at a minibatch of what was not at hand."""
        for column, name, support in self.unseen:
            self._check(name, support, batch[column])

    def _check(self, name: str, support: Any, data: Any) -> None:
        bad = ~support.check(data).reshape(len(data), -1).all(-1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"expected data in the support of model site '{name}', {support}, got {int(bad.sum())} of {len(data)} outside, "
                f"row {row} with values from {data[row].min():.3g} to {data[row].max():.3g}. Convert those data, drop them, or "
                "choose another distribution."
            )
