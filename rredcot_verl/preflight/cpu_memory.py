"""Estimate of what a run on CPU holds at its largest, all processes on one machine; float32 throughout."""

import os
from dataclasses import dataclass

from omegaconf import DictConfig

from rredcot_verl.preflight.memory import GIB
from rredcot_verl.preflight.model_size import ModelFacts

LIBRARIES_GIB = 0.6
"""Of a process with torch, transformers and verl: about what is left of those in docs/results/bench.md."""

OTHERS_GIB = 3.0
"""Assumed for the other processes, Ray's own and shared pages: 2 and 0.75 in docs/results/bench.md."""

FREE_SHARE = 0.9
"""Share of the machine's memory that an estimate may take without a warning."""


@dataclass(frozen=True)
class CPUMemory:
    """GiB at most, with passes filled up to a number of tokens; the one run that it was compared with is in
    docs/results/bench.md, which the number of copies of the logits was chosen by.

    Attributes:
        states: Weights, gradients and AdamW of a training worker, 4, 4 and 8 bytes a parameter over the ranks.
        token: Of a token of a pass with gradient: 16 bytes for each entry of the vocabulary (four copies of its
            logits), and activations, 4 (12 h + 4 f) a layer.
        num_tokens: `ppo_max_token_len_per_gpu`.
        server: A rollout server: weights, and two buckets on their way to them.
        num_ranks: Training workers, each with a server.
    """

    states: float
    token: float
    num_tokens: int
    server: float
    num_ranks: int

    @property
    def training(self) -> float:
        """A training worker."""
        return self.states + self.token * self.num_tokens + LIBRARIES_GIB

    @property
    def total(self) -> float:
        """All processes."""
        return self.num_ranks * (self.training + self.server) + OTHERS_GIB

    def tokens_within(self, gib: float) -> int:
        """The longest pass that fits; 0 or less where nothing does."""
        left = (gib - OTHERS_GIB) / self.num_ranks - self.server - self.states - LIBRARIES_GIB
        return int(left / self.token)


def cpu_memory(config: DictConfig, facts: ModelFacts) -> CPUMemory:
    """The estimate for a run with `trainer.device=cpu`."""
    num_ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    weights = 4 * facts.num_parameters
    bucket = min(weights, config.actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes << 20)
    activations = 4 * facts.num_layers * (12 * facts.hidden_size + 4 * facts.intermediate_size)
    return CPUMemory(
        states=(weights + 12 * facts.num_trainable_parameters) / num_ranks / GIB,
        token=(16 * facts.vocab_size + activations) / GIB,
        num_tokens=int(config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu),
        server=(weights + 2 * bucket) / GIB + LIBRARIES_GIB,
        num_ranks=num_ranks,
    )


def machine_gib() -> float:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
