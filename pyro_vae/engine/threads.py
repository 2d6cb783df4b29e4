"""One thread at a time: Pyro's handlers and its parameter store are those of the whole process."""

import threading
from types import TracebackType

from pyro_vae.errors import PyroVAEError


class OneThread:
    """Around what runs a program: refuses a second thread meanwhile. The same thread may enter again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise other_thread()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()


ONE_THREAD = OneThread()


def other_thread() -> PyroVAEError:
    """The refusal of two threads that run programs at the same time."""
    return PyroVAEError(
        "expected one thread at a time, since Pyro's handlers and its parameter store are those of the whole process, "
        "got a program that runs in another thread. Run one after the other, or each in a process of its own, such as "
        'joblib\'s with backend="loky".'
    )
