"""Estimate of what a run on CPU holds at its largest, all processes on one machine.

In float32; with bfloat16 a pass of training takes less than is said, and a server's weights half.
"""

import os
from dataclasses import dataclass

from omegaconf import DictConfig

from rredcot_verl.preflight.memory import GIB
from rredcot_verl.preflight.model_size import ModelFacts
from rredcot_verl.preflight.pass_memory import FUSED_CHUNK

LIBRARIES_GIB = 0.6
"""Of a process with torch, transformers and verl: about what is left of those in docs/results/bench.md."""

OTHERS_GIB = 3.0
"""Assumed for the other processes, Ray's own and shared pages: 2 and 0.75 in docs/results/bench.md."""

FREE_SHARE = 0.9
"""Share of the machine's memory that an estimate may take without a warning."""


@dataclass(frozen=True)
class CPUMemory:
    """GiB at most, with passes filled up to a number of tokens; held against runs in docs/results/bench.md.

    Attributes:
        states: Weights, gradients and AdamW of a training worker, 4, 4 and 8 bytes a parameter over the ranks.
        token: Of a token of a pass with gradient: activations, 4 (12 h + 4 f) a layer, or of a single one and 4 h of
            the others with gradient checkpointing; and without fused kernels 16 V, four copies of its logits.
        head: Of such a pass, however long: with fused kernels 20 V for each token of a chunk, and twice the head.
        num_tokens: `ppo_max_token_len_per_gpu`.
        server: A rollout server: weights, and two buckets on their way to them.
        num_ranks: Training workers, each with a server.
    """

    states: float
    token: float
    head: float
    num_tokens: int
    server: float
    num_ranks: int

    @property
    def update(self) -> float:
        """A pass with gradient."""
        return self.head + self.token * self.num_tokens

    @property
    def training(self) -> float:
        """A training worker."""
        return self.states + self.update + LIBRARIES_GIB

    @property
    def total(self) -> float:
        """All processes."""
        return self.num_ranks * (self.training + self.server) + OTHERS_GIB

    def tokens_within(self, gib: float) -> int:
        """The longest pass that fits; 0 or less where nothing does."""
        left = (gib - OTHERS_GIB) / self.num_ranks - self.server - self.states - self.head - LIBRARIES_GIB
        return int(left / self.token)


def cpu_memory(config: DictConfig, facts: ModelFacts) -> CPUMemory:
    """The estimate for a run with `trainer.device=cpu`."""
    num_ranks, model = config.trainer.nnodes * config.trainer.n_gpus_per_node, config.actor_rollout_ref.model
    weights, vocabulary = 4 * facts.num_parameters, facts.vocab_size
    rollout = config.actor_rollout_ref.rollout
    served = weights // 2 if rollout.dtype == "bfloat16" else weights
    bucket = min(weights, rollout.checkpoint_engine.update_weights_bucket_megabytes << 20)
    layer, kept = 4 * (12 * facts.hidden_size + 4 * facts.intermediate_size), 4 * facts.hidden_size
    activations = layer * facts.num_layers
    if model.enable_gradient_checkpointing:
        activations = layer + kept * facts.num_layers
    fused = model.use_fused_kernels
    num_tokens = int(config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu)
    head = 20 * vocabulary * min(num_tokens, FUSED_CHUNK) + 8 * vocabulary * facts.hidden_size
    return CPUMemory(
        states=(weights + 12 * facts.num_trainable_parameters) / num_ranks / GIB,
        token=(activations + (0 if fused else 16 * vocabulary)) / GIB,
        head=head / GIB if fused else 0.0,
        num_tokens=num_tokens,
        server=(served + 2 * bucket) / GIB + LIBRARIES_GIB,
        num_ranks=num_ranks,
    )


def machine_gib() -> float:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
