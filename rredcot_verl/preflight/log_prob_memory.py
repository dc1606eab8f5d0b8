"""Estimate of the GPU memory of FSDP's passes for log-probabilities, with and without probes; see `pass_memory`."""

from dataclasses import dataclass

from omegaconf import DictConfig

from rredcot_verl.passes.probe_parts import LEAST_ROOM
from rredcot_verl.preflight.memory import GIB, TrainingMemory
from rredcot_verl.preflight.model_size import ModelFacts
from rredcot_verl.preflight.pass_memory import LogProbPass, pass_bytes


@dataclass(frozen=True)
class LogProbMemory:
    """Estimate for one GPU while it computes log-probabilities, in GiB.

    Attributes:
        states: Weights, those gathered for the layers at work, and the optimizer's states where they stay.
        activations: Of the layer at work.
        logits: With what verl and the reading of probes make of them, at the largest.
    """

    states: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """A layer's activations are gone when there are logits."""
        return self.states + max(self.activations, self.logits)


def largest_passes(config: DictConfig, most_probe_tokens: int, fuse: bool) -> list[LogProbPass]:
    """The largest passes that verl's token budget leads to; see `passes.probe_parts`.

    Args:
        config: The run's.
        most_probe_tokens: Of a response of full length, 0 without shared prefixes.
        fuse: Whether verl's own pass reads the probes.
    """
    budget = int(config.actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu)
    own = LogProbPass(budget)
    if not most_probe_tokens:
        return [own]
    longest = min(budget, config.data.max_prompt_length + config.data.max_response_length)
    num_tokens = max(budget, min(longest + most_probe_tokens, max(budget, longest + budget // LEAST_ROOM)))
    # Shorter traces have as many probes for their length.
    probes = round(num_tokens * most_probe_tokens / (longest + most_probe_tokens))
    if fuse:
        return [LogProbPass(num_tokens - probes, 0, probes, probes)]
    return [own, LogProbPass(0, num_tokens - probes, probes, probes)]


def log_prob_memory(
    config: DictConfig, facts: ModelFacts, training: TrainingMemory, most_probe_tokens: int, fuse: bool
) -> LogProbMemory:
    """The largest of a run's passes.

    Args:
        config: The run's, with FSDP or FSDP2.
        facts: The model's sizes.
        training: Estimate of the update, which has the same states.
        most_probe_tokens, fuse: See `largest_passes`.
    """
    actor = config.actor_rollout_ref.actor
    states = training.weights + training.working + (0.0 if actor.fsdp_config.optimizer_offload else training.optimizer)
    needs = [pass_bytes(config, facts, each) for each in largest_passes(config, most_probe_tokens, fuse)]
    activations, logits = max(needs, key=max)
    return LogProbMemory(states, activations / GIB, logits / GIB)
