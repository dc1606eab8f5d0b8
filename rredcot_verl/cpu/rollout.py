"""What verl starts and talks to: the replica (in the trainer), its server actor, and the adapter (in each worker)."""

import os
import sys
from collections.abc import AsyncIterable, Iterable
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import get_device_name
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica

from rredcot_verl.cpu import ROLLOUT_NAME, check_rollout
from rredcot_verl.cpu.language_model import RolloutModel
from rredcot_verl.cpu.rollout_server import RolloutServer, ServerLimits
from rredcot_verl.cpu.weight_buckets import in_buckets
from rredcot_verl.probes.vocabulary import ends_of


def check_cpu_run(config: RolloutConfig) -> None:
    """Checks that the run is a CPU run within what the rollout server can do.

    Raises:
        RuntimeError: verl's device is not the CPU.
        ValueError: See `check_rollout`.
    """
    device_name = get_device_name()
    if device_name != "cpu":
        raise RuntimeError(
            f"rollout.name={ROLLOUT_NAME} runs on CPU only, but verl's device is {device_name!r}. A CPU run is an "
            "explicit choice: set VERL_PLATFORM=cpu in the environment and trainer.device=cpu in the configuration"
        )
    check_rollout(config)


def _actor_name(replica_rank: int, role: str = "") -> str:
    return f"{ROLLOUT_NAME}_server_{role}{replica_rank}_0"


def _server_limits(config: RolloutConfig, model_config: HFModelConfig) -> ServerLimits:
    max_model_len = config.max_model_len or config.prompt_length + config.response_length
    # Models without learned or rotary tables (ALiBi, none at all) state no limit.
    context_length = getattr(model_config.hf_config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    return ServerLimits(
        prompt_length=config.prompt_length,
        response_length=config.response_length,
        max_model_len=min(max_model_len, context_length),
        context_length=context_length,
        max_num_seqs=config.max_num_seqs,
        ignore_eos=config.ignore_eos,
        free_cache_engine=config.free_cache_engine,
    )


class CPURolloutServer(RolloutServer):
    """The server as a Ray actor: builds model and limits from verl's configuration.

    Args:
        config: verl's rollout configuration. The weights are always read from the model's folder, whatever
            `load_format` says: until the first weight update the server answers as the initial policy.
        model_config: verl's model configuration.
        replica_rank: Rank of the replica; part of the sampling seed, so that replicas draw different samples.
        num_threads: Of torch.
    """

    def __init__(self, config: RolloutConfig, model_config: HFModelConfig, replica_rank: int, num_threads: int):
        config = omega_conf_to_dataclass(config)
        check_cpu_run(config)
        torch.set_num_threads(num_threads)
        model_config = omega_conf_to_dataclass(model_config)
        torch.manual_seed(config.seed + replica_rank)
        model = AutoModelForCausalLM.from_pretrained(
            model_config.local_path,
            config=model_config.hf_config,
            dtype=config.dtype,
            trust_remote_code=model_config.trust_remote_code,
        )
        rollout_model = RolloutModel(
            model, ends_of(model_config.generation_config, model_config.hf_config), config.max_num_batched_tokens
        )
        super().__init__(rollout_model, _server_limits(config, model_config))

    async def ready(self) -> bool:
        """Answers once the model is loaded."""
        return True


class CPUReplica(RolloutReplica):
    """One rollout replica: one server actor, on the node of the training worker it belongs to."""

    async def launch_servers(self) -> None:
        """Starts the server actor and waits until its model is loaded.

        Raises:
            RuntimeError: verl's device is not the CPU.
            ValueError: The configuration asks for what the server cannot do.
        """
        check_cpu_run(self.config)
        role = "reward_" if self.is_reward_model else "teacher_" if self.is_teacher_model else ""
        name = _actor_name(self.replica_rank, role) + self.name_suffix
        node_id, num_threads = await self.workers[0].__ray_call__.remote(
            lambda _: (ray.get_runtime_context().get_node_id(), torch.get_num_threads())
        )
        server = (
            ray.remote(CPURolloutServer)
            .options(
                name=name,
                num_cpus=0,
                max_concurrency=self.max_concurrency,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
            )
            .remote(self.config, self.model_config, self.replica_rank, num_threads)
        )
        await server.ready.remote()
        self.servers = [server]
        self._server_handle = server
        # No HTTP: the load balancer uses the address as the server's name only.
        self._server_address = name


class CPUServerAdapter(BaseRollout):
    """A training worker's line to its server: wakes it, puts it to sleep, sends it the actor's weights.

    Args:
        config: verl's rollout configuration.
        model_config: verl's model configuration.
        device_mesh: Not used.
        replica_rank: Rank of the replica; by default the worker's own rank, as a server has one process.
    """

    def __init__(
        self,
        config: RolloutConfig,
        model_config: HFModelConfig,
        device_mesh: DeviceMesh | None,
        replica_rank: int = -1,
    ):
        super().__init__(config, model_config, device_mesh)
        check_cpu_run(self.config)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank
        self.is_leader_rank = True
        self._server: ray.actor.ActorHandle | None = None

    @property
    def server(self) -> ray.actor.ActorHandle:
        """The server actor; looked up late, because verl starts the servers after the workers."""
        if self._server is None:
            self._server = ray.get_actor(_actor_name(self.replica_rank))
        return self._server

    async def resume(self, tags: list[str]) -> None:
        """Wakes the parts of the server named in `tags` (`weights`, `kv_cache`)."""
        if self.config.free_cache_engine:
            await self.server.wake_up.remote(tags=tags)

    async def release(self) -> None:
        """Puts the server to sleep."""
        if self.config.free_cache_engine:
            await self.server.sleep.remote()

    @torch.no_grad()
    async def update_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]] | AsyncIterable[tuple[str, torch.Tensor]],
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        peft_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Sends the actor's weights to the server in buckets and has them loaded in place.

        Args:
            weights: Names and whole tensors. Drawn to the end on every rank: each tensor is gathered by a collective.
            global_steps: Version of the weights, optimiser steps.
            wire_format: Must be `named_tensors`.
            peft_config: Must be `None`.
            **kwargs: Further arguments of other backends, without meaning here.

        Raises:
            ValueError: The weights are adapters or deltas.
        """
        if wire_format != "named_tensors":
            raise ValueError(f"rollout.name={ROLLOUT_NAME} takes whole weights, got wire_format={wire_format!r}")
        if peft_config is not None:
            raise ValueError(f"rollout.name={ROLLOUT_NAME} cannot load LoRA adapters; set model.lora.merge=true")
        bucket_bytes = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        async for bucket in in_buckets(weights, bucket_bytes):
            await self.server.load_weights.remote(bucket)
        await self.server.finish_weight_update.remote(global_steps)
