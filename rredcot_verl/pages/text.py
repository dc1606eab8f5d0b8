"""Numbers written for people, and text that a reader can see."""

import re
from typing import Any

# Characters that would end the document early or that browsers do not show; the line break and the tab stay.
_HIDDEN = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(9), *range(11, 32), 127)}
# Marks that turn the reading direction would reorder the text of the page around them.
_HIDDEN |= {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def printable(text: str) -> str:
    """Replaces what a reader cannot see: control characters, marks that turn the reading direction, lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8").translate(_HIDDEN)


# A text of a table or of plain text is one line of it.
MOST_LINE_CHARACTERS = 160


def line(text: str, *, from_end: bool = False) -> str:
    """Any text on one line of bounded length, without characters that a terminal obeys."""
    whole = " ⏎ ".join(part.strip() for part in printable(text).strip().split("\n")).replace("\t", " ") or "(no text)"
    if len(whole) <= MOST_LINE_CHARACTERS:
        return whole
    return "… " + whole[-MOST_LINE_CHARACTERS:] if from_end else whole[:MOST_LINE_CHARACTERS] + " …"


def markdown(text: str) -> str:
    """Text that Markdown takes as it is: nothing of it becomes a heading, a link, a cell or a tag."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+\-.!|~$])", r"\\\1", text)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def signed(value: float, num_digits: int = 2) -> str:
    """A number with its sign, ``+0.25`` or ``−0.50`` (with a true minus sign); a rounded zero has none, ``0.00``."""
    text = f"{value:+.{num_digits}f}"
    return text[1:] if float(text) == 0.0 else text.replace("-", "−")


def number(value: float, num_digits: int | None = 3) -> str:
    """A number with a true minus sign; three significant digits where ``num_digits`` is none."""
    size = abs(value)
    if num_digits is None:
        text = f"{value:.3g}" if size < 1000 else f"{value:,.0f}"
    elif size >= 100:
        text = f"{value:,.0f}"
    elif 0 < size < 10.0**-num_digits / 2:
        text = f"{value:.1e}"
    else:
        text = f"{value:.{num_digits}f}"
    return text.replace("-", "−")


def describe(value: dict[str, Any], num_digits: int = 3) -> str:
    """An estimate with its interval, ``{"estimate", "low", "high"}`` of the bench, in plain text."""
    if value["estimate"] is None:
        return "not measured"
    text = number(value["estimate"], num_digits)
    if value["low"] is None:
        return text
    return f"{text} ({number(value['low'], num_digits)} to {number(value['high'], num_digits)})"


def duration(seconds: float | None) -> str:
    """Writes a time in the unit a reader thinks in, for example ``42 s``, ``12.5 min`` or ``3.1 h``."""
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def percent(share: float | None) -> str:
    """Writes a share in per cent, with a decimal where it is small."""
    if share is None:
        return "unknown"
    return f"{100 * share:.1f} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"
