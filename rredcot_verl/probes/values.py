"""Self-values of one response from the log-probabilities of its probes, whoever read them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rredcot_verl.config.blocks import SelfValueConfig
from rredcot_verl.core.self_value import geometric_value, joint_value, normalized_value
from rredcot_verl.probes.elicitation import Probe


@dataclass(frozen=True)
class ProbeScore:
    """What the policy thinks of one probe.

    Attributes:
        token_log_probs: Log-probability of each forced token, nats; what comes before `Probe.scored_from` is given and
            may hold anything.
        closing_log_prob: Log-probability that the answer ends there, nats, summed over the closing tokens.
        num_forward_tokens: Tokens computed for it that the trace itself had not computed.
        num_recomputed_tokens: Tokens of the trace computed once more, because the server's cache had lost them.
    """

    token_log_probs: Sequence[float]
    closing_log_prob: float
    num_forward_tokens: int
    num_recomputed_tokens: int = 0


def self_values(form: str, probes: Sequence[Probe], scores: Sequence[ProbeScore], utilities: Sequence[float]) -> Tensor:
    """Self-values in [0, 1] from the scores of all probes.

    Args:
        form: `joint`, `normalized` or `geometric`.
        probes: One or two probes for every state and proposal.
        scores: One a probe.
        utilities: One an answer, in [0, 1].

    Returns:
        `(num_states,)` float32.

    Raises:
        ValueError: A log-probability is NaN or positive: the numbers cannot be trusted.
    """
    shape = (probes[-1].state + 1, len(utilities))
    log_probs = torch.full(shape, float("-inf"), dtype=torch.float64)
    lengths = torch.ones(shape, dtype=torch.int64)
    for probe, score in zip(probes, scores, strict=True):
        counted = [*score.token_log_probs[probe.scored_from :], score.closing_log_prob]
        # A sum over closing tokens may exceed log 1 by rounding only.
        if any(value != value or value > 1e-3 for value in counted):
            raise ValueError(f"got log-probabilities {counted} for the probe {probe.token_ids}")
        place = probe.state, probe.proposal
        log_probs[place] = torch.logaddexp(log_probs[place], torch.tensor(sum(counted), dtype=torch.float64))
        lengths[place] = max(int(lengths[place]), len(counted))
    weights = torch.tensor(utilities, dtype=torch.float64)
    if form == "joint":
        return joint_value(log_probs, weights)
    if form == "normalized":
        return normalized_value(log_probs, weights)
    return geometric_value(log_probs, weights, lengths)


def state_values(
    settings: SelfValueConfig, probes: Sequence[Probe], scores: Sequence[ProbeScore], utilities: Sequence[float]
) -> list[float]:
    """Self-values v_0 .. v_{K-1} in units of reward; see `self_values`."""
    low, high = settings.reward_range
    # Settled by the estimator; where there is none, by the method.
    form = "joint" if settings.form == "auto" else settings.form
    values = low + (high - low) * self_values(form, probes, scores, utilities).double()
    return list(values.tolist())
