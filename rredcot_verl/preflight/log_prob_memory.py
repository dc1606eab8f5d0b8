"""Estimate of the GPU memory of FSDP's passes for log-probabilities, with and without probes.

Formulas of the allocations, which a test holds against the peak of the CPU allocator.
"""

from dataclasses import dataclass

from omegaconf import DictConfig

from rredcot_verl.passes.probe_pack import READ_AT_ONCE
from rredcot_verl.passes.probe_parts import LEAST_ROOM
from rredcot_verl.preflight.memory import GIB, TrainingMemory
from rredcot_verl.preflight.model_size import ModelFacts
from rredcot_verl.sources.engines import bypasses_old_log_prob, ulysses_size

FUSED_CHUNK = 512
"""Tokens that verl's fused kernels in torch take at once."""


@dataclass(frozen=True)
class LogProbPass:
    """What a pass computes on a GPU, in tokens.

    Attributes:
        num_own: Tokens of traces whose own log-probabilities are made.
        num_others: Tokens of traces whose own are not.
        num_probe_tokens: Tokens of probes.
        num_read: Tokens at which probes are read.
    """

    num_own: int
    num_others: int = 0
    num_probe_tokens: int = 0
    num_read: int = 0

    @property
    def num_tokens(self) -> int:
        """All of them."""
        return self.num_own + self.num_others + self.num_probe_tokens


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


def pass_bytes(config: DictConfig, facts: ModelFacts, of: LogProbPass) -> tuple[float, float]:
    """Bytes of a pass's activations, and of its logits.

    V = vocabulary, h, f = hidden size and width of the feed-forward part, 2 bytes a number (bfloat16).

    - Activations: 2 (5 h + 3 f) a token; no gradient is kept.
    - Logits: 2 V for each token whose own log-probabilities are made or at which a probe is read. verl divides its own
      by the temperature, a copy, unless that is 1. Without torch.compile its entropy takes two more, or 12 V for each
      token of a chunk. The fused kernels have none of these, but in torch 12 V for each token of a chunk.
    - Reading probes: 8 bytes for each of `READ_AT_ONCE` logits, not while verl's copies exist.
    """
    engine, rollout = config.actor_rollout_ref.actor.fsdp_config, config.actor_rollout_ref.rollout
    row = 2 * facts.vocab_size
    kernels = config.actor_rollout_ref.model
    if kernels.use_fused_kernels:
        in_torch = kernels.fused_kernel_options.impl_backend == "torch"
        num_rows, made = of.num_read, 6 * row * min(of.num_own, FUSED_CHUNK) if in_torch else 0
    else:
        num_rows = of.num_own + of.num_read
        scaled = row * of.num_own if rollout.temperature != 1 else 0
        entropy = 0 if engine.use_torch_compile else 2 * row * of.num_own
        if entropy and engine.entropy_from_logits_with_chunking:
            entropy = 6 * row * min(of.num_own, engine.entropy_from_logits_chunk_size)
        made = scaled + entropy
    reading = 8 * min(READ_AT_ONCE, of.num_read * facts.vocab_size)
    activations = 2 * of.num_tokens * (5 * facts.hidden_size + 3 * facts.intermediate_size)
    return activations, row * num_rows + max(made, reading)


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
