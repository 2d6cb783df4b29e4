"""Checks that data are in the support of the sites that observe them: only the first training step validates."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.engine.columns import at_rows
from pyro_vae.engine.coverage import is_circular
from pyro_vae.engine.minibatches import Batch, Minibatches
from pyro_vae.engine.program import Program
from pyro_vae.engine.sites import Sites, masks, validates
from pyro_vae.engine.supports import Unknown, plain, support_of
from pyro_vae.errors import PyroVAEError


class DataSupport:
    """Refuses data outside the support of the site that observes them.

    It checks supports whose bounds are numbers, at sites with validation and without masks. The support may depend on
    the minibatch, such as its largest count. So a row is refused only if a run of the program on it refuses it too.

    This package's pairs have a method `check_data` with the arguments of their `model`. If the model is such a method,
    it calls this too.
    """

    def __init__(self, program: Program, model_sites: Sites) -> None:
        self.program, model = program, program.model
        # A wrapper around the method may change the arguments, and so what the check would see.
        owner = getattr(model, "__self__", None)
        own_model = isinstance(owner, nn.Module) and getattr(owner, "model", None) == model
        self.check_data = getattr(owner, "check_data", None) if own_model else None
        self.supports: list[tuple[int, str, Any]] = []  # of the columns of a minibatch that a site observes
        for name, site in model_sites.items():
            support = plain(support_of(site["fn"]))
            varies = any(isinstance(value, Tensor) for value in vars(support).values())
            known = not isinstance(support, Unknown) and not constraints.is_dependent(support)
            known = known and not is_circular(site["fn"])  # an angle may be given in any turn
            if validates(site) and not masks(site) and known and not varies:
                columns = (i for i, argument in enumerate(program.args) if argument is site["value"])
                self.supports.extend((column, name, support) for column in columns)

    def check_at_once(self, batches: Minibatches) -> "DataSupport | None":
        """Check the data, if they are tensors on one device; for others, the result checks each minibatch."""
        whole = batches.all_at_hand()
        if whole is None or len({column.device for column in whole}) > 1:
            return self
        self.check(whole)
        return None

    def check(self, batch: Batch) -> None:
        """Raise an error if some rows are outside."""
        for column, name, support in self.supports:
            if column >= len(batch):
                continue
            data = batch[column]
            outside = _rows_outside(support, data)
            size = len(self.program.args[0])
            if len(outside):
                outside = torch.cat([self._outside(batch, rows, column, name) for rows in outside.split(size)])
            if len(outside):
                row = int(outside[0])
                raise PyroVAEError(
                    f"expected data in the support of model site '{name}', {support}, got {len(outside)} of "
                    f"{len(data)} rows outside; row {row} has values from {data[row].min():.3g} to "
                    f"{data[row].max():.3g}. Convert those data, drop them, or choose another distribution. A mask, or "
                    "validate_args=False, turns this check off."
                )
        if self.check_data is not None:
            self.check_data(*batch)

    def _outside(self, batch: Batch, rows: Tensor, column: int, name: str) -> Tensor:
        """Those of some rows that are outside of the support which the site has in a minibatch with them."""
        size = len(self.program.args[0])
        if len(batch[0]) > size:
            taken = torch.cat([rows, torch.arange(size, device=rows.device)])[:size]
            some = tuple(_taken(each, taken, len(batch[0])) for each in batch)
            found = self._outside(some, torch.arange(size), column, name)
            return rows[found[found < len(rows)].to(rows.device)]
        program = self.program.on(batch)
        model, _ = program.trace()
        if name not in model:  # the program observes it on other rows alone
            return torch.arange(0)
        return _rows_outside(plain(support_of(model.nodes[name]["fn"])), program.args[column])


def _taken(column: Any, rows: Tensor, number: int) -> Any:
    """Some of the rows of a column, which may be a list of strings; the column itself if it has no rows."""
    has_rows = isinstance(column, Tensor) or (isinstance(column, list | tuple) and len(column) == number)
    return at_rows(column, rows) if has_rows else column


def _rows_outside(support: Any, data: Tensor) -> Tensor:
    """The rows of data with a value outside of a support."""
    inside: Tensor = support.check(data).reshape(len(data), -1).all(-1)
    return (~inside).nonzero()[:, 0]
