"""What figures were taken on."""

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from self_value_bench.clock import MEMORY_ON_CPU, MEMORY_ON_CUDA


def machine(device: torch.device) -> dict[str, Any]:
    """The machine, its libraries, and how memory is read on it."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)", info.read_text(), re.MULTILINE) if info.exists() else None
    on_gpu = device.type == "cuda"
    return {
        "cpu": named[1] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "memory": MEMORY_ON_CUDA if on_gpu else MEMORY_ON_CPU,
        "load_average_at_start": os.getloadavg(),
    }
