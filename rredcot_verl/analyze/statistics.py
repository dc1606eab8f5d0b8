"""Statistics with intervals by a bootstrap over prompts.

Traces of a prompt share their difficulty and states of a trace their past, so neither is independent; prompts are.
Every statistic here is computed on all resamples at once and returns `(num_resamples + 1,)` numbers: the first is the
estimate on the data themselves, the others are those of the resamples. Two methods' statistics on the same
`Resamples` are paired, so their difference has an interval of its own.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

CONFIDENCE = 0.95
FEWEST_GROUPS = 2
"""Below this many prompts there is no interval."""
BLOCK = 1 << 18
"""Numbers ranked at once: what fits a core's cache."""
_NOTHING = "nothing to measure it on"
MOST_UNDEFINED = 0.05
"""Share of resamples on which a statistic may be undefined (no spread left) before its interval is given up."""


@dataclass(frozen=True)
class Resamples:
    """How often each prompt is drawn in each resample.

    Attributes:
        counts: `(num_resamples + 1, num_groups)`; the first row is 1 everywhere.
    """

    counts: Array

    @classmethod
    def draw(cls, num_groups: int, num_resamples: int, seed: int) -> "Resamples":
        """Draw prompts with replacement.

        Args:
            num_groups: Number of prompts.
            num_resamples: Number of resamples.
            seed: The same seed draws the same resamples.
        """
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(num_groups, np.full(num_groups, 1 / max(num_groups, 1)), size=num_resamples)
        return cls(np.concatenate([np.ones((1, num_groups)), drawn.astype(np.float64)]))

    def total(self, quantity: Array, groups: Labels) -> Array:
        """Sum of `quantity` `(num,)`, each item counted as often as its group `(num,)` was drawn."""
        return self.counts @ np.bincount(groups, weights=quantity, minlength=self.counts.shape[1])

    def mean(self, quantity: Array, groups: Labels) -> Array:
        """Mean of `quantity` `(num,)` over items."""
        return self.ratio(quantity, np.ones_like(quantity), groups)

    def ratio(self, above: Array, below: Array, groups: Labels) -> Array:
        """Sum of `above` over sum of `below`; NaN where that is 0."""
        return _divide(self.total(above, groups), self.total(below, groups))

    def spearman(self, x: Array, y: Array, groups: Labels) -> Array:
        """Rank correlation of `x` and `y` `(num,)`, ranked anew in every resample; ties share their mean rank."""
        ranker_x, ranker_y = Ranker(x), Ranker(y)

        def correlation(weights: Array) -> Array:
            ranks_x, ranks_y = ranker_x.ranks(weights), ranker_y.ranks(weights)
            weighted = weights * ranks_x
            covariance = np.einsum("bn,bn->b", weighted, ranks_y)
            spread_x = np.einsum("bn,bn->b", weighted, ranks_x)
            spread_y = np.einsum("bn,bn,bn->b", weights, ranks_y, ranks_y)
            scale = weights.sum(axis=1) ** 3
            return _correlation(covariance, spread_x, spread_y, scale)

        return self._in_blocks(correlation, groups)

    def auc(self, score: Array, positive: NDArray[np.bool_], groups: Labels) -> Array:
        """Probability that a positive item scores above a negative one, a tie counting one half; items `(num,)`."""
        ranker = Ranker(score)

        def share(weights: Array) -> Array:
            num_positive = weights[:, positive].sum(axis=1)
            num_negative = weights.sum(axis=1) - num_positive
            # Ranks are centred on 0; half the number of positive items is the mean rank among themselves.
            lead = (weights * ranker.ranks(weights))[:, positive].sum(axis=1)
            return _divide(lead, num_positive * num_negative) + 0.5

        return self._in_blocks(share, groups)

    def _in_blocks(self, statistic: Callable[[Array], Array], groups: Labels) -> Array:
        """A statistic of how often each item is drawn, computed on a part of the resamples at a time."""
        if not groups.size:
            return np.full(len(self.counts), np.nan)
        size = max(1, BLOCK // groups.size)
        starts = range(0, len(self.counts), size)
        return np.concatenate([statistic(self.counts[start : start + size][:, groups]) for start in starts])


class Ranker:
    """Ranks of fixed numbers under changing weights: sorted once, ranked often."""

    def __init__(self, numbers: Array) -> None:
        _, self._place, repeats = np.unique(numbers, return_inverse=True, return_counts=True)
        self._order = np.argsort(self._place, kind="stable")
        self._ends = np.cumsum(repeats) - 1

    def ranks(self, weights: Array) -> Array:
        """Mean ranks `(num_resamples, num)`, less their weighted mean, when number n occurs `weights[b, n]` times."""
        until = np.cumsum(weights[:, self._order], axis=1)[:, self._ends]
        before = np.concatenate([np.zeros((len(until), 1)), until[:, :-1]], axis=1)
        ranks: Array = (until + before - until[:, -1:]) / 2
        return ranks[:, self._place]


def within_ranks(numbers: Array, valid: NDArray[np.bool_]) -> Array:
    """Ranks within each row: `(num_rows, width)`, ties sharing their mean rank; 0 where not `valid`."""
    both = valid[:, :, None] & valid[:, None, :]
    filled = np.where(valid, numbers, 0.0)
    below = (filled[:, None, :] < filled[:, :, None]) & both
    equal = (filled[:, None, :] == filled[:, :, None]) & both
    return np.where(valid, below.sum(axis=2) + (equal.sum(axis=2) + 1) / 2, 0.0)


def row_correlation(x: Array, y: Array, valid: NDArray[np.bool_], fewest: int = 3) -> Array:
    """Pearson correlation within each row `(num_rows, width)`, on ranks for Spearman's.

    Returns:
        `(num_rows,)`; NaN where fewer than `fewest` items are valid or `y` does not vary (there is nothing to order),
        0 where `x` alone does not vary (it orders nothing, and must not escape the mean by that).
    """
    num = valid.sum(axis=1)
    safe = np.maximum(num, 1)
    x, y = np.where(valid, x, 0.0), np.where(valid, y, 0.0)
    x = np.where(valid, x - (x.sum(axis=1) / safe)[:, None], 0.0)
    y = np.where(valid, y - (y.sum(axis=1) / safe)[:, None], 0.0)
    spread_x, spread_y = (x * x).sum(axis=1), (y * y).sum(axis=1)
    flat_x, flat_y = spread_x <= 1e-18 * safe, spread_y <= 1e-18 * safe
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.where(flat_x, 0.0, (x * y).sum(axis=1) / np.sqrt(spread_x * spread_y))
    return np.where((num < fewest) | flat_y, np.nan, np.clip(correlation, -1.0, 1.0))


@dataclass(frozen=True)
class Measured:
    """A statistic on all resamples.

    Attributes:
        samples: `(num_resamples + 1,)`, the first on the data; empty where there is none.
        num: States, segments or traces behind it.
        num_groups: Prompts among them.
        reason: Why there is none.
    """

    samples: Array
    num: int
    num_groups: int
    reason: str | None = None

    @classmethod
    def of(cls, samples: Array, groups: Labels, reason: str | None = None) -> "Measured":
        """A statistic of items, whose prompts are `groups` `(num,)`."""
        return cls(samples, len(groups), len(np.unique(groups)), reason)

    @classmethod
    def none(cls, reason: str) -> "Measured":
        """A measure that does not apply."""
        return cls(np.zeros(0), 0, 0, reason)

    def interval(self) -> dict[str, Any]:
        """Estimate and 95 % percentile interval, ready for JSON.

        Returns:
            `estimate`, `low`, `high` (None where not defined), `num`, `num_groups` and `reason` (None if all is there).
        """
        samples, reason = self.samples, self.reason
        result: dict[str, Any] = {"estimate": None, "low": None, "high": None, "num": 0, "num_groups": 0}
        if not samples.size:
            return {**result, "reason": reason or _NOTHING}
        result |= {"num": self.num, "num_groups": self.num_groups}
        if self.num == 0 or not math.isfinite(samples[0]):
            return {**result, "reason": reason or (_NOTHING if self.num == 0 else "nothing varies")}
        result["estimate"] = float(samples[0])
        drawn = samples[1:][np.isfinite(samples[1:])]
        if self.num_groups < FEWEST_GROUPS:
            return {**result, "reason": "no interval: a single prompt"}
        if len(drawn) < max(1, (1 - MOST_UNDEFINED) * (len(samples) - 1)):
            return {**result, "reason": "no interval: not defined on too many resamples"}
        tail = 100 * (1 - CONFIDENCE) / 2
        result["low"], result["high"] = (float(number) for number in np.percentile(drawn, [tail, 100 - tail]))
        return {**result, "reason": None}

    def minus(self, other: "Measured") -> "Measured":
        """The paired difference."""
        if not self.samples.size or not other.samples.size:
            return Measured.none(self.reason or other.reason or _NOTHING)
        return Measured(self.samples - other.samples, self.num, self.num_groups)


def intervals(measured: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """Several measures by name, ready for JSON."""
    return {name: value.interval() for name, value in measured.items()}


def _divide(above: Array, below: Array) -> Array:
    result: Array = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=np.asarray(below) != 0)
    return result


def _correlation(covariance: Array, spread_x: Array, spread_y: Array, scale: Array) -> Array:
    """Covariance over spreads; NaN where a spread is rounding of the scale."""
    varies = (spread_x > 1e-12 * scale) & (spread_y > 1e-12 * scale)
    norm = np.sqrt(np.where(varies, spread_x * spread_y, 1.0))
    return np.where(varies, np.clip(covariance / norm, -1.0, 1.0), np.nan)
