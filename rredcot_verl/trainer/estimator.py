"""The advantage estimator, registered under the names of all sources: from segments to advantages.

verl hands an estimator rewards, mask, group labels and config only. The trainer passes the segments beside that call,
through `with_segments`; without them the estimator is verl's GRPO, which is its public contract.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, register_adv_est

from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.core.credit import Credit, CreditRule, segment_credit
from rredcot_verl.core.groups import group_statistics
from rredcot_verl.core.redistribution import SegmentBatch, expand_to_tokens, return_error
from rredcot_verl.sources.registry import SOURCES

logger = logging.getLogger(__name__)

RETURN_TOLERANCE = 1e-4
"""Largest difference between a row's token-level rewards and its outcome that is still rounding, relative to the
largest outcome (or to 1)."""


@dataclass
class Segmented:
    """What the trainer knows of the rows whose advantages are being computed, and what came of it.

    Attributes:
        segments: The segments of the batch.
        final_rows: `(bs,)` int64: for each row the row that holds its session's final output. As in verl's GRPO, only
            final outputs enter the group statistics; the others share its advantage.
        rule: How values become advantages.
        credit: What the estimator made of them; None before it was called.
    """

    segments: SegmentBatch
    final_rows: Tensor
    rule: CreditRule
    credit: Credit | None = None


_SEGMENTED: ContextVar[Segmented | None] = ContextVar("rredcot_segmented", default=None)


@contextlib.contextmanager
def with_segments(segmented: Segmented) -> Iterator[Segmented]:
    """Pass segments to the estimator for the calls made inside the block."""
    token = _SEGMENTED.set(segmented)
    try:
        yield segmented
    finally:
        _SEGMENTED.reset(token)


def credit_rule(algorithm: Any, settings: RREDCoTConfig) -> CreditRule:
    """How values become advantages in a run.

    Args:
        algorithm: verl's `algorithm` node; `norm_adv_by_std_in_grpo`, `gamma` and `lam` are read.
        settings: The `algorithm.rredcot` block.
    """
    low, high = settings.self_value.reward_range
    credit = settings.credit
    return CreditRule(
        form=credit.form,
        beta=credit.beta,
        pinned=credit.pinned,
        control=credit.control,
        gamma=float(algorithm.gamma),
        lam=float(algorithm.lam) if credit.lam is None else credit.lam,
        norm_by_std=bool(algorithm.get("norm_adv_by_std_in_grpo", True)),
        reward_low=low,
        reward_spread=high - low,
    )


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
        config: verl's `algorithm` node; `norm_adv_by_std_in_grpo` is read where no segments are handed over.
        kwargs: Whatever else verl passes to estimators; not used.

    Returns:
        advantages, returns: two different tensors `(bs, response_length)`.

    Raises:
        ValueError: Inside `with_segments`: the rewards do not sum to the outcomes, so something changed them.
    """
    del kwargs
    segmented = _SEGMENTED.get()
    if segmented is None:
        _warn_without_segments()
        norm_by_std = True if config is None else bool(config.get("norm_adv_by_std_in_grpo", True))
        advantages, _ = compute_grpo_outcome_advantage(
            token_level_rewards, response_mask, index, norm_adv_by_std_in_grpo=norm_by_std, config=config
        )
        return advantages, advantages.clone()
    segments = segmented.segments
    _check_rewards(token_level_rewards, segments.outcomes, index)
    segmented.credit = compute_credit(segmented, index, response_mask)
    advantages = expand_to_tokens(segmented.credit.segment_advantages, segments.segment_boundaries, response_mask)
    return advantages, advantages.clone()


def compute_credit(segmented: Segmented, index: Sequence[Any] | np.ndarray, response_mask: Tensor) -> Credit:
    """Advantages by segment; verl's GRPO is called for those of the outcomes.

    Args:
        segmented: The segments, and how their values become advantages.
        index: `(bs,)` group labels (uid).
        response_mask: `(bs, response_length)`.
    """
    segments, rule, labels = segmented.segments, segmented.rule, np.asarray(index, dtype=object)
    finals, position = segmented.final_rows.unique(return_inverse=True)
    outcomes = segments.outcomes.float()
    row_advantages, _ = compute_grpo_outcome_advantage(
        outcomes[finals].unsqueeze(1),
        torch.ones(len(finals), 1),
        labels[finals.numpy()],
        norm_adv_by_std_in_grpo=rule.norm_by_std,
    )
    groups = group_statistics(outcomes, labels.tolist(), segmented.final_rows)
    scores = group_statistics(segments.scores.float(), labels.tolist(), segmented.final_rows)
    num_tokens = segments.num_tokens(response_mask)
    return segment_credit(segments, num_tokens, row_advantages[:, 0][position], groups, scores, rule)


def _check_rewards(token_level_rewards: Tensor, outcomes: Tensor, index: np.ndarray) -> None:
    error = return_error(token_level_rewards, outcomes)
    if error.numel() and error.max() > RETURN_TOLERANCE * max(1.0, outcomes.abs().max().item()):
        row = int(error.argmax())
        raise ValueError(
            f"the token-level rewards of row {row} (uid {index[row]}) sum to {token_level_rewards[row].sum().item()}, "
            f"but its outcome is {outcomes[row].item()}: something changed the rewards after redistribution"
        )


@functools.cache
def _warn_without_segments() -> None:
    logger.warning(
        "rredcot: the estimator was called without segments, so its advantages are GRPO's; segments need verl's V1 "
        "trainer (trainer.use_v1=True)"
    )


for _name in SOURCES:
    register_adv_est(_name)(compute_rredcot_advantage)
