"""One method's entry in the results: its measures, its differences to the reference, its credit and its cost."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from rredcot_verl.analyze import measures, wrong_lines
from rredcot_verl.analyze.estimators import REFERENCE
from rredcot_verl.analyze.measures import agreement, calibration_curve
from rredcot_verl.analyze.method_values import ALL_ROLLOUTS, ORACLE, Evidence, Method
from rredcot_verl.analyze.statistics import Array, Measured, intervals
from rredcot_verl.analyze.trace_table import Mask

IS_THE_GOLD = "it is the gold itself"


class Comparison:
    """Compares methods on one table, and keeps what several of them need.

    Args:
        evidence: The traces under one cutting.
        methods: The methods; the one named `joint:reference` is what others are compared with.
    """

    def __init__(self, evidence: Evidence, methods: Iterable[Method] = ()) -> None:
        self.evidence = evidence
        self.table = table = evidence.table
        self.methods = {method.name: method for method in methods}
        self.reference = self.methods.get(REFERENCE)
        self._gold = ORACLE if table.has_truth else ALL_ROLLOUTS
        self._reference_measures: dict[tuple[str, bytes, tuple[str, ...]], dict[str, Measured]] = {}

    def entry(self, method: Method) -> dict[str, Any]:
        """Everything about one method: an entry of `methods` in the results."""
        rows = method.covers(self.table)
        measured = self.measure(method, rows)
        forecast = not method.uses_outcome and method.name != self._gold
        return {
            "name": method.name,
            "family": method.family,
            "about": method.about,
            "estimator": method.estimator,
            "uses_outcome": method.uses_outcome,
            "against": method.against,
            "coverage": float(rows.mean()),
            "measures": intervals(measured),
            "differences": self._differences(method, measured, rows),
            "over_chance": {"blame_top1": self._over_chance(measured["blame_top1"], method, rows)},
            "calibration": calibration_curve(self.table, method.values, rows) if forecast else None,
            "cost": self.cost(method),
        }

    def measure(self, method: Method, rows: Mask, names: Iterable[str] = measures.NAMES) -> dict[str, Measured]:
        """Agreement and blame of a method on some traces."""
        names = tuple(names)
        is_gold = method.name == self._gold
        measured = agreement(
            self.table,
            method.values,
            self.table.other_rollouts if method.against == "rest" else self.table.gold,
            rows,
            rewards=method.segment_rewards(self.table),
            names=[name for name in names if name in measures.FLUENCY or not is_gold],
            uses_outcome=method.uses_outcome,
        )
        measured = {name: measured.get(name, Measured.none(IS_THE_GOLD)) for name in names}
        found = wrong_lines.blame(self.table, method.segment_rewards(self.table), rows)
        return {**measured, **{f"blame_{name}": value for name, value in found.items()}}

    def cost(self, method: Method) -> dict[str, dict[str, Any]]:
        """Seconds and tokens a trace, beside those of the plain log-prob pass and of generating it."""
        log_prob, generate = self.evidence.cost("log_prob"), self.evidence.cost("generate")
        one = np.ones(len(self.table.traces))
        return {
            "seconds": self._ratio(method.seconds, one),
            "num_tokens": self._ratio(method.num_tokens, one),
            "seconds_of_log_prob": self._ratio(method.seconds, log_prob[0]),
            "seconds_of_generation": self._ratio(method.seconds, generate[0]),
            "tokens_of_generation": self._ratio(method.num_tokens, generate[1]),
        }

    def costs(self) -> dict[str, dict[str, Any]]:
        """What generating a trace and the plain log-prob pass cost."""
        one = np.ones(len(self.table.traces))
        result = {}
        for what in ("generate", "log_prob"):
            seconds, num_tokens = self.evidence.cost(what)
            result[what] = {"seconds": self._ratio(seconds, one), "num_tokens": self._ratio(num_tokens, one)}
        return result

    def gold(self) -> dict[str, Any]:
        """How noisy the gold is, and the correlations that this noise allows at most."""
        table, gold = self.table, self.table.gold
        numbers = gold.num_rollouts[table.is_state]
        known = table.is_state & np.isfinite(gold.noise)
        names = [name for name in measures.NAMES if name.startswith("spearman")]
        everyone = np.ones(len(table.traces), dtype=bool)
        first, second = table.halves
        halves = agreement(table, first.values, second, everyone, names=names)
        return {
            "exact": table.has_truth,
            "num_rollouts": {
                "min": int(numbers.min()) if numbers.size else 0,
                "mean": float(numbers.mean()) if numbers.size else 0.0,
                "max": int(numbers.max(initial=0)),
            },
            "noise": float(gold.noise[known].mean()) if known.any() else None,
            "variance": float(np.var(gold.values[known])) if known.any() else None,
            "split_half": intervals(halves),
            "ceiling": {name: _ceiling(value).interval() for name, value in halves.items()},
        }

    def chance(self) -> dict[str, dict[str, Any]]:
        """Blame by rules that read nothing."""
        rules = wrong_lines.chance(self.table)
        return {rule: intervals(found) for rule, found in rules.items()}

    def _differences(self, method: Method, measured: dict[str, Measured], rows: Mask) -> dict[str, dict[str, Any]]:
        reference = self.reference
        if reference is None or method.name in (REFERENCE, self._gold):
            return {}
        common = rows & reference.covers(self.table)
        if not np.array_equal(common, rows):
            measured = self.measure(method, common)
        theirs = self._of_reference(method.against, common, tuple(measured))
        return {name: measured[name].minus(theirs[name]).interval() for name in measured}

    def _of_reference(self, against: str, rows: Mask, names: tuple[str, ...]) -> dict[str, Measured]:
        key = (against, rows.tobytes(), names)
        if key not in self._reference_measures:
            assert self.reference is not None
            reference = replace(self.reference, against=against)
            kept = [name for name in names if not name.startswith("blame_")]
            self._reference_measures[key] = self.measure(reference, rows, kept)
        return self._reference_measures[key]

    def _over_chance(self, top1: Measured, method: Method, rows: Mask) -> dict[str, Any]:
        flat = np.zeros(self.table.is_state.shape)
        rows = rows & np.isfinite(method.segment_rewards(self.table)).all(axis=1)
        return top1.minus(wrong_lines.blame(self.table, flat, rows)["top1"]).interval()

    def _ratio(self, above: Array, below: Array) -> dict[str, Any]:
        known = np.isfinite(above) & np.isfinite(below)
        groups = self.table.groups[known]
        samples = self.table.resamples.ratio(above[known], below[known], groups)
        return Measured.of(samples, groups, "not measured").interval()


def _ceiling(halves: Measured) -> Measured:
    """Correlation of the true values with the whole gold, from that of its halves (Spearman-Brown)."""
    if not halves.samples.size:
        return halves
    positive = np.where(halves.samples > 0, halves.samples, np.nan)
    reason = "the halves of the gold do not agree"
    return Measured(np.sqrt(2 * positive / (1 + positive)), halves.num, halves.num_groups, reason)
