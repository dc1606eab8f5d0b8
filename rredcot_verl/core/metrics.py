"""What a batch's credit looks like, as scalars for the tracker.

verl aggregates by substrings of a metric's name ("max", "min", "sum", "total"); the names here mean what they say to
it, and a test checks that none does so by accident.
"""

import torch
from torch import Tensor

from rredcot_verl.core.redistribution import SegmentBatch


def credit_metrics(segments: SegmentBatch, num_tokens: Tensor, weights: Tensor) -> dict[str, float]:
    """Metrics over the scored rows; empty when there is none.

    Args:
        segments: The segments of the batch.
        num_tokens: `(bs, num_segments)` tokens of each segment that the policy wrote.
        weights: `(bs, num_segments)` segment advantage over the response's own (1 everywhere is GRPO).

    Returns:
        Metric name (without prefix) to value.
    """
    rows = segments.scored
    if not bool(rows.any()):
        return {}
    values, outcomes = segments.self_values[rows], segments.scores[rows]
    rewards, tokens, counts = segments.segment_rewards[rows], num_tokens[rows], segments.num_segments[rows]
    last_value = values.gather(1, (counts - 1).unsqueeze(1)).squeeze(1)
    error = last_value - outcomes
    credit = rewards.abs()
    mass = credit.sum().clamp(min=1e-12)
    metrics = {
        "segments_per_response/mean": counts.double().mean().item(),
        "start_value/mean": values[:, 0].mean().item(),
        "end_value/mean": last_value.mean().item(),
        "end_value_bias/mean": error.mean().item(),
        "end_value_squared_error/mean": error.square().mean().item(),
        "negative_credit_share/mean": (credit * (rewards < 0)).sum().item() / mass.item(),
        "segment_weight/max": weights[rows].masked_fill(tokens == 0, 0.0).max().item(),
    }
    if rows.sum() > 1 and last_value.std() > 0 and outcomes.std() > 0:
        metrics["end_value_correlation/mean"] = torch.corrcoef(torch.stack([last_value, outcomes]))[0, 1].item()
    for name, share in zip(("first", "middle", "last"), _shares_by_third(credit, tokens), strict=True):
        metrics[f"credit_share_{name}_third/mean"] = share / mass.item()
    return metrics


def _shares_by_third(credit: Tensor, num_tokens: Tensor) -> list[float]:
    """Credit whose segment ends in the first, middle and last third of its response's tokens."""
    ends = num_tokens.cumsum(1).double() / num_tokens.sum(1, keepdim=True).clamp(min=1)
    third = (ends * 3 - 1e-9).floor().clamp(0, 2)
    return [(credit * (third == which)).sum().item() for which in range(3)]
