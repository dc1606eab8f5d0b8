"""Where the task can check lines: does the blame of a failed trace land on its first wrong line?

The segment *holding* a wrong line is the one in which the line ends (its last visible character), as in
`rredcot_verl.report`: a mistake is only complete there. Equal numbers share their place, so a method that says nothing
scores what chance does.
"""

import numpy as np

from rredcot_verl.analyze.statistics import Array, Measured
from rredcot_verl.analyze.trace_table import Mask, TraceTable

NAMES = ("top1", "rank", "auc")
"""`top1`: share of traces whose most negative segment holds the first wrong line; `rank`: mean place of that segment
among the trace's segments by blame, 1 is the most blamed; `auc`: probability that such a segment is blamed more than
another segment of a failed trace, over all of them."""


def blame(table: TraceTable, credit: Array, rows: Mask) -> dict[str, Measured]:
    """How well the most negative credit finds the wrong segment.

    Args:
        table: The traces.
        credit: `(num_traces, width)`, d_k or advantages; lower is more blame.
        rows: `(num_traces,)`, traces to count.

    Returns:
        Each of `NAMES`.
    """
    known: Mask = np.all(np.isfinite(np.where(table.is_state, credit, 0.0)), axis=1)
    chosen = np.nonzero(rows & known & (table.wrong_segments >= 0))[0]
    if not len(chosen):
        return {name: Measured.none(_reason(table)) for name in NAMES}
    resamples, segments = table.resamples, table.wrong_segments[chosen]
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


def chance(table: TraceTable) -> dict[str, dict[str, Measured]]:
    """What rules that read nothing would score: `chance`, `first_segment` and `last_segment`."""
    everyone = np.ones(len(table.traces), dtype=bool)
    number = np.broadcast_to(np.arange(table.width, dtype=np.float64), table.is_state.shape)
    rules = {"chance": np.zeros_like(number), "first_segment": number, "last_segment": -number}
    return {name: blame(table, credit, everyone) for name, credit in rules.items()}


def _reason(table: TraceTable) -> str:
    if not table.failed.any():
        return "no failed trace"
    if not (table.failed & table.lines_checked).any():
        return "the task cannot check lines"
    if not (table.failed & table.has_wrong_line).any():
        return "no failed trace with a wrong line"
    return "no such trace with values and at least two segments"
