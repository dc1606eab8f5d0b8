"""The embedded CPU backend: stock `python -m verl.trainer.main_ppo` on CPU, FSDP2 over gloo, a transformers server.

An explicit choice: nothing in here is registered unless `VERL_PLATFORM=cpu` is set. Importing this package imports
nothing else.
"""

from collections.abc import Mapping
from typing import Any

ROLLOUT_NAME = "rredcot_cpu"
"""Value of `actor_rollout_ref.rollout.name` that selects the transformers rollout server, and of
`actor_rollout_ref.rollout.checkpoint_engine.backend` for servers with processes of their own."""

HOOKS: dict[str, str] = {
    "verl.plugin.platform.platform_manager": "rredcot_verl.cpu.hooks:register_platform",
    "verl.workers.engine.fsdp.transformer_impl": "rredcot_verl.cpu.hooks:register_engine",
    "verl.workers.rollout.replica": "rredcot_verl.cpu.hooks:register_replica",
    "verl.workers.rollout.base": "rredcot_verl.cpu.hooks:register_adapter",
    "verl.checkpoint_engine.base": "rredcot_verl.cpu.hooks:register_checkpoint_engine",
    "verl.trainer.ppo.v1": "rredcot_verl.cpu.hooks:register_trainer",
}
"""verl module -> `module:function` to call with that module once verl has imported it."""

DTYPES = ("float32", "bfloat16")
"""What `actor_rollout_ref.rollout.dtype` may be: the type of the server's weights and of training's products."""


def check_rollout(config: Mapping[str, Any]) -> None:
    """Checks that a `rollout` block asks for what the server can do.

    Raises:
        ValueError: It asks for more than one process per server, or for a type or feature that the server lacks.
    """
    for name in ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size"):
        if config.get(name, 1) != 1:
            raise ValueError(f"rollout.name={ROLLOUT_NAME} needs rollout.{name}=1, got {config.get(name)}")
    dtype = config.get("dtype", DTYPES[0])
    if dtype not in DTYPES:
        raise ValueError(f"rollout.name={ROLLOUT_NAME} needs rollout.dtype of {', '.join(DTYPES)}, got {dtype}")
    for name in ("full_determinism", "enable_rollout_routing_replay", "quantization"):
        if config.get(name, None):
            raise ValueError(f"rollout.name={ROLLOUT_NAME} does not support rollout.{name}={config.get(name)!r}")
