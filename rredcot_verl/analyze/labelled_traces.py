"""How well the values of every method find the first wrong step of labelled traces, beside rules that read no value."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rredcot_verl.analyze.first_wrong import Windows, choose_threshold, first_above, harmonic, largest_above
from rredcot_verl.analyze.method_values import Evidence, Method
from rredcot_verl.analyze.records import LabelRecord
from rredcot_verl.analyze.segmentations import LABELS
from rredcot_verl.analyze.statistics import Array, Labels, Measured, intervals
from rredcot_verl.analyze.trace_table import Mask, TraceTable

NAMES = ("f1", "wrong", "right", "exact", "largest")
"""`wrong`: share of the traces with a wrong step whose first one is predicted exactly; `right`: share of the others of
which none is predicted; `f1`: harmonic mean of the two; `exact`: share of all traces; `largest`: of those with a wrong
step, the share in which it has the largest fall, without a threshold."""
_NO_HALVES = "one prompt: there is no other half to choose a threshold on"
_NONE_WRONG, _ALL_WRONG = "no trace with a wrong step", "no trace without a wrong step"
_MOST_GENERATORS = 20


@dataclass(frozen=True)
class LabelledTraces:
    """The traces of a table cut by their labels.

    Attributes:
        table: The table; the last segment of a trace is no step but the token that ends it.
        records: The label of each trace.
        first_wrong: `(num_traces,)`, -1 where no step is wrong.
        num_steps: `(num_traces,)`.
        is_step: `(num_traces, width)`.
        entropies: `(num_traces, width)`, mean entropy of the policy before a step's tokens, nats.
        in_second: `(num_traces,)`, the half of the prompts.
    """

    table: TraceTable
    records: list[LabelRecord]
    first_wrong: Labels
    num_steps: Labels
    is_step: Mask
    entropies: Array
    in_second: Mask

    @classmethod
    def of(cls, evidence: Evidence) -> "LabelledTraces | None":
        """None where the traces have no labels."""
        table = evidence.table
        by_trace = {record.trace: record for record in evidence.measurements.labels}
        if table.cutting != LABELS or not all(trace.trace in by_trace for trace in table.traces):
            return None
        records = [by_trace[trace.trace] for trace in table.traces]
        first_wrong = [-1 if record.first_wrong is None else record.first_wrong for record in records]
        num_steps = table.num_segments - 1
        entropies = np.full(table.is_state.shape, np.nan)
        for row, record in enumerate(records):
            entropies[row, : num_steps[row]] = record.entropies
        prompts = np.random.default_rng(evidence.seed).permutation(np.unique(table.groups))
        return cls(
            table,
            records,
            np.array(first_wrong, dtype=np.int64),
            num_steps,
            np.arange(table.width) < num_steps[:, None],
            entropies,
            np.isin(table.groups, prompts[len(prompts) // 2 :]),
        )

    @property
    def is_wrong(self) -> Mask:
        """`(num_traces,)`, whether a step is wrong."""
        found: Mask = self.first_wrong >= 0
        return found

    @property
    def one_of_all(self) -> Array:
        """`(num_traces,)`, how often a step drawn at random is a given one."""
        share: Array = 1.0 / np.maximum(self.num_steps, 1)
        return share

    def falls(self, values: Array) -> Array:
        """v_{k-1} - v_k of every step `(num_traces, width)` from v_0 .. v_K in the first columns."""
        after = np.concatenate([values[:, 1:], np.full((len(values), 1), np.nan)], axis=1)
        falls: Array = values - after
        return falls

    def entry(
        self,
        name: str,
        family: str,
        about: str,
        scores: Array,
        windows_of: Callable[[Array, Labels], Windows] = first_above,
        *,
        uses_outcome: bool = False,
    ) -> dict[str, Any]:
        """An entry of `labels.entries` in the results, by scores of the steps `(num_traces, width)`."""
        rows: Mask = np.all(np.isfinite(scores) | ~self.is_step, axis=1)
        scores = np.where(self.is_step, scores, -np.inf)
        windows = windows_of(np.where(rows[:, None], scores, -np.inf), self.first_wrong)
        halves = (rows & ~self.in_second, rows & self.in_second)
        if all(half.any() for half in halves):
            # A half has the threshold of the other one.
            thresholds = [self._choose(windows, half) for half in halves[::-1]]
            correct = windows.holds(np.where(self.in_second, thresholds[1], thresholds[0])).astype(np.float64)
            measured = self.measure(correct, rows, self._largest(scores))
        else:
            thresholds, measured = [], dict.fromkeys(NAMES, Measured.none(_NO_HALVES))
        return self._row(name, family, about, rows, measured, thresholds, uses_outcome=uses_outcome)

    def _row(
        self,
        name: str,
        family: str,
        about: str,
        rows: Mask,
        measured: dict[str, Measured],
        thresholds: list[float] | None = None,
        *,
        uses_outcome: bool = False,
    ) -> dict[str, Any]:
        return {
            "name": name,
            "family": family,
            "about": about,
            "uses_outcome": uses_outcome,
            "coverage": float(rows.mean()),
            "thresholds": thresholds or None,
            "measures": intervals(measured),
            "over_chance": measured["f1"].minus(self.chance(rows)["f1"]).interval(),
        }

    def _choose(self, windows: Windows, part: Mask) -> float:
        return choose_threshold(Windows(windows.low[part], windows.high[part]), self.is_wrong[part])

    def measure(self, correct: Array, rows: Mask, largest: Array) -> dict[str, Measured]:
        """Each of `NAMES`.

        Args:
            correct: `(num_traces,)`, probability that the prediction is right.
            rows: `(num_traces,)`, the traces to count.
            largest: `(num_traces,)`, probability that the wrong step has the largest score.
        """
        resamples, groups = self.table.resamples, self.table.groups
        parts = {
            "wrong": (rows & self.is_wrong, _NONE_WRONG),
            "right": (rows & ~self.is_wrong, _ALL_WRONG),
            "exact": (rows, None),
        }
        found = {
            name: Measured.of(resamples.mean(correct[part], groups[part]), groups[part], reason)
            for name, (part, reason) in parts.items()
        }
        f1 = harmonic(found["wrong"].samples, found["right"].samples)
        part, reason = parts["wrong"]
        return {
            "f1": Measured.of(f1, groups[rows], f"{_NONE_WRONG}, or {_ALL_WRONG}"),
            **found,
            "largest": Measured.of(resamples.mean(largest[part], groups[part]), groups[part], reason),
        }

    def chance(self, rows: Mask) -> dict[str, Measured]:
        """None with the share of traces of which none is wrong, else any step of the trace."""
        share_right = float((~self.is_wrong)[rows].mean()) if rows.any() else 0.0
        one = self.one_of_all
        expected: Array = np.where(self.is_wrong, (1 - share_right) * one, share_right)
        return self.measure(expected, rows, one)

    def rules(self) -> list[dict[str, Any]]:
        """What reads no value: chance, constant answers, surprisal and entropy."""
        everyone, none = np.ones(len(self.first_wrong), dtype=bool), ~self.is_wrong
        one = self.one_of_all
        first = (self.first_wrong == 0).astype(np.float64)
        last = (self.first_wrong == self.num_steps - 1).astype(np.float64)
        fixed = {
            "chance": ("no wrong step as often as there is none, else any step", self.chance(everyone)),
            "first_step": ("always the first step", self.measure(first, everyone, first)),
            "last_step": ("always the last step", self.measure(last, everyone, last)),
            "no_step": ("never a wrong step", self.measure(none.astype(np.float64), everyone, one)),
        }
        rows = [self._row(name, "rule", about, everyone, measured) for name, (about, measured) in fixed.items()]
        surprisal = "the step of the largest mean surprisal of its tokens, if above a threshold"
        entropy = "the step of the largest mean entropy before its tokens, if above a threshold"
        return [
            *rows,
            self.entry("surprisal", "rule", surprisal, -self.table.fluency, largest_above),
            self.entry("entropy", "rule", entropy, self.entropies, largest_above),
        ]

    def _largest(self, scores: Array) -> Array:
        """`(num_traces,)`, whether the wrong step has the largest score; equals share."""
        is_top = scores == scores.max(axis=1, keepdims=True)
        own = is_top[np.arange(len(scores)), np.maximum(self.first_wrong, 0)]
        share: Array = own / np.maximum(is_top.sum(axis=1), 1)
        return share


def labelled_results(evidence: Evidence, methods: list[Method]) -> dict[str, Any] | None:
    """`labels` of the results, see docs/analyze.md; None where the traces have no labels."""
    traces = LabelledTraces.of(evidence)
    if traces is None:
        return None
    table, is_wrong = traces.table, traces.is_wrong
    generators = sorted({record.generator for record in traces.records if record.generator})
    entries = [
        traces.entry(
            method.name,
            method.family,
            method.about,
            traces.falls(method.values),
            uses_outcome=method.uses_outcome,
        )
        for method in evidence.each(methods, "labels")
        if method.covers(table).any()
    ]
    return {
        "num_traces": len(table.traces),
        "num_groups": len(np.unique(table.groups)),
        "num_wrong": int(is_wrong.sum()),
        "num_right": int((~is_wrong).sum()),
        "num_wrong_solved": int((is_wrong & ~table.failed).sum()),
        "num_right_failed": int((~is_wrong & table.failed).sum()),
        "outcomes": dict(Counter(record.outcome for record in traces.records)),
        "mean_steps": float(traces.num_steps.mean()),
        "generators": generators[:_MOST_GENERATORS],
        "entries": [*traces.rules(), *entries],
    }
