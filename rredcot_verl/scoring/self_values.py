"""Self-values of one response from the log-probabilities of its probes."""

from collections.abc import Sequence

from rredcot_verl.config.schema import SelfValueConfig
from rredcot_verl.scoring.probes import Branch, Proposal
from rredcot_verl.scoring.rollout import BranchScore, self_values


def state_values(
    settings: SelfValueConfig, branches: Sequence[Branch], scores: Sequence[BranchScore], utilities: Sequence[float]
) -> list[float]:
    """Self-values v_0 .. v_{K-1} in units of reward."""
    low, high = settings.reward_range
    proposals = [Proposal("", utility) for utility in utilities]
    values = low + (high - low) * self_values(settings.form, branches, scores, proposals).double()
    return values.tolist()
