"""Puts the rollout servers that read probes in the place of verl's own, for runs whose probes they read."""

import importlib

from verl.workers.rollout.replica import RolloutReplicaRegistry

REPLICAS = {
    "vllm": ("rredcot_verl.servers.vllm", "ProbingVLLMReplica"),
    "sglang": ("rredcot_verl.servers.sglang", "ProbingSGLangReplica"),
}
"""Value of `actor_rollout_ref.rollout.name` -> module and class of its replica."""


def use_probing_servers(rollout_name: str) -> None:
    """Make verl start rollout servers that take `read_probes`, from now on, in this process.

    To be called in the process that starts the servers (the trainer's), before they are started. They generate as
    verl's own do. Does nothing for backends without such a server; the embedded CPU server reads probes anyway.

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
