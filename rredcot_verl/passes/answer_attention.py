"""How much the tokens that predict an answer attend to every token before them.

Read where transformers' attention interface hands a layer its queries and keys, for the answer's query rows only and a
strip of them at a time, so that no matrix of all tokens against all tokens is ever made.
"""

from typing import Any

import torch
from torch import Tensor

from rredcot_verl.passes.attribution_pack import AttributionPack

MAX_SCORES = 2**24
"""Most attention scores computed at once, over all heads; 64 MiB."""


class AnswerAttention:
    """Sums up the layers of a pass, as `SharedPrefix.observe` of it.

    Args:
        pack: The tasks; nothing is read for one without answer.
        num_layers: Attention layers of the model.
    """

    def __init__(self, pack: AttributionPack, num_layers: int) -> None:
        # Where each answer's sequence starts, and in it the rows that predict the answer, which see no further.
        self._rows = [
            (start, start + task.answer_from - 1, start + task.answer_to - 1)
            for start, task in zip(pack.layout.trace_starts, pack.tasks, strict=False)
        ]
        self._num_layers = num_layers
        self._totals: list[Tensor] = []

    def __call__(self, query: Tensor, key: Tensor, *scores: Any, **more_scores: Any) -> None:
        """A layer's `(num_heads, num_tokens, head_dim)` queries, its keys, and the rest of `attention_by_token`."""
        layer = [
            attention_by_token(query[:, first:last], key[:, start:last], *scores, **more_scores)
            for start, first, last in self._rows
        ]
        self._totals = [a + b for a, b in zip(self._totals, layer, strict=True)] if self._totals else layer

    def means(self) -> list[Tensor]:
        """For each task `(answer_to - 1,)`: attention of an answer's row to a token, mean over layers, heads, rows."""
        return [
            total / (self._num_layers * max(1, last - first))
            for total, (_, first, last) in zip(self._totals, self._rows, strict=True)
        ]


@torch.no_grad()
def attention_by_token(
    query: Tensor,
    key: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of a sequence's last queries to each of its tokens.

    Args:
        query: `(num_heads, num_queries, head_dim)`, of the last `num_queries` of the tokens.
        key: `(num_key_value_heads, num_tokens, head_dim)`.
        scaling: Factor of the scores; None for 1 / sqrt(head_dim).
        sliding_window: How far back a token sees, itself included, in tokens.
        softcap: Bound of the scores, as in Gemma 2.

    Returns:
        `(num_tokens,)` float32: mean over heads, sum over queries. It sums to `num_queries`.
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
            total += scores.softmax(dim=-1).sum(dim=2).mean(dim=(0, 1))
    return total
