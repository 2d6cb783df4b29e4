"""One thread at a time: Pyro's handlers and its parameter store are those of the whole process."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from pyro_vae.errors import PyroVAEError


class OneThread:
    """Around what runs a program: refuses a second thread meanwhile. The same thread may enter again."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Begin anew, as in a forked process, which has one thread alone."""
        self._lock, self._programs = threading.RLock(), 0

    def __enter__(self) -> None:
        self._acquire()
        self._programs += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._programs -= 1
        self._lock.release()

    @contextmanager
    def for_a_moment(self) -> Iterator[None]:
        """Around what ends soon, such as a pair's `embed`: other threads wait for it."""
        self._acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _acquire(self) -> None:
        while not self._lock.acquire(timeout=0.01 if self._programs == 0 else 0):
            if self._programs > 0:
                raise other_thread()


ONE_THREAD = OneThread()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=ONE_THREAD.renew)


def other_thread() -> PyroVAEError:
    """The refusal of two threads that run programs at the same time."""
    return PyroVAEError(
        "expected one thread at a time, since Pyro's handlers and its parameter store are those of the whole process, "
        "got a program that runs in another thread. Run one after the other, or each in a process of its own, such as "
        'joblib\'s with backend="loky".'
    )
