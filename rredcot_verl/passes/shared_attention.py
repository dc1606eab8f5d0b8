"""Attention for traces and probes in one sequence, as an attention function of transformers.

On a GPU it is FlexAttention with a block mask. Elsewhere it is scaled dot-product attention in parts: plain causal
attention for each trace, then the probes' few queries against their trace and themselves, so that no mask of the whole
sequence is ever made.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rredcot_verl.passes.probe_pack import ProbePack

if TYPE_CHECKING:
    # Imports verl, which a pass on one device does not need.
    from rredcot_verl.passes.sequence_split import SequenceSplit

NAME = "rredcot_shared_prefix"
"""Name of the attention function in transformers' registry."""

QUERY_TILE = 64
"""Fewest queries of probes, and most queries of a sliding window, computed at once on CPU."""

FLEX_DEVICE = "cuda"
"""Type of the device on which the attention is FlexAttention."""

WAY_OUT = "set algorithm.rredcot.self_value.share_prefix=false"
"""For models that cannot compute such a sequence."""


@dataclass(frozen=True)
class Window:
    """What a model asks for instead of a mask: causal attention, and how far back, in tokens; None for any."""

    size: int | None


@dataclass(frozen=True)
class Tile:
    """Part of an attention: some queries, the keys they may see, and which of them they do; causal without a mask."""

    queries: slice
    keys: slice | Tensor
    mask: Tensor | None


@dataclass
class SharedPrefix:
    """The pass under way.

    Attributes:
        pack: The sequence being computed; set before the model is called.
        split: How its tokens are split over ranks, if they are.
        observe: Called in each layer with its queries, its keys and the rest of `attention_by_token`.
        num_calls: Attention layers that have asked for it.
        masks: By sliding window, FlexAttention's block mask or the tiles; made by the first layer that needs it.
    """

    pack: ProbePack | None = None
    split: "SequenceSplit | None" = None
    observe: Callable[..., None] | None = None
    num_calls: int = 0
    masks: dict[int | None, Any] = field(default_factory=dict)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention of one layer over the pack; see `shared_prefix_attention`.

        Returns:
            `(1, num_tokens, num_heads, head_dim)`.
        """
        assert self.pack is not None
        if query.shape[0] != 1 or query.shape[2] != self.pack.num_tokens or key.shape[2] != query.shape[2]:
            raise RuntimeError(
                f"attention got queries {tuple(query.shape)} and keys {tuple(key.shape)}, expected one sequence of "
                f"{self.pack.num_tokens} tokens"
            )
        self.num_calls += 1
        softcap, on_gpu = kwargs.get("softcap"), query.device.type == FLEX_DEVICE
        if kwargs.get("s_aux") is not None:
            raise ValueError(f"this model's attention has sinks, so its prefixes cannot be shared; {WAY_OUT}")
        if softcap is not None and not on_gpu:
            raise ValueError("attention with a softcap needs FlexAttention on a GPU")
        if self.observe is not None:
            self.observe(query[0], key[0], scaling, sliding_window, softcap=softcap)
        if sliding_window not in self.masks:
            make = make_block_mask if on_gpu else make_tiles
            self.masks[sliding_window] = make(self.pack, sliding_window)
        mask = self.masks[sliding_window]
        if on_gpu:
            output = _flex(query, key, value, mask, scaling, softcap)
        else:
            output = _in_parts(query, key, value, mask, scaling)
        return output.transpose(1, 2).contiguous()


_PASS: ContextVar[SharedPrefix | None] = ContextVar("rredcot_shared_prefix", default=None)


@contextlib.contextmanager
def shared_prefix(config: PreTrainedConfig, pack: ProbePack | None = None) -> Iterator[SharedPrefix]:
    """Within the block, models of this config attend as the pack says.

    Args:
        config: The model's own config object; its attention implementation is put back afterwards.
        pack: The sequence to be computed, on the model's device; None if it is set later.

    Raises:
        RuntimeError: Some layer did not ask for it: its numbers would not be those of the prefixes.
    """
    text_config = config.get_text_config(decoder=True)
    before = text_config._attn_implementation
    current = SharedPrefix(pack)
    token = _PASS.set(current)
    text_config._attn_implementation = NAME
    try:
        yield current
        if current.num_calls != text_config.num_hidden_layers:
            raise RuntimeError(
                f"{current.num_calls} of {text_config.num_hidden_layers} layers of this model attend through "
                f"transformers' attention interface, so its prefixes cannot be shared; {WAY_OUT}"
            )
    finally:
        text_config._attn_implementation = before
        _PASS.reset(token)


def why_not_shared(config: PreTrainedConfig, device: str) -> str | None:
    """Why the probes of a model cannot share their prefix, None where they can.

    Args:
        config: The model's config.
        device: Type of the device it runs on, e.g. `cuda`.
    """
    text_config = config.get_text_config(decoder=True)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if getattr(config, "vision_config", None) is not None:
        return "the model is multimodal"
    if model_class is None or not getattr(model_class, "_supports_attention_backend", False):
        return f"a model of type {config.model_type} does not attend through transformers' attention interface"
    other = set(getattr(text_config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        return f"the model has layers of other kinds: {sorted(other)}"
    found = rope_types(text_config)
    if found & {"dynamic", "longrope"}:
        return f"its rotary embedding ({sorted(found)}) depends on the length of the sequence"
    if device != FLEX_DEVICE and getattr(text_config, "attn_logit_softcapping", None) is not None:
        return "its attention is soft-capped, which needs FlexAttention on a GPU"
    if text_config.model_type == "gpt_oss":
        return "its attention has sinks, whose share of each token's attention no shared pass was shown to get right"
    return None


def rope_types(text_config: PreTrainedConfig) -> set[str]:
    """Kinds of rotary embedding of a model's layers."""
    parameters = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    # Either one set of parameters, or one for each kind of layer.
    nested = [entry for entry in parameters.values() if isinstance(entry, dict)] or [parameters]
    return {str(entry.get("rope_type", "default")) for entry in nested}


def kept_logits(output: Any, num_rows: int, way_out: str) -> Tensor:
    """`(num_rows, vocab_size)` logits of a model's output, of the tokens that `logits_to_keep` named.

    Args:
        output: Of a pass over one sequence.
        num_rows: Tokens that were named.
        way_out: What to do about a model that does not know the argument.

    Raises:
        RuntimeError: There are more or fewer.
    """
    logits: Tensor = output.logits.squeeze(0)
    if hasattr(logits, "full_tensor"):
        logits = logits.full_tensor()
    if len(logits) != num_rows:
        raise RuntimeError(
            f"the model gave logits of {len(logits)} tokens where {num_rows} were asked for (logits_to_keep); {way_out}"
        )
    return logits


def window_of_mask(*args: Any, use_vmap: bool = False, local_size: int | None = None, **kwargs: Any) -> Window:
    """Mask function with transformers' signature: what a layer gets for a mask.

    Args:
        args, kwargs: Sizes and types that no mask is made of here.
        use_vmap: Whether the model adds a rule of its own to the causal one.
        local_size: How far back a token sees, in tokens.

    Raises:
        RuntimeError: The model's tokens do not just see what is before them.
    """
    if use_vmap:
        raise RuntimeError(f"this model's attention is more than causal, so its prefixes cannot be shared; {WAY_OUT}")
    return Window(local_size)


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Window,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function with transformers' signature.

    Args:
        module: The attention layer.
        query: `(1, num_heads, num_tokens, head_dim)`; this rank's tokens where they are split.
        key, value: `(1, num_key_value_heads, num_tokens, head_dim)`.
        attention_mask: What `window_of_mask` gave the model; the pack says who sees whom.
        scaling: Factor of the scores.
        sliding_window: How far back a token sees, in tokens, as flash attention is told; must be the mask's.
        kwargs: What else a model passes; sinks are refused, and a soft cap off the GPU.

    Returns:
        `(1, num_tokens, num_heads, head_dim)`, and no weights.
    """
    current = _PASS.get()
    if current is None or current.pack is None:
        raise RuntimeError(f"the attention function {NAME} was called outside `shared_prefix`")
    split = current.split
    if split is not None:
        query, key, value = split.gather(query), split.gather(key), split.gather(value)
    # Some models tell only the mask of their windows, or change the mask: those have no one meaning here.
    if attention_mask != Window(sliding_window):
        raise RuntimeError(
            f"layer {getattr(module, 'layer_idx', '?')} of this model has the mask {attention_mask} and "
            f"sliding_window={sliding_window}, so its prefixes cannot be shared; {WAY_OUT}"
        )
    output = current.attend(query, key, value, scaling, sliding_window, **kwargs)
    return output if split is None else split.scatter(output), None


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, window_of_mask)


def make_block_mask(pack: ProbePack, sliding_window: int | None) -> Any:
    """FlexAttention's block mask of a pack, on the pack's device."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return pack.sees(query, key, sliding_window)

    device = pack.positions.device
    # Compiled, the mask of the whole sequence is never in memory.
    make = _compiled(_block_mask) if device.type == FLEX_DEVICE else _block_mask
    return make(sees, pack.num_tokens, device)


def _block_mask(sees: Callable[..., Tensor], num_tokens: int, device: torch.device) -> Any:
    # A number in the code stays one when sizes are unknown.
    return create_block_mask(sees, None, None, num_tokens, num_tokens, device=device, BLOCK_SIZE=128)


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None, softcap: float | None) -> Tensor:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    # Only the number of tokens is unknown to the kernel; the model's sizes and its scale are constants of it.
    for each in (query, key, value):
        torch._dynamo.mark_static(each, (0, 1, 3))
    score_mod = None if softcap is None else capped
    with torch._dynamo.config.patch(specialize_float=True):
        output: Tensor = _compiled(flex_attention)(
            query, key, value, score_mod=score_mod, block_mask=mask, scale=scaling, enable_gqa=True
        )
    return output


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled for packs of any length, the first one's too, which torch would compile by itself first."""
    return torch.compile(function, dynamic=True)


def _in_parts(query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scaling: float | None) -> Tensor:
    # Values may be narrower than keys (multi-head latent attention).
    output = query.new_empty(*query.shape[:3], value.shape[3])
    for tile in tiles:
        output[:, :, tile.queries] = scaled_dot_product_attention(
            query[:, :, tile.queries],
            key[:, :, tile.keys],
            value[:, :, tile.keys],
            attn_mask=tile.mask,
            is_causal=tile.mask is None,
            scale=scaling,
            enable_gqa=True,
        )
    return output


def make_tiles(pack: ProbePack, sliding_window: int | None) -> list[Tile]:
    """Split attention over a pack into parts that leave out most of what is masked.

    Memory of the masks: one byte for each probe's token and token it may see; with a sliding window shorter than a
    trace, also up to two windows for each token of the trace.
    """
    window = pack.num_tokens if sliding_window is None else sliding_window
    tiles = []
    for start, end in zip(pack.trace_starts, pack.trace_starts[1:], strict=False):
        # The whole trace, or strips of it where the window is shorter.
        height = end - start if end - start <= window else max(QUERY_TILE, window)
        for first in range(start, end, max(1, height)):
            last = min(first + height, end)
            keys = slice(max(start, first - window + 1), last)
            plain = keys.start == first and last - first <= window
            mask = None if plain else _mask(pack, slice(first, last), _range(pack, keys.start, last), sliding_window)
            tiles.append(Tile(slice(first, last), keys, mask))
    for queries, seen in _probe_tiles(pack, window):
        tiles.append(Tile(queries, seen, _mask(pack, queries, seen, sliding_window)))
    return tiles


def _mask(pack: ProbePack, queries: slice, keys: Tensor, sliding_window: int | None) -> Tensor:
    return pack.sees(_range(pack, queries.start, queries.stop).unsqueeze(1), keys.unsqueeze(0), sliding_window)


def _range(pack: ProbePack, start: int, end: int) -> Tensor:
    return torch.arange(start, end, device=pack.positions.device)


def _probe_tiles(pack: ProbePack, window: int) -> Iterator[tuple[slice, Tensor]]:
    """Queries of neighbouring probes of one trace, and the keys that any of them sees."""
    limits = pack.limits.tolist()
    for start, first, end in zip(pack.trace_starts, pack.probe_starts, pack.probe_starts[1:], strict=False):
        while first < end:
            last = min(first + QUERY_TILE, end)
            # Probes of one boundary stay together: they see each other.
            while last < end and limits[last] == limits[last - 1]:
                last += 1
            furthest = max(0, limits[first] - window + 1)
            prefix = _range(pack, start + furthest, start + limits[last - 1])
            yield slice(first, last), torch.cat([prefix, _range(pack, first, last)])
            first = last
