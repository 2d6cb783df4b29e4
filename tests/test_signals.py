"""Signals that come at awkward moments."""

import signal
import sys
import time

import pytest

from pyro_vae.signals import taken_for_ctrl_c


def test_a_signal_during_an_import_stops_the_program_after_it(tmp_path, monkeypatch):
    """matplotlib and others catch what an import raises, and warn instead."""
    (tmp_path / "catches_all.py").write_text(
        "import signal, time\n"
        "caught = None\n"
        "try:\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    time.sleep(0.2)\n"
        "except BaseException as error:\n"
        "    caught = error\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with taken_for_ctrl_c(then_obeyed=False, with_ctrl_c=True) as received, pytest.raises(KeyboardInterrupt):
        import catches_all

        time.sleep(10)
    assert received == [signal.SIGTERM]
    assert sys.modules.pop("catches_all") is catches_all
    assert catches_all.caught is None
