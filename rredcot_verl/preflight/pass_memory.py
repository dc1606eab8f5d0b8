"""Formulas of what a pass for log-probabilities and probes allocates on a GPU.

A test holds them against the peak of the CPU allocator, `scripts/check_gpu.py` against a GPU's: so neither verl nor the
config's libraries are imported here.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rredcot_verl.passes.probe_pack import READ_AT_ONCE

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from rredcot_verl.preflight.model_size import ModelFacts

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


def pass_bytes(config: "DictConfig", facts: "ModelFacts", of: LogProbPass) -> tuple[float, float]:
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
