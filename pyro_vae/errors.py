"""What this package raises when it refuses: each message says what was expected, what came, and the fix."""

import operator
import re
from typing import Any


def without_shapes(text: str) -> str:
    """A message without the table of shapes that Pyro adds to each ValueError of a program that it traces."""
    return re.sub(r"\n *Trace Shapes:.*", "", text, flags=re.DOTALL)


class PyroVAEError(ValueError):
    """The base class of every refusal of this package.

    Example:
        >>> import pyro_vae as pv
        >>> try:
        ...     pv.IWAE(0)
        ... except pv.PyroVAEError as error:
        ...     print(error)
        expected num_particles to be a positive integer, got 0.
    """

    def __str__(self) -> str:
        return without_shapes(super().__str__())


def require_count(name: str, value: object, fix: str = "", *, least: int = 1, why: str = "") -> None:
    """Raise ValueError unless the value of the argument `name` is an integer, at least `least`."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if number < least:
        wanted = "a positive integer" if least == 1 else f"an integer, at least {least}"
        raise PyroVAEError(f"expected {name} to be {wanted}{why}, got {value!r}. {fix}".rstrip())


class NotFiniteError(PyroVAEError, FloatingPointError):
    """A loss, a parameter or a log-weight is NaN or infinite."""


class NotWrittenError(PyroVAEError, OSError):
    """A file can't be written, such as on a full disk.

    Attributes:
        history: the table that :func:`fit` returns, with the epochs until then; None if training had not begun.
    """

    history: Any = None


class CallbackError(PyroVAEError, RuntimeError):
    """A callback of a training has failed: the message names it, and where; the cause is the exception's own.

    Attributes:
        history: the table that :func:`fit` returns, with the epochs until then.
    """

    history: Any = None


class OtherRankError(PyroVAEError, RuntimeError):
    """Another process of the group has failed, has left, or does not make the call that this one makes."""


class NoDensityError(PyroVAEError, NotImplementedError):
    """A site's distribution can't compute the density of a value."""


class MissingCompilerError(PyroVAEError, RuntimeError):
    """Compiled code needs a C++ compiler, and none works."""


class MissingPackageError(PyroVAEError, ImportError):
    """A package that an extra of this one installs is not there: the message has the command that installs it."""
