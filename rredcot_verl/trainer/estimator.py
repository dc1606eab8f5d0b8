"""The advantage estimator `rredcot`, as verl's registry calls it.

verl hands an estimator rewards, mask, group labels and config only. The trainer passes the segments beside that call,
through `segment_context`; without them the estimator is verl's GRPO, which is its public contract.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, register_adv_est

from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.core.advantage import EPSILON, group_statistics, reweight, segment_td
from rredcot_verl.core.redistribution import SegmentBatch, expand_to_tokens, return_error
from rredcot_verl.core.values import UNPINNED

logger = logging.getLogger(__name__)

NAME = "rredcot"
RETURN_TOLERANCE = 1e-4
"""Largest difference between a row's token-level rewards and its outcome that is still rounding, relative to the
largest outcome (or to 1)."""
SPREAD_TOLERANCE = 1e-2
"""`td` divides by a group's outcome deviation; below this share of the reward range the group counts as uniform."""


@dataclass(frozen=True)
class SegmentContext:
    """What the trainer knows of the rows whose advantages are being computed.

    Attributes:
        segments: The segments of the batch.
        segment_advantages: `(bs, num_segments)`, from `compute_credit`.
    """

    segments: SegmentBatch
    segment_advantages: Tensor


_CONTEXT: ContextVar[SegmentContext | None] = ContextVar("rredcot_segments", default=None)


@contextlib.contextmanager
def segment_context(context: SegmentContext) -> Iterator[None]:
    """Pass segments to the estimator for the calls made inside the block."""
    token = _CONTEXT.set(context)
    try:
        yield
    finally:
        _CONTEXT.reset(token)


@dataclass(frozen=True)
class Credit:
    """Advantages by segment.

    Attributes:
        row_advantages: `(bs,)`, GRPO's advantage of each response.
        segment_advantages: `(bs, num_segments)`.
        segment_weights: `(bs, num_segments)`, segment advantage over the response's own, before `credit.error_penalty`;
            1 where the response has none.
    """

    row_advantages: Tensor
    segment_advantages: Tensor
    segment_weights: Tensor


@register_adv_est(NAME)
def compute_rredcot_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """RREDCoT advantages; verl's GRPO exactly for rows that carry no segment information.

    Args:
        token_level_rewards: `(bs, response_length)`.
        response_mask: `(bs, response_length)`.
        index: `(bs,)` group labels (uid).
        config: verl's `algorithm` node; `norm_adv_by_std_in_grpo`, `gamma` and `lam` are read.
        kwargs: Whatever else verl passes to estimators; not used.

    Returns:
        advantages, returns: two different tensors `(bs, response_length)`.

    Raises:
        ValueError: Inside `segment_context`: the rewards do not sum to the outcomes, so something changed them.
    """
    del kwargs
    norm_by_std = True if config is None else bool(config.get("norm_adv_by_std_in_grpo", True))
    context = _CONTEXT.get()
    if context is None:
        _warn_without_segments()
        advantages, _ = compute_grpo_outcome_advantage(
            token_level_rewards, response_mask, index, norm_adv_by_std_in_grpo=norm_by_std, config=config
        )
        return advantages, advantages.clone()
    segments = context.segments
    error = return_error(token_level_rewards, segments.outcomes)
    if error.numel() and error.max() > RETURN_TOLERANCE * max(1.0, segments.outcomes.abs().max().item()):
        row = int(error.argmax())
        raise ValueError(
            f"the token-level rewards of row {row} (uid {index[row]}) sum to {token_level_rewards[row].sum().item()}, "
            f"but its outcome is {segments.outcomes[row].item()}: something changed the rewards after redistribution"
        )
    advantages = expand_to_tokens(context.segment_advantages, segments.segment_boundaries, response_mask.size(1))
    advantages = advantages * response_mask
    return advantages, advantages.clone()


@functools.cache
def _warn_without_segments() -> None:
    logger.warning(
        "rredcot: the estimator was called without segments, so its advantages are GRPO's; segments need verl's V1 "
        "trainer (trainer.use_v1=True)"
    )


def compute_credit(
    segments: SegmentBatch,
    final_rows: Tensor,
    index: np.ndarray,
    response_mask: Tensor,
    algorithm: Any,
    settings: RREDCoTConfig,
    source: str = NAME,
) -> Credit:
    """Advantages by segment; verl's GRPO is called for those of the outcomes.

    Args:
        segments: The segments of the batch.
        final_rows: `(bs,)` int64: for each row the row that holds its session's final output (itself, for ordinary
            agent loops). As in verl's GRPO, only final outputs enter the group statistics; the others share its
            advantage.
        index: `(bs,)` group labels (uid).
        response_mask: `(bs, response_length)`.
        algorithm: verl's `algorithm` node; `norm_adv_by_std_in_grpo`, `gamma` and `lam` are read.
        settings: The `algorithm.rredcot` block.
        source: Where the segments' values come from, one of `config.sources.SOURCES`.
    """
    norm_by_std = bool(algorithm.get("norm_adv_by_std_in_grpo", True))
    finals, position = final_rows.unique(return_inverse=True)
    outcomes = segments.outcomes[finals].float()
    groups = np.asarray(index, dtype=object)[finals.numpy()]
    row_advantages, _ = compute_grpo_outcome_advantage(
        outcomes.unsqueeze(1), torch.ones(len(finals), 1), groups, norm_adv_by_std_in_grpo=norm_by_std
    )
    row_advantages = row_advantages[:, 0][position]
    if settings.credit.form == "reweight":
        num_tokens = segments.num_tokens(response_mask)
        pinned = source not in UNPINNED
        weights = reweight(row_advantages, segments, num_tokens, beta=settings.credit.beta, pinned=pinned)
        return _penalised(row_advantages, row_advantages.unsqueeze(1) * weights, settings.credit.error_penalty)
    mean, deviation = group_statistics(outcomes, groups.tolist())
    scale = deviation + EPSILON if norm_by_std else torch.ones_like(deviation)
    if settings.regresses():
        mean, scale = _without_the_own(outcomes, mean, scale, groups)
    td = segment_td(segments, mean[position], scale[position], float(algorithm.gamma), float(algorithm.lam))
    # GRPO's own advantage, to the last bit, for a row without values, and in a group too uniform to be scaled up.
    low, high = settings.self_value.reward_range
    uniform = deviation[position] <= SPREAD_TOLERANCE * (high - low)
    advantages = torch.where((segments.scored & ~uniform).unsqueeze(1), td, row_advantages.unsqueeze(1))
    return _penalised(row_advantages, advantages, settings.credit.error_penalty)


def _without_the_own(outcomes: Tensor, mean: Tensor, scale: Tensor, groups: np.ndarray) -> tuple[Tensor, Tensor]:
    """Baselines that fit regressed values, which rest on the mean of the *other* rollouts.

    With R - b = (R - b_others) (n - 1) / n a response of one segment keeps GRPO's advantage, and between v_0 and v_1
    nothing of the own outcome is paid back. A group of one keeps verl's convention.
    """
    labels, place, counts = np.unique(groups.astype(str), return_inverse=True, return_counts=True)
    del labels
    count = torch.from_numpy(counts[place]).to(mean)
    others = (count * mean - outcomes) / (count - 1).clamp(min=1)
    alone = count == 1
    return torch.where(alone, mean, others), torch.where(alone, scale, scale * count / (count - 1).clamp(min=1))


def _penalised(row_advantages: Tensor, segment_advantages: Tensor, error_penalty: float) -> Credit:
    rows = row_advantages.unsqueeze(1)
    weights = torch.where(rows != 0, segment_advantages / rows, torch.ones_like(segment_advantages))
    return Credit(row_advantages, torch.where(rows < 0, error_penalty, 1.0) * segment_advantages, weights)
