"""A linear layer that is quick for the few rows of a decoding step."""

import torch
from torch import Tensor, nn

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


def use_few_rows(model: nn.Module) -> None:
    """Makes every large linear layer of a model one of these, with the weights it has."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= LEAST_WEIGHTS:
            module.__class__ = FewRowsLinear
