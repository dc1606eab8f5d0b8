"""Statistics over the seeds of an experiment: few numbers, paired, with intervals that know how few they are.

A seed gives every arm the same start and the same order of problems, so arms are compared by differences within seeds.
All intervals are Student's t at 95 % over seeds, or over the pseudo-values of a jackknife where a figure is no mean.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Interval = dict[str, Any]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Curves:
    """Learning curves of one arm, a row a seed.

    Attributes:
        seeds: Of the rows.
        samples: `(num_points,)`, responses spent, increasing.
        accuracy: `(num_seeds, num_points)`.
    """

    seeds: tuple[int, ...]
    samples: Array
    accuracy: Array

    @property
    def mean(self) -> Array:
        """Mean over seeds, `(num_points,)`."""
        mean: Array = self.accuracy.mean(axis=0)
        return mean

    @property
    def area(self) -> Array:
        """Mean accuracy over the samples (trapezoid), `(num_seeds,)`."""
        width = self.samples[-1] - self.samples[0]
        if width == 0:
            return self.accuracy[:, 0]
        area: Array = np.trapezoid(self.accuracy, self.samples, axis=1) / width
        return area

    def smoothed(self, window: int) -> "Curves":
        """Means of `window` neighbouring points, at the middle of each window; the ends that fill none are left out."""
        window = max(1, min(window, len(self.samples)))
        kernel = np.full(window, 1 / window)
        rows = [np.convolve(row, kernel, mode="valid") for row in self.accuracy]
        return Curves(self.seeds, np.convolve(self.samples, kernel, mode="valid"), np.array(rows))

    def of_seeds(self, seeds: Sequence[int]) -> "Curves":
        """The rows of these seeds, in their order."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return Curves(tuple(seeds), self.samples, self.accuracy[rows])

    def at(self, samples: Array) -> "Curves":
        """The points at these samples."""
        return Curves(self.seeds, samples, self.accuracy[:, np.isin(self.samples, samples)])

    def band(self) -> list[Interval]:
        """At each point the mean over seeds and its interval."""
        return [t_interval(column) for column in self.accuracy.T]


def t_quantile(num_degrees: int, confidence: float = CONFIDENCE) -> float:
    """The two-sided quantile of Student's t: 12.71 for one degree of freedom, 2.776 for four, at 95 %.

    By bisection of its distribution function, which is a finite sum for whole degrees (Abramowitz and Stegun 26.7.3,
    26.7.4).
    """
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_mass(middle, num_degrees) < confidence else (low, middle)
    return high


def t_interval(values: Sequence[float] | Array) -> Interval:
    """Mean of a few numbers and its 95 % t interval; none with fewer than two.

    Returns:
        `estimate`, `low`, `high`, `num`.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not numbers.size:
        return {"estimate": None, "low": None, "high": None, "num": 0}
    mean, low, high = float(numbers.mean()), None, None
    if numbers.size > 1:
        half = t_quantile(numbers.size - 1) * float(numbers.std(ddof=1)) / math.sqrt(numbers.size)
        low, high = mean - half, mean + half
    return {"estimate": mean, "low": low, "high": high, "num": int(numbers.size)}


def isotonic(values: Array) -> Array:
    """The non-decreasing sequence that is nearest in squares (pool adjacent violators)."""
    means: list[float] = []
    counts: list[int] = []
    for value in values:
        mean, count = float(value), 1
        while means and means[-1] >= mean:
            mean = (mean * count + means[-1] * counts[-1]) / (count + counts[-1])
            count += counts.pop()
            means.pop()
        means.append(mean)
        counts.append(count)
    return np.repeat(means, counts)


def samples_to_reach(samples: Array, accuracy: Array, level: float) -> float:
    """Samples after which a learning curve has reached an accuracy for good; infinite where it has not.

    The curve is the nearest non-decreasing one, so that neither a lucky point counts as reached nor an unlucky one as
    lost; it is straight between the middles of its flat parts. What its first part is at already took no samples.

    Args:
        samples: `(num_points,)`, increasing.
        accuracy: `(num_points,)`, noisy.
        level: The accuracy to reach.
    """
    fitted = isotonic(accuracy)
    levels, index = np.unique(fitted, return_inverse=True)
    middles = np.bincount(index, weights=samples) / np.bincount(index)
    if level > levels[-1]:
        return math.inf
    if level <= levels[0]:
        return 0.0
    return float(np.interp(level, levels, middles))


def ratio_to_reach(arm: Curves, baseline: Curves, level_of: Callable[[Curves], float]) -> Interval:
    """Samples that an arm needs to reach an accuracy, over those of the baseline: of their mean curves over seeds.

    The interval is that of the log-ratio, by a jackknife over the seeds that both have: each is left out of both arms
    at once, the level is found anew, and the pseudo-values have a t interval.

    Args:
        arm: Curves of the arm.
        baseline: Curves of the baseline.
        level_of: The accuracy to reach, given the baseline's curves.

    Returns:
        `estimate`, `low`, `high`, `num` of seeds, and why one of them is missing (`reason`). Where the arm does not
        reach the level, `at_least` is what the ratio exceeds: all its samples over those of the baseline.
    """
    seeds = [seed for seed in baseline.seeds if seed in arm.seeds]
    result: Interval = {"estimate": None, "low": None, "high": None, "num": len(seeds), "at_least": None}

    def needed(chosen: Sequence[int]) -> tuple[float, float]:
        own, other = arm.of_seeds(chosen), baseline.of_seeds(chosen)
        level = level_of(other)
        return samples_to_reach(own.samples, own.mean, level), samples_to_reach(other.samples, other.mean, level)

    if not seeds:
        return result | {"reason": "no seed in common"}
    own, other = needed(seeds)
    if not (math.isfinite(other) and other > 0):
        return result | {"reason": "the baseline does not reach it" if other else "reached at the start"}
    if not math.isfinite(own):
        return result | {"reason": "not reached", "at_least": float(arm.samples[-1]) / other}
    if not own:
        return result | {"reason": "reached at the start"}
    result["estimate"] = own / other
    if len(seeds) < 2:
        return result | {"reason": "no interval: a single seed"}
    without = [needed([other for other in seeds if other != seed]) for seed in seeds]
    if not all(math.isfinite(number) and number > 0 for pair in without for number in pair):
        return result | {"reason": "no interval: not reached when a seed is left out"}
    log, num = math.log(own / other), len(seeds)
    pseudo = t_interval([num * log - (num - 1) * math.log(left / right) for left, right in without])
    half = (pseudo["high"] - pseudo["low"]) / 2
    return result | {"low": math.exp(log - half), "high": math.exp(log + half), "reason": None}


def _central_mass(t: float, num_degrees: int) -> float:
    """Probability that |T| is below t."""
    angle = math.atan(t / math.sqrt(num_degrees))
    cosine_squared = math.cos(angle) ** 2
    if num_degrees % 2:
        term = math.cos(angle)
        total = term if num_degrees > 1 else 0.0
        for k in range(3, num_degrees - 1, 2):
            term *= cosine_squared * (k - 1) / k
            total += term
        return 2 / math.pi * (angle + math.sin(angle) * total)
    term = total = 1.0
    for k in range(2, num_degrees - 1, 2):
        term *= cosine_squared * (k - 1) / k
        total += term
    return math.sin(angle) * total
