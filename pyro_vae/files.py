"""Files that are written all or not at all, and places that one process alone writes to."""

import contextlib
import errno
import os
import shutil
import socket
import threading
import uuid
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from glob import escape
from pathlib import Path
from typing import IO

from pyro_vae.errors import NotWrittenError, PyroVAEError

UNFINISHED = ".unfinished"


@contextmanager
def written_whole(path: str | Path, room: int = 0) -> Iterator[Path]:
    """A path beside `path` to write to: at the end it takes the place of `path`, and on failure it is removed.

    A process that is killed meanwhile leaves the old file. The next one to write there removes what it left.

    With `room`, a number of bytes, a disk without so much room is noticed before, for a library that crashes on it.
    """
    path = Path(os.path.realpath(path))  # a link stays a link; Path.resolve has an error of its own for a loop
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear(path)
    # The end of the name stays, since some writers choose a format by it.
    unfinished = path.with_name(f".{path.stem}.{_host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}{UNFINISHED}{path.suffix}")
    try:
        if room:
            _require_room(unfinished, room, path)
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        if path.is_file():
            shutil.copymode(path, unfinished)
        unfinished.replace(path)
    except OSError as error:
        own = error.filename is None or UNFINISHED in str(error.filename)
        if isinstance(error, PyroVAEError) or not own:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error  # a writer may not name it
    finally:
        with contextlib.suppress(OSError):  # the error that came first says more
            unfinished.unlink(missing_ok=True)


def _require_room(unfinished: Path, room: int, path: Path) -> None:
    try:
        with unfinished.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, room)
            elif shutil.disk_usage(path.parent).free < room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, of {room / 1e6:.1f} MB that it needs", str(path)) from error
    unfinished.unlink()


def _host() -> str:
    return socket.gethostname().replace(".", "-")


def _clear(path: Path) -> None:
    """Remove what killed processes of this machine left beside a path."""
    for left in path.parent.glob(f"{escape(f'.{path.stem}.{_host()}.')}*{UNFINISHED}{escape(path.suffix)}"):
        number = left.name.removeprefix(f".{path.stem}.{_host()}.").split(".")[0]
        if number.isdigit() and not _lives(int(number)):
            left.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


@contextmanager
def writing_to(path: str | Path) -> Iterator[None]:
    """Around writes to a path: an error names it, which that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if isinstance(error, PyroVAEError):
            raise
        raise NotWrittenError(
            f"{path} can't be written ({error.strerror or error}): expected room, and the permission to write there. "
            "Remove the cause, or pass another path."
        ) from error


_HELD: set[Path] = set()  # the places of this process, whose own locks do not exclude each other
_HOLDING = threading.Lock()


@contextmanager
def one_writer(path: str | Path, doing: str, *, inside: bool = False) -> Iterator[None]:
    """Keep `path` for this writer alone: another one is refused, in this process or any other on the file system.

    The lock is a file beside it, or `inside` this folder, and ends with its process, however that ends: a process that
    was forked meanwhile does not keep it.
    """
    place = Path(os.path.realpath(path))
    if place.is_dir() and not inside:
        raise PyroVAEError(f"expected {path} to be a file, or a new one, got a folder. Pass a file in it.")
    lock = place / ".lock" if inside else place.with_name(f".{place.name}.lock")
    with _HOLDING:
        if place in _HELD:
            raise PyroVAEError(_busy(path, doing, "this process"))
        _HELD.add(place)
    try:
        with ExitStack() as held:
            try:
                lock.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(_locked(lock, path, doing))
            except OSError as error:
                raise NotWrittenError(
                    f"{path} can't be written ({error}): expected a folder to write to. Pass another path, or change "
                    "its permissions."
                ) from error
            yield
    finally:
        _HELD.discard(place)


def _busy(path: str | Path, doing: str, who: str) -> str:
    return f"{who} is {doing} {path}: expected one writer at a time. Wait for it, or pass another path."


@contextmanager
def _locked(lock: Path, path: str | Path, doing: str) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows
        _warn_of_no_lock(path)
        yield
        return
    while True:
        file = lock.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            who = _owner(file)
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise PyroVAEError(_busy(path, doing, who)) from None
            _warn_of_no_lock(path)
            yield
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                break
        file.close()  # its last owner has removed it meanwhile
    process = os.getpid()
    try:
        file.truncate(0)
        file.write(f"process {process} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        if os.getpid() == process:  # not in a process that was forked meanwhile
            lock.unlink(missing_ok=True)
        file.close()


def _owner(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "another process"


def _warn_of_no_lock(path: str | Path) -> None:
    warnings.warn(
        f"the file system of {path} has no locks: a second process that writes there is not noticed.", stacklevel=5
    )
