"""Signals that end a program, taken for a Ctrl-C first, so that a training keeps its work."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def taken_for_ctrl_c(*, then_obeyed: bool) -> Iterator[list[signal.Signals]]:
    """Inside, the first SIGTERM or SIGHUP raises ``KeyboardInterrupt``, and is in the list; the second one is obeyed.

    With `then_obeyed`, the first one ends the program when the block has ended, however it ends. Ignored signals
    (``nohup``) stay ignored, and other handlers stay. Handlers are the main thread's: in another one nothing changes.
    """
    received: list[signal.Signals] = []

    def interrupt(number: int, _: Any) -> None:
        if os.getpid() != process:  # forked meanwhile
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(signal.Signals(number))
        put_back()
        raise KeyboardInterrupt

    def put_back() -> None:
        for each in own:
            if signal.getsignal(each) is interrupt:
                signal.signal(each, signal.SIG_DFL)

    process = os.getpid()
    in_main = threading.current_thread() is threading.main_thread()
    own = [each for each in ENDING if in_main and signal.getsignal(each) is signal.SIG_DFL]
    for each in own:
        signal.signal(each, interrupt)
    try:
        yield received
    finally:
        put_back()
        if received and then_obeyed:
            signal.raise_signal(received[0])


def name_of(received: list[signal.Signals]) -> str:
    """What a message calls the signal."""
    return received[0].name if received else "Ctrl-C"
