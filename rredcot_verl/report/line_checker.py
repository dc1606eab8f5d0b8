"""Line checkers: functions of a task that can judge the lines of a response."""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

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


def load_line_checker(name: str) -> LineChecker:
    """Imports a line checker.

    Args:
        name: ``module:function``. The module is looked up as in ``python -m``: the current folder counts too.

    Returns:
        The function, called as ``f(prompt, response)``.

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
    """Runs a line checker on a trace.

    Args:
        checker: The line checker.
        trace: The trace whose response is judged.

    Returns:
        The judged lines in order of their place in the response.

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
