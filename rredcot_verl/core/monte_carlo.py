"""Monte Carlo estimates of a state's value: mean and standard error of sampled outcomes."""

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
