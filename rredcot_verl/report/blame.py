"""Where a failed trace went wrong, and where its credit puts the blame."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rredcot_verl.report.data import CheckedLine, Trace


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


def segment_of_line(trace: Trace, line: CheckedLine) -> int | None:
    """Finds the segment in which a line ends.

    Args:
        trace: The trace.
        line: A line of its response.

    Returns:
        The segment's index, or ``None`` where no segment covers the line's end.
    """
    last = last_visible_character(trace, line)
    return next((k for k, segment in enumerate(trace.segments) if segment.start <= last < segment.end), None)


def last_visible_character(trace: Trace, line: CheckedLine) -> int:
    """Finds where a line ends, as the place that decides to which segment it belongs.

    Args:
        trace: The trace.
        line: A line of its response.

    Returns:
        Offset of the line's last character that is not white space; the line's start where there is none.
    """
    # Whether the line break belongs to the line, to its segment or to the next segment is a matter of the tokenizer and
    # of the checker, and must not decide.
    return line.start + max(len(trace.response[line.start : line.end].rstrip()), 1) - 1


def blame_of(trace: Trace, lines: Sequence[CheckedLine]) -> Blame | None:
    """Compares the place of the blame with the place of the first mistake.

    Args:
        trace: The trace.
        lines: Its judged lines, in order.

    Returns:
        The comparison, or ``None`` for a trace that does not count: not scored, solved, without a wrong line, or with
        fewer than two segments (where there is nothing to choose from).
    """
    if not trace.is_scored or not trace.is_failed or len(trace.segments) < 2:
        return None
    line = next((line for line in lines if not line.ok), None)
    if line is None:
        return None
    blamed = int(np.argmin([segment.segment_reward for segment in trace.segments]))
    return Blame(blamed, segment_of_line(trace, line), line)
