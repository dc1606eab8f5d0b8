"""Starts the gloo process group of a CPU training worker when it is imported there, and gives it its threads.

Name this module in `actor_rollout_ref.model.external_lib`: verl imports it in each worker just before it starts its
own group, for which it would ask torch for `cpu:gloo,cpu:gloo`, a string torch refuses. verl leaves a group that exists
already alone. Everywhere else (driver, agent loop workers, rollout servers, tests) importing it does nothing.
"""

import logging
import os

import torch
import torch.distributed

logger = logging.getLogger(__name__)

THREADS = "RREDCOT_CPU_THREADS"
"""Environment variable: threads of a training worker, and of its server."""

# verl's worker groups set all of these in their workers' environment; WG_PREFIX is verl's own, so torchrun's
# environment is not mistaken for one.
_WORKER_GROUP_VARIABLES = ("WG_PREFIX", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_cpu_training_worker() -> bool:
    """Tells whether this process is a worker of a verl worker group in a run with `VERL_PLATFORM=cpu`."""
    on_cpu = os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"
    return on_cpu and all(name in os.environ for name in _WORKER_GROUP_VARIABLES)


def start_process_group() -> None:
    """Starts the default gloo group from the worker's environment, unless there is a group already."""
    if torch.distributed.is_initialized():
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(backend="cpu:gloo", rank=rank, world_size=world_size)
    logger.info("gloo process group started: rank %d of %d", rank, world_size)


def take_threads() -> None:
    """Gives torch this rank's share of the cores, or as many threads as `RREDCOT_CPU_THREADS` says.

    The run's environment gives every process one. A rollout server takes as many as its worker: in
    `trainer_mode=sync` they take turns.

    Raises:
        ValueError: The variable holds no number from 1.
    """
    chosen = os.environ.get(THREADS, "")
    if chosen and not (chosen.isdecimal() and int(chosen) > 0):
        raise ValueError(f"{THREADS} must be a whole number from 1, got {chosen!r}")
    num_ranks = int(os.environ.get("RAY_LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    torch.set_num_threads(int(chosen) if chosen else max(1, len(os.sched_getaffinity(0)) // num_ranks))


if is_cpu_training_worker():
    take_threads()
    start_process_group()
