"""What `run.json` says: the model, the task, the settings, the machine and the command."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rredcot_verl.analyze.model import Policy, default_dtype, describe
from rredcot_verl.analyze.options import Options

_PACKAGES = ("rredcot_verl", "verl", "torch", "transformers", "numpy")


def describe_run(
    options: Options, policy: Policy, folder: Path, model_fingerprint: str, layers: Sequence[int]
) -> dict[str, Any]:
    """The contents of `run.json` before anything is measured."""
    chosen = options.arguments
    main, other = options.num_rollouts
    return {
        "title": chosen.title or folder.resolve().name,
        "command": chosen.command,
        "model": describe(policy, folder),
        "source": {"prompts": chosen.prompts, "traces": chosen.traces},
        "reward_function": chosen.reward_function,
        "line_checker": chosen.line_checker,
        "reward_range": list(options.settings.self_value.reward_range),
        "settings": options.settings.model_dump(mode="json"),
        "methods": chosen.methods,
        "measured": list(options.measured),
        "cuttings": [cutting.name for cutting in options.cuttings],
        "main_cutting": options.cuttings[0].name,
        "group_size": None if chosen.traces else chosen.group_size,
        "sampling_temperature": chosen.temperature,
        "temperature": chosen.temperatures[0],
        "temperatures": chosen.temperatures,
        "max_response_tokens": chosen.max_response_tokens,
        "num_rollouts": {"main": main, "other": other},
        "layers": list(layers),
        "dim": chosen.dim,
        "num_gradients": chosen.gradients,
        "seed": chosen.seed,
        "budget_s": options.budget_s,
        "device": describe_device(policy.device),
        "dtype": chosen.dtype if chosen.dtype != "auto" else default_dtype(chosen.device),
        "machine": {
            "system": platform.platform(),
            "num_cores": os.cpu_count(),
            "num_threads": torch.get_num_threads(),
        },
        "versions": _versions(),
        "identity": options.identity(model_fingerprint),
    }


def describe_device(device: torch.device) -> str:
    """The device for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
