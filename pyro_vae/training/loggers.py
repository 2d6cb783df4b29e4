"""Callbacks that log a training: to a file of comma-separated values, and to TensorBoard."""

import csv
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_vae.checks import Count, checked, shown
from pyro_vae.errors import PyroVAEError
from pyro_vae.extras import require
from pyro_vae.files import one_writer, writing_to, written_whole
from pyro_vae.training.calling import Callback
from pyro_vae.training.record import Record

COLUMNS = (
    "bound",
    "reconstruction",
    "kl",
    "beta",
    "lr",
    "gradient_norm",
    "examples_per_second",
    "validation_bound",
)
HEADER = ("event", "epoch", "step", *COLUMNS)


class CSV(Callback):
    """Write the numbers of steps and epochs to a file of comma-separated values.

    A row has ``event`` ("step" or "epoch"), ``epoch``, ``step``, and the numbers of :class:`Record`, empty where they
    are not known. A training that goes on from a checkpoint drops the rows after that checkpoint.

    Arguments:
        path: the file.
        every: write each so many steps.
        overwrite: whether a new training may replace a file that exists.

    Raises:
        ValueError: a new training finds the file, without `overwrite`; or another training logs to it meanwhile.

    Example:
        >>> import pandas as pd, tempfile, torch, pyro_vae as pv
        >>> path = tempfile.mkdtemp() + "/log.csv"
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> _ = pv.fit(vae, torch.randn(64, 5), pv.ELBO(), epochs=1, batch_size=32, callbacks=pv.callbacks.CSV(path))
        >>> pd.read_csv(path).event.tolist()
        ['step', 'step', 'epoch']
    """

    draws = False

    @checked
    def __init__(self, path: str | Path, *, every: Count = 1, overwrite: bool = False) -> None:
        self.path, self.every, self.overwrite = Path(path), every, overwrite
        if self.path.exists() and not overwrite and not self.path.is_file():
            raise PyroVAEError(f"expected a file as the path of CSV, got the folder {self.path}. Pass a file in it.")

    def on_start(self, record: Record) -> None:
        """Begin the file, or drop the rows after the checkpoint."""
        record.enter(one_writer(self.path, "logging to"))
        rows: list[dict[str, str]] = []
        if self.path.exists() and record.step:
            rows = self._rows(record.step)
        elif self.path.exists() and not self.overwrite:
            raise PyroVAEError(
                f"expected a new file for a new training, got {self.path}, which exists. Pass another path, or "
                "CSV(path, overwrite=True)."
            )
        with writing_to(self.path), written_whole(self.path) as unfinished, unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, HEADER)
            writer.writeheader()
            writer.writerows(rows)

    def _rows(self, last: int) -> list[dict[str, str]]:
        """The rows of the file up to a step."""
        with self.path.open(newline="") as file:
            lines = [line for line in file if line.endswith("\n")]  # a writer that was killed may have cut the last one
        reader = csv.DictReader(lines)
        if lines and tuple(reader.fieldnames or ()) != HEADER:
            raise PyroVAEError(
                f"expected {self.path} to be a log of pv.callbacks.CSV, got a file with other columns. Pass another "
                "path."
            )
        return [row for row in reader if (row["step"] or "").isdigit() and int(row["step"]) <= last]

    def on_step(self, record: Record) -> None:
        """Write a row."""
        self._write("step", record)

    def on_epoch(self, record: Record) -> None:
        """Write a row."""
        self._write("epoch", record)

    def _write(self, event: str, record: Record) -> None:
        numbers = record.numbers()
        with writing_to(self.path):
            before = self.path.stat().st_size if self.path.exists() else 0
            try:
                with self.path.open("a", newline="") as file:
                    row = event, record.epoch, record.step, *(numbers.get(name, "") for name in COLUMNS)
                    csv.writer(file).writerow(row)
            except OSError:
                with suppress(OSError):
                    os.truncate(self.path, before)  # no part of a row stays
                raise


class TensorBoard(Callback):
    """Write the numbers of steps and epochs, and images, for TensorBoard.

    Steps are under ``step/``, epochs under ``epoch/``. Show them with ``tensorboard --logdir FOLDER``. A training that
    goes on from a checkpoint hides what was written after that checkpoint.

    Arguments:
        folder: where event files go.
        every: write the numbers of each so many steps.
        images: by name, functions of no argument, such as ``{"samples": lambda: vae.generate(16)}``. Each returns
            images of shape (N, C, H, W) from 0 to 1, or a Matplotlib figure. They draw the same random numbers each
            time.
        images_every: how many epochs lie between images.

    Raises:
        MissingPackageError: the package `tensorboard` is not there.
    """

    @checked
    def __init__(
        self,
        folder: str | Path,
        *,
        every: Count = 1,
        images: Mapping[str, Callable[[], Any]] | None = None,
        images_every: Count = 1,
    ) -> None:
        require("tensorboard", by="the callback TensorBoard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer_class: Any = SummaryWriter
        self.folder, self.every = Path(folder), every
        self.images, self.images_every = dict(images or {}), images_every

    def on_start(self, record: Record) -> None:
        """Open the event file."""
        purge = record.step + 1 if record.step else None
        with writing_to(self.folder):
            self.writer = self._writer_class(str(self.folder), purge_step=purge)
        record.enter(self._closed())

    def on_step(self, record: Record) -> None:
        """Write the step's numbers."""
        self._write("step", record)

    def on_epoch(self, record: Record) -> None:
        """Write the epoch's numbers, and images."""
        self._write("epoch", record)
        if record.epoch % self.images_every == 0:
            for name, function in self.images.items():
                picture = function()
                with writing_to(self.folder):
                    self._draw(name, picture, record.step)
        with writing_to(self.folder):
            self.writer.flush()

    def on_end(self, record: Record) -> None:
        """Write what is left: the file itself is closed however the training ends."""
        with writing_to(self.folder):
            self.writer.flush()

    @contextmanager
    def _closed(self) -> Iterator[None]:
        try:
            yield
        finally:
            with suppress(OSError):  # the error that ended the training says more
                self.writer.close()

    def _write(self, event: str, record: Record) -> None:
        with writing_to(self.folder):
            for name, value in record.numbers().items():
                self.writer.add_scalar(f"{event}/{name}", value, record.step)

    def _draw(self, name: str, picture: Any, step: int) -> None:
        if isinstance(picture, Tensor):
            if picture.dim() != 4:
                raise PyroVAEError(
                    f"expected images '{name}' of shape (N, C, H, W), or a figure, got {shown(picture)}. Reshape them."
                )
            self.writer.add_images(name, picture.detach().clamp(0, 1), step)
        else:
            self.writer.add_figure(name, picture, step)
