"""`python -m rredcot_verl.doctor`: can this installation run RREDCoT? One line a check, exit code 1 on a fault."""

import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

REINSTALL = "pip install verl==0.9.1 (see REQUIRED_VERL.txt), then run the doctor again"

_DISCOVERY = """
import json, warnings
warnings.simplefilter("ignore")
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
from verl.experimental.reward_loop.reward_manager import registry
from verl.trainer.ppo.v1 import get_trainer_cls
from rredcot_verl.sources.registry import SOURCES
print("FOUND" + json.dumps({
    **{f"advantage estimator {name}": name in ADV_ESTIMATOR_REGISTRY for name in SOURCES},
    "reward manager rredcot": "rredcot" in registry.REWARD_MANAGER,
    "trainer sync": "RREDCoT" in get_trainer_cls("sync").__name__,
}))
"""


def check_version() -> str | None:
    """verl's version is the one the contract was read from."""
    from rredcot_verl.compat import REQUIRED_VERL

    try:
        found = version("verl")
    except PackageNotFoundError:
        return f"verl is not installed; {REINSTALL}"
    return None if found == REQUIRED_VERL else f"found {found}, expected {REQUIRED_VERL}; {REINSTALL}"


def check_contract() -> str | None:
    """Every verl symbol relied on is there."""
    from rredcot_verl.compat import CPU_SYMBOLS, SYMBOLS, check_symbols

    faults = check_symbols({**SYMBOLS, **CPU_SYMBOLS})
    return f"{'; '.join(faults)}; {REINSTALL}" if faults else None


def check_discovery() -> str | None:
    """A fresh process that only imports verl finds every registration."""
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    done = subprocess.run([sys.executable, "-c", _DISCOVERY], capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND")), None)
    if line is None:
        cause = done.stderr.strip().splitlines()[-1:]
        return f"the process failed: {cause}; run `python -c 'import verl.trainer.ppo.v1'` to see all of it"
    missing = [name for name, found in json.loads(line.removeprefix("FOUND")).items() if not found]
    if not missing:
        return None
    return (
        f"not registered: {', '.join(missing)}; pip install rredcot_verl into this environment, and leave "
        f"VERL_USE_EXTERNAL_PLUGINS unset or let it name rredcot (it is {policy!r}); `python -c 'import "
        "rredcot_verl.register'` shows an import error"
    )


def check_overlay() -> str | None:
    """The overlay composes with verl's own config and passes its own checks."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException

    from rredcot_verl.run.settings import active_settings

    try:
        with initialize_config_module("rredcot_verl.config", version_base=None):
            config = compose("rredcot_trainer", overrides=["actor_rollout_ref.rollout.name=vllm"])
        active_settings(config)
    except (HydraException, ValueError) as error:
        return f"{error}; {REINSTALL}"
    return None


def check_golden() -> str | None:
    """Two segments, the second one decisive: a number computed by hand."""
    import torch

    from rredcot_verl.core.credit import CreditRule, segment_credit
    from rredcot_verl.core.groups import group_statistics
    from rredcot_verl.core.redistribution import SegmentBatch, redistribute

    segments = SegmentBatch.from_rows([[0, 2, 4]], [[0.25, 0.0]], torch.tensor([1.0]), [4])
    mask = torch.ones(1, 4)
    rewards = redistribute(segments, mask)
    groups = group_statistics(segments.outcomes, ["a"])
    rule = CreditRule(form="reweight", beta=1.0)
    made = segment_credit(segments, segments.num_tokens(mask), torch.tensor([1.0]), groups, groups, rule)
    weights = made.segment_weights
    # d = (-0.25, 1): weights proportional to exp(d), with mean 1 over two tokens each.
    expected = 2 / (1 + math.exp(-1.25))
    if rewards.tolist() == [[0.25, -0.25, 0.0, 1.0]] and abs(weights[0, 1].item() - expected) < 1e-6:
        return None
    return f"got {rewards.tolist()} and weight {weights[0, 1].item()}, expected {expected}; reinstall rredcot_verl"


def check_vllm() -> str | None:
    """If vLLM is installed, it has what the scoring server relies on."""
    if importlib.util.find_spec("vllm") is None:
        return None
    from rredcot_verl.compat import VLLM_SYMBOLS, check_symbols

    faults = check_symbols(VLLM_SYMBOLS)
    return "; ".join(faults) + "; self_value.engine=rollout needs another version of vLLM" if faults else None


def check_megatron() -> str | None:
    """If Megatron-core is installed, it has what the Megatron engine relies on."""
    if importlib.util.find_spec("megatron") is None:
        return None
    from rredcot_verl.compat import MEGATRON_SYMBOLS, check_symbols

    faults = check_symbols(MEGATRON_SYMBOLS)
    return "; ".join(faults) + "; strategy=megatron needs self_value.share_prefix=false" if faults else None


CHECKS: dict[str, Callable[[], str | None]] = {
    "verl version": check_version,
    "verl contract": check_contract,
    "vLLM (if installed)": check_vllm,
    "Megatron-core (if installed)": check_megatron,
    "plugin discovery": check_discovery,
    "overlay": check_overlay,
    "golden number": check_golden,
}


def main() -> int:
    """Run all checks and report; the exit code."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    faults = 0
    for name, check in CHECKS.items():
        fault = check()
        faults += fault is not None
        sys.stdout.write(f"{'ok  ' if fault is None else 'FAIL'} {name}{'' if fault is None else ': ' + fault}\n")
        sys.stdout.flush()
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
