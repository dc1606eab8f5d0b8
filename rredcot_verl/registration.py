"""What goes into verl's registries, one function for each verl module that owns one.

Each imports the module that registers itself, as verl's own decorators do. Nothing is imported at the top: these run
while verl's modules are being loaded, and a module of ours that is being imported itself registers when it is done.
"""

import importlib
from types import ModuleType


def register_estimator(core_algos: ModuleType) -> None:
    """Registers the advantage estimator under the names of all sources."""
    importlib.import_module("rredcot_verl.trainer.estimator")


def register_reward_manager(reward_manager: ModuleType) -> None:
    """Registers the reward manager `rredcot`."""
    importlib.import_module("rredcot_verl.agent.reward_manager")


def register_trainers(v1: ModuleType) -> None:
    """Puts a pass-through subclass of each of verl's trainers under its own mode name."""
    importlib.import_module("rredcot_verl.trainer.trainer")


def register_engine(transformer_impl: ModuleType) -> None:
    """Registers the FSDP engine with our passes, under a model type of its own."""
    from rredcot_verl.passes.engine import RREDCoTEngine
    from rredcot_verl.passes.protocol import MODEL_TYPE

    transformer_impl.EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda", "npu"])(
        RREDCoTEngine
    )


def register_megatron_engine(transformer_impl: ModuleType) -> None:
    """Registers the Megatron engine that reads probes, under the same model type."""
    from rredcot_verl.passes.megatron_engine import RREDCoTMegatronEngine
    from rredcot_verl.passes.protocol import MODEL_TYPE

    transformer_impl.EngineRegistry.register(model_type=MODEL_TYPE, backend="megatron")(RREDCoTMegatronEngine)
