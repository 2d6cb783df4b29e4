"""Docstrings are written for a terminal. Here a bare (N, *event) or p(x|z) becomes code, for reStructuredText."""

import re
from typing import Any

# A shape with a star, or a density with a bar, that stands neither in code nor in a formula.
BARE = re.compile(r"(``.*?``|`[^`]*`|\*\*.*?\*\*)|(\w*\([^()`]*\*\w[^()`]*\)|\w+\([^()|`]*\|[^()`]*\))")


def mark(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Put what reStructuredText reads as emphasis or a substitution into code, outside of examples and formulas."""
    _list_references(lines)
    indent = None  # of the block that is left as it is
    for i, line in enumerate(lines):
        start = len(line) - len(line.lstrip())
        if indent is not None and line.strip() and start <= indent:
            indent = None
        if indent is None and (line.lstrip().startswith((".. math::", "Example")) or line.rstrip().endswith("::")):
            indent = start
        elif indent is None and not line.lstrip().startswith(">>>"):
            lines[i] = BARE.sub(lambda found: found[1] or f"``{found[2]}``", line)


def _list_references(lines: list[str]) -> None:
    """Make each paper a point of a list; it ends where a line ends with a full stop."""
    inside, ended = None, True
    for i, line in enumerate(lines):
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if text == "References:":
            inside, ended = indent, True
        elif inside is not None and text:
            if indent <= inside:
                inside = None
                continue
            lines[i] = " " * (inside + 4) + ("- " if ended else "  ") + text
            ended = text.endswith(".")


def setup(app: Any) -> dict[str, bool]:
    """Before napoleon, which would have marked the arguments' names."""
    app.connect("autodoc-process-docstring", mark, priority=400)
    return {"parallel_read_safe": True}
