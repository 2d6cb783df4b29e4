"""What results print: a statement of at most 80 columns, and in a notebook a small table."""

import re
import textwrap
from html import escape

COLUMNS = 80  # of a terminal
# A space where a line does not end: within a phrase, such as "median ESS 12" or "-1.0 ± 0.1".
WITHIN = re.compile(r"(?<![,;]) (?![(]|[-+] )")


class Printed:
    """A result that says what it is, in place of the tensors that it has.

    A subclass that is a dataclass has ``repr=False``, since its own repr would replace this one.
    """

    def _statement(self) -> str:
        """What ``print`` shows, before lines are broken."""
        raise NotImplementedError

    def _rows(self) -> dict[str, object]:
        """What a notebook shows: values by their names."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(
            textwrap.fill(
                WITHIN.sub("\N{NO-BREAK SPACE}", line),
                COLUMNS,
                subsequent_indent="  ",
                break_long_words=False,
                break_on_hyphens=False,
            )
            for line in self._statement().splitlines()
        ).replace("\N{NO-BREAK SPACE}", " ")

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """The rows as a table, which takes its colours from the notebook."""
        rows = "".join(
            f'<tr><th scope="row" style="text-align: left">{escape(name)}</th>'
            f'<td style="text-align: left">{escape(str(value))}</td></tr>'
            for name, value in self._rows().items()
        )
        return f"<table><tbody>{rows}</tbody></table>"
