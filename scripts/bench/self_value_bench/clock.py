"""Seconds and peak memory of a call."""

import ctypes
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MEMORY_ON_CPU = "peak resident memory above that before the call, the kernel's high-water mark reset before it (MiB)"
MEMORY_ON_CUDA = "peak of the allocator above what was allocated before the call (MiB)"

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
"""Clocks by name: seconds that pass, and seconds that the process's threads compute, hardly changed by other load."""


@dataclass
class Measured:
    """Measurements of one variant.

    Attributes:
        seconds: By round, of all the work.
        peak_mib: Most memory above that before the call; None where it cannot be read.
        extrapolated: How the seconds follow from what was run; empty where all of it was.
        result: What the last call returned.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    peak_mib: float | None = None
    extrapolated: str = ""
    result: Any = None

    @property
    def median(self) -> float | None:
        """Seconds; None where nothing was run."""
        return statistics.median(self.seconds.values()) if self.seconds else None

    def over(self, other: "Measured") -> float | None:
        """Median over rounds of the quotient of seconds: what slows a whole round down does not count."""
        rounds = self.seconds.keys() & other.seconds.keys()
        return statistics.median(self.seconds[r] / other.seconds[r] for r in rounds) if rounds else None

    def run(self, round_number: int, call: Callable[[], Any], device: torch.device, clock: str, scale: float = 1):
        """Times one call and notes its peak memory.

        Args:
            round_number: The round it belongs to; variants of one round are compared.
            call: The work.
            device: Where it runs.
            clock: Which of `CLOCKS`.
            scale: Factor from the seconds of the call to those noted.
        """
        self.result = None
        before = _start_memory(device)
        started = CLOCKS[clock]()
        self.result = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds[round_number] = (CLOCKS[clock]() - started) * scale
        if before is not None:
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")
            self.peak_mib = max(self.peak_mib or 0, (peak - before) / 2**20)


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


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
