"""From what a source measured of a response to the values of its states.

A source is where segment values come from: probes, continuations, weights of the segments for the answer. Whatever it
is, redistribution reads values v_0 .. v_{K-1} and pins v_K to the outcome R, so that v_0 + sum of d_k = R always.
"""

import itertools
import math
from collections.abc import Sequence


def new_highs(probabilities: Sequence[float]) -> list[float]:
    """Running maximum of the reference answer's probability: only new highs of it pay.

    Step-wise marginal information gain against a monotonic historical watermark (arXiv 2602.01034), which pays a step
    for what it adds to the highest likelihood of the answer so far. Its masking of rewards to parts of the completion
    and its supervised objective are not built.

    Args:
        probabilities: P_0 .. P_{K-1}, in units of reward. They are the values of `vps` as they are.

    Returns:
        v_0 .. v_{K-1}.
    """
    return list(itertools.accumulate(probabilities, max))


def attribution_values(weights: Sequence[float], outcome: float, baseline: float) -> list[float]:
    """Values that pay each segment its share of R - b (ours): v_k = b + (R - b) * (share_1 + ... + share_k).

    Args:
        weights: Weight of each of the K segments for the answer, at least 0.
        outcome: R.
        baseline: b, the mean outcome of the response's group, so that the differences sum to GRPO's numerator.

    Returns:
        v_0 .. v_{K-1}; nothing where every weight is 0, as the weights then say nothing.

    Raises:
        ValueError: A weight is negative or not a number.
    """
    total = sum(weights)
    if not (all(weight >= 0 for weight in weights) and math.isfinite(total)):
        raise ValueError(f"weights of segments must be finite and at least 0, got {list(weights)}")
    if total == 0:
        return []
    before = itertools.accumulate(weights[:-1], initial=0.0)
    return [baseline + (outcome - baseline) * weight / total for weight in before]
