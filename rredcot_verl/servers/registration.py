"""Puts the rollout servers that score probes in the place of verl's own, for runs that score by the rollout server."""

import importlib

from verl.workers.rollout.replica import RolloutReplicaRegistry

REPLICAS = {
    "vllm": ("rredcot_verl.servers.vllm", "ScoringVLLMReplica"),
    "sglang": ("rredcot_verl.servers.sglang", "ScoringSGLangReplica"),
}
"""Value of `actor_rollout_ref.rollout.name` -> module and class of its replica."""


def use_scoring_servers(rollout_name: str) -> None:
    """Make verl start rollout servers that take `read_probes`, from now on, in this process.

    To be called in the process that starts the servers (the trainer's), before they are started. They generate as
    verl's own do. Does nothing for backends without such a server; the embedded CPU server scores anyway.

    Args:
        rollout_name: `actor_rollout_ref.rollout.name`.

    Raises:
        ImportError: The backend is not installed.
    """
    if rollout_name not in REPLICAS:
        return
    # verl's own loader first: it prepares the import of some backends.
    RolloutReplicaRegistry.get(rollout_name)
    module_name, class_name = REPLICAS[rollout_name]
    replica = getattr(importlib.import_module(module_name), class_name)
    RolloutReplicaRegistry.register(rollout_name, lambda: replica)
