"""verl's Megatron engine, and ours, on a CPU: stand-ins for CUDA, a model without TransformerEngine, its weights.

Importing this registers both engines for the device `cpu`. Megatron-core's layers, its parallel linear layers, its
schedules and its optimiser are its own; of verl's engine two builder methods are overridden, because its bridges need
TransformerEngine. The attention of verl's own packed pass is this file's.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from verl.utils.megatron_utils import unwrap_model
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

from rredcot_verl.passes.megatron_engine import RREDCoTMegatronEngine
from rredcot_verl.passes.protocol import MODEL_TYPE


class OnCPU(TorchFunctionMode):
    """`device="cuda"` in Megatron's schedules and optimiser."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class _Stream:
    """The one there is: the token dispatcher of a mixture of experts asks for another."""

    def record_event(self) -> "_Stream":
        """An event that has happened."""
        return self

    def synchronize(self) -> None:
        """Nothing runs beside."""


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


@contextlib.contextmanager
def _no_fork(self: Any, name: str = "") -> Iterator[None]:
    yield


def stand_in_for_cuda() -> None:
    """What Megatron-core asks of CUDA without being told that there is none, in this process."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    stream = _Stream()
    torch.cuda.Stream = torch.cuda.current_stream = lambda *args: stream  # type: ignore[misc, assignment]
    torch.cuda.stream = contextlib.nullcontext  # type: ignore[assignment, misc]
    CudaRNGStatesTracker.fork = _no_fork
    CudaRNGStatesTracker.add = lambda self, name, seed: None
    # 0.16.1 names it where TransformerEngine is installed only.
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    token_dispatcher.maybe_move_tensor_to_cpu = _to_host


class Norm(torch.nn.RMSNorm):
    """RMSNorm under sequence parallelism too, which Megatron leaves to TransformerEngine."""

    def __init__(self, config: Any, hidden_size: int, eps: float, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps)


class PackedAttention(torch.nn.Module):
    """Causal attention of verl's packed rows, for TransformerEngine's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, query: Any, key: Any, value: Any, mask: Any, *, packed_seq_params: Any, **kwargs: Any) -> Any:
        """One row at a time; `(num_tokens, num_heads, head_dim)`."""
        starts, parts = packed_seq_params.cu_seqlens_q_padded.tolist(), []
        for start, end in zip(starts, starts[1:], strict=False):
            q, k, v = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
            parts.append(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(parts).flatten(1)


TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
OF_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
}
"""Parameters of Megatron that are one of transformers', outside the layers and of a layer."""


def load_weights(stage: GPTModel, weights: dict[str, torch.Tensor]) -> None:
    """Copy a transformers model's weights into this rank's part of a stage."""
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            whole = _whole(name, stage, weights)
            parameter.copy_(whole if whole.shape == parameter.shape else _part(name, whole, parameter))


def _part(name: str, whole: torch.Tensor, parameter: Any) -> torch.Tensor:
    rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    if "linear_fc1" in name:
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size, dim=parameter.partition_dim)[rank]


def _whole(name: str, stage: GPTModel, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """A Megatron parameter of the whole model, of the weights of a Qwen3 or Qwen3-MoE model of transformers."""
    if name in TOP:
        return weights[TOP[name]]
    prefix, rest = _layer(name, stage)
    if rest == "self_attention.linear_qkv.weight":
        groups, size = stage.config.num_query_groups, stage.config.kv_channels
        parts = [weights[f"{prefix}self_attn.{one}_proj.weight"] for one in "qkv"]
        # For each group its queries, its key and its value.
        return torch.cat([part.unflatten(0, (groups, -1, size)) for part in parts], dim=1).flatten(0, 2)
    if rest == "mlp.linear_fc1.weight":
        return torch.cat([weights[f"{prefix}mlp.{one}_proj.weight"] for one in ("gate", "up")])
    if "local_experts" in rest:
        local, layer = rest.split("local_experts.")[1].split(".", 1)
        expert = mpu.get_expert_model_parallel_rank() * stage.config.num_moe_experts
        expert = expert // mpu.get_expert_model_parallel_world_size() + int(local)
        return weights[f"{prefix}mlp.experts.{'gate_up' if 'fc1' in layer else 'down'}_proj"][expert]
    return weights[prefix + OF_LAYER[rest]]


def _layer(name: str, stage: GPTModel) -> tuple[str, str]:
    _, _, number, rest = name.split(".", 3)
    return f"model.layers.{stage.decoder.layers[int(number)].layer_number - 1}.", rest


class Bridge:
    """What verl asks of a bridge once the model is there, for a dense model that is whole on every rank."""

    def export_weights(self, modules: list[Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors, as transformers has them."""
        (stage,) = unwrap_model(modules)
        for name, parameter in stage.named_parameters():
            yield from _exported(name, stage, parameter.detach())


def _exported(name: str, stage: GPTModel, whole: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if name in TOP:
        yield TOP[name], whole
        return
    prefix, rest = _layer(name, stage)
    if rest == "self_attention.linear_qkv.weight":
        groups, size = stage.config.num_query_groups, stage.config.kv_channels
        queries = stage.config.num_attention_heads // groups
        parts = whole.unflatten(0, (groups, -1, size)).split([queries, 1, 1], dim=1)
        yield from (
            (f"{prefix}self_attn.{one}_proj.weight", part.flatten(0, 2)) for one, part in zip("qkv", parts, strict=True)
        )
    elif rest == "mlp.linear_fc1.weight":
        yield from (
            (f"{prefix}mlp.{one}_proj.weight", part) for one, part in zip(("gate", "up"), whole.chunk(2), strict=True)
        )
    else:
        yield prefix + OF_LAYER[rest], whole


class CPUMegatronEngine(MegatronEngineWithLMHead):
    """verl's engine with Megatron-core's local layers, in float32, without a bridge."""

    def initialize(self) -> None:
        """See `BaseEngine`."""
        with OnCPU():
            super().initialize()

    def forward_backward_batch(self, *args: Any, **kwargs: Any) -> Any:
        """See `BaseEngine`."""
        with OnCPU():
            return super().forward_backward_batch(*args, **kwargs)

    def optimizer_step(self) -> float:
        """See `BaseEngine`."""
        with OnCPU():
            return super().optimizer_step()

    def get_per_tensor_param(self, base_sync_done: bool = False, **kwargs: Any) -> Any:
        """See `BaseEngine`; verl's looks for the buffers of Megatron's distributed optimiser, which needs a GPU."""
        return self.bridge.export_weights(self.module), None

    def _build_tf_config(self) -> None:
        self.is_value_model = False
        self.share_embeddings_and_output_weights = self.model_config.hf_config.tie_word_embeddings
        self.param_dtype = self.dtype = torch.float32
        self.vanilla_bridge, self.provider, self.bridge, self.peft_cls = True, None, Bridge(), None
        hf, parallel = self.model_config.hf_config, self.engine_config
        num_experts = getattr(hf, "num_experts", None)
        experts = {
            "num_moe_experts": num_experts,
            "moe_router_topk": getattr(hf, "num_experts_per_tok", None),
            "moe_ffn_hidden_size": getattr(hf, "moe_intermediate_size", None),
            "moe_router_load_balancing_type": "none",
        }
        self.tf_config = TransformerConfig(
            num_layers=hf.num_hidden_layers,
            hidden_size=hf.hidden_size,
            num_attention_heads=hf.num_attention_heads,
            num_query_groups=hf.num_key_value_heads,
            ffn_hidden_size=hf.intermediate_size,
            kv_channels=hf.head_dim,
            normalization="RMSNorm",
            layernorm_epsilon=hf.rms_norm_eps,
            qk_layernorm=True,
            add_bias_linear=False,
            gated_linear_unit=True,
            activation_func=silu,
            bias_activation_fusion=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cpu_initialization=True,
            params_dtype=torch.float32,
            pipeline_dtype=torch.float32,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            sequence_parallel=parallel.sequence_parallel,
            variable_seq_lengths=True,
            batch_p2p_comm=False,
            moe_token_dispatcher_type="alltoall",
            **(experts if num_experts else {}),
        )

    def _build_megatron_module(self) -> list[Any]:
        hf = self.model_config.hf_config
        spec = get_gpt_layer_local_spec(
            num_experts=getattr(hf, "num_experts", None), qk_layernorm=True, normalization="RMSNorm"
        )
        layer, attention = spec.submodules, spec.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        layer.input_layernorm = layer.pre_mlp_layernorm = attention.q_layernorm = attention.k_layernorm = Norm
        stage = GPTModel(
            self.tf_config,
            TransformerBlockSubmodules([spec] * get_num_layers_to_build(self.tf_config), Norm),
            vocab_size=hf.vocab_size,
            max_sequence_length=hf.max_position_embeddings,
            position_embedding_type="rope",
            rotary_base=hf.rope_parameters["rope_theta"],
            pre_process=mpu.is_pipeline_first_stage(),
            post_process=mpu.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
        )
        model = AutoModelForCausalLM.from_pretrained(self.model_config.local_path, dtype=torch.float32)
        load_weights(stage, model.state_dict())
        if self.engine_config.forward_only:
            return [stage]
        return [DistributedDataParallel(self.tf_config, DistributedDataParallelConfig(), stage)]


class CPURREDCoTMegatronEngine(RREDCoTMegatronEngine, CPUMegatronEngine):
    """The same with our pass."""


for _model_type, _engine in (("language_model", CPUMegatronEngine), (MODEL_TYPE, CPURREDCoTMegatronEngine)):
    EngineRegistry.register(model_type=_model_type, backend="megatron", device="cpu")(_engine)
