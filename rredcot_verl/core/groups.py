"""Statistics of the outcomes of a prompt's rollouts, and rewards on the scale from 0 to 1.

Taken here once: credit, attributions and calibration all start from a group's mean.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupStatistics:
    """Outcomes of the group of each row; a group of one has mean 0 and deviation 1 (verl's convention).

    Attributes:
        outcomes: `(bs,)`, R of the row's session.
        mean: `(bs,)`.
        deviation: `(bs,)`, standard deviation with n - 1, as verl's GRPO takes it.
        count: `(bs,)`, number of rollouts, dtype of `outcomes`.
    """

    outcomes: Tensor
    mean: Tensor
    deviation: Tensor
    count: Tensor

    def mean_of_others(self) -> Tensor:
        """`(bs,)` mean outcome of the group's other rollouts; 0 for a group of one."""
        others = (self.count * self.mean - self.outcomes) / (self.count - 1).clamp(min=1)
        return others.masked_fill(self.count == 1, 0.0)

    def deviation_of_others(self) -> Tensor:
        """`(bs,)` standard deviation (with n - 2) of the group's other outcomes; 0 where there are fewer than two."""
        away = (self.outcomes - self.mean) ** 2 * self.count / (self.count - 1).clamp(min=1)
        squares = self.deviation**2 * (self.count - 1) - away
        return (squares.clamp(min=0) / (self.count - 2).clamp(min=1)).sqrt().masked_fill(self.count < 3, 0.0)


def group_statistics(outcomes: Tensor, index: Sequence[Hashable], final_rows: Tensor | None = None) -> GroupStatistics:
    """Mean, deviation and size of each row's group.

    Args:
        outcomes: `(bs,)`.
        index: `bs` group labels.
        final_rows: `(bs,)` int64, for each row the row that holds its session's final output. As in verl's GRPO only
            these enter, and the others share what they get; None: every row is a session.
    """
    if final_rows is not None:
        finals, position = torch.unique(final_rows, return_inverse=True)
        known = group_statistics(outcomes[finals], [index[row] for row in finals.tolist()])
        return GroupStatistics(
            known.outcomes[position], known.mean[position], known.deviation[position], known.count[position]
        )
    labels = {label: number for number, label in enumerate(dict.fromkeys(index))}
    group = torch.tensor([labels[label] for label in index], dtype=torch.int64)
    zeros = torch.zeros(len(labels), dtype=outcomes.dtype)
    count = zeros.scatter_add(0, group, torch.ones_like(outcomes))
    mean = zeros.scatter_add(0, group, outcomes) / count
    squares = zeros.scatter_add(0, group, (outcomes - mean[group]) ** 2)
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    single = count == 1
    mean, deviation = mean.masked_fill(single, 0.0), deviation.masked_fill(single, 1.0)
    return GroupStatistics(outcomes, mean[group], deviation[group], count[group])


def leave_one_out_means(outcomes: Tensor, index: Sequence[Hashable], final_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean outcome of the other rollouts of each row's prompt.

    Args:
        outcomes: `(bs,)`, from 0 to 1.
        index: `bs` group labels (uid).
        final_rows: `(bs,)` int64: for each row the row that holds its session's final output (itself, for ordinary
            agent loops). Only final outputs are counted, as in verl's GRPO.

    Returns:
        means `(bs,)` float64, NaN where the group has no other rollout, and counts `(bs,)` int64 of those others.
    """
    groups = group_statistics(outcomes.double(), index, final_rows)
    means = groups.mean_of_others().clamp(0.0, 1.0)
    return means.masked_fill(groups.count < 2, float("nan")), groups.count.long() - 1


RewardT = TypeVar("RewardT", float, Tensor)


def to_unit(rewards: RewardT, reward_range: tuple[float, float]) -> RewardT:
    """Rewards on the scale from 0 (lowest) to 1 (highest); what lies outside is clipped."""
    low, high = reward_range
    scaled = (rewards - low) / (high - low)
    if isinstance(scaled, Tensor):
        return scaled.clamp(0.0, 1.0)
    return min(max(scaled, 0.0), 1.0)


def from_unit(values: RewardT, reward_range: tuple[float, float]) -> RewardT:
    """Values from 0 to 1 in units of reward."""
    low, high = reward_range
    return low + (high - low) * values
