"""A stand-in for `torch.cuda` on a machine without an accelerator.

Delegates to `torch.cpu` and adds the calls verl makes that `torch.cpu` lacks. Memory calls report nothing allocated:
there is no device memory to account for, and the host's is reported by verl itself (`perf/cpu_memory_used_gb`).
"""

import platform
from typing import Any

import psutil
import torch

get_rng_state = torch.get_rng_state
set_rng_state = torch.set_rng_state
manual_seed = manual_seed_all = torch.manual_seed


def __getattr__(name: str) -> Any:
    return getattr(torch.cpu, name)


def empty_cache(*arguments: Any, **named: Any) -> None:
    """Does nothing: there is no device memory to free, share, record or partition."""


ipc_collect = reset_peak_memory_stats = set_per_process_memory_fraction = empty_cache


def memory_allocated(device: Any = None) -> int:
    """Returns 0 bytes."""
    return 0


memory_reserved = max_memory_allocated = max_memory_reserved = memory_allocated


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Returns the host's (available, total) memory in bytes."""
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def get_device_name(device: Any = None) -> str:
    """Returns the processor's name; verl looks up peak FLOP/s by it and finds none for a CPU."""
    return platform.processor() or "cpu"
