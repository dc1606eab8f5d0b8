"""What the gradient of one form of credit is worth beside GRPO's, from the gradients of many units of prompts.

A *unit* is one or more prompts with all their traces: an independent draw. With h its summed gradient and n its
response tokens, the gradient of a batch of m units is that of verl's `token-mean` loss, g = (sum of h) / (sum of n).
Its mean is mu = E[h] / E[n], and by the delta method the variance of its coordinate i is var_i / m with
var_i = E[(h_i - n mu_i)^2] / E[n]^2. So units of any size say what a batch of any size would do.

Two views, both relative to GRPO's gradient of the same traces:

- Euclid: (progress along the direction)^2 / variance, summed over coordinates.
- Adam scales each coordinate by its own root mean square, so its expected step is mu_i / sqrt(mu_i^2 + var_i / m), and
  sum_i s_i of that, with s the direction, is the rise of what is maximised, to first order and up to the rate.

No product is made of a unit with itself, which would be its noise: <s, mu> is a mean over pairs of different units.
Adam's denominators come from the half of the units that the pairs do not come from, in each of the three ways to halve
four quarters. What is left is the bias of a root of an estimate, of order 1 / (number of units) and much the same for
both forms; the jackknife over groups of units takes that order out and gives the intervals.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FEWEST_UNITS = 10
TOO_FEW = f"gradients of fewer than {FEWEST_UNITS} prompts: their mean is noise"
NO_DIRECTION = "GRPO's mean gradient does not stand out from its noise; take more prompts"
NOT_REACHED = "not reached within the numbers of samples that were measured"
MEASURES = ("efficiency", "adam", "samples")
SHARES = (0.06, 0.125, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)
"""Sizes of a batch, over the given one, at which Adam's step is computed."""
_GROUPS = 16
_HALVES = ((0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2))
"""Quarters of each half; its neighbour is the other half."""
_BLOCK = 1 << 11
_TINY = 1e-30
_LEAST = 0.1
"""A mean square that is less than this share of the other half's counts as so much."""
_Z = 1.96


@dataclass(frozen=True)
class UnitGradients:
    """Gradients of one form of credit, a row a unit.

    Attributes:
        coordinates: `(num_units, num_coordinates)` float32, all coordinates of h or a random part of them.
        sketch: `(num_units, dim)`, what keeps inner products; None: the coordinates, as they are all there.
    """

    coordinates: Tensor
    sketch: Tensor | None = None

    @property
    def whole(self) -> Tensor:
        """What inner products are taken of."""
        return self.coordinates if self.sketch is None else self.sketch

    def rows(self, kept: Tensor) -> "UnitGradients":
        """Some units, by a `(num_units,)` mask."""
        return UnitGradients(self.coordinates[kept], None if self.sketch is None else self.sketch[kept])


class GradientComparison:
    """Compares forms of credit with GRPO on the same units.

    Args:
        direction: The gradients whose mean is the direction of progress.
        grpo: GRPO's.
        tokens: `(num_units,)`, response tokens of each.
        units_per_batch: Units of an optimiser step's batch; need not be whole.
        seed: Deals the units into quarters and groups.
    """

    def __init__(
        self, direction: UnitGradients, grpo: UnitGradients, tokens: Tensor, units_per_batch: float, seed: int = 0
    ) -> None:
        self._direction, self._m = direction, units_per_batch
        self._tokens = tokens.double()
        num = len(tokens)
        order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
        place = torch.empty(num, dtype=torch.int64)
        place[order] = torch.arange(num)
        self._quarters = place % 4
        # In runs, so that a group takes from every quarter.
        groups = place * min(_GROUPS, num) // max(num, 1)
        leave_out = torch.arange(min(_GROUPS, num)).unsqueeze(1) != groups
        self._kept = torch.cat([torch.ones(1, num, dtype=torch.bool), leave_out]).double()
        self.obstacle: str | None = None
        """Why nothing can be compared, if so."""
        if num < FEWEST_UNITS:
            self.obstacle = TOO_FEW
            return
        self._progress, self._variance = self._euclid(grpo)
        self._step = self._adam(grpo)[:, SHARES.index(1.0)]
        self._seen = {
            "efficiency": _stands_out(self._progress),
            **dict.fromkeys(("adam", "samples"), _stands_out(self._step)),
        }
        if not any(self._seen.values()):
            self.obstacle = NO_DIRECTION

    def signal_to_noise(self) -> dict[str, Any]:
        """Squared length of GRPO's mean gradient along the direction, over the variance of a batch's gradient."""
        if self.obstacle == TOO_FEW:
            return nothing(TOO_FEW)
        return self._interval(self._progress / self._variance * self._m)

    def compare(self, own: UnitGradients) -> dict[str, dict[str, Any]]:
        """What a form is worth, each figure with its interval; only where there is no `obstacle`.

        A view in which GRPO's own progress does not stand out from noise has no figures: words that decide nothing bury
        it in Euclid's first.

        Returns:
            `efficiency`: progress^2 / variance over GRPO's. `adam`: the progress of Adam's expected step over GRPO's.
            `samples`: the share of GRPO's samples a step at which the form's step makes GRPO's progress.
        """
        progress, variance = self._euclid(own)
        steps = self._adam(own)
        shares = torch.tensor([_crossing(mine, float(at)) for mine, at in zip(steps, self._step, strict=True)])
        found = {
            "efficiency": self._interval((progress / self._progress) ** 2 * self._variance / variance),
            "adam": self._interval(steps[:, SHARES.index(1.0)] / self._step),
            # Shares are ratios of sizes: as logarithms their errors are alike on both sides.
            "samples": self._interval(shares.log(), exponentiate=True),
        }
        return {name: interval if self._seen[name] else nothing(NO_DIRECTION) for name, interval in found.items()}

    def _euclid(self, own: UnitGradients) -> tuple[Tensor, Tensor]:
        """On all units and without each group: progress along the direction, and variance of a unit's gradient."""
        kept, n = self._kept, self._tokens
        whole, direction = own.whole.double(), self._direction.whole.double()
        cross, gram = whole @ direction.T, whole @ whole.T
        total, squares, num = kept @ n, kept @ n**2, kept.sum(dim=1)
        progress = _pairs(kept, cross) / (total**2 - squares)
        length = torch.einsum("ru,uv,rv->r", kept, gram, kept) / total**2
        along = torch.einsum("ru,uv,rv->r", kept * n, gram, kept) / total
        variance = (kept @ gram.diagonal() - 2 * along + squares * length) / (num - 1) / (total / num) ** 2
        return progress, variance

    def _adam(self, own: UnitGradients) -> Tensor:
        """`(1 + num_groups, len(SHARES))`: progress of Adam's expected step, up to a factor that all forms share."""
        halves = torch.stack([torch.isin(self._quarters, torch.tensor(half)) for half in _HALVES])
        weights = (self._kept.unsqueeze(1) * halves).flatten(0, 1).float()
        # Neither the size of the tokens' number nor that of the gradients matters: numbers near 1 lose no digits.
        n = (self._tokens / self._tokens.mean()).float()
        total, squares, num = (each.unsqueeze(1) for each in (weights @ n, weights @ n**2, weights.sum(dim=1)))
        other = torch.arange(len(weights)) ^ 1
        progress = torch.zeros(len(weights), len(SHARES), dtype=torch.float64)
        for ours, theirs in _blocks(own.coordinates, self._direction.coordinates):
            sums = weights @ ours
            mean = sums / total
            product = ((weights @ theirs) * sums - weights @ (ours * theirs)) / (total**2 - squares)
            deviations = weights @ ours**2 - 2 * mean * ((weights * n) @ ours) + mean**2 * squares
            variance = deviations / ((num - 1) * (total / num) ** 2)
            mean_square = mean.square_()
            size = mean_square + variance
            mean_square, variance = mean_square[other], variance[other]
            # Gradients of rare words may all but lack in the half that gives the denominator.
            product *= (size[other] / (_LEAST * size).clamp(min=_TINY)).clamp(0, 1).sqrt()
            for column, share in enumerate(SHARES):
                # The mean's own square holds var / num, and that of a batch var / m: both are in E[g^2].
                square = torch.addcmul(mean_square, variance, 1 / (share * self._m) - 1 / num[other])
                progress[:, column] += torch.einsum("rc,rc->r", product, square.clamp_(min=_TINY).rsqrt_())
        # A batch larger than what the denominators rest on cannot be told from its mean.
        known = torch.tensor(SHARES) * self._m <= num.min()
        return torch.where(known, progress, torch.nan).view(len(self._kept), len(_HALVES), -1).mean(dim=1)

    def _interval(self, numbers: Tensor, exponentiate: bool = False) -> dict[str, Any]:
        """Jackknife: the first number is that of all units, the others those without each group."""
        if not numbers[0].isfinite():
            return nothing(NOT_REACHED)
        estimate, error = _jackknife(numbers)
        ends = (estimate, estimate - _Z * error, estimate + _Z * error)
        values = [math.exp(end) if exponentiate else end for end in ends]
        named = dict(zip(("estimate", "low", "high"), values, strict=True))
        found: dict[str, Any] = {**named, "num": len(self._tokens), "num_groups": len(numbers) - 1, "reason": None}
        if not numbers.isfinite().all():
            whole = float(numbers[0])
            found |= {"estimate": math.exp(whole) if exponentiate else whole, "low": None, "high": None}
            found["reason"] = "no interval: not reached without some of the prompts"
        return found


def _pairs(weights: Tensor, products: Tensor) -> Tensor:
    """Sum of the products of different units, for each row of weights of 0 and 1."""
    return torch.einsum("ru,uv,rv->r", weights, products, weights) - weights @ products.diagonal()


def _blocks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """The same columns of several matrices, each scaled to a mean square of 1, few enough for a core's cache."""
    scales = [float(tensor.square().mean().clamp(min=_TINY).rsqrt()) for tensor in tensors]
    for start in range(0, tensors[0].shape[1], _BLOCK):
        yield [tensor[:, start : start + _BLOCK] * scale for tensor, scale in zip(tensors, scales, strict=True)]


def _jackknife(numbers: Tensor) -> tuple[float, float]:
    whole, parts = numbers[0], numbers[1:]
    num = len(parts)
    estimate = num * whole - (num - 1) * parts.mean()
    error = ((num - 1) / num * ((parts - parts.mean()) ** 2).sum()).sqrt()
    return float(estimate), float(error)


def _stands_out(numbers: Tensor) -> bool:
    estimate, error = _jackknife(numbers)
    # Of a mean over pairs that is 0, the jackknife's variance is twice the true one. Not a number where a batch is more
    # than was measured.
    return estimate > _Z * error / math.sqrt(2)


def nothing(reason: str) -> dict[str, Any]:
    """An interval that is not there."""
    return {"estimate": None, "low": None, "high": None, "num": 0, "num_groups": 0, "reason": reason}


def _crossing(steps: Tensor, wanted: float) -> float:
    """The share at which progress, which grows with the batch, reaches what is wanted; NaN beyond what is known."""
    known: Mapping[float, float] = {share: step for share, step in zip(SHARES, steps.tolist(), strict=True) if step > 0}
    points = sorted(known.items())
    for (share, low), (further, high) in zip(points, points[1:], strict=False):
        if low <= wanted <= high and high > low:
            way = math.log(wanted / low) / math.log(high / low)
            return math.exp(math.log(share) + way * math.log(further / share))
    return math.nan
