"""The traces shown on the page: which ones are drawn, and their text line by line."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from rredcot_verl.report.data import Run
from rredcot_verl.report.line_checker import (
    Blame,
    CheckedLine,
    LineChecker,
    blame_of,
    check_lines,
    last_visible_character,
)
from rredcot_verl.report.trace import Trace


@dataclass(frozen=True)
class Piece:
    """A line of a response, as far as it lies in one segment.

    Attributes:
        text: Its text.
        ok: The line checker's verdict, on the piece that holds the end of the line; ``None`` where there is none.
        is_first_wrong: Whether it is the first wrong line of a response whose blame is looked at.
    """

    text: str
    ok: bool | None = None
    is_first_wrong: bool = False


@dataclass(frozen=True)
class ShownTrace:
    """A trace chosen for the page.

    Attributes:
        trace: The trace.
        reason: Why it was chosen, in words.
        lines: Its judged lines; empty without a line checker.
        blame: Where its credit puts the blame; ``None`` where that question does not arise.
    """

    trace: Trace
    reason: str
    lines: Sequence[CheckedLine] = ()
    blame: Blame | None = None

    def pieces(self, index: int) -> list[Piece]:
        """The text of a segment, line by line; that after the last segment for the index after its own."""
        response, segments = self.trace.response, self.trace.segments
        start = segments[index - 1].end if index else 0
        text = response[start : segments[index].end if index < len(segments) else len(response)]
        if not text.strip():
            return [Piece(text.replace("\n", "⏎") or "(no text)")]
        pieces = []
        for line in text.split("\n"):
            pieces.append(self._piece(line, start))
            start += len(line) + 1
        # The line break between two segments belongs to either; shown, it would be an empty row.
        visible = [k for k, piece in enumerate(pieces) if piece.text.strip()]
        return pieces[visible[0] : visible[-1] + 1]

    def _piece(self, text: str, start: int) -> Piece:
        places = range(start, start + max(len(text), 1))
        judged = next((line for line in self.lines if last_visible_character(self.trace, line) in places), None)
        if judged is None:
            return Piece(text)
        return Piece(text, judged.ok, self.blame is not None and self.blame.line is judged)


def judged(trace: Trace, reason: str, line_checker: LineChecker | None) -> ShownTrace:
    """A trace for the page, with its lines judged where there is a line checker."""
    lines = [] if line_checker is None else check_lines(line_checker, trace)
    return ShownTrace(trace, reason, lines, blame_of(trace, lines))


def choose(run: Run, line_checker: LineChecker | None, seed: int) -> list[ShownTrace]:
    """Draws at most nine traces, none twice: failed and solved ones of the whole run, then its last and its first step.

    With a line checker the failed traces are drawn by whether the blame was located, and misses are shown too. The same
    seed draws the same traces.
    """
    shown = [trace for trace in run.traces if trace.is_scored and trace.response.strip()]
    if not shown:
        return []
    order = random.Random(seed).sample(shown, len(shown))
    # Without at least two segments there is no credit to look at; such traces come last.
    order.sort(key=lambda trace: len(trace.segments) < 2)
    drawn: list[ShownTrace] = []

    def draw(members: Sequence[Trace], count: int, reason: str, located: bool | None = None) -> None:
        taken, most = {id(one.trace) for one in drawn}, len(drawn) + count
        for trace in members:
            if len(drawn) == most:
                return
            # Only the traces drawn are judged again: a checker may be slow and a run has thousands of traces.
            found = None if id(trace) in taken else judged(trace, reason, line_checker)
            if found and (located is None or (found.blame is not None and found.blame.is_located == located)):
                drawn.append(found)

    failed = [trace for trace in order if trace.is_failed]
    if line_checker is None:
        draw(failed, 3, "Failed")
    else:
        draw(failed, 2, "Failed: the blame falls on the first wrong line", located=True)
        draw(failed, 1, "Failed: the blame falls elsewhere", located=False)
    draw([trace for trace in order if not trace.is_failed], 2, "Solved")
    steps = [trace.step for trace in shown]
    for step, which in ((max(steps), "last"), (min(steps), "first")):
        draw([trace for trace in order if trace.step == step], 2, f"Drawn from the {which} step")
    return drawn
