"""What `run.json` says: the model, the task, the settings, the machine and the command."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rredcot_verl.analyze.command_line import Options
from rredcot_verl.analyze.policy import Policy, default_dtype

_PACKAGES = ("rredcot_verl", "verl", "torch", "transformers", "numpy")


def describe_run(
    options: Options, policy: Policy, folder: Path, layers: Sequence[int], identity: dict[str, Any]
) -> dict[str, Any]:
    """The contents of `run.json` before anything is measured."""
    main, other = options.num_rollouts
    config, device = policy.model.config, policy.device
    text = config.get_text_config(decoder=True)
    return {
        "title": options.title or folder.resolve().name,
        "command": options.command,
        "model": {
            "path": str(folder),
            "type": config.model_type,
            "num_parameters": policy.num_parameters,
            "num_layers": policy.num_layers,
            "hidden_size": text.hidden_size,
            "vocab_size": text.vocab_size,
        },
        "source": {"prompts": options.prompts, "traces": options.traces, "labels": options.labels},
        "reward_function": options.reward_function,
        "line_checker": options.line_checker,
        "true_values": options.true_values,
        "reward_range": list(options.settings.self_value.reward_range),
        "settings": options.settings.model_dump(mode="json"),
        "methods": options.methods,
        "measured": list(options.measured),
        "cuttings": list(options.cuttings),
        "main_cutting": next(iter(options.cuttings)),
        "group_size": options.group_size if options.prompts else None,
        "sampling_temperature": options.temperature,
        "max_response_tokens": options.max_response_tokens,
        "num_rollouts": {"main": main, "other": other},
        "layers": list(layers),
        "dim": options.dim,
        "seed": options.seed,
        "budget_s": options.budget_s,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        "dtype": options.dtype if options.dtype != "auto" else default_dtype(options.device),
        "machine": {"system": platform.platform(), "num_cores": os.cpu_count(), "num_threads": torch.get_num_threads()},
        "versions": _versions(),
        "identity": identity,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
