"""Reading JSON-lines files, and checking what a row of them holds.

Every problem a user can cause is a ``ReportError`` that names the file, and the line where there is one.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

logger = logging.getLogger(__name__)


class ReportError(ValueError):
    """A run that cannot be reported on; the message names the file and says what is wrong with it."""


def json_lines(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields the rows of a JSON-lines file with their place, ``file:line``; a large file need not fit into memory.

    A last line that a stopped run left unfinished is reported and left out.

    Raises:
        ReportError: The file is missing, empty or not UTF-8 text, or a line is no JSON object.
    """
    is_empty = True
    try:
        # Only "\n" ends a line: JSON may hold a raw U+2028, and text a carriage return.
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{file}:{number}"
                try:
                    row = _row(line, where)
                except ReportError as error:
                    if is_empty or line.endswith(b"\n"):
                        raise
                    logger.warning("%s; the line was cut off, and is left out", error)
                    return
                is_empty = False
                yield row, where
    except FileNotFoundError as error:
        raise ReportError(f"{file}: no such file") from error
    if is_empty:
        raise ReportError(f"{file}: the file is empty")


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a JSON value is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


INTEGER, NUMBER, TEXT, LIST, SWITCH = "an integer", "a finite number", "text", "a list", "true or false"
_IS_A: dict[str, Callable[[Any], bool]] = {
    INTEGER: lambda value: is_number(value) and isinstance(value, int),
    NUMBER: lambda value: is_number(value) and math.isfinite(value),
    TEXT: lambda value: isinstance(value, str),
    LIST: lambda value: isinstance(value, list),
    SWITCH: lambda value: isinstance(value, bool),
}


def entry(row: dict[str, Any], key: str, kind: str, where: str, *, optional: bool = False) -> Any:
    """What a row holds under a key, a ``NUMBER`` as float; none for null or nothing where it is optional.

    Raises:
        ReportError: It is of another kind.
    """
    value: Any = row.get(key)
    if optional and value is None:
        return None
    if not _IS_A[kind](value):
        raise ReportError(f"{where}: {key!r} must be {kind}, got {value!r}")
    return float(value) if kind == NUMBER else value


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ReportError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        raise ReportError(f"{where}: bad JSON: {error.msg} (column {error.colno})") from error
    if not isinstance(row, dict):
        raise ReportError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row
