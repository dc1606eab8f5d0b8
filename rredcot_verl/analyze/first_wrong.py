"""The prediction of the first wrong step of a trace from scores of its steps, and the choice of its threshold.

A step's score is the fall of the value in it, v_{k-1} - v_k, never pinned to the outcome. What is predicted is the
first step whose score exceeds a threshold, and that no step is wrong where none does. The threshold is chosen for
ProcessBench's F1 (arXiv 2412.06559); the prediction from values is ours.
"""

from dataclasses import dataclass

import numpy as np

from rredcot_verl.analyze.statistics import Array, Labels
from rredcot_verl.analyze.trace_table import Mask


@dataclass(frozen=True)
class Windows:
    """The thresholds t at which the prediction of each trace is right, `low <= t < high`; none where they are equal.

    Attributes:
        low, high: `(num_traces,)`.
    """

    low: Array
    high: Array

    def holds(self, threshold: Array) -> Mask:
        """`(num_traces,)`, whether each trace's prediction is right at its threshold."""
        found: Mask = (self.low <= threshold) & (threshold < self.high)
        return found


def first_above(scores: Array, first_wrong: Labels) -> Windows:
    """The first step above the threshold is predicted.

    Args:
        scores: `(num_traces, width)`, -inf beyond the trace's steps.
        first_wrong: `(num_traces,)`, number of the first wrong step, -1 where none is wrong.
    """
    rows, highest = np.arange(len(scores)), np.maximum.accumulate(scores, axis=1)
    before = np.where(first_wrong > 0, highest[rows, np.maximum(first_wrong, 1) - 1], -np.inf)
    none = first_wrong < 0
    return Windows(np.where(none, highest[:, -1], before), np.where(none, np.inf, scores[rows, first_wrong]))


def largest_above(scores: Array, first_wrong: Labels) -> Windows:
    """The step with the largest score is predicted, the first of equals, if it is above the threshold."""
    largest, none = scores.max(axis=1), first_wrong < 0
    high = np.where(scores.argmax(axis=1) == first_wrong, largest, -np.inf)
    return Windows(np.where(none, largest, -np.inf), np.where(none, np.inf, high))


def harmonic(wrong: Array, right: Array) -> Array:
    """ProcessBench's F1 of the accuracies on wrong and on right traces; 0 where both are."""
    total = wrong + right
    f1 = np.divide(2 * wrong * right, total, out=np.zeros_like(total), where=total != 0)
    found: Array = np.where(np.isnan(total), np.nan, f1)
    return found


def choose_threshold(windows: Windows, is_wrong: Mask) -> float:
    """The threshold with the best F1, of equals with the most traces right, then the lowest.

    Between the numbers at which a prediction changes nothing does: the middle of such a stretch is taken.
    """
    bounds = np.concatenate([windows.low, windows.high])
    bounds = np.unique(bounds[np.isfinite(bounds)])
    if not bounds.size:
        return 0.0
    # Below all of them too, where everything exceeds it.
    candidates = np.concatenate([bounds[:1] - 1.0, bounds])
    num_right = [_num_held(windows, kind, candidates) for kind in (is_wrong, ~is_wrong)]
    shares = [held / max(int(kind.sum()), 1) for held, kind in zip(num_right, (is_wrong, ~is_wrong), strict=True)]
    f1, exact = harmonic(*shares), num_right[0] + num_right[1]
    best = int(np.lexsort((-np.arange(len(f1)), exact, f1))[-1])
    following = candidates[min(best + 1, len(candidates) - 1)]
    return float(candidates[best] + following) / 2


def _num_held(windows: Windows, kind: Mask, thresholds: Array) -> Array:
    """`(num,)`, how many traces of a kind are predicted right at each threshold."""
    chosen = kind & (windows.low < windows.high)
    low, high = np.sort(windows.low[chosen]), np.sort(windows.high[chosen])
    begun, ended = np.searchsorted(low, thresholds, "right"), np.searchsorted(high, thresholds, "right")
    return (begun - ended).astype(np.float64)
