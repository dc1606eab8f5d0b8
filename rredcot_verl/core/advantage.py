"""Credit: from GRPO's advantage of a response and the values of its segments to an advantage for each segment.

Both forms give one number a segment; `expand_to_tokens` is the one place that maps it to tokens.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from rredcot_verl.core.redistribution import SegmentBatch

EPSILON = 1e-6
"""verl's `compute_grpo_outcome_advantage` adds this to the group's standard deviation."""


def reweight(
    row_advantages: Tensor, segments: SegmentBatch, num_tokens: Tensor, beta: float, pinned: bool = True
) -> Tensor:
    """Positive weights sigma_k proportional to exp(beta * sign(A) * d_k), with mean 1 over the tokens of a response.

    That GRPO's advantage keeps its sign and scale and is reweighted multiplicatively is the paper's; the exponential is
    ours. `beta` = 0, a single segment, or equal segment rewards give weights of exactly 1.

    Args:
        row_advantages: `(bs,)`, GRPO's advantage of each response; only its sign is read.
        segments: The segments of the batch.
        num_tokens: `(bs, num_segments)`, tokens of each segment that the policy wrote.
        beta: Strength, in 1 / reward.
        pinned: Whether the last segment counts with d_K = R - v_{K-1}; otherwise with 0 (`core.values.UNPINNED`).

    Returns:
        `(bs, num_segments)` float32 weights, 1 for a row that was not scored.
    """
    rewards = segments.segment_rewards
    if not pinned:
        rewards = rewards.scatter(1, segments.num_segments.unsqueeze(1) - 1, 0.0)
    exponent = beta * row_advantages.double().sign().unsqueeze(1) * rewards
    # An empty (padded) segment must not set the level that is subtracted for safety.
    level = exponent.masked_fill(num_tokens == 0, float("-inf")).amax(dim=1, keepdim=True)
    weights = (exponent - level.nan_to_num(neginf=0.0)).clamp(max=0.0).exp()
    mean = (weights * num_tokens).sum(dim=1, keepdim=True) / num_tokens.sum(dim=1, keepdim=True).clamp(min=1)
    weights = torch.where(mean > 0, weights / mean, torch.ones_like(weights))
    return torch.where(segments.scored.unsqueeze(1), weights, torch.ones_like(weights)).float()


def segment_td(segments: SegmentBatch, baselines: Tensor, scales: Tensor, gamma: float, lam: float) -> Tensor:
    """Segment-level GAE on the self-values (ours).

    With V(s_0) = the group's mean outcome, V(s_k) = v_k, and the outcome R paid at the end:
    delta_k = gamma * v_k - v_{k-1} for k < K, delta_K = R - v_{K-1}, A_k = sum_{l >= k} (gamma * lam)^{l-k} delta_l,
    divided by the group's outcome scale. The baseline at s_0 is GRPO's own, so a single segment gives GRPO.

    Args:
        segments: The segments of the batch.
        baselines: `(bs,)`, mean outcome of the row's group.
        scales: `(bs,)`, what GRPO divides by.
        gamma: Discount for each segment.
        lam: GAE's lambda for each segment.

    Returns:
        `(bs, num_segments)` float32 advantages; padded segments hold 0.
    """
    values = segments.self_values.clone()
    values[:, 0] = baselines.double()
    width = values.size(1) - 1
    is_last = torch.arange(1, width + 1) == segments.num_segments.unsqueeze(1)
    is_padding = torch.arange(1, width + 1) > segments.num_segments.unsqueeze(1)
    bootstrap = torch.where(is_last, segments.outcomes.unsqueeze(1), gamma * values[:, 1:])
    deltas = (bootstrap - values[:, :-1]).masked_fill(is_padding, 0.0)
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for k in reversed(range(width)):
        running = deltas[:, k] + gamma * lam * running
        advantages[:, k] = running
    return (advantages / scales.double().unsqueeze(1)).float()


def group_statistics(outcomes: Tensor, index: Sequence[Hashable]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the outcomes of each row's group, as verl's GRPO takes them.

    A group of one has mean 0 and deviation 1 (verl's convention).

    Args:
        outcomes: `(bs,)`.
        index: `bs` group labels.

    Returns:
        Two tensors `(bs,)`, dtype of `outcomes`.
    """
    labels = {label: number for number, label in enumerate(dict.fromkeys(index))}
    group = torch.tensor([labels[label] for label in index], dtype=torch.int64)
    zeros = torch.zeros(len(labels), dtype=outcomes.dtype)
    count = zeros.scatter_add(0, group, torch.ones_like(outcomes))
    mean = zeros.scatter_add(0, group, outcomes) / count
    squares = zeros.scatter_add(0, group, (outcomes - mean[group]) ** 2)
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    single = count == 1
    mean, deviation = mean.masked_fill(single, 0.0), deviation.masked_fill(single, 1.0)
    return mean[group], deviation[group]
