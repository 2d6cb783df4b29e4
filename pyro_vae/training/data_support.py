"""Checks that data are in the support of the sites that observe them: only the first training step validates."""

from typing import Any

from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.engine.minibatches import Minibatches
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.program import sample_sites
from pyro_vae.engine.sites import masks, validates
from pyro_vae.engine.supports import interval, plain, support_of
from pyro_vae.errors import PyroVAEError


class DataSupport:
    """Refuses data outside the support of the site that observes them.

    It checks supports that are the same for all data, at sites with validation and without masks. This package's pairs
    have a method `check_data` with the arguments of their `model`. If the model is such a method, it calls this too.
    Tensors are checked at once; splits and DataLoaders are checked minibatch by minibatch.
    """

    def __init__(self, model: PyroFunction, model_trace: Trace, batch: tuple[Any, ...], batches: Minibatches) -> None:
        # A wrapper around the method may change the arguments, and so what the check would see.
        owner = getattr(model, "__self__", None)
        own_model = isinstance(owner, nn.Module) and getattr(owner, "model", None) == model
        self.check_data = getattr(owner, "check_data", None) if own_model else None
        self.unseen: list[tuple[int, str, Any]] = []
        for name, site in sample_sites(model_trace, latent=False).items():
            support = support_of(site["fn"])
            moves = any(isinstance(end, Tensor) for end in interval(support) or ())
            if not validates(site) or masks(site) or moves or constraints.is_dependent(support):
                continue
            for column, argument in enumerate(batch):
                if site["value"] is not argument:
                    continue
                whole = batches.at_hand(column)
                if whole is None:
                    self.unseen.append((column, name, plain(support)))
                else:
                    self._check(name, plain(support), whole)
        whole_columns = batches.all_at_hand()
        if self.check_data is not None and whole_columns is not None:
            self.check_data(*whole_columns)
            self.check_data = None

    def check(self, batch: tuple[Any, ...]) -> None:
        """Check a minibatch of data that were not checked at once."""
        for column, name, support in self.unseen:
            if column < len(batch):
                self._check(name, support, batch[column])
        if self.check_data is not None:
            self.check_data(*batch)

    def _check(self, name: str, support: Any, data: Any) -> None:
        bad = ~support.check(data).reshape(len(data), -1).all(-1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise PyroVAEError(
                f"expected data in the support of model site '{name}', {support}, got {int(bad.sum())} of {len(data)} "
                f"rows outside; row {row} has values from {data[row].min():.3g} to {data[row].max():.3g}. Convert "
                "those data, drop them, or choose another distribution. A mask, or validate_args=False, turns this check "
                "off."
            )
