"""The `verl.plugins` entry point: lazy registration, nothing else.

verl imports this module in every process, while `verl/__init__` is still running, and swallows any error. So nothing is
imported here: each registration runs when verl itself has imported the module that holds the registry. With another
advantage estimator none of them changes anything.
"""

import importlib
import os
from types import ModuleType

from wrapt import when_imported

HOOKS: dict[str, str] = {
    "verl.trainer.ppo.core_algos": "rredcot_verl.registration:register_estimator",
    "verl.experimental.reward_loop.reward_manager": "rredcot_verl.registration:register_reward_manager",
    "verl.trainer.ppo.v1": "rredcot_verl.registration:register_trainers",
    "verl.workers.engine.fsdp.transformer_impl": "rredcot_verl.registration:register_engine",
    "verl.workers.engine.megatron.transformer_impl": "rredcot_verl.registration:register_megatron_engine",
}
"""verl module -> the function that registers with it once it is imported."""


def _install(hooks: dict[str, str]) -> None:
    for verl_module, target in hooks.items():
        when_imported(verl_module)(_caller(target))


def _caller(target: str):  # type: ignore[no-untyped-def]
    module_name, function_name = target.split(":")

    def call(module: ModuleType) -> None:
        getattr(importlib.import_module(module_name), function_name)(module)

    return call


_install(HOOKS)
if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
    from rredcot_verl.cpu import HOOKS as CPU_HOOKS

    _install(CPU_HOOKS)
