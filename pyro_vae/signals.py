"""Signals that end a program, taken for a Ctrl-C first, so that a training keeps its work."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def taken_for_ctrl_c(*, then_obeyed: bool, with_ctrl_c: bool = False) -> Iterator[list[signal.Signals]]:
    """Inside, the first SIGTERM or SIGHUP raises ``KeyboardInterrupt``, and is in the list; the second one is obeyed.

    With `then_obeyed`, the first one ends the program when the block has ended, however it ends. Ignored signals
    (``nohup``) stay ignored, and other handlers stay. Handlers are the main thread's: in another one nothing changes.
    With `with_ctrl_c`, for a whole program, SIGINT is one of them, so that a second Ctrl-C ends the process at once. A
    signal that comes during an import then waits for the end of that import.
    """
    received: list[signal.Signals] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # forked meanwhile
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        # In an import, KeyboardInterrupt is lost, or becomes another exception.
        if with_ctrl_c and _num_imports(frame) > num_imports:
            again = threading.Timer(0.05, signal.raise_signal, [number])
            again.daemon = True
            again.start()
            return
        received.append(signal.Signals(number))
        put_back()
        raise KeyboardInterrupt

    def put_back() -> None:
        for each, earlier in own.items():
            if signal.getsignal(each) is interrupt:
                signal.signal(each, signal.SIG_DFL if received else earlier)

    process, num_imports = os.getpid(), _num_imports(sys._getframe())
    in_main = threading.current_thread() is threading.main_thread()
    own: dict[int, Any] = {each: signal.SIG_DFL for each in ENDING if signal.getsignal(each) is signal.SIG_DFL}
    if with_ctrl_c and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        own[signal.SIGINT] = signal.getsignal(signal.SIGINT)
    for each in own if in_main else ():
        signal.signal(each, interrupt)
    try:
        yield received
    finally:
        put_back()
        if received and then_obeyed:
            signal.raise_signal(received[0])


def _num_imports(frame: FrameType | None) -> int:
    """The number of frames of unfinished imports."""
    return sum(each.f_code.co_filename == "<frozen importlib._bootstrap>" for each, _ in traceback.walk_stack(frame))


def name_of(received: list[signal.Signals]) -> str:
    """What a message calls the signal."""
    return received[0].name if received and received[0] != signal.SIGINT else "Ctrl-C"
