"""Whether a program wrote what it should have."""

import re

from rredcot_verl.rewards.sandbox.literals import is_close

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_BLANKS = re.compile(r"(\s+)")


def outputs_match(actual: str, expected: str, tolerance: float) -> bool:
    """Compare line by line; blanks at the end of a line and empty lines at the end of the text do not count.

    Where the expected text has a number with a decimal point or an exponent, a number within `tolerance` of it,
    absolute or relative, is right. Everything else is compared as text: whole numbers, words, the blanks between them.
    """
    actual_lines, expected_lines = _lines(actual), _lines(expected)
    if len(actual_lines) != len(expected_lines):
        return False
    return all(
        _line_matches(found, wanted, tolerance) for found, wanted in zip(actual_lines, expected_lines, strict=True)
    )


def _lines(text: str) -> list[str]:
    # Not splitlines: a form feed or a Unicode separator is part of a line.
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _line_matches(actual: str, expected: str, tolerance: float) -> bool:
    if actual == expected:
        return True
    actual_parts, expected_parts = _BLANKS.split(actual), _BLANKS.split(expected)
    if len(actual_parts) != len(expected_parts):
        return False
    return all(
        _part_matches(found, wanted, tolerance) for found, wanted in zip(actual_parts, expected_parts, strict=True)
    )


def _part_matches(actual: str, expected: str, tolerance: float) -> bool:
    if actual == expected:
        return True
    is_decimal = _NUMBER.fullmatch(expected) and any(mark in expected for mark in ".eE")
    if not is_decimal or not _NUMBER.fullmatch(actual):
        return False
    return is_close(float(actual), float(expected), tolerance)


def first_difference(actual: str, expected: str, tolerance: float, width: int = 60) -> str:
    """Where two outputs differ, for people."""
    actual_lines, expected_lines = _lines(actual), _lines(expected)
    for number, (found, wanted) in enumerate(zip(actual_lines, expected_lines, strict=False), 1):
        if not _line_matches(found, wanted, tolerance):
            return f"line {number} is {found[:width]!r}, expected {wanted[:width]!r}"
    return f"{len(actual_lines)} lines, expected {len(expected_lines)}"
