"""What the CPU backend puts into verl's registries, one function for each verl module that owns a registry.

Every function takes the verl module that has just been imported. Nothing heavy is imported at the top: these run while
verl's own modules are still being loaded, in every process of a run.
"""

from types import ModuleType

from rredcot_verl.cpu import ROLLOUT_NAME


def register_platform(platform_manager: ModuleType) -> None:
    """Registers the platform `cpu` (chosen only by `VERL_PLATFORM=cpu`, never detected)."""
    from rredcot_verl.cpu.platform import PlatformCPU

    platform_manager.PlatformRegistry.register(platform="cpu")(PlatformCPU)


def register_engine(transformer_impl: ModuleType) -> None:
    """Registers the FSDP2 language-model engine for the device `cpu`, without and with our passes."""
    from rredcot_verl.cpu.engine import CPUFSDPEngineWithLMHead, CPURREDCoTEngine
    from rredcot_verl.passes.protocol import MODEL_TYPE

    for model_type, engine in (("language_model", CPUFSDPEngineWithLMHead), (MODEL_TYPE, CPURREDCoTEngine)):
        transformer_impl.EngineRegistry.register(model_type=model_type, backend="fsdp2", device="cpu")(engine)


def register_replica(replica: ModuleType) -> None:
    """Registers the rollout replica under the name `rredcot_cpu`; the class is loaded on first use."""

    def load_replica() -> type:
        from rredcot_verl.cpu.rollout import CPUReplica

        return CPUReplica

    replica.RolloutReplicaRegistry.register(ROLLOUT_NAME, load_replica)


def register_adapter(rollout_base: ModuleType) -> None:
    """Registers the adapter through which the training worker reaches its server.

    verl offers no function for this registry; it is a plain dict of dotted names.
    """
    rollout_base._ROLLOUT_REGISTRY[(ROLLOUT_NAME, "async")] = "rredcot_verl.cpu.rollout.CPUServerAdapter"


def register_checkpoint_engine(checkpoint_engine: ModuleType) -> None:
    """Registers the checkpoint engine that brings weights to rollout servers in processes of their own."""
    from rredcot_verl.cpu.checkpoint_engine import CPUCheckpointEngine

    checkpoint_engine.CheckpointEngineRegistry.register(ROLLOUT_NAME)(CPUCheckpointEngine)


def register_trainer(v1: ModuleType) -> None:
    """Stands in for verl's `separate_async` trainer, whichever stands there already."""
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    from rredcot_verl.cpu.separate_async import CPUSeparateAsyncMixin

    trainer = TRAINER_REGISTRY["separate_async"]
    bases = (CPUSeparateAsyncMixin, trainer)
    TRAINER_REGISTRY["separate_async"] = type(f"CPU{trainer.__name__}", bases, {"__doc__": trainer.__doc__})
