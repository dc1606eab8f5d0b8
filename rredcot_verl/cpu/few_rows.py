"""A linear layer that is quick for the few rows of a decoding step."""

import torch
from torch import Tensor, nn

MOST_ROWS = 64
"""Above it the product as torch makes it is as quick."""
LEAST_WEIGHTS = 2**18
"""Weights of a layer below which it makes no difference; the layers of the tiny models have fewer."""


class FewRowsLinear(nn.Linear):
    """Multiplies the weights by the rows and not the rows by the weights.

    Of 16 rows torch's product on a CPU takes twice as long with two threads: it packs the weights each time
    (docs/results/bench.md). Only sums are rounded in another order.
    """

    def forward(self, input: Tensor) -> Tensor:
        """See `nn.Linear`."""
        rows = input.reshape(-1, self.in_features)
        if len(rows) > MOST_ROWS:
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
