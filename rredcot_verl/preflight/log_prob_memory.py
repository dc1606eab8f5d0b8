"""Estimate of the GPU memory of FSDP's passes for log-probabilities, with and without probes; see `pass_memory`."""

from dataclasses import dataclass

from omegaconf import DictConfig

from rredcot_verl.passes.probe_parts import LEAST_ROOM
from rredcot_verl.preflight.memory import GIB, TrainingMemory
from rredcot_verl.preflight.model_size import ModelFacts
from rredcot_verl.preflight.pass_memory import LogProbPass, pass_bytes
from rredcot_verl.sources.engines import bypasses_old_log_prob, ulysses_size


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
    """The largest passes that verl's micro batches lead to; see `passes.probe_parts`. None, where it makes none.

    Args:
        config: The run's.
        most_probe_tokens: Of a response of full length, 0 without shared prefixes.
        fuse: Whether verl's own pass reads the probes.
    """
    rollout, num_ranks = config.actor_rollout_ref.rollout, ulysses_size(config.actor_rollout_ref.actor)
    longest = config.data.max_prompt_length + config.data.max_response_length
    if rollout.log_prob_use_dynamic_bsz:
        own = int(rollout.log_prob_max_token_len_per_gpu) * num_ranks
        longest = min(own, longest)
        whole = max(own, min(longest + most_probe_tokens, max(own, longest + own // LEAST_ROOM)))
        # Shorter traces have as many probes for their length.
        probes = round(whole * most_probe_tokens / (longest + most_probe_tokens))
    else:
        # verl refuses a run that names none.
        num_rows = rollout.log_prob_micro_batch_size_per_gpu or 1
        own, probes = num_rows * longest, num_rows * most_probe_tokens
        whole = own + probes

    def on_a_gpu(*tokens: int) -> LogProbPass:
        return LogProbPass(*(-(-each // num_ranks) for each in tokens))

    if most_probe_tokens and fuse:
        return [on_a_gpu(whole - probes, 0, probes, probes)]
    passes = [] if bypasses_old_log_prob(config) else [on_a_gpu(own)]
    return passes + ([on_a_gpu(0, whole - probes, probes, probes)] if most_probe_tokens else [])


def log_prob_memory(
    config: DictConfig, facts: ModelFacts, training: TrainingMemory, most_probe_tokens: int, fuse: bool
) -> LogProbMemory | None:
    """The largest of a run's passes; None where it has none.

    Args:
        config: The run's, with FSDP or FSDP2.
        facts: The model's sizes.
        training: Estimate of the update, which has the same states.
        most_probe_tokens, fuse: See `largest_passes`.
    """
    actor = config.actor_rollout_ref.actor
    states = training.weights + training.working + (0.0 if actor.fsdp_config.optimizer_offload else training.optimizer)
    needs = [pass_bytes(config, facts, each) for each in largest_passes(config, most_probe_tokens, fuse)]
    if not needs:
        return None
    activations, logits = max(needs, key=max)
    return LogProbMemory(states, activations / GIB, logits / GIB)
