"""Monte Carlo estimates of a state's value: mean and standard error of sampled outcomes, and which states to sample."""

import math
from collections.abc import Sequence


def monte_carlo_value(outcomes: Sequence[float]) -> tuple[float, float]:
    """Mean of the outcomes of independent continuations of a state: an unbiased estimate of E[R | s_k].

    VinePPO (arXiv 2410.01679). The standard error is ours, for the metrics.

    Args:
        outcomes: Verified reward of each continuation, at least one.

    Returns:
        The mean, and its standard error sqrt(sample variance / n); 0 for a single outcome, which has no spread.

    Raises:
        ValueError: No outcome, or one that is not finite.
    """
    if not outcomes:
        raise ValueError("a Monte Carlo value needs at least one outcome")
    if not all(math.isfinite(outcome) for outcome in outcomes):
        raise ValueError(f"the outcomes of continuations must be finite, got {list(outcomes)}")
    count = len(outcomes)
    mean = math.fsum(outcomes) / count
    if count == 1:
        return mean, 0.0
    variance = math.fsum((outcome - mean) ** 2 for outcome in outcomes) / (count - 1)
    return mean, math.sqrt(variance / count)


def sampling_order(boundaries: Sequence[int]) -> list[int]:
    """In which order the states of a response are sampled where a budget may not last for all (ours).

    The prompt's state comes first, because no credit can be given without it. Then always the boundary that is farthest
    from those already taken and from the response's end, so that what a budget leaves out is spread evenly and the
    joined segments are about equally long. Ties go to the earlier boundary.

    Args:
        boundaries: `num_segments + 1` rising offsets from 0 to the response length, in tokens.

    Returns:
        The numbers 0 .. num_segments - 1, each once.
    """
    if len(boundaries) < 2:
        return []
    distance = [min(offset - boundaries[0], boundaries[-1] - offset) for offset in boundaries[:-1]]
    order, remaining = [0], list(range(1, len(boundaries) - 1))
    while remaining:
        state = max(remaining, key=lambda number: distance[number])
        remaining.remove(state)
        order.append(state)
        for other in remaining:
            distance[other] = min(distance[other], abs(boundaries[other] - boundaries[state]))
    return order
