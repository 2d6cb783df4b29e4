"""Which cases of a test the quick suite runs."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases for ``parametrize``; those that are not `quick` are marked slow."""
    quick = list(quick)
    values = [(case, case if isinstance(case, tuple) else (case,)) for case in cases]
    return [pytest.param(*each, marks=[pytest.mark.slow] * (case not in quick)) for case, each in values]
