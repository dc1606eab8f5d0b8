"""Linear layers and attention that are quick for the few rows of a decoding step."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

MOST_ROWS = 256
"""As many as were measured (docs/results/bench.md); the more rows, the less there is to gain."""
LEAST_WEIGHTS = 2**19
"""Weights of a layer below which it makes no difference; the layers of the tiny models have fewer."""


class FewRowsLinear(nn.Linear):
    """Multiplies the weights by the rows and not the rows by the weights.

    With two threads torch's product of 4 to 64 rows takes 1.3 to 3.4 times as long (docs/results/bench.md). Only sums
    are rounded in another order.
    """

    def forward(self, input: Tensor) -> Tensor:
        """See `nn.Linear`."""
        rows = input.reshape(-1, self.in_features)
        if not 1 < len(rows) <= MOST_ROWS:
            return super().forward(input)
        output = torch.mm(self.weight, rows.t()).t()
        if self.bias is not None:
            output = output + self.bias
        return output.reshape(*input.shape[:-1], self.out_features)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of transformers' interface: its `sdpa`, but for one new token of sequences that are padded.

    There every key and value is copied for each query head of its group; here those heads are queries of one head, and
    see the same. Only sums are rounded in another order.
    """
    batch_size, num_heads, num_queries, width = query.shape
    shared = attention_mask is not None and attention_mask.ndim == 4 and attention_mask.shape[1] == 1
    if num_queries > 1 or not shared or key.shape[1] == num_heads:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(batch_size, key.shape[1], -1, width), key, value, attention_mask, scale=kwargs.get("scaling")
    )
    return output.reshape(batch_size, 1, num_heads, -1), None


_ATTENTION = "rredcot_few_rows"
AttentionInterface.register(_ATTENTION, attend)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def use_few_rows(model: nn.Module) -> None:
    """Makes every large linear layer of a model one of these, with the weights it has, and its attention `attend`."""
    replaceable = isinstance(model, PreTrainedModel) and model._supports_attention_backend
    if replaceable and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_ATTENTION)
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= LEAST_WEIGHTS:
            module.__class__ = FewRowsLinear
