"""One method's entry in the results: its measures, its differences to the reference, its credit and its cost."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from rredcot_verl.analyze import blame, measures, variance
from rredcot_verl.analyze.board import Board, Gold, Mask, group_numbers, reward_range
from rredcot_verl.analyze.measures import Measured, agreement, calibration_curve
from rredcot_verl.analyze.methods import REFERENCE, Method, cost
from rredcot_verl.analyze.records import Measurements
from rredcot_verl.analyze.statistics import Array, Resamples
from rredcot_verl.analyze.variance import Gradient

FORMS = ("reweight", "td")
THE_GOLD = "monte_carlo_gold"
UNIFORM = 1e-6
"""GRPO advantages below this are rounding in a group whose traces all earn the same."""
RESTING_ON_OTHERS = ("group_mean", "position", "calibrated", "hidden", "both")
"""Names of methods whose values start from the mean of the prompt's other traces begin like this."""
IS_THE_GOLD = "it is the gold itself"


class Comparison:
    """Compares methods on one board, and keeps what several of them need.

    Args:
        measurements: All records.
        board: The traces under one cutting.
        resamples: Of the prompts; the same for all boards, so that differences are paired.
        methods: The methods; the one named `joint:reference` is what others are compared with.
        notes: What could not be done is added here.
    """

    def __init__(
        self,
        measurements: Measurements,
        board: Board,
        resamples: Resamples,
        methods: Iterable[Method],
        notes: list[str],
    ) -> None:
        self.measurements, self.board, self.resamples = measurements, board, resamples
        self.methods = {method.name: method for method in methods}
        self.reference = self.methods.get(REFERENCE)
        self.wrong = blame.wrong_segments(board)
        self.sketches = variance.load_sketches(measurements, board)
        if self.sketches is None:
            notes.append(f"no gradient sketches for {board.cutting}: no variance of the policy gradient")
        self._reference_measures: dict[tuple[str, bytes, tuple[str, ...]], dict[str, Measured]] = {}
        self._grpo_credit = self.advantages(None, "reweight")
        self._grpo = self._gradient(self._grpo_credit)

    def entry(self, method: Method) -> dict[str, Any]:
        """Everything about one method, as `evaluate` documents it."""
        rows = method.covers(self.board)
        measured = self.measure(method, rows)
        forecast = not method.uses_outcome and method.name != THE_GOLD
        return {
            "name": method.name,
            "family": method.family,
            "about": method.about,
            "estimator": method.estimator,
            "uses_outcome": method.uses_outcome,
            "against": method.against,
            "coverage": float(rows.mean()),
            "measures": {name: value.interval() for name, value in measured.items()},
            "differences": self._differences(method, measured, rows),
            "over_chance": {"blame_top1": self._over_chance(measured["blame_top1"], method, rows)},
            "calibration": calibration_curve(self.board, self.resamples, method.values, rows) if forecast else None,
            "credit": {form: self.credit(method, form) for form in FORMS},
            "cost": self.cost(method),
        }

    def measure(self, method: Method, rows: Mask, names: Iterable[str] = measures.NAMES) -> dict[str, Measured]:
        """Agreement and blame of a method on some traces."""
        names = tuple(names)
        if method.name == THE_GOLD:
            measured = {name: Measured.none(IS_THE_GOLD) for name in names}
        else:
            measured = agreement(
                self.board,
                self.resamples,
                method.values,
                self._gold(method.against),
                rows,
                rewards=method.segment_rewards(self.board),
                names=names,
                uses_outcome=method.uses_outcome,
            )
        found = blame.blame(self.board, self.resamples, self.wrong, method.segment_rewards(self.board), rows)
        return {**measured, **{f"blame_{name}": value for name, value in found.items()}}

    def credit(
        self, method: Method | None, form: str, *, beta: float = 1.0, penalty: float = 1.0, lam: float = 1.0
    ) -> dict[str, dict[str, Any]]:
        """Gradient under a credit form relative to GRPO, and the blame by the final advantage."""
        credit = self.advantages(method, form, beta=beta, penalty=penalty, lam=lam)
        own = self._gradient(credit)
        result: dict[str, Measured] = {}
        if own is None or self._grpo is None or self.sketches is None:
            result = {name: Measured.none("no gradient sketches") for name in variance.NAMES}
        else:
            result = variance.compare(self.board, self.resamples, self.sketches, own, self._grpo)
        rows = np.ones(len(self.board.traces), dtype=bool) if method is None else method.covers(self.board)
        # A group whose traces all earn the same has no advantage to place.
        rows &= np.abs(self._grpo_credit[:, 0]) > UNIFORM
        found = blame.blame(self.board, self.resamples, self.wrong, credit, rows)
        result |= {f"blame_{name}": value for name, value in found.items()}
        return {name: value.interval() for name, value in result.items()}

    def cost(self, method: Method) -> dict[str, dict[str, Any]]:
        """Seconds and tokens a trace, beside those of the plain log-prob pass and of generating it."""
        records = self.measurements.costs
        log_prob, generate = (cost(self.board, records, what) for what in ("log_prob", "generate"))
        one = np.ones(len(self.board.traces))
        return {
            "seconds": self._ratio(method.seconds, one),
            "num_tokens": self._ratio(method.num_tokens, one),
            "seconds_of_log_prob": self._ratio(method.seconds, log_prob[0]),
            "seconds_of_generation": self._ratio(method.seconds, generate[0]),
            "tokens_of_generation": self._ratio(method.num_tokens, generate[1]),
        }

    def costs(self) -> dict[str, dict[str, Any]]:
        """What generating a trace and the plain log-prob pass cost."""
        one = np.ones(len(self.board.traces))
        result = {}
        for what in ("generate", "log_prob"):
            seconds, num_tokens = cost(self.board, self.measurements.costs, what)
            result[what] = {"seconds": self._ratio(seconds, one), "num_tokens": self._ratio(num_tokens, one)}
        return result

    def gold(self) -> dict[str, Any]:
        """How noisy the gold is, and the correlations that this noise allows at most."""
        board, gold = self.board, self.board.gold
        numbers = gold.num_rollouts[board.is_state]
        known = board.is_state & np.isfinite(gold.noise)
        names = [name for name in measures.NAMES if name.startswith(("spearman", "pearson"))]
        everyone = np.ones(len(board.traces), dtype=bool)
        first, second = board.halves
        halves = agreement(board, self.resamples, first.values, second, everyone, names=names)
        return {
            "num_rollouts": {
                "min": int(numbers.min()) if numbers.size else 0,
                "mean": float(numbers.mean()) if numbers.size else 0.0,
                "max": int(numbers.max(initial=0)),
            },
            "noise": float(gold.noise[known].mean()) if known.any() else None,
            "variance": float(np.var(gold.values[known])) if known.any() else None,
            "split_half": {name: value.interval() for name, value in halves.items()},
            "ceiling": {name: _ceiling(value).interval() for name, value in halves.items()},
        }

    def chance(self) -> dict[str, dict[str, Any]]:
        """Blame by rules that read nothing."""
        rules = blame.chance(self.board, self.resamples, self.wrong)
        return {rule: {name: value.interval() for name, value in found.items()} for rule, found in rules.items()}

    def grpo(self) -> dict[str, Any]:
        """GRPO's own gradient."""
        if self._grpo is None or self.sketches is None:
            return {"snr": Measured.none("no gradient sketches").interval()}
        return {"snr": variance.signal_to_noise(self.board, self.resamples, self.sketches, self._grpo).interval()}

    def advantages(
        self, method: Method | None, form: str, *, beta: float = 1.0, penalty: float = 1.0, lam: float = 1.0
    ) -> Array:
        """Advantages of the segments as in training; None is GRPO."""
        regressed = method is not None and method.name.startswith(RESTING_ON_OTHERS)
        settings = variance.settings_for(reward_range(self.measurements.run), form, beta, penalty, regressed)
        return variance.advantages(self.measurements, self.board, method, settings, lam)

    def _gradient(self, credit: Array) -> Gradient | None:
        if self.sketches is None:
            return None
        return variance.gradient(self.board, self.sketches, credit, len(group_numbers(self.measurements)))

    def _gold(self, against: str) -> Gold:
        return self.board.rest if against == "rest" else self.board.gold

    def _differences(self, method: Method, measured: dict[str, Measured], rows: Mask) -> dict[str, dict[str, Any]]:
        reference = self.reference
        if reference is None or method.name in (REFERENCE, THE_GOLD):
            return {}
        common = rows & reference.covers(self.board)
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
        flat = np.zeros(self.board.is_state.shape)
        rows = rows & np.isfinite(method.segment_rewards(self.board)).all(axis=1)
        return top1.minus(blame.blame(self.board, self.resamples, self.wrong, flat, rows)["top1"]).interval()

    def _ratio(self, above: Array, below: Array) -> dict[str, Any]:
        known = np.isfinite(above) & np.isfinite(below)
        groups = self.board.groups[known]
        samples = self.resamples.ratio(above[known], below[known], groups)
        return Measured(samples, int(known.sum()), len(np.unique(groups)), "not measured").interval()


def the_gold(board: Board) -> Method:
    """The gold as a method: what credit from Monte Carlo with all continuations would do."""
    values = np.where(board.is_state, board.gold.values, np.nan)
    most = np.where(board.is_state, board.gold.num_rollouts, 0).sum(axis=1) / np.maximum(board.num_segments, 1)
    about = "all continuations of the gold: what Monte Carlo credit can do at this noise"
    return Method(
        THE_GOLD,
        "monte_carlo",
        about,
        values,
        estimator="vineppo",
        seconds=board.seconds * most,
        num_tokens=board.num_tokens * most,
    )


def _ceiling(halves: Measured) -> Measured:
    """Correlation of the true values with the whole gold, from that of its halves (Spearman-Brown)."""
    if not halves.samples.size:
        return halves
    positive = np.where(halves.samples > 0, halves.samples, np.nan)
    reason = "the halves of the gold do not agree"
    return Measured(np.sqrt(2 * positive / (1 + positive)), halves.num, halves.num_groups, reason)
