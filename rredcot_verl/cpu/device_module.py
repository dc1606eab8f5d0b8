"""A stand-in for `torch.cuda` on a machine without an accelerator.

Delegates to `torch.cpu` and adds the calls verl makes that `torch.cpu` lacks. Memory calls report nothing allocated:
there is no device memory to account for, and the host's is reported by verl itself (`perf/cpu_memory_used_gb`).
"""

import platform
from typing import Any

import psutil
import torch
from torch.random import get_rng_state, manual_seed, set_rng_state

__all__ = [
    "empty_cache",
    "get_device_name",
    "get_rng_state",
    "ipc_collect",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "reset_peak_memory_stats",
    "set_per_process_memory_fraction",
    "set_rng_state",
]

manual_seed_all = manual_seed


def __getattr__(name: str) -> Any:
    return getattr(torch.cpu, name)


def empty_cache() -> None:
    """Does nothing: the host allocator keeps no device cache."""


def ipc_collect() -> None:
    """Does nothing: no device memory is shared between processes."""


def reset_peak_memory_stats(device: Any = None) -> None:
    """Does nothing: no peak is recorded."""


def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
    """Does nothing: host memory is not partitioned."""


def memory_allocated(device: Any = None) -> int:
    """Returns 0 bytes."""
    return 0


def memory_reserved(device: Any = None) -> int:
    """Returns 0 bytes."""
    return 0


def max_memory_allocated(device: Any = None) -> int:
    """Returns 0 bytes."""
    return 0


def max_memory_reserved(device: Any = None) -> int:
    """Returns 0 bytes."""
    return 0


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Returns the host's (available, total) memory in bytes."""
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def get_device_name(device: Any = None) -> str:
    """Returns the processor's name; verl looks up peak FLOP/s by it and finds none for a CPU."""
    return platform.processor() or "cpu"
