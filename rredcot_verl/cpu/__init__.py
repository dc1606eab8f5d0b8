"""The embedded CPU backend: stock `python -m verl.trainer.main_ppo` on CPU, FSDP2 over gloo, a transformers server.

An explicit choice: nothing in here is registered unless `VERL_PLATFORM=cpu` is set. Importing this package imports
nothing else.
"""

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
