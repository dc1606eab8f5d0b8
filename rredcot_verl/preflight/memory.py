"""Estimates of GPU memory from the model's size and the config. Nothing here was measured: see each formula.

The passes for log-probabilities of FSDP are in `log_prob_memory`.
"""

from dataclasses import dataclass

from omegaconf import DictConfig

from rredcot_verl.preflight.model_size import ModelFacts, lora_rank

GIB = 1 << 30
ESTIMATED = ("fsdp", "fsdp2", "megatron")
"""Training engines (`actor_rollout_ref.actor.strategy`) with formulas here."""

SERVER_OVERHEAD_GIB = 3.0
"""Assumed for a rollout server's activations, CUDA graphs and libraries."""

_BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}


@dataclass(frozen=True)
class TrainingMemory:
    """Estimate for one training GPU, in GiB.

    Attributes:
        weights, gradients, optimizer: This GPU's share of the states.
        working: Weights gathered for the layers at work (FSDP).
        activations: Kept and recomputed ones of the largest pass.
        logits: Of that pass, with their gradient.
        resident: What stays on the GPU while servers on the same GPU generate.
    """

    weights: float
    gradients: float
    optimizer: float
    working: float
    activations: float
    logits: float
    resident: float

    @property
    def total(self) -> float:
        """Everything at its largest, at once."""
        return self.weights + self.gradients + self.optimizer + self.working + self.activations + self.logits


@dataclass(frozen=True)
class ServerMemory:
    """Estimate for one GPU of a rollout server.

    Attributes:
        budget: GiB it may take: gpu_memory_utilization of the GPU.
        weights: GiB.
        cache: GiB left for the key-value cache.
        cache_tokens: Tokens that fit into a server's cache.
    """

    budget: float
    weights: float
    cache: float
    cache_tokens: int


def training_memory(config: DictConfig, facts: ModelFacts) -> TrainingMemory:
    """Estimate the memory of a training GPU.

    P parameters, of which T trained; S = tokens of a pass (`ppo_max_token_len_per_gpu`); h, f, L, V = hidden size,
    width of the feed-forward part a token uses, layers, vocabulary.

    - FSDP over W GPUs: weights P b / W (b bytes of `fsdp_config.model_dtype`), gradients T b / W, AdamW 2 T b / W;
      gathered at work: 2 bytes for two layers and the embeddings.
    - Megatron: P' and T' of this GPU after tensor, pipeline and expert parallelism; weights 2 P', gradients 4 T', and
      distributed optimizer 12 T' over the data-parallel ranks.
    - Activations with checkpointing: 2 S h L for layer inputs, and 2 S (12 h + 4 f) for the layer being recomputed.
      Without checkpointing the second term once for each layer.
    - Logits: 2 bytes and 2 for their gradient (FSDP); 2 and 4 (Megatron, over tensor-parallel ranks): S V times that;
      with Megatron 2 bytes of the longer pass that only reads log-probabilities, where that is more. Its pass for
      probes makes logits of the answers only; up to a quarter more tokens than the budget are not counted.

    The reference model, if any, adds weights. Fragmentation and libraries are not in it: leave some GiB.
    """
    actor, num_gpus = config.actor_rollout_ref.actor, config.trainer.nnodes * config.trainer.n_gpus_per_node
    if actor.strategy == "megatron":
        return _megatron(config, facts, num_gpus)
    engine = actor.fsdp_config
    shards = min(engine.fsdp_size, num_gpus) if engine.fsdp_size > 0 else num_gpus
    width = _BYTES.get(str(engine.model_dtype), 4)
    # A LoRA model's base weights are stored alike; only adapters have gradients.
    weights = facts.num_parameters * width / shards
    trained = facts.num_trainable_parameters * width / shards
    tokens = actor.ppo_max_token_len_per_gpu
    checkpointed = config.actor_rollout_ref.model.enable_gradient_checkpointing
    reference = weights if actor.use_kl_loss and not lora_rank(config.actor_rollout_ref.model) else 0.0
    resident = (0 if engine.param_offload else weights) + (0 if engine.optimizer_offload else 2 * trained)
    return TrainingMemory(
        weights=(weights + reference) / GIB,
        gradients=trained / GIB,
        optimizer=2 * trained / GIB,
        working=2 * (2 * facts.largest_layer + facts.num_embedding_parameters) / GIB,
        activations=_activations(facts, tokens, facts.num_layers, checkpointed) / GIB,
        logits=4 * tokens * facts.vocab_size / GIB,
        resident=resident / GIB,
    )


def _megatron(config: DictConfig, facts: ModelFacts, num_gpus: int) -> TrainingMemory:
    engine = config.actor_rollout_ref.actor.megatron
    tensor, pipeline = engine.tensor_model_parallel_size, engine.pipeline_model_parallel_size
    expert_tensor = engine.expert_tensor_parallel_size or tensor
    dense_group = tensor * pipeline
    expert_group = engine.expert_model_parallel_size * expert_tensor * pipeline
    parts = (
        (facts.num_parameters - facts.num_expert_parameters, dense_group),
        (facts.num_expert_parameters, expert_group),
    )
    share = facts.num_trainable_parameters / facts.num_parameters
    local = sum(number / group for number, group in parts)
    # The distributed optimizer splits each part over the GPUs that hold copies of it.
    optimizer = 12 * share * sum(number / group / max(1, num_gpus // group) for number, group in parts)
    weights, gradients = 2 * local, 4 * local * share
    tokens = config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu
    checkpointed = engine.override_transformer_config.get("recompute_granularity") == "full"
    layers = facts.num_layers / pipeline
    split = tensor if engine.sequence_parallel else 1
    resident = (0 if engine.param_offload else weights) + (0 if engine.optimizer_offload else optimizer)
    return TrainingMemory(
        weights=weights / GIB,
        gradients=gradients / GIB,
        optimizer=optimizer / GIB,
        working=0.0,
        activations=_activations(facts, tokens, layers, checkpointed) / split / GIB,
        logits=max(6 * tokens, 2 * _log_prob_tokens(config)) * facts.vocab_size / tensor / GIB,
        resident=resident / GIB,
    )


def _log_prob_tokens(config: DictConfig) -> int:
    return int(config.actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu)


def _activations(facts: ModelFacts, tokens: float, num_layers: float, checkpointed: bool) -> float:
    one_layer = 2 * tokens * (12 * facts.hidden_size + 4 * facts.intermediate_size)
    inputs = 2 * tokens * facts.hidden_size * num_layers
    return inputs + one_layer if checkpointed else one_layer * num_layers


def server_memory(config: DictConfig, facts: ModelFacts, gpu_gib: float) -> ServerMemory:
    """Estimate the memory of a rollout server's GPU.

    Weights 2 P / TP bytes; the cache gets what `gpu_memory_utilization` leaves after them and `SERVER_OVERHEAD_GIB`. A
    token takes 2 * layers * key-value heads * head size * 2 bytes over the TP GPUs of the server; no head is split.
    """
    rollout = config.actor_rollout_ref.rollout
    parallel = rollout.tensor_model_parallel_size
    budget = gpu_gib * rollout.gpu_memory_utilization
    weights = 2 * facts.num_parameters / parallel / GIB
    cache = max(0.0, budget - weights - SERVER_OVERHEAD_GIB)
    per_token = facts.kv_bytes_per_token / min(parallel, facts.num_kv_heads)
    return ServerMemory(budget, weights, cache, int(cache * GIB / per_token))
