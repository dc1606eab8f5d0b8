"""Traces and probes in one sequence through a pipeline stage of Megatron-core's GPT model.

Nothing of Megatron is imported at the top: the driver asks `PLAIN` of configs where Megatron need not be installed.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rredcot_verl.passes.probe_pack import ProbePack, Vocabulary
from rredcot_verl.passes.shared_attention import WAY_OUT, SharedPrefix, rope_types

PLAIN: dict[str, Any] = {
    "context_parallel_size": 1,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
    "fp8": None,
    "fp4": None,
    "window_size": None,
    "softmax_type": "vanilla",
    "cuda_graph_impl": "none",
    "enable_cuda_graph": False,
    "moe_expert_capacity_factor": None,
}
"""Settings of Megatron's `TransformerConfig`, and the value without which a pack would be computed wrongly."""


def not_plain(settings: Any) -> list[str]:
    """`name=value` of the settings that are set to anything but what `PLAIN` says.

    Args:
        settings: A `TransformerConfig`, or a mapping that overrides some of it.
    """
    look_up = settings.get if hasattr(settings, "get") else lambda name: getattr(settings, name, None)
    found = {name: look_up(name) for name in PLAIN}
    return [f"{name}={value}" for name, value in found.items() if value and value != PLAIN[name]]


def why_not_this_model(config: PreTrainedConfig) -> str | None:
    """Why Megatron's model with the weights of one of transformers cannot compute a pack, as far as its config tells.

    Args:
        config: Of transformers' model.
    """
    text_config = config.get_text_config(decoder=True)
    if getattr(config, "vision_config", None) is not None:
        return "the model is multimodal"
    if getattr(text_config, "kv_lora_rank", None):
        return "its attention is latent (kv_lora_rank)"
    others = rope_types(text_config) - {"default", "linear", "llama3"}
    if others:
        return f"its rotary embedding is {sorted(others)}"
    if getattr(text_config, "attn_logit_softcapping", None) is not None:
        return "its attention is soft-capped"
    kinds = set(getattr(text_config, "layer_types", None) or ()) - {"full_attention"}
    if not getattr(text_config, "layer_types", None) and getattr(text_config, "sliding_window", None):
        kinds = {f"sliding_window={text_config.sliding_window}"}
    if kinds:
        return f"the model has layers of other kinds: {sorted(kinds)}"
    return None


def why_not_shared(stage: nn.Module) -> str | None:
    """Why a pipeline stage cannot compute a pack; None where it can.

    Args:
        stage: Unwrapped.
    """
    from megatron.core.transformer.attention import SelfAttention

    found = not_plain(stage.config)
    if found:
        return ", ".join(found)
    embedding = getattr(stage, "position_embedding_type", None)
    if embedding != "rope":
        return f"position_embedding_type={embedding}"
    others = {type(layer.self_attention).__name__ for layer in _layers(stage)} - {SelfAttention.__name__}
    return f"it has layers of other kinds: {sorted(others)}" if others else None


def _layers(stage: nn.Module) -> list[Any]:
    return list(stage.decoder.layers)  # type: ignore[union-attr, arg-type]


class PackAttention(nn.Module):
    """Stands in for a layer's core attention; heads are this tensor-parallel rank's.

    Args:
        current: The pass under way.
        scaling: Factor of the scores; None for that of the head's size.
    """

    def __init__(self, current: SharedPrefix, scaling: float | None) -> None:
        super().__init__()
        self.current, self.scaling = current, scaling
        # FlexAttention is compiled for inference, as in any pass that reads probes.
        self.eval()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attend as the pack says, whatever mask is given.

        Args:
            query, key, value: `(num_tokens, 1, num_heads, head_dim)`, rotated.
            args, kwargs: Megatron's mask and its kind.

        Returns:
            `(num_tokens, 1, num_heads * head_dim)`.
        """
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        return self.current.attend(query, key, value, self.scaling).transpose(0, 1).flatten(2)


@contextlib.contextmanager
def pack_through(stage: nn.Module, pack: ProbePack, rows: Tensor, read: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the block, a pipeline stage computes the pack.

    Args:
        stage: Unwrapped.
        pack: On the stage's device.
        rows: `(num_rows,)` int64, the tokens whose logits the last stage makes.
        read: Called with them, `(num_rows, vocab_size / tensor_model_parallel_size)`.

    Raises:
        RuntimeError: Some layer, the rotary embedding or the head was not asked: numbers would be wrong.
    """
    current, positions, asked = SharedPrefix(pack), pack.positions, {"rotary": 0, "head": 0}

    def rotate(module: Any, args: Any, output: Tensor) -> Tensor:
        # Megatron rotates by a token's index, whatever its position id.
        asked["rotary"] += 1
        return module.get_emb(int(positions.max()) + 1)[positions]

    def keep_rows(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return _rows_of(args[0], rows, stage.config.sequence_parallel), *args[1:]

    def read_logits(module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        asked["head"] += 1
        logits, bias = output
        read(logits[: len(rows), 0])
        # Megatron casts what it returns to float32: nothing of it is needed.
        return logits[:1], bias

    attentions = [layer.self_attention for layer in _layers(stage)]
    with contextlib.ExitStack() as undo:
        for attention in attentions:
            undo.callback(setattr, attention, "core_attention", attention.core_attention)
            attention.core_attention = PackAttention(current, stage.config.softmax_scale)
        undo.callback(stage.rotary_pos_emb.register_forward_hook(rotate).remove)
        if stage.post_process:
            undo.callback(stage.output_layer.register_forward_pre_hook(keep_rows).remove)
            undo.callback(stage.output_layer.register_forward_hook(read_logits).remove)
        yield
    expected = {"rotary": 1, "head": int(stage.post_process)}
    if current.num_calls != len(attentions) or asked != expected:
        raise RuntimeError(
            f"{current.num_calls} of {len(attentions)} layers of this stage attended as the pack says, and it used "
            f"{asked} instead of {expected}; {WAY_OUT}"
        )


def _rows_of(hidden: Tensor, rows: Tensor, sequence_parallel: bool) -> Tensor:
    """Some tokens' hidden states as the head takes them: dealt out over the ranks, padded, under sequence parallelism.

    Args:
        hidden: `(num_tokens, 1, hidden_size)`, or this rank's part of them.
        rows: `(num_rows,)` int64.
        sequence_parallel: Whether it is a part.
    """
    if not sequence_parallel:
        return hidden[rows]
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        scatter_to_sequence_parallel_region,
    )

    missing = -len(rows) % parallel_state.get_tensor_model_parallel_world_size()
    rows = torch.cat([rows, rows[:1].expand(missing)])
    return scatter_to_sequence_parallel_region(gather_from_sequence_parallel_region(hidden)[rows])


class VocabularyShard(Vocabulary):
    """Logits of this tensor-parallel rank's tokens, `(num_rows, vocab_size / tensor_model_parallel_size)`."""

    def __init__(self) -> None:
        from megatron.core import parallel_state

        self.group = parallel_state.get_tensor_model_parallel_group()
        self.rank = parallel_state.get_tensor_model_parallel_rank()

    def logsumexp(self, logits: Tensor) -> Tensor:
        """See `Vocabulary`."""
        largest = logits.amax(dim=1)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=self.group)
        total = (logits - largest.unsqueeze(1)).exp_().sum(dim=1)
        torch.distributed.all_reduce(total, group=self.group)
        return largest + total.log_()

    def take(self, logits: Tensor, rows: Tensor, token_ids: Tensor) -> Tensor:
        """See `Vocabulary`."""
        size = logits.shape[1]
        local = token_ids - self.rank * size
        taken = logits[rows, local.clamp(0, size - 1)] * ((local >= 0) & (local < size))
        torch.distributed.all_reduce(taken, group=self.group)
        return taken
