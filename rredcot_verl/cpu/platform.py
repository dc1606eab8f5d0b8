"""The verl platform `cpu`."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase

from rredcot_verl.cpu import device_module


class PlatformCPU(PlatformBase):
    """CPU as verl's accelerator: gloo collectives, no device memory, Ray's `GPU` resource used as a plain counter.

    verl's worker groups ask Ray for `GPU` resources; a CPU run declares as many as it has ranks
    (`ray_kwargs.ray_init.num_gpus`), and Ray checks nothing but the number.
    """

    @property
    def device_name(self) -> str:
        """`"cpu"`, as torch spells it."""
        return "cpu"

    @property
    def vendor_name(self) -> str:
        """`"cpu"`: no vendor-specific engine exists for it."""
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        """The stand-in for `torch.cuda`."""
        return device_module

    def is_available(self) -> bool:
        """Always true: a process has a CPU."""
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """Always false, so that auto-detection can never choose CPU; `VERL_PLATFORM=cpu` does."""
        return False

    def current_device(self) -> str:
        """Returns `"cpu"`: verl hands this to `Tensor.to`, where an index would mean an accelerator."""
        return torch.cpu.current_device()

    def device_count(self) -> int:
        """Returns 1."""
        return torch.cpu.device_count()

    def _nothing(self, *arguments: Any) -> None:
        """Does nothing: there is one device, synchronous, without memory of its own, allocator or profiler."""

    set_device = synchronize = set_allocator_settings = empty_cache = profiler_start = profiler_stop = _nothing

    def manual_seed(self, seed: int) -> None:
        """Seeds torch's CPU generator."""
        device_module.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        """Returns `(None, None)`: CPUs have no compute capability."""
        return None, None

    def communication_backend_name(self) -> str:
        """Returns `"gloo"`."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """Returns the variable Ray sets for its `GPU` resource; its value means nothing here."""
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        """Does nothing: there is no device profiler."""
        yield

    def ray_resource_name(self) -> str:
        """Returns `"GPU"`: verl's resource check counts GPU and NPU only."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        """Returns none: there are no visible devices to keep Ray from setting."""
        return []

    def is_ipc_supported(self) -> bool:
        """Returns false: tensors go between processes through Ray."""
        return False

    def cudart(self) -> Any:
        """Returns `None`: there is no CUDA runtime."""
        return None
