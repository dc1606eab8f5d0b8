"""What a preflight prints."""

import shutil
import textwrap
from collections.abc import Sequence

Row = tuple[str, str]
"""Label and text."""

LABEL = 20
"""Width of the first column."""


def section(title: str, rows: Sequence[Row]) -> str:
    """A heading and aligned rows; long values go on below themselves."""
    # A number and its % stay together.
    lines = (_wrap(text.replace(" %", "\0%"), f"  {label:<{LABEL}} ", " " * (LABEL + 3)) for label, text in rows)
    return "\n".join([title, *(line.replace("\0", " ") for line in lines)])


def bullets(title: str, messages: Sequence[str]) -> str:
    """A heading and a list."""
    lines = [
        _wrap(paragraph, "    " if number else "  - ", "    ")
        for message in messages
        for number, paragraph in enumerate(message.splitlines())
    ]
    return "\n".join([title, *lines])


def _wrap(text: str, first: str, others: str) -> str:
    """Text no wider than the terminal, with what stands before its first line and before the others."""
    width = max(72, min(120, shutil.get_terminal_size((110, 24)).columns))
    wrapped = textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False, break_long_words=False
    )
    return wrapped or first


def count(number: float) -> str:
    """A number of things for people: 4.02 B, 596 M, 26,024."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def percent(share: float) -> str:
    """A share for people: 0.4 %, 12 %."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def plural(number: int, noun: str) -> str:
    """1 node, 2 nodes."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
