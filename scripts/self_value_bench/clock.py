"""Seconds and peak memory of a call."""

import ctypes
import gc
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MEMORY_ON_CPU = "peak resident memory above that before the call, the kernel's high-water mark reset before it (MiB)"
MEMORY_ON_CUDA = "peak of the allocator above what was allocated before the call (MiB)"


@dataclass
class Measured:
    """Measurements of one variant.

    Attributes:
        seconds: By round, of all the work.
        peak_bytes: Most memory above that before the call; None where it cannot be read.
        extrapolated: How the seconds follow from what was run; empty where all of it was.
        result: What the last call returned.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    extrapolated: str = ""
    result: Any = None


CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
"""Clocks by name: seconds that pass, and seconds that the process's threads compute, hardly changed by other load."""


def run(
    measured: Measured,
    round_number: int,
    call: Callable[[], Any],
    device: torch.device,
    clock: str,
    scale: float = 1,
) -> None:
    """Time one call and note its peak memory.

    Args:
        measured: Takes the figures.
        round_number: The round it belongs to; variants of one round are compared.
        call: The work.
        device: Where it runs.
        clock: Which of `CLOCKS`.
        scale: Factor from the seconds of the call to those noted.
    """
    measured.result = None
    before = _start_memory(device)
    started = CLOCKS[clock]()
    measured.result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    measured.seconds[round_number] = (CLOCKS[clock]() - started) * scale
    peak = _peak_memory(device)
    if before is not None and peak is not None:
        measured.peak_bytes = max(measured.peak_bytes or 0, peak - before)


def _start_memory(device: torch.device) -> int | None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if sys.platform != "linux":
        return None
    # Freed memory that the C library kept would hide the growth.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if sys.platform == "linux" else None


def _status(name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
