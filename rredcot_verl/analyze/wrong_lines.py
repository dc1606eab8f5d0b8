"""Where the task can check lines: does the blame of a failed trace land on its first wrong line?

The segment *holding* a wrong line is the one in which the line ends (its last visible character), as in
`rredcot_verl.report`: a mistake is only complete there. Equal numbers share their place, so a method that says nothing
scores what chance does.
"""

from dataclasses import dataclass

import numpy as np

from rredcot_verl.analyze.statistics import Array, Labels, Measured, Resamples
from rredcot_verl.analyze.trace_table import Mask, TraceTable

NAMES = ("top1", "rank", "auc")
"""`top1`: share of traces whose most negative segment holds the first wrong line; `rank`: mean place of that segment
among the trace's segments by blame, 1 is the most blamed; `auc`: probability that such a segment is blamed more than
another segment of a failed trace, over all of them."""


@dataclass(frozen=True)
class WrongSegments:
    """The failed traces whose first wrong line is known and falls into one of at least two segments.

    Attributes:
        rows: `(num,)` rows of the table.
        segments: `(num,)` index of the segment that holds the first wrong line, 0 is the first.
        num_failed: Failed traces.
        num_checked: Those whose lines the task could check.
        num_wrong: Those with a wrong line.
        num_solved_checked, num_solved_wrong: Solved traces whose lines were checked, and those with a wrong line: a
            checker that finds many is in doubt.
    """

    rows: Labels
    segments: Labels
    num_failed: int
    num_checked: int
    num_wrong: int
    num_solved_checked: int
    num_solved_wrong: int


def wrong_segments(table: TraceTable) -> WrongSegments:
    """Find them."""
    rows, segments = [], []
    for row, trace in enumerate(table.traces):
        if not table.failed[row] or trace.wrong_from is None or trace.wrong_to is None:
            continue
        line = trace.response[trace.wrong_from : trace.wrong_to]
        last = trace.wrong_from + max(len(line.rstrip()), 1) - 1
        segment = int(np.searchsorted(table.cuts[row].characters, last, side="right")) - 1
        if table.num_segments[row] > 1 and 0 <= segment < table.num_segments[row]:
            rows.append(row)
            segments.append(segment)
    checked = np.array([trace.lines_checked for trace in table.traces], dtype=bool)
    wrong = np.array([trace.wrong_from is not None for trace in table.traces], dtype=bool)
    solved = ~table.failed
    return WrongSegments(
        np.array(rows, dtype=np.int64),
        np.array(segments, dtype=np.int64),
        int(table.failed.sum()),
        int((table.failed & checked).sum()),
        int((table.failed & wrong).sum()),
        int((solved & checked).sum()),
        int((solved & wrong).sum()),
    )


def blame(
    table: TraceTable, resamples: Resamples, wrong: WrongSegments, credit: Array, rows: Mask
) -> dict[str, Measured]:
    """How well the most negative credit finds the wrong segment.

    Args:
        table: The traces.
        resamples: Of their prompts.
        wrong: From `wrong_segments`.
        credit: `(num_traces, width)`, d_k or advantages; lower is more blame.
        rows: `(num_traces,)`, traces to count.

    Returns:
        Each of `NAMES`.
    """
    known: Mask = np.all(np.isfinite(np.where(table.is_state, credit, 0.0)), axis=1)
    keep = rows[wrong.rows] & known[wrong.rows]
    chosen, segments = wrong.rows[keep], wrong.segments[keep]
    if not len(chosen):
        return {name: Measured.none(_reason(wrong)) for name in NAMES}
    groups = table.groups[chosen]
    valid = table.is_state[chosen]
    # Differences below 1e-9 are rounding of sums of values, and count as equal.
    scores: Array = np.where(valid, credit[chosen], 0.0).round(9)
    own = scores[np.arange(len(chosen)), segments][:, None]
    num_below = ((scores < own) & valid).sum(axis=1)
    num_equal = ((scores == own) & valid).sum(axis=1)
    top1 = np.where(num_below == 0, 1 / num_equal, 0.0)
    rank = num_below + (num_equal + 1) / 2
    positive = np.arange(valid.shape[1]) == segments[:, None]
    by_segment = resamples.auc(-scores[valid], positive[valid], np.broadcast_to(groups[:, None], valid.shape)[valid])
    return {
        "top1": Measured.of(resamples.mean(top1, groups), groups),
        "rank": Measured.of(resamples.mean(rank, groups), groups),
        "auc": Measured.of(by_segment, groups),
    }


def chance(table: TraceTable, resamples: Resamples, wrong: WrongSegments) -> dict[str, dict[str, Measured]]:
    """What rules that read nothing would score: `chance`, `first_segment` and `last_segment`."""
    everyone = np.ones(len(table.traces), dtype=bool)
    number = np.broadcast_to(np.arange(table.width, dtype=np.float64), table.is_state.shape)
    rules = {"chance": np.zeros_like(number), "first_segment": number, "last_segment": -number}
    return {name: blame(table, resamples, wrong, credit, everyone) for name, credit in rules.items()}


def _reason(wrong: WrongSegments) -> str:
    if not wrong.num_failed:
        return "no failed trace"
    if not wrong.num_checked:
        return "the task cannot check lines"
    if not wrong.num_wrong:
        return "no failed trace with a wrong line"
    return "no such trace with values and at least two segments"
