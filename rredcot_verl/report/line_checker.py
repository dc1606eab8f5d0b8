"""Line checkers: functions of a task that can judge the lines of a response; and whether a failed response's credit
puts the blame on the first wrong one.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from rredcot_verl.report.files import ReportError
from rredcot_verl.report.trace import Trace


class CheckedLine(Protocol):
    """What a line checker returns for each line it can judge.

    Attributes:
        start: First character of the line, an offset into the response.
        end: One past its last character.
        ok: Whether the line is correct.
    """

    start: int
    end: int
    ok: bool


LineChecker = Callable[[str, str], Sequence[CheckedLine]]


@dataclass(frozen=True)
class Blame:
    """Where a failed trace went wrong, and where its credit puts the blame.

    Attributes:
        blamed: Index of the segment with the smallest segment reward; the earliest of several.
        first_wrong: Index of the segment in which the first wrong line ends; ``None`` where no segment covers it.
        line: The first wrong line.
    """

    blamed: int
    first_wrong: int | None
    line: CheckedLine

    @property
    def is_located(self) -> bool:
        """Whether the blamed segment is the one that holds the first wrong line."""
        return self.blamed == self.first_wrong


def load_line_checker(name: str) -> LineChecker:
    """Imports a line checker, a function called as ``f(prompt, response)``.

    Args:
        name: ``module:function``. The module is looked up as in ``python -m``: the current folder counts too.

    Raises:
        ReportError: The name is malformed, or does not lead to a function.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ReportError(f"line checker {name!r}: expected 'module:function'")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        checker = getattr(importlib.import_module(module_name), function_name, None)
    except ImportError as error:
        raise ReportError(f"line checker {name!r}: cannot import {module_name}: {error}") from error
    if not callable(checker):
        raise ReportError(f"line checker {name!r}: {module_name} has no function {function_name!r}")
    return cast(LineChecker, checker)


def check_lines(checker: LineChecker, trace: Trace) -> list[CheckedLine]:
    """Judges the lines of a trace's response, in order of their place.

    Raises:
        ReportError: A line's offsets do not lie in the response.
    """
    lines = sorted(checker(trace.prompt, trace.response), key=lambda line: line.start)
    for line in lines:
        if not 0 <= line.start <= line.end <= len(trace.response):
            raise ReportError(
                f"line checker: offsets {line.start}..{line.end} do not lie in a response of "
                f"{len(trace.response)} characters (step {trace.step}, uid {trace.uid})"
            )
    return lines


def last_visible_character(trace: Trace, line: CheckedLine) -> int:
    """Offset of a line's last character that is not white space; the line's start where there is none."""
    # Whether the line break belongs to the line, to its segment or to the next segment is a matter of the tokenizer and
    # of the checker, and must not decide to which segment the line belongs.
    return line.start + max(len(trace.response[line.start : line.end].rstrip()), 1) - 1


def segment_of_line(trace: Trace, line: CheckedLine) -> int | None:
    """Index of the segment in which a line ends, or ``None`` where no segment covers its end."""
    last = last_visible_character(trace, line)
    return next((k for k, segment in enumerate(trace.segments) if segment.start <= last < segment.end), None)


def blame_of(trace: Trace, lines: Sequence[CheckedLine]) -> Blame | None:
    """Compares the place of the blame with the place of the first mistake; the lines are in order.

    None for a trace that does not count: not scored, solved, without a wrong line, or with fewer than two segments
    (where there is nothing to choose from).
    """
    line = next((line for line in lines if not line.ok), None)
    if line is None or not trace.is_scored or not trace.is_failed or len(trace.segments) < 2:
        return None
    return Blame(int(np.argmin(trace.credits)), segment_of_line(trace, line), line)
