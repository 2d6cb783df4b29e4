"""Training state on disk: written all or not at all, and read without running code from the file."""

import io
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.modules import PyroFunction, buffers, find_modules
from pyro_vae.engine.ownership import merged
from pyro_vae.engine.parameters import find_parameters, store_as_it_is
from pyro_vae.engine.program import Program
from pyro_vae.errors import NotWrittenError, PyroVAEError
from pyro_vae.files import written_whole
from pyro_vae.training import contents

FORMAT = "pyro_vae checkpoint 1"


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write a checkpoint beside `path` and move it there in one step, so that a kill leaves the old or the new."""
    try:
        with written_whole(path) as unfinished, unfinished.open("wb") as file:
            try:
                torch.save({"format": FORMAT, **state}, file)
            except RuntimeError as error:  # PyTorch says that a position is unexpected; the context is a full disk, say
                raise (error.__context__ or error) from None
    except OSError as error:
        why = OSError(error.errno, error.strerror) if error.errno else error  # the message has the path already
        kept = "The file there is as it was" if Path(path).is_file() else "There is no file"
        raise NotWrittenError(
            f"the checkpoint {path} can't be written ({why}): expected a file that can be. {kept}. Remove the cause, "
            "or pass another path, and train again."
        ) from error


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, tensors to the CPU; refuse a file that is damaged, or is not as this package writes it."""
    state = _read(Path(path))
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if not isinstance(found, str) or found != FORMAT:
        later = isinstance(found, str) and re.fullmatch(r"pyro_vae checkpoint \d+", found)
        fix = "A later version of pyro_vae wrote it: update pyro_vae" if later else "Pass the path that pv.fit wrote"
        raise PyroVAEError(f"expected {path} to be a '{FORMAT}', got {contents.shortened(found)}. {fix}.")
    contents.check(path, state)
    return state


def _read(path: Path) -> Any:
    """Read what torch.save wrote, without running code from the file."""
    try:
        if path.exists() and not path.is_file():
            found = "a folder. Pass the file in it" if path.is_dir() else "no file. Pass the path of one"
            raise PyroVAEError(f"expected {path} to be a checkpoint, got {found}.")
        if not path.is_file():
            raise FileNotFoundError(f"expected a checkpoint at {path}, found none. Train first, or check the path.")
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch does not compare the checksums
                raise zipfile.BadZipFile("a part of the file has another checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (PyroVAEError, FileNotFoundError):
        raise
    except OSError as error:
        raise PyroVAEError(
            f"expected {path} to be a checkpoint that can be read, got {error}. Remove the cause, or pass another path."
        ) from error
    except Exception as error:  # each library says in its own way that the bytes are not as it wrote them
        raise PyroVAEError(
            f"{path} can't be read as a checkpoint: it is truncated, damaged, or another kind of file. If pv.fit wrote "
            "it, delete it and train again. A pickled pair is read by torch.load(path, weights_only=False)."
        ) from error


def check_readable(name: str, value: Any) -> None:
    """Refuse, before any work, a part of a checkpoint with more than tensors and plain Python values."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (AttributeError, TypeError, pickle.PickleError) as error:
        raise PyroVAEError(
            f"a checkpoint is read without running code: expected {name} of tensors and plain Python values, got "
            f"{value!r}. Pass float(...) or int(...) of NumPy's numbers, or no checkpoint."
        ) from error


def stalled(epochs: int, best: dict[str, Any] | None, patience: int | None) -> bool:
    """Whether, after so many epochs, the best of them is `patience` epochs ago."""
    return patience is not None and best is not None and epochs - int(best["epoch"]) >= patience


@takes_program
def load_parameters(path: str | Path, model: PyroFunction, guide: PyroFunction, *args: Any, **kwargs: Any) -> None:
    """Load the parameters, and batch norm's statistics, from a checkpoint of :func:`pyro_vae.fit` into a program.

    They are those of the last epoch; if `fit` had `patience`, those of the best epoch.

    Arguments:
        path: the checkpoint.
        model, guide: those that were trained; see :func:`pyro_vae.fit`.
        args, kwargs: arguments of both, some data of the right shape, on which a run uses all parameters.

    Raises:
        FileNotFoundError: there is no checkpoint at `path`.
        ValueError: the file is not a checkpoint, or is one of another program.

    Example:
        >>> import tempfile, torch, pyro_vae as pv
        >>> x, path = torch.randn(64, 5), tempfile.mkdtemp() + "/checkpoint.pt"
        >>> vae = pv.mlp_vae((5,), latent_dim=2, likelihood="gaussian")
        >>> history = pv.fit(vae, x, pv.ELBO(), epochs=1, checkpoint=path)
        >>> again = pv.mlp_vae((5,), latent_dim=2, likelihood="gaussian")
        >>> pv.load_parameters(path, again, x)
        >>> torch.equal(vae.embed(x), again.embed(x))
        True
    """
    state = load(path)
    put_back = store_as_it_is()
    try:
        parameters = merged(*find_parameters(Program(model, guide, args, kwargs)))
        restore(path, state.get("best") or state, parameters, buffers(find_modules(model, guide)))
    except Exception:
        put_back()
        raise


def check_tensors(
    path: str | Path, state: dict[str, Any], parameters: dict[str, Tensor], own_buffers: dict[str, Tensor]
) -> None:
    """Refuse the parameters and buffers of another program."""
    for what, saved, own in _pairs(state, parameters, own_buffers):
        for name in sorted(saved.keys() | own.keys()):
            here, there = (contents.describe(t[name]) if name in t else "absent" for t in (own, saved))
            if here != there:
                raise PyroVAEError(
                    f"the checkpoint {path} is of another program: expected {what} '{name}' {here}, as in the "
                    f"program that you pass, got {there} in the file. Build the program that was trained, or pass "
                    "another path."
                )


def restore(
    path: str | Path, state: dict[str, Any], parameters: dict[str, Tensor], own_buffers: dict[str, Tensor]
) -> None:
    """Copy a checkpoint's tensors into a program's, in place; refuse those of another program before the first copy."""
    check_tensors(path, state, parameters, own_buffers)
    with torch.no_grad():
        for _, saved, own in _pairs(state, parameters, own_buffers):
            for name, value in own.items():
                value.copy_(saved[name])


def _pairs(
    state: dict[str, Any], parameters: dict[str, Tensor], own_buffers: dict[str, Tensor]
) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
    """The saved tensors and the program's own, of each sort."""
    yield "parameter", state["parameters"], parameters
    yield "buffer", state["buffers"], own_buffers
