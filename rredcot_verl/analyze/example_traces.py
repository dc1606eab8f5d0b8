"""A few traces for the page: what the gold and the estimates say of each segment."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rredcot_verl.analyze.estimators import IN_EXAMPLES, READ
from rredcot_verl.analyze.method_values import Method
from rredcot_verl.analyze.trace_table import TraceTable

NUM_FAILED, NUM_SOLVED = 3, 2


def examples(table: TraceTable, methods: Sequence[Method], layer: int | None = None) -> list[dict[str, Any]]:
    """Choose traces and lay out their segments.

    Failed traces with a known wrong line come first, those whose gold says most clearly where the outlook fell; then
    solved ones whose gold moved most. So they are not typical: they are the ones with something to find. Of the layers
    read, `layer` is shown.

    Returns:
        `examples` of the results, see docs/analyze.md.
    """
    gold = np.where(table.is_state, table.gold.values, np.nan)
    complete = (np.isfinite(gold) | ~table.is_state).all(axis=1) & (table.num_segments > 1)
    moves = np.abs(table.segment_rewards(np.nan_to_num(gold)))
    largest = np.where(table.is_inner, moves, 0.0).max(axis=1)
    order = sorted(np.nonzero(complete)[0].tolist(), key=lambda row: -largest[row])
    failed = sorted((row for row in order if table.failed[row]), key=lambda row: table.wrong_segments[row] < 0)
    solved = [row for row in order if not table.failed[row]]
    shown = _columns(methods, layer)
    return [
        _layout(table, shown, row) for row in [*_apart(table, failed, NUM_FAILED), *_apart(table, solved, NUM_SOLVED)]
    ]


def _columns(methods: Sequence[Method], layer: int | None) -> list[Method]:
    by_name = {method.name: method for method in methods}
    names = [*IN_EXAMPLES, *(f"{prefix}{layer}" for prefix in READ)]
    return [by_name[name] for name in names if name in by_name]


def _apart(table: TraceTable, rows: Sequence[int], most: int) -> list[int]:
    """The first rows, one a prompt."""
    chosen: dict[int, int] = {}
    for row in rows:
        chosen.setdefault(int(table.groups[row]), row)
    return list(chosen.values())[:most]


def _layout(table: TraceTable, shown: Sequence[Method], row: int) -> dict[str, Any]:
    trace, cut, num = table.traces[row], table.cuts[row], int(table.num_segments[row])
    outcome = float(table.rewards[row])

    def after(values: Any, k: int) -> float | None:
        number = outcome if k == num else float(values[row, k])
        return number if np.isfinite(number) else None

    return {
        "trace": trace.trace,
        "why": "failed" if table.failed[row] else "solved",
        "prompt": trace.prompt,
        "reward": trace.reward,
        "ground_truth": trace.ground_truth,
        "methods": [method.name for method in shown],
        "start": {"gold": after(table.gold.values, 0), "values": [after(method.values, 0) for method in shown]},
        "segments": [
            {
                "text": trace.response[cut.characters[k - 1] : cut.characters[k]],
                "holds_wrong_line": bool(table.wrong_segments[row] == k - 1),
                "gold": after(table.gold.values, k),
                "values": [after(method.values, k) for method in shown],
            }
            for k in range(1, num + 1)
        ],
    }
