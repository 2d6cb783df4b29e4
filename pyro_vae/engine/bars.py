"""Progress bars: in a terminal, and in a notebook with or without ipywidgets."""

import importlib.util
import sys
from typing import Any

from tqdm.std import tqdm


def progress_bar(progress: bool, **options: Any) -> Any:
    """A bar of tqdm, with these options; a disabled one without `progress`, or where nobody looks, as in a file.

    A notebook without ipywidgets gets a bar of text, which tqdm itself would leave out there.
    """
    if not progress:
        return tqdm(disable=True, **options)
    if not _in_notebook():
        return tqdm(disable=None, **options)
    if importlib.util.find_spec("ipywidgets") is None:
        return tqdm(file=sys.stdout, ncols=80, **options)
    from tqdm.notebook import tqdm as widget

    return widget(**options)


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this: the shell that it makes is of its own class."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"
