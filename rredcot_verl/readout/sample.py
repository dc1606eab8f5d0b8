"""The rows of a fit, and fits to some of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from rredcot_verl.readout.fit import LogisticFit, log_likelihood

INFINITE = float("inf")
AUTOMATIC = 0.0
INTERCEPT_RIDGE = 1e-3
"""The constant is as good as free."""
STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Rollouts that the mean of the other prompts counts as, beside a prompt's own other rollouts."""
WIDEST = 6.0
"""Standardised columns are clipped at this many standard deviations."""
CHUNK = 3
"""Neighbouring ridges compared by one expansion."""
TINY = 1e-12


class Choice(NamedTuple):
    """What is chosen by held-out likelihood.

    Attributes:
        ridges: Strength for each block of columns, in responses: 1 / variance of a coefficient per standard deviation
            of its column. Infinite: the block is left out.
        strength: Rollouts that the mean of the other prompts counts as in the offset; `AUTOMATIC`: as makes the
            training outcomes likeliest without any column.
    """

    ridges: tuple[float, ...]
    strength: float

    @property
    def used(self) -> tuple[bool, ...]:
        """Which blocks are not left out."""
        return tuple(ridge < INFINITE for ridge in self.ridges)


@dataclass(frozen=True)
class Sample:
    """Rows to fit to and to value.

    Attributes:
        design: `(num_rows, num_features + 1)` float64, from `standardised`.
        blocks: `(num_features,)` int64 from 0.
        group_means: `(num_rows,)` float64, mean outcome of the prompt's other rollouts; NaN: none.
        num_others: `(num_rows,)` float64, how many those are.
        outcomes: `(num_rows,)` float64 in [0, 1].
        weights: `(num_rows,)` float64; a response of the present step has 1 in all.
        prompts: `(num_rows,)` int64, prompts numbered from 0.
        folds: `(num_rows,)` int64.
    """

    design: Tensor
    blocks: Tensor
    group_means: Tensor
    num_others: Tensor
    outcomes: Tensor
    weights: Tensor
    prompts: Tensor
    folds: Tensor


def standardised(features: Tensor) -> Tensor:
    """Columns of mean 0 and deviation 1, clipped, and a column of ones: `(num_rows, num_features + 1)` float64.

    No outcome is read. The strength of a ridge follows each fit's training rows, see `_Fits`.
    """
    features = features.double()
    if not features.numel():
        return features.new_ones(features.size(0), 1 + features.size(1))
    center, scale = features.mean(dim=0), features.std(dim=0, correction=0)
    varies = scale > 1e-9 * (1.0 + center.abs())
    standard = ((features - center) / scale.masked_fill(~varies, 1.0)).clamp(-WIDEST, WIDEST) * varies
    return torch.cat([standard, standard.new_ones(len(standard), 1)], dim=1)


class Fits:
    """Fits to the rows in `train`; they see no outcome of another row.

    Args:
        sample: All rows.
        train: `(num_rows,)` bool.
    """

    def __init__(self, sample: Sample, train: Tensor) -> None:
        self._sample = sample
        self._train = train.nonzero().flatten()
        self._outcomes = outcomes = sample.outcomes[self._train]
        agree = self._others_agree(self._train)
        self._selected = not bool((agree & ((outcomes - sample.group_means[self._train]).abs() < TINY)).any())
        self._weights = weights = self.weights(self._train)
        total, successes = weights.sum(), weights @ outcomes
        self.mean = min(1.0, float(successes / total)) if total > 0 else 0.5
        """Mean outcome of the training rows."""
        # Half a success and half a failure more, or a mean of 0 or 1 would have no log-odds.
        self._level = float((successes + 0.5) / (total + 1.0))
        self._design = sample.design[self._train]
        center = weights @ self._design / total.clamp(min=TINY)
        self._variances = weights @ self._design.square() / total.clamp(min=TINY) - center.square()
        self._silent = outcomes.numel() == 0 or bool((outcomes == outcomes[0]).all())
        self._offsets: dict[float, Tensor] = {}
        self._kept: dict[tuple[Choice, ...], Tensor] = {}

    def weights(self, of: Tensor) -> Tensor:
        """Weights of the rows `of` (numbers) in a likelihood.

        Prompts that were all right or all wrong are often not measured. Of those that were, a rollout whose others are
        all wrong is right, whatever its states: that is the selection, and it says nothing. Given others that do not
        agree, the own outcome was not selected for. So where no training prompt is uniform, rows with 0 or 1 as the
        mean of the others do not count.
        """
        weights = self._sample.weights[of]
        return weights.masked_fill(self._others_agree(of), 0.0) if self._selected else weights

    def _others_agree(self, of: Tensor) -> Tensor:
        means = self._sample.group_means[of]
        return (means < TINY) | (means > 1.0 - TINY)

    def log_odds(self, choice: Choice, of: Tensor) -> Tensor:
        """Log-odds of the rows `of` (numbers), fitted to the last digit."""
        offsets = self._drawn(choice.strength)
        if self._silent or not any(choice.used):
            return offsets[of]
        columns = self._columns(choice)
        fit = LogisticFit(self._design[:, columns], offsets[self._train], self._outcomes, self._weights)
        return offsets[of] + self._sample.design[of][:, columns] @ fit.fit(self._penalties(choice))

    def compare(self, choices: Iterable[Choice], of: Tensor) -> dict[Choice, Tensor]:
        """Log-odds of the rows `of` (numbers) for each choice, close enough to compare them.

        They depend on the set of choices by a little, so what is asked for together must be known together.
        """
        found: dict[Choice, Tensor] = {}
        for used, group in groupby(sorted(choices, key=lambda c: (c.used, c.strength, *c.ridges)), lambda c: c.used):
            alike = tuple(group)
            offsets = torch.stack([self._drawn(choice.strength)[of] for choice in alike])
            if any(used) and not self._silent:
                offsets = offsets + self._coefficients(alike) @ self._sample.design[of][:, self._columns(alike[0])].T
            found.update(zip(alike, offsets, strict=True))
        return found

    def _drawn(self, strength: float) -> Tensor:
        """Offsets of all rows: log-odds of the group means, drawn to the training rows' mean."""
        if strength not in self._offsets:
            if strength == AUTOMATIC:
                self._offsets[strength] = max((self._drawn(value) for value in STRENGTHS), key=self._likelihood)
            else:
                means, others = self._sample.group_means.nan_to_num(nan=0.0), self._sample.num_others
                self._offsets[strength] = ((strength * self._level + others * means) / (strength + others)).logit()
        return self._offsets[strength]

    def _likelihood(self, log_odds: Tensor) -> float:
        return float(self._weights @ log_likelihood(log_odds[self._train], self._outcomes))

    def _coefficients(self, choices: tuple[Choice, ...]) -> Tensor:
        """`(num_choices, num_columns)` of choices that use the same blocks, sorted; kept, as folds often ask alike."""
        if choices not in self._kept:
            fit, found = None, []
            for strength, group in groupby(choices, lambda choice: choice.strength):
                offsets = self._drawn(strength)[self._train]
                if fit is None:
                    columns = self._columns(choices[0])
                    fit = LogisticFit(self._design[:, columns], offsets, self._outcomes, self._weights)
                else:
                    fit = fit.moved(offsets)
                penalties = torch.stack([self._penalties(choice) for choice in group])
                found += [fit.path(part) for part in torch.split(penalties, CHUNK)]
            self._kept[choices] = torch.cat(found)
        return self._kept[choices]

    def _columns(self, choice: Choice) -> Tensor:
        """Numbers of the columns in use: those of the blocks in use, and the constant."""
        used = torch.tensor(choice.used)[self._sample.blocks]
        return torch.cat([used, used.new_ones(1)]).nonzero().flatten()

    def _penalties(self, choice: Choice) -> Tensor:
        """Ridge of the columns in use, per unit of the columns as they are: `(num_columns,)`."""
        # A ridge on standardised columns is one on the columns times their variances. A column that does not vary in
        # the training rows has taught the fit nothing.
        variances = self._variances[:-1]
        ridges = torch.tensor(choice.ridges, dtype=torch.float64)[self._sample.blocks]
        ridges = ridges * torch.where(variances > 1e-8, variances, 1e12)
        return torch.cat([ridges, ridges.new_tensor([INTERCEPT_RIDGE])])[self._columns(choice)]
