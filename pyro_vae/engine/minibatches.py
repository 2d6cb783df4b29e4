"""Training and evaluation data by minibatch: tensors, arrays, splits, tuples and dictionaries of them, a DataLoader."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset, default_collate

from pyro_vae.checks import how_to_make_dense, shown, with_article
from pyro_vae.devices import moved
from pyro_vae.distributed import mixed
from pyro_vae.engine import rng
from pyro_vae.engine.columns import ArrayRows, at_rows, check_finite, column_of, tensor_of
from pyro_vae.engine.naming import in_order
from pyro_vae.errors import PyroVAEError, require_count

Batch = tuple[Any, ...]  # a program's arguments
Share = Callable[[int], slice]  # a process's part of so many rows


class Minibatches:
    """The data of :func:`pyro_vae.fit` or of an evaluation as minibatches: tuples of a program's arguments.

    Dictionaries become tuples by the names of the parameters of `model`. Rows of arrays become tensors.
    """

    device: torch.device | None = None  # where minibatches go; None leaves them where the data are
    share: Share | None = None  # of each minibatch's rows; None takes all
    begins_again = True  # whether another pass has the same minibatches; not so for a stream that can be read once

    def __init__(self, data: Any, batch_size: int | None, name: str, model: Any = None, guide: Any = None) -> None:
        self.program = model, guide
        self.loader = data if isinstance(data, DataLoader) else None
        if self.loader is not None:
            if batch_size is not None and name == "data":
                raise PyroVAEError("expected no batch_size with a DataLoader, which has its own. Set it there.")
            self.batch_size, self.size = self.loader.batch_size, None
            self.begun: Iterator[Any] | None = None  # a stream that can't begin again, after a look at its first ones
            try:
                self.steps: int | None = len(self.loader)
            except TypeError:  # an iterable data set has no length
                self.steps = None
            return
        self.batch_size = 128 if batch_size is None else batch_size
        require_count("batch_size", self.batch_size)
        if isinstance(data, Mapping):
            data = in_order(data, *self.program, name)
        given = data if isinstance(data, tuple | list) else (data,)
        self.columns: Sequence[Any] = tuple(column_of(column, name) for column in given or [None])
        sizes = {len(column) for column in self.columns}
        if len(sizes) > 1:
            raise PyroVAEError(
                f"expected {name} to be tensors of one length, got lengths {[len(c) for c in self.columns]}."
            )
        self.size = sizes.pop()
        if self.size == 0 and name == "data":
            raise PyroVAEError("expected data to train on, got none.")
        for column in self.columns:
            if isinstance(column, Tensor):
                check_finite(column, name)
        self.steps = math.ceil(self.size / self.batch_size)

    @property
    def moves_rows(self) -> bool:
        """Whether other data come to a row of a minibatch from step to step."""
        if self.loader is None or self.steps != 1:
            return self.steps != 1 or self.share is not None
        if isinstance(self.loader.dataset, IterableDataset):
            return True
        sampler: Any = self.loader.sampler if self.loader.batch_sampler is None else self.loader.batch_sampler
        states = self.generator_states()
        with rng.preserved():
            orders = [np.array(list(sampler)) for _ in range(8)]  # so many, since two rows have two orders only
        self.set_generator_states(states)
        return not all(np.array_equal(order, orders[0]) for order in orders)

    def example(self) -> Batch:
        """A first minibatch, for a trial run; the random numbers of the training stay as they are."""
        if self.loader is None:
            with rng.preserved():
                return self._take(slice(0, self.batch_size))
        rest, first = self._begin(self.loader)
        if isinstance(self.loader.dataset, IterableDataset):
            _, again = self._begin(self.loader)
            if not _same(first, again):  # a stream that can't begin again: no minibatch may be lost
                self.begun = chain([first] if again is None else [first, again], rest)
                self.begins_again = False
        return self._checked(first)

    @property
    def ends_in_one_row(self) -> bool:
        """Whether the last of several minibatches, or the only one, has a single row."""
        size = self.number
        return bool(size) and (size or 0) % (self.batch_size or 1) == 1 % (self.batch_size or 1)

    @property
    def is_read(self) -> bool:
        """Whether minibatches are read when they are needed, and the data are not all in memory."""
        return self.loader is not None or any(isinstance(column, ArrayRows) for column in self.columns)

    @property
    def number(self) -> int | None:
        """The number of data, as far as it is known before they are read."""
        if self.loader is None:
            return self.size
        if self.steps is None or self.batch_size is None:  # a stream, or one with a batch_sampler, does not say
            return None
        sampler: Any = self.loader.sampler
        return self.steps * self.batch_size if self.loader.drop_last else len(sampler)

    @property
    def cuts_rows(self) -> bool:
        """Whether minibatches are cut from the data's first dimension; a loader's own collate_fn may do otherwise."""
        cut = self.steps != 1 or self.share is not None
        return cut and (self.loader is None or self.loader.collate_fn is default_collate)

    def of_one(self, first: Batch) -> Batch:
        """A minibatch with one row of the first one."""
        return tuple(at_rows(column, slice(0, 1)) for column in first)

    def _begin(self, loader: Any) -> tuple[Iterator[Any], Any]:
        """An iterator of a loader, and its first minibatch; the random numbers of the training stay as they are."""
        states = self.generator_states()
        with rng.preserved():
            rest = iter(loader)
            first = next(rest, None)
        self.set_generator_states(states)
        return rest, first

    def all_at_hand(self) -> Batch | None:
        """All columns, if each is a tensor."""
        tensors = self.loader is None and all(isinstance(column, Tensor) for column in self.columns)
        return tuple(self.columns) if tensors else None

    def looks(self) -> Iterator[Batch]:
        """One pass that training does not notice; without minibatches for a stream that can't begin again."""
        if self.loader is not None and self.begun is not None:
            return
        states = self.generator_states()
        try:
            with rng.preserved():
                yield from self.in_order()
        finally:
            self.set_generator_states(states)

    def shuffled(self, key: int, epoch: int, skip: int = 0) -> Iterator[Batch | None]:
        """An epoch in its random order. A single minibatch keeps its order, since its rows may have parameters.

        The order depends on `key` and on the number of the epoch alone, so that all processes have the same one. In
        place of the first `skip` minibatches there is None; a DataLoader makes them all the same. None stands also for
        a minibatch of which this process has no row.
        """
        if self.loader is not None:
            samplers: tuple[Any, ...] = self.loader.sampler, self.loader.batch_sampler
            for sampler in samplers:
                if hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(epoch)
            yield from (None if i < skip else batch for i, batch in enumerate(self.in_order()))
            return
        if self.steps == 1:
            yield from (None if skip else batch for batch in self.shared(self.share))
            return
        order = torch.randperm(self.size or 0, generator=torch.Generator().manual_seed(mixed(key, epoch)))
        for i, index in enumerate(order.split(self.batch_size or 1)):
            own = index if self.share is None else index[self.share(len(index))]
            yield None if i < skip or not len(own) else self._take(own)

    def in_order(self) -> Iterator[Batch]:
        """One pass in the data's own order."""
        if self.loader is not None:
            batches, self.begun = self.begun or iter(self.loader), None
            yield from map(self._checked, batches)
            return
        for start in range(0, self.size or 0, self.batch_size or 1):
            yield self._take(slice(start, start + (self.batch_size or 1)))

    def shared(self, share: Share | None) -> Iterator[Batch]:
        """One pass in the data's own order over a process's rows of each minibatch; a DataLoader's are its own."""
        for batch in self.in_order():
            if share is None or self.loader is not None:
                yield batch
                continue
            rows = share(len(batch[0]))
            if rows.stop > rows.start:
                yield tuple(at_rows(column, rows) for column in batch)

    def _checked(self, batch: Any) -> Batch:
        """A DataLoader's minibatch as a program's arguments."""
        if batch is None:
            raise PyroVAEError("expected a DataLoader with a minibatch, got an empty one.")
        if isinstance(batch, Mapping):
            batch = in_order(batch, *self.program, "minibatches")
        given = batch if isinstance(batch, tuple | list) else (batch,)
        columns = tuple(map(tensor_of, given))
        if not columns or not isinstance(columns[0], Tensor):
            raise PyroVAEError(
                "expected a DataLoader of tensors, or of tuples or dictionaries that begin with one, got minibatches "
                f"that begin with {with_article(type(columns[0]).__name__) if columns else 'nothing'}. Set its "
                "collate_fn; of a data set of Hugging Face, call with_format('torch')."
            )
        for column in columns:
            if isinstance(column, Tensor) and column.is_meta:
                raise PyroVAEError(
                    f"expected minibatches with values, got {shown(column)}. {how_to_make_dense(column)}"
                )
        return moved(columns, self.device)

    def generator_states(self) -> list[Tensor]:
        """The states of the DataLoader's random number generators, if it has any."""
        return [generator.get_state() for generator in self.generators()]

    def set_generator_states(self, states: list[Tensor]) -> None:
        """Restore the DataLoader's random number generators."""
        for generator, state in zip(self.generators(), states, strict=True):
            generator.set_state(state)

    def generators(self) -> list[torch.Generator]:
        """The DataLoader's random number generators."""
        sampler = getattr(self.loader, "sampler", None)
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        owners = (self.loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
        found = (getattr(owner, "generator", None) for owner in owners)
        return list(dict.fromkeys(generator for generator in found if generator is not None))

    def _take(self, index: Any) -> Batch:
        rows = tuple(at_rows(column, index) for column in self.columns)
        if self.device is not None and self.device.type == "cuda":  # from pinned memory a copy waits for nothing
            rows = tuple(r.pin_memory() if isinstance(r, Tensor) and not r.is_cuda else r for r in rows)
        return moved(rows, self.device)


def _same(first: Any, second: Any) -> bool:
    """Whether two minibatches hold the same values."""
    (values, shape), (others, other_shape) = pytree.tree_flatten(first), pytree.tree_flatten(second)
    return shape == other_shape and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else np.array_equal(a, b)
        for a, b in zip(values, others, strict=True)
    )
