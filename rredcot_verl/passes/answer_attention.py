"""How much the tokens that predict an answer attend to every token before them.

Read where transformers' attention interface hands a layer its queries and keys, for the answer's query rows only and a
strip of them at a time, so that no matrix of all tokens against all tokens is ever made. What the layer gives is what
`shared_attention` gives, packed traces and sliding windows included.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from rredcot_verl.passes.probe_pack import ProbePack
from rredcot_verl.passes.shared_attention import Window, shared_prefix, shared_prefix_attention, window_of_mask

NAME = "rredcot_answer_attention"
"""Name of the attention function in transformers' registry."""

MAX_SCORES = 2**24
"""Most attention scores computed at once, over all heads; 64 MiB."""


@dataclass(frozen=True)
class Rows:
    """The query rows of one answer in a pack: those of its sequence's tokens `first` to `last` - 1.

    Attributes:
        start: Where the sequence starts in the pack.
        first, last: Offsets in the sequence; they attend to `last` tokens at most.
    """

    start: int
    first: int
    last: int


@dataclass
class AnswerAttention:
    """The pass under way.

    Attributes:
        rows: For each sequence of the pack the rows that are read; nothing is read where `first == last`.
        num_layers: Attention layers of the model.
        last_layer_only: Whether the other layers are left out.
        num_calls: Layers that have been called.
        totals: For each sequence `(last,)` float32, the sum over the layers read; see `attention_by_token`.
    """

    rows: Sequence[Rows]
    num_layers: int
    last_layer_only: bool
    num_calls: int = 0
    totals: list[Tensor] = field(default_factory=list)

    def means(self) -> list[Tensor]:
        """For each sequence `(last,)`: attention of an answer's row to each token, mean over layers, heads and rows."""
        num_layers = 1 if self.last_layer_only else self.num_layers
        return [
            total / (num_layers * max(1, rows.last - rows.first))
            for total, rows in zip(self.totals, self.rows, strict=True)
        ]


_PASS: ContextVar[AnswerAttention | None] = ContextVar("rredcot_answer_attention", default=None)


@contextlib.contextmanager
def answer_attention(
    config: PreTrainedConfig, pack: ProbePack, rows: Sequence[Rows], last_layer_only: bool
) -> Iterator[AnswerAttention]:
    """Within the block, a forward pass over the pack by a model of this config is read.

    Args:
        config: The model's own config object; its attention implementation is put back afterwards.
        pack: The sequence to be computed, on the model's device.
        rows: What is read of each of its sequences.
        last_layer_only: Read the last layer instead of all.

    Raises:
        RuntimeError: Some layer did not ask for its attention through transformers' interface.
    """
    text_config = config.get_text_config(decoder=True)
    current = AnswerAttention(rows, text_config.num_hidden_layers, last_layer_only)
    with shared_prefix(config) as shared:
        shared.pack = pack
        token = _PASS.set(current)
        # `shared_prefix` puts back what was there before both.
        text_config._attn_implementation = NAME
        try:
            yield current
        finally:
            _PASS.reset(token)


def answer_attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Window,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function with transformers' signature: see `shared_prefix_attention`, whose output this is."""
    current = _PASS.get()
    if current is None:
        raise RuntimeError(f"the attention function {NAME} was called outside `answer_attention`")
    output = shared_prefix_attention(module, query, key, value, attention_mask, scaling, sliding_window, **kwargs)
    current.num_calls += 1
    if current.last_layer_only and current.num_calls != current.num_layers:
        return output
    layer = [
        attention_by_token(
            query[0, :, rows.start + rows.first : rows.start + rows.last],
            key[0, :, rows.start : rows.start + rows.last],
            scaling,
            sliding_window,
            kwargs.get("softcap"),
            kwargs.get("s_aux"),
        )
        for rows in current.rows
    ]
    current.totals = [a + b for a, b in zip(current.totals, layer, strict=True)] if current.totals else layer
    return output


AttentionInterface.register(NAME, answer_attention_function)
AttentionMaskInterface.register(NAME, window_of_mask)


@torch.no_grad()
def attention_by_token(
    query: Tensor,
    key: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of a sequence's last queries to each of its tokens.

    Args:
        query: `(num_heads, num_queries, head_dim)`, of the last `num_queries` of the tokens.
        key: `(num_key_value_heads, num_tokens, head_dim)`.
        scaling: Factor of the scores; None for 1 / sqrt(head_dim).
        sliding_window: How far back a token sees, itself included, in tokens.
        softcap: Bound of the scores, as in Gemma 2.
        sinks: `(num_heads,)` scores of nothing at all, as in gpt-oss; they take their share.

    Returns:
        `(num_tokens,)` float32: mean over heads, sum over queries. Without sinks it sums to `num_queries`.
    """
    num_heads, num_queries, head_dim = query.shape
    num_tokens = key.shape[1]
    total = torch.zeros(num_tokens, device=query.device)
    height = max(1, MAX_SCORES // (num_heads * max(1, num_tokens)))
    positions = torch.arange(num_tokens, device=query.device)
    # The engine's autocast would compute the scores in half precision.
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.float().view(key.shape[0], num_heads // key.shape[0], num_queries, head_dim)
        keys = key.float().unsqueeze(1).transpose(-1, -2)
        for first in range(0, num_queries, height):
            strip = grouped[:, :, first : first + height]
            scores = (strip @ keys) * (head_dim**-0.5 if scaling is None else scaling)
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            at = positions[num_tokens - num_queries + first :][: strip.shape[2]].unsqueeze(1)
            unseen = positions > at
            if sliding_window is not None:
                unseen |= at - positions >= sliding_window
            scores = scores.masked_fill(unseen, float("-inf"))
            if sinks is not None:
                sink = sinks.float().view(key.shape[0], -1, 1, 1).expand(*scores.shape[:3], 1)
                scores = torch.cat([scores, sink], dim=-1)
            total += scores.softmax(dim=-1)[..., :num_tokens].sum(dim=2).mean(dim=(0, 1))
    return total
