"""Credit: from GRPO's advantage of a response and the values of its segments to an advantage for each segment.

Every form gives one number a segment; `expand_to_tokens` is the one place that maps it to tokens. A form is one
function and one line of `FORMS`. Which of them are right in expectation is derived in docs/method.md.

Values and outcomes are differences in units of the reward's range here, so that no form depends on an affine change of
the reward. What was added to the verifier's score (a penalty for overlong responses) stays in the advantage and never
enters a difference of values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rredcot_verl.core.groups import GroupStatistics
from rredcot_verl.core.redistribution import SegmentBatch

EPSILON = 1e-6
"""verl's `compute_grpo_outcome_advantage` adds this to the group's standard deviation."""
LEAST_SPREAD = 0.1
"""`td` divides by the deviation of the *other* rollouts' outcomes; at or below this share of the reward's range they
count as agreeing, and the row has GRPO's own advantage. Two outcomes in groups of up to 100 are never that close."""


@dataclass(frozen=True)
class CreditRule:
    """How values become advantages. The fields up to `control` are those of the `credit` block, see there.

    Attributes:
        form: A key of `FORMS`.
        beta: See `reweight`.
        pinned: `reweight`: whether d of the last segment is R - v_{K-1}; otherwise 0.
        control: `none`, or what takes the place of the credit in a control arm; see `controlled`.
        gamma, lam: See `td` and `critic`.
        norm_by_std: verl's `algorithm.norm_adv_by_std_in_grpo`.
        reward_low: Lowest reward.
        reward_spread: Highest less lowest reward.
    """

    form: str = "reweight"
    beta: float = 1.0
    pinned: bool = True
    control: Literal["none", "shuffled", "inverted", "position"] = "none"
    gamma: float = 1.0
    lam: float = 1.0
    norm_by_std: bool = True
    reward_low: float = 0.0
    reward_spread: float = 1.0


@dataclass(frozen=True)
class Credit:
    """Advantages by segment.

    Attributes:
        row_advantages: `(bs,)`, GRPO's advantage of each response.
        segment_advantages: `(bs, num_segments)`.
        segment_weights: `(bs, num_segments)`, segment advantage over the response's own; 1 where that is 0.
    """

    row_advantages: Tensor
    segment_advantages: Tensor
    segment_weights: Tensor


@dataclass(frozen=True)
class CreditBatch:
    """What a form reads.

    Attributes:
        advantages: `(bs, 1)` float64, GRPO's.
        segments: The segments of the batch.
        rewards: `(bs, num_segments)` float64, d_k in units of the reward's range, 0 for padded segments.
        num_tokens: `(bs, num_segments)` float64, tokens of each segment that the policy wrote.
        groups, score_groups: Statistics of each row's group: of R, and of the verifier's scores.
        rule: The settings.
    """

    advantages: Tensor
    segments: SegmentBatch
    rewards: Tensor
    num_tokens: Tensor
    groups: GroupStatistics
    score_groups: GroupStatistics
    rule: CreditRule

    @property
    def shaping(self) -> Tensor:
        """`(bs,)`, what was added to a score less the mean of that in its group."""
        return (self.segments.outcomes - self.segments.scores) - (self.groups.mean - self.score_groups.mean)

    def mean(self, quantity: Tensor) -> Tensor:
        """`(bs, 1)` mean over the tokens of a response, of something given by segment."""
        total = self.num_tokens.sum(dim=1, keepdim=True).clamp(min=1)
        return (quantity * self.num_tokens).sum(dim=1, keepdim=True) / total


def segment_credit(
    segments: SegmentBatch,
    num_tokens: Tensor,
    row_advantages: Tensor,
    groups: GroupStatistics,
    score_groups: GroupStatistics,
    rule: CreditRule,
) -> Credit:
    """Advantages by segment. A row without values has GRPO's own, to the last bit, but for `critic`.

    Args:
        segments: The segments of the batch.
        num_tokens: `(bs, num_segments)`, tokens of each segment that the policy wrote.
        row_advantages: `(bs,)`, GRPO's advantage of each response.
        groups, score_groups: Statistics of each response's group: of R, and of the verifier's scores.
        rule: The form and its settings.

    Raises:
        ValueError: There is no such form.
    """
    if rule.form not in FORMS:
        raise ValueError(f"credit form {rule.form!r} is not one of {', '.join(FORMS)}")
    rewards = segments.segment_rewards / rule.reward_spread
    if not rule.pinned:
        rewards = rewards.scatter(1, segments.num_segments.unsqueeze(1) - 1, 0.0)
    rows = CreditBatch(
        row_advantages.double().unsqueeze(1), segments, rewards, num_tokens.double(), groups, score_groups, rule
    )
    advantages = FORMS[rule.form](rows)
    if rule.control != "none":
        advantages = controlled(advantages, rows)
    own = row_advantages.unsqueeze(1)
    credited = segments.scored.unsqueeze(1) | (rule.form == "critic")
    advantages = torch.where(credited, advantages.to(own.dtype), own)
    return Credit(row_advantages, advantages, torch.where(own != 0, advantages / own, torch.ones_like(advantages)))


def reweight(rows: CreditBatch) -> Tensor:
    """A_k = A sigma_k with positive weights of mean 1 over the tokens of a response.

    That GRPO's advantage keeps its sign and scale and is reweighted multiplicatively is the paper's; the exponential,
    sigma_k proportional to exp(beta * sign(A) * d_k), is ours. `beta` = 0, a single segment, or equal segment rewards
    give weights of exactly 1.
    """
    exponent = rows.rule.beta * rows.advantages.sign() * rows.rewards
    # An empty (padded) segment must not set the level that is subtracted for safety.
    level = exponent.masked_fill(rows.num_tokens == 0, float("-inf")).amax(dim=1, keepdim=True)
    weights = (exponent - level.nan_to_num(neginf=0.0)).clamp(max=0.0).exp()
    mean = rows.mean(weights)
    return rows.advantages * torch.where(mean > 0, weights / mean, torch.ones_like(weights))


def td(rows: CreditBatch) -> Tensor:
    """Segment-level GAE on the values, in units of GRPO's advantage (ours).

    With b and s the mean and the standard deviation of the *other* rollouts' outcomes, u_k = (v_k - b) (n - 1) / (n s)
    for 0 < k < K, u_0 = 0 and u_K = GRPO's advantage: delta_k = gamma u_k - u_{k-1}, A_k = sum over l >= k of
    (gamma lam)^{l-k} delta_l. A single segment is GRPO. What the advantage of segment k is compared with, u_{k-1},
    depends on the row's prefix and on other rollouts only, so with lam = gamma = 1 the expected gradient is GRPO's,
    whatever the values are.

    Where the others agree, the group is uniform, and its values unknown, unless this very row differs: values used
    there would be used by outcome. Such a row has GRPO's own advantage.
    """
    rule, groups, segments = rows.rule, rows.groups, rows.segments
    deviation = groups.deviation_of_others()
    # Groups may have been chosen by the reward or by the score alone.
    agree = torch.minimum(deviation, rows.score_groups.deviation_of_others()) <= LEAST_SPREAD * rule.reward_spread
    scale = (groups.count - 1).double() / groups.count
    if rule.norm_by_std:
        scale = scale / (deviation + EPSILON).masked_fill(agree, 1.0)
    shaped = rows.shaping / (groups.deviation + EPSILON) if rule.norm_by_std else rows.shaping
    baseline = rows.score_groups.mean_of_others()
    values = (segments.self_values - baseline.unsqueeze(1)) * scale.unsqueeze(1)
    values[:, 0] = 0.0
    advantages = _gae(rows, values, rows.advantages[:, 0] - shaped)
    return torch.where(agree.unsqueeze(1), rows.advantages, advantages + shaped.unsqueeze(1))


def critic(rows: CreditBatch) -> Tensor:
    """Segment-level GAE on values that estimate success, in every group (ours).

    v_0 takes the place of the group: p = (v_0 - lowest reward) / range, s = range * sqrt(p (1 - p)), the deviation of
    a reward that is lowest or highest; p is kept `1 / (2 n)` away from 0 and 1. With u_k = v_k / s and u_K = R / s, GAE
    as in `td`. So a response of a group whose rewards are all alike has credit too: what it did right and wrong on the
    way. What was added to a score counts less the mean of what was added to the others'. A row without values is one
    segment whose v_0 is the mean of the others' scores; without others it has GRPO's advantage.

    What segment k is compared with depends on the row's prefix and on other rollouts and steps only, so with
    lam = gamma = 1 the expected gradient is that of the expected reward, each prompt weighted by 1 / s, as long as
    no group was chosen by its outcomes.
    """
    rule, scored, alone = rows.rule, rows.segments.scored, rows.groups.count == 1
    values = rows.segments.self_values.clone()
    values[:, 0] = torch.where(scored, values[:, 0], rows.score_groups.mean_of_others().double())
    values = (values - rule.reward_low) / rule.reward_spread
    outcomes = (rows.score_groups.outcomes.double() - rule.reward_low) / rule.reward_spread
    scale = torch.full_like(outcomes, rule.reward_spread)
    if rule.norm_by_std:
        least = 0.5 / rows.groups.count.double().clamp(min=2)
        start = values[:, 0].clamp(least, 1 - least)
        scale = 1 / (start * (1 - start)).sqrt()
    penalty = rows.groups.outcomes - rows.score_groups.outcomes
    shaped = penalty - (rows.groups.mean_of_others() - rows.score_groups.mean_of_others())
    advantages = _gae(rows, values * scale.unsqueeze(1), outcomes * scale)
    advantages = advantages + (shaped / rule.reward_spread * scale).unsqueeze(1)
    return torch.where((alone & ~scored).unsqueeze(1), rows.advantages, advantages)


def _gae(rows: CreditBatch, values: Tensor, outcomes: Tensor) -> Tensor:
    """`(bs, num_segments)`: A_k = sum over l >= k of (gamma lam)^{l-k} delta_l, delta_k = gamma u_k - u_{k-1}.

    Where no response's values differ along it, lam = 1: they say nothing of where, as before a readout has anything to
    fit to, and a smaller lam would keep the outcome from all segments but the last. That is asked of the whole batch:
    of one response it may depend on where it ends, and so on its outcome.

    Args:
        rows: The batch.
        values: `(bs, num_segments + 1)`, u_0 .. u_{K-1} of each row; what stands behind them is not read.
        outcomes: `(bs,)`, u_K, not discounted.
    """
    rule, width, known = rows.rule, values.size(1) - 1, rows.segments.self_values[:, :-1]
    place = torch.arange(1, width + 1)
    last = rows.segments.num_segments.unsqueeze(1)
    flat = bool(((known == known[:, :1]) | (place > last)).all())
    decay = rule.gamma * (1.0 if flat else rule.lam)
    gains = torch.where(place == last, outcomes.unsqueeze(1), rule.gamma * values[:, 1:])
    deltas = (gains - values[:, :-1]).masked_fill(place > last, 0.0)
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for k in reversed(range(width)):
        running = deltas[:, k] + decay * running
        advantages[:, k] = running
    return advantages


FORMS: dict[str, Callable[[CreditBatch], Tensor]] = {"reweight": reweight, "td": td, "critic": critic}
"""`(rows) -> (bs, num_segments)` float64."""


def controlled(advantages: Tensor, rows: CreditBatch) -> Tensor:
    """A control arm: credit that knows nothing, with each response's mean and spread of advantages kept.

    Both are over tokens, so that nothing but the place of the credit differs. `shuffled`: the segments' advantages in
    an order that is drawn anew each time (torch's generator); `inverted`: mirrored at the response's mean; `position`:
    falling evenly from the first segment to the last.
    """
    rule, bs, width = rows.rule, *advantages.shape
    mean = rows.mean(advantages)
    away = advantages - mean
    place = torch.arange(width).expand(bs, width)
    if rule.control == "inverted":
        return mean - away
    if rule.control == "shuffled":
        # Padded segments are moved to the end again.
        keys = torch.rand(bs, width).masked_fill(place >= rows.segments.num_segments.unsqueeze(1), 2.0)
        pattern = advantages.gather(1, keys.argsort(dim=1))
    else:
        pattern = -place.double()
    pattern = pattern - rows.mean(pattern)
    size, own = rows.mean(away**2).sqrt(), rows.mean(pattern**2).sqrt()
    return mean + torch.where(own > 0, pattern * size / own.clamp(min=EPSILON), torch.zeros_like(pattern))
