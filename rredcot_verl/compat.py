"""The contract with verl: the version it was read from, and every symbol relied on.

One table, checked by the doctor and by a test; another test checks that the package imports nothing of verl that is not
in it. Attribute paths are followed from the module; parameters are those we pass or override. What only instances have
is looked for in the code of their class's methods.
"""

import importlib
import inspect

REQUIRED_VERL = "0.9.1"
"""As in REQUIRED_VERL.txt."""

_WORKER = "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ.__ray_metadata__.modified_class.__ray_actor_class__"
_ENGINE = "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead"

SYMBOLS: dict[str, tuple[str, ...]] = {
    # estimator
    "verl.trainer.ppo.core_algos:register_adv_est": ("name_or_enum",),
    "verl.trainer.ppo.core_algos:compute_grpo_outcome_advantage": (
        "token_level_rewards",
        "response_mask",
        "index",
        "norm_adv_by_std_in_grpo",
        "config",
    ),
    # reward manager
    "verl.experimental.reward_loop.reward_manager:register": ("name",),
    "verl.experimental.reward_loop.reward_manager:NaiveRewardManager": ("config", "tokenizer", "compute_score"),
    "verl.experimental.reward_loop.reward_manager:NaiveRewardManager.run_single": ("data",),
    "verl.experimental.reward_loop.reward_manager:NaiveRewardManager.tokenizer": (),
    "verl:DataProto": (),
    # trainer
    "verl.trainer.ppo.v1.trainer_base:TRAINER_REGISTRY": (),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer": ("config",),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._init_tokenizer": (),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._compute_old_log_prob": ("batch", "metrics"),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._compute_advantage": ("batch", "metrics"),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._save_checkpoint": (),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer.step": ("metrics", "timing_raw"),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer.global_steps": (),
    # Told by the live line; they pass through.
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._setup": (),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._validate": (),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._compute_reward_colocate": (),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._compute_ref_log_prob": (),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._compute_values": (),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._update_critic": (),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._update_actor": (),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer.on_step_end": (),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._load_checkpoint": (),
    # Calls the base trainer's between bringing earlier weights back and going on: our pass stands in between.
    "verl.trainer.ppo.v1.trainer_separate_async:PPOTrainerSeparateAsync._compute_old_log_prob": ("batch", "metrics"),
    "verl.workers.utils.padding:response_to_nested": ("tensor", "response_mask"),
    # agent loop
    "verl.experimental.agent_loop:AgentLoopOutput": (
        "prompt_ids",
        "response_ids",
        "response_mask",
        "response_logprobs",
        "reward_score",
        "extra_fields",
    ),
    "verl.experimental.agent_loop.agent_loop:AgentLoopMetrics": (),
    "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopManagerTQ": (),
    _WORKER: (),
    "verl.experimental.agent_loop.agent_loop:AgentLoopWorker": ("config", "llm_client"),
    f"{_WORKER}._run_prompt": ("prompt", "sampling_params", "trajectory", "trace"),
    f"{_WORKER}._run_agent_loop": ("sampling_params", "trajectory"),
    f"{_WORKER}._agent_loop_postprocess": ("output", "validate"),
    f"{_WORKER}._compute_score": ("outputs", "kwargs"),
    # rollout client
    "verl.workers.rollout.llm_server:LLMServerClient.generate": ("request_id", "prompt_ids", "sampling_params"),
    # training engine
    "verl.workers.engine_workers:ActorRolloutRefWorker.compute_log_prob": ("data",),
    "verl.workers.engine.base:EngineRegistry.register": ("model_type", "backend", "device"),
    f"{_ENGINE}.initialize": (),
    f"{_ENGINE}.forward_backward_batch": ("data", "loss_function", "forward_only"),
    f"{_ENGINE}.forward_step": ("micro_batch", "loss_function", "forward_only"),
    f"{_ENGINE}.prepare_model_inputs": ("micro_batch",),
    f"{_ENGINE}.prepare_model_outputs": ("output", "output_args", "micro_batch", "logits_processor_func"),
    f"{_ENGINE}.get_data_parallel_group": (),
    f"{_ENGINE}.use_ulysses_sp": (),
    f"{_ENGINE}.ulysses_parallel_group": (),
    f"{_ENGINE}.ulysses_sequence_parallel_size": (),
    "verl.utils.ulysses:gather_seq_scatter_heads": ("x", "seq_dim", "head_dim", "group"),
    "verl.utils.ulysses:gather_heads_scatter_seq": ("x", "seq_dim", "head_dim", "group"),
    "verl.utils.tensordict_utils:get": ("tensordict", "key"),
    "verl.utils.tensordict_utils:get_non_tensor_data": ("data", "key", "default"),
    "verl.utils.tensordict_utils:assign_non_tensor": ("tensor_dict",),
    "verl.utils.tensordict_utils:index_select_tensor_dict": ("batch", "indices"),
    # configuration
    "verl.utils.config:omega_conf_to_dataclass": ("config",),
    "verl.utils.import_utils:load_class_from_fqn": ("fqn",),
    # preflight
    "verl.trainer.ppo.core_algos:ADV_ESTIMATOR_REGISTRY": (),
    "verl.utils.config:validate_config": ("config", "use_reference_policy", "use_critic"),
    "verl.utils.import_utils:load_extern_object": ("module_path", "object_name"),
    "verl.trainer.ppo.utils:need_critic": ("config",),
    "verl.trainer.ppo.utils:need_reference_policy": ("config",),
    # data and verifiers
    "verl.utils.reward_score:default_compute_score": ("data_source", "solution_str", "ground_truth"),
    "verl.utils.reward_score.sandbox_fusion.utils:check_correctness": (
        "sandbox_fusion_url",
        "in_outs",
        "generation",
        "timeout",
        "memory_limit_mb",
        "concurrent_semaphore",
    ),
}
"""`module:attribute.path` -> parameters (or fields) it must have."""

CPU_SYMBOLS: dict[str, tuple[str, ...]] = {
    "verl.plugin.platform:set_platform": ("platform",),
    "verl.plugin.platform.platform_base:PlatformBase": (),
    "verl.plugin.platform.platform_manager:PlatformRegistry.register": ("platform",),
    "verl.utils.device:get_device_name": (),
    "verl.utils.config:omega_conf_to_dataclass": ("config",),
    "verl.workers.config:HFModelConfig": (),
    "verl.workers.config:RolloutConfig": (),
    "verl.workers.engine.base:EngineRegistry.register": ("model_type", "backend", "device"),
    "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead._build_fsdp_module": ("module",),
    "verl.workers.rollout.base:BaseRollout": ("config", "model_config", "device_mesh"),
    "verl.workers.rollout.base:BaseRollout.update_weights": ("weights",),
    "verl.workers.rollout.base:_ROLLOUT_REGISTRY": (),
    "verl.workers.rollout.replica:RolloutReplica": ("replica_rank", "config", "model_config"),
    "verl.workers.rollout.replica:RolloutReplica.launch_servers": (),
    "verl.workers.rollout.replica:RolloutReplica.max_concurrency": (),
    "verl.workers.rollout.replica:RolloutReplicaRegistry.register": ("name", "loader"),
    "verl.workers.rollout.replica:TokenOutput": ("token_ids", "log_probs", "stop_reason", "extra_fields"),
    "verl.workers.rollout.utils:ensure_async_iterator": (),
    "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer": ("poll_interval",),
    "verl.trainer.ppo.v1.replay_buffer:ReplayBufferAsync": ("poll_interval",),
    # separate_async
    "verl.trainer.ppo.v1.trainer_base:TRAINER_REGISTRY": (),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._init_resource_pool_mgr": (),
    "verl.trainer.ppo.utils:Role.Actor": (),
    "verl.trainer.ppo.utils:Role.ActorRollout": (),
    "verl.trainer.ppo.utils:Role.ActorRolloutRef": (),
    "verl.trainer.ppo.utils:Role.RefPolicy": (),
    "verl.experimental.separation.engine_workers:DetachActorWorker.copy_handler": (),
    "verl.experimental.separation.engine_workers:DetachActorWorker.save_model_to_cpu": ("n",),
    "verl.checkpoint_engine.base:CheckpointEngineRegistry.register": ("backend",),
    "verl.checkpoint_engine.base:CheckpointEngine.prepare": (),
    "verl.checkpoint_engine.base:CheckpointEngine.build_topology": (
        "actor_wg_world_size",
        "rollout_world_size",
        "metadata",
    ),
    "verl.checkpoint_engine.base:CheckpointEngine.init_process_group": (),
    "verl.checkpoint_engine.base:CheckpointEngine.finalize": (),
    "verl.checkpoint_engine.base:CheckpointEngine.send_weights": ("weights", "global_steps"),
    "verl.checkpoint_engine.base:CheckpointEngine.receive_weights": ("global_steps",),
}
"""What the embedded CPU backend relies on besides."""

_MEGATRON_ENGINE = "verl.workers.engine.megatron.transformer_impl:MegatronEngineWithLMHead"

MEGATRON_SYMBOLS: dict[str, tuple[str, ...]] = {
    f"{_MEGATRON_ENGINE}.module": (),
    f"{_MEGATRON_ENGINE}.engine_config": (),
    f"{_MEGATRON_ENGINE}.model_config": (),
    f"{_MEGATRON_ENGINE}.initialize": (),
    f"{_MEGATRON_ENGINE}.forward_backward_batch": ("data", "loss_function", "forward_only"),
    f"{_MEGATRON_ENGINE}.forward_step": (
        "batch_iter",
        "model",
        "logits_processor_func",
        "postprocess_micro_batch_func",
    ),
    f"{_MEGATRON_ENGINE}.postprocess_micro_batch_func": ("output", "data", "forward_only", "loss_function"),
    f"{_MEGATRON_ENGINE}.prepare_model_outputs": ("output", "data"),
    f"{_MEGATRON_ENGINE}.get_data_parallel_group": (),
    "verl.utils.device:get_device_id": (),
    "verl.utils.megatron_utils:unwrap_model": ("model",),
    "megatron.core.models.gpt.gpt_model:GPTModel": ("pre_process", "post_process", "position_embedding_type"),
    "megatron.core.models.gpt.gpt_model:GPTModel.forward": ("input_ids", "position_ids", "attention_mask"),
    "megatron.core.models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.get_emb": ("max_seq_len",),
    "megatron.core.transformer.attention:SelfAttention": ("submodules",),
    "megatron.core.transformer.transformer_config:TransformerConfig": (
        "sequence_parallel",
        "softmax_scale",
        "context_parallel_size",
        "multi_latent_attention",
        "mtp_num_layers",
        "fp8",
        "window_size",
        "softmax_type",
        "moe_expert_capacity_factor",
    ),
    "megatron.core.parallel_state:get_tensor_model_parallel_group": (),
    "megatron.core.parallel_state:get_tensor_model_parallel_rank": (),
    "megatron.core.parallel_state:get_tensor_model_parallel_world_size": (),
    "megatron.core.tensor_parallel:gather_from_sequence_parallel_region": ("input_",),
    "megatron.core.tensor_parallel:scatter_to_sequence_parallel_region": ("input_",),
}
"""What our Megatron engine relies on. Can be looked up only where megatron-core is installed."""

SERVER_SYMBOLS: dict[str, tuple[str, ...]] = {
    "verl.workers.rollout.replica:RolloutReplicaRegistry.register": ("name", "loader"),
    "verl.workers.rollout.replica:RolloutReplicaRegistry.get": ("name",),
    "verl.workers.rollout.replica:RolloutReplica.max_concurrency": (),
    "verl.workers.rollout.replica:TokenOutput": ("token_ids", "stop_reason", "extra_fields"),
    "verl.workers.config:RolloutConfig": ("max_num_seqs", "max_model_len", "scheduling_policy"),
}
"""What the rollout servers that read probes rely on besides, whichever backend is installed."""

_VLLM_SERVER = "verl.workers.rollout.vllm_rollout.vllm_async_server"

VLLM_SYMBOLS: dict[str, tuple[str, ...]] = {
    f"{_VLLM_SERVER}:vLLMReplica": ("replica_rank", "config", "model_config"),
    f"{_VLLM_SERVER}:vLLMReplica.server_class": (),
    f"{_VLLM_SERVER}:vLLMHttpServer": ("config", "model_config"),
    f"{_VLLM_SERVER}:vLLMHttpServer.generate": (
        "prompt_ids",
        "sampling_params",
        "request_id",
        "image_data",
        "video_data",
    ),
    f"{_VLLM_SERVER}:vLLMHttpServer._park_until_admitted": ("request_id",),
    f"{_VLLM_SERVER}:vLLMHttpServer._admitting": (),
    f"{_VLLM_SERVER}:vLLMHttpServer.config": (),
    f"{_VLLM_SERVER}:vLLMHttpServer.engine": (),
    f"{_VLLM_SERVER}:vLLMHttpServer.global_steps": (),
    f"{_VLLM_SERVER}:vLLMHttpServer.lora_as_adapter": (),
    "verl.workers.rollout.vllm_rollout.utils:VLLM_LORA_INT_ID": (),
    "verl.workers.rollout.vllm_rollout.utils:VLLM_LORA_NAME": (),
    "verl.workers.rollout.vllm_rollout.utils:VLLM_LORA_PATH": (),
    "vllm:SamplingParams": (
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "stop",
        "ignore_eos",
        "logprob_token_ids",
        "detokenize",
        "output_kind",
        "extra_args",
    ),
    "vllm.config:VllmConfig": ("model_config", "cache_config"),
    "vllm.config:ModelConfig": ("logits_processors", "logprobs_mode"),
    "vllm.config:ModelConfig.get_vocab_size": (),
    "vllm.config:CacheConfig": ("block_size",),
    "vllm.inputs:TokensPrompt": (),
    "vllm.lora.request:LoRARequest": ("lora_name", "lora_int_id", "lora_path"),
    "vllm.sampling_params:MAX_LOGPROB_TOKEN_IDS": (),
    "vllm.sampling_params:RequestOutputKind.FINAL_ONLY": (),
    "vllm.outputs:RequestOutput": ("outputs", "num_cached_tokens"),
    "vllm.outputs:CompletionOutput": ("token_ids", "logprobs", "finish_reason"),
    "vllm.logprobs:Logprob": ("logprob",),
    "vllm.v1.engine.async_llm:AsyncLLM.generate": (
        "prompt",
        "sampling_params",
        "request_id",
        "lora_request",
        "priority",
    ),
    "vllm.v1.engine.async_llm:AsyncLLM.list_loras": (),
    "vllm.v1.engine.async_llm:AsyncLLM.model_config": (),
    "vllm.v1.engine.async_llm:AsyncLLM.vllm_config": (),
    "vllm.v1.sample.logits_processor:BatchUpdate": (),
    "vllm.v1.sample.logits_processor:LogitsProcessor": ("vllm_config", "device", "is_pin_memory"),
    "vllm.v1.sample.logits_processor:LogitsProcessor.apply": ("logits",),
    "vllm.v1.sample.logits_processor:LogitsProcessor.is_argmax_invariant": (),
    "vllm.v1.sample.logits_processor:LogitsProcessor.update_state": ("batch_update",),
    "vllm.v1.sample.logits_processor:process_dict_updates": ("req_entries", "batch_update", "new_state"),
}
"""What our vLLM server relies on. Can be looked up only where vllm is installed."""

SGLANG_SYMBOLS: dict[str, tuple[str, ...]] = {
    "verl.workers.rollout.sglang_rollout.async_sglang_server:SGLangReplica": (),
    "verl.workers.rollout.sglang_rollout.async_sglang_server:SGLangHttpServer.generate": (
        "prompt_ids",
        "sampling_params",
        "request_id",
        "image_data",
        "video_data",
    ),
    "verl.workers.rollout.sglang_rollout.async_sglang_server:SGLangHttpServer._disaggregation_role": (),
    "verl.workers.rollout.sglang_rollout.async_sglang_server:SGLangHttpServer.global_steps": (),
    "verl.workers.rollout.sglang_rollout.async_sglang_server:SGLangHttpServer.lora_as_adapter": (),
    "verl.workers.rollout.sglang_rollout.async_sglang_server:SGLangHttpServer.tokenizer_manager": (),
    "verl.workers.rollout.sglang_rollout.utils:SGLANG_LORA_NAME": (),
    "sglang.srt.managers.io_struct:GenerateReqInput": (
        "input_ids",
        "sampling_params",
        "return_logprob",
        "logprob_start_len",
        "token_ids_logprob",
    ),
}
"""What our SGLang server relies on. Can be looked up only where sglang is installed."""


def check_symbols(symbols: dict[str, tuple[str, ...]]) -> list[str]:
    """Look every symbol up in the installed verl.

    Returns:
        One line for each symbol that is missing or lacks a parameter.
    """
    return [fault for name, parameters in symbols.items() if (fault := _check_symbol(name, parameters)) is not None]


def _check_symbol(name: str, parameters: tuple[str, ...]) -> str | None:
    module_name, _, path = name.partition(":")
    try:
        found = importlib.import_module(module_name)
        for attribute in path.split("."):
            if _is_of_instances(found, attribute):
                return None
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        return f"{name}: {error}"
    fields = getattr(found, "model_fields", None)
    known = set(fields) if fields is not None else set()
    if parameters and fields is None:
        known = set(inspect.signature(found).parameters)
    missing = [parameter for parameter in parameters if parameter not in known]
    return f"{name}: has no {', '.join(missing)}" if missing else None


def _is_of_instances(found: object, attribute: str) -> bool:
    """Whether a class has an attribute only when it is made: some method of it names it."""
    if not inspect.isclass(found) or hasattr(found, attribute):
        return False
    methods = [method for base in found.__mro__ for method in vars(base).values() if inspect.isfunction(method)]
    return any(attribute in method.__code__.co_names for method in methods)
