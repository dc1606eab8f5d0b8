"""Self-values of one response from the log-probabilities of its probes, whoever read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rredcot_verl.core.self_value import geometric_value, joint_value, normalized_value
from rredcot_verl.probes.probe import Probe


@dataclass(frozen=True)
class ProbeScore:
    """What a rollout server thinks of one probe.

    Attributes:
        token_log_probs: Log-probability of each forced token, nats; what comes before `Probe.scored_from` is given and
            may hold anything.
        closing_log_prob: Log-probability that the answer ends there, nats, summed over the closing tokens.
        num_forward_tokens: Tokens computed for it that the trace itself had not computed.
        num_recomputed_tokens: Tokens of the trace computed once more, because the server's cache had lost them.
        lost_closing_mass: Probability of the closing tokens that the server leaves out, where it measured it; else 0.
    """

    token_log_probs: Sequence[float]
    closing_log_prob: float
    num_forward_tokens: int
    num_recomputed_tokens: int = 0
    lost_closing_mass: float = 0.0


class ProbePlace(NamedTuple):
    """Where the log-probabilities of one probe belong.

    Attributes:
        state: Index k of the boundary.
        proposal: Index of the answer.
        num_log_probs: How many count: the answer's tokens and its end.
    """

    state: int
    proposal: int
    num_log_probs: int

    @classmethod
    def of(cls, probe: Probe) -> "ProbePlace":
        """The place of a probe."""
        return cls(probe.state, probe.proposal, len(probe.token_ids) - probe.scored_from + 1)


def self_values(form: str, probes: Sequence[Probe], scores: Sequence[ProbeScore], utilities: Sequence[float]) -> Tensor:
    """`values_of_log_probs` of what a server has read.

    Args:
        form: `joint`, `normalized` or `geometric`.
        probes: For every state, of each proposal at most two.
        scores: One a probe.
        utilities: One an answer, in [0, 1].
    """
    log_probs = [
        value
        for probe, score in zip(probes, scores, strict=True)
        for value in (*score.token_log_probs[probe.scored_from :], score.closing_log_prob)
    ]
    return values_of_log_probs(form, [ProbePlace.of(probe) for probe in probes], log_probs, utilities)


def values_of_log_probs(
    form: str, places: Sequence[ProbePlace] | np.ndarray, log_probs: Sequence[float], utilities: Sequence[float]
) -> Tensor:
    """Self-values in [0, 1] from the log-probabilities of all probes.

    Args:
        form: `joint`, `normalized` or `geometric`.
        places: One a probe, boundary by boundary; or their numbers, `(num_probes, 3)`.
        log_probs: Probe by probe the counted tokens' log-probabilities and that of the answer's end, laid end to end.
        utilities: One an answer, in [0, 1].

    Returns:
        `(num_states,)` float32.

    Raises:
        ValueError: A log-probability is NaN or positive: the numbers cannot be trusted.
    """
    total, lengths = sum_by_state(places, log_probs, len(utilities))
    return values_of_sums(form, total, lengths, utilities)


def sum_by_state(
    places: Sequence[ProbePlace] | np.ndarray, log_probs: Sequence[float], num_answers: int
) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer at each state, from its probes; -inf where it has none.

    Args:
        places, log_probs: As in `values_of_log_probs`.
        num_answers: Answers a state.

    Returns:
        `(num_states, num_answers)` float64, nats, and the tokens that each sums over, int64, at least 1.

    Raises:
        ValueError: A log-probability is NaN or positive: the numbers cannot be trusted.
    """
    states, proposals, counts = np.asarray(places).T
    shape = (states[-1] + 1, num_answers)
    total, lengths = np.full(shape, -np.inf), np.ones(shape, dtype=np.int64)
    counted = np.asarray(log_probs, dtype=np.float64)
    # A sum over closing tokens may exceed log 1 by rounding only.
    wrong = np.isnan(counted) | (counted > 1e-3)
    if wrong.any():
        probe = int(counts.cumsum().searchsorted(wrong.argmax(), side="right"))
        raise ValueError(
            f"got log-probability {counted[wrong][0]} in a probe of answer {proposals[probe]} at state {states[probe]}"
        )
    np.logaddexp.at(total, (states, proposals), np.add.reduceat(counted, counts.cumsum() - counts))
    np.maximum.at(lengths, (states, proposals), counts)
    return torch.from_numpy(total), torch.from_numpy(lengths)


def values_of_sums(form: str, total: Tensor, lengths: Tensor, utilities: Sequence[float]) -> Tensor:
    """Self-values `(num_states,)` float32 in [0, 1] from what `sum_by_state` gives.

    Raises:
        ValueError: There is no such form.
    """
    weights = torch.tensor(utilities, dtype=torch.float64)
    if form == "joint":
        return joint_value(total, weights)
    if form == "normalized":
        return normalized_value(total, weights)
    if form == "geometric":
        return geometric_value(total, weights, lengths)
    raise ValueError(f"value form {form!r} is not one of joint, normalized and geometric")
