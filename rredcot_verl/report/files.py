"""Reading JSON-lines files, and checking what a row of them holds.

Every problem a user can cause is a ``ReportError`` that names the file, and the line where there is one.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard


class ReportError(ValueError):
    """A run that cannot be reported on; the message names the file and says what is wrong with it."""


def json_lines(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Reads a JSON-lines file row by row, so that a large one need not fit into memory.

    Args:
        file: The file.

    Yields:
        Each row with its place, ``file:line``.

    Raises:
        ReportError: The file is missing, empty or not UTF-8 text, or a line is no JSON object.
    """
    is_empty = True
    try:
        # Only "\n" ends a line: JSON may hold a raw U+2028, and text a carriage return.
        with file.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    is_empty = False
                    yield _row(line, f"{file}:{number}"), f"{file}:{number}"
    except FileNotFoundError as error:
        raise ReportError(f"{file}: no such file") from error
    except UnicodeDecodeError as error:
        raise ReportError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if is_empty:
        raise ReportError(f"{file}: the file is empty")


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a JSON value is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def integer(row: dict[str, Any], key: str, where: str) -> int:
    """The integer under a key; a ReportError where there is none."""
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ReportError(f"{where}: {key!r} must be an integer, got {value!r}")


def number(row: dict[str, Any], key: str, where: str) -> float:
    """The finite number under a key; a ReportError where there is none."""
    value = row.get(key)
    if is_number(value) and math.isfinite(value):
        return float(value)
    raise ReportError(f"{where}: {key!r} must be a finite number, got {value!r}")


def number_or_nan(row: dict[str, Any], key: str, where: str) -> float:
    """The number under a key, and not a number where there is none."""
    value = row.get(key)
    return float(value) if is_number(value) else math.nan


def string(row: dict[str, Any], key: str, where: str) -> str:
    """The text under a key; a ReportError where there is none."""
    value = row.get(key)
    if isinstance(value, str):
        return value
    raise ReportError(f"{where}: {key!r} must be text, got {value!r}")


def text_or_none(row: dict[str, Any], key: str, where: str) -> str | None:
    """The text under a key, and none where it is null or missing."""
    return None if row.get(key) is None else string(row, key, where)


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ReportError(f"{where}: bad JSON: {error.msg} (column {error.colno})") from error
    if not isinstance(row, dict):
        raise ReportError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row
