"""Credit: from GRPO's advantage of a response and the values of its segments to an advantage for each segment.

Every form gives one number a segment; `expand_to_tokens` is the one place that maps it to tokens. A form is one
function and one line of `segment_credit`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rredcot_verl.core.groups import GroupStatistics
from rredcot_verl.core.redistribution import SegmentBatch

EPSILON = 1e-6
"""verl's `compute_grpo_outcome_advantage` adds this to the group's standard deviation."""
SPREAD_TOLERANCE = 1e-2
"""`td` divides by a group's outcome deviation; below this share of the reward range the group counts as uniform."""


@dataclass(frozen=True)
class CreditRule:
    """How values become advantages.

    Attributes:
        form: `reweight` or `td`.
        beta: See `reweight`.
        error_penalty: Factor on the advantages of responses whose GRPO advantage is negative (ours).
        gamma, lam: See `segment_td`.
        norm_by_std: verl's `algorithm.norm_adv_by_std_in_grpo`.
        reward_spread: Highest less lowest reward.
        pinned: Whether the last segment counts with d_K = R - v_{K-1} in `reweight`; otherwise with 0.
        without_own: Whether the values rest on the mean of the *other* rollouts, so that `td` must start from it too.
    """

    form: str = "reweight"
    beta: float = 1.0
    error_penalty: float = 1.0
    gamma: float = 1.0
    lam: float = 1.0
    norm_by_std: bool = True
    reward_spread: float = 1.0
    pinned: bool = True
    without_own: bool = False


@dataclass(frozen=True)
class Credit:
    """Advantages by segment.

    Attributes:
        row_advantages: `(bs,)`, GRPO's advantage of each response.
        segment_advantages: `(bs, num_segments)`.
        segment_weights: `(bs, num_segments)`, segment advantage over the response's own, before `error_penalty`; 1
            where the response has none.
    """

    row_advantages: Tensor
    segment_advantages: Tensor
    segment_weights: Tensor


def segment_credit(
    segments: SegmentBatch, num_tokens: Tensor, row_advantages: Tensor, groups: GroupStatistics, rule: CreditRule
) -> Credit:
    """Advantages by segment. A row without values, or in a group too uniform to be scaled up, has GRPO's own.

    Args:
        segments: The segments of the batch.
        num_tokens: `(bs, num_segments)`, tokens of each segment that the policy wrote.
        row_advantages: `(bs,)`, GRPO's advantage of each response.
        groups: Outcome statistics of each response's group, of the dtype GRPO takes them in.
        rule: The form and its settings.

    Raises:
        ValueError: There is no such form.
    """
    rows = row_advantages.unsqueeze(1)
    if rule.form == "reweight":
        advantages = rows * reweight(row_advantages, segments, num_tokens, beta=rule.beta, pinned=rule.pinned)
    elif rule.form == "td":
        advantages = _td(segments, row_advantages, groups, rule)
    else:
        raise ValueError(f"credit form {rule.form!r} is not one of reweight and td")
    weights = torch.where(rows != 0, advantages / rows, torch.ones_like(advantages))
    return Credit(row_advantages, torch.where(rows < 0, rule.error_penalty, 1.0) * advantages, weights)


def _td(segments: SegmentBatch, row_advantages: Tensor, groups: GroupStatistics, rule: CreditRule) -> Tensor:
    mean, scale = groups.mean, torch.ones_like(groups.deviation)
    if rule.norm_by_std:
        scale = groups.deviation + EPSILON
    if rule.without_own:
        # With R - b = (R - b_others) (n - 1) / n a response of one segment keeps GRPO's advantage, and between v_0 and
        # v_1 nothing of the own outcome is paid back. A group of one keeps verl's convention.
        alone, others = groups.count == 1, groups.mean_of_others()
        scale = torch.where(alone, scale, scale * groups.count / (groups.count - 1).clamp(min=1))
        mean = torch.where(alone, mean, others)
    td = segment_td(segments, mean, scale, rule.gamma, rule.lam)
    # GRPO's own advantage, to the last bit.
    uniform = groups.deviation <= SPREAD_TOLERANCE * rule.reward_spread
    return torch.where((segments.scored & ~uniform).unsqueeze(1), td, row_advantages.unsqueeze(1))


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
        pinned: Whether the last segment counts with d_K = R - v_{K-1}; otherwise with 0.

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
