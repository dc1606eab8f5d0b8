"""What `vllm_forcing.ForcedAnswers` does to the logits. Imports torch and nothing of vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rredcot_verl.servers.vllm_forced import NUM_CLOSINGS, SHIFT


@dataclass(frozen=True)
class ForcedRequest:
    """What one request forces.

    Attributes:
        forced: The token of each step.
        closings: For each step the lists of closing tokens to sum there, at most two.
        channels: Tokens as whose log-probabilities the numbers are handed over.
        temperature: Divides the logits.
        output_ids: vLLM's own list of what it has generated so far.
    """

    forced: Sequence[int]
    closings: Sequence[Sequence[Sequence[int]]]
    channels: Sequence[int]
    temperature: float
    output_ids: Sequence[int]

    @property
    def step(self) -> int:
        """The step at hand, from 0."""
        # vLLM may run one step more than was asked for, and drops it.
        return min(len(self.output_ids), len(self.forced) - 1)


def replace_rows(logits: torch.Tensor, requests: Sequence[ForcedRequest]) -> torch.Tensor:
    """The logits of rows that force.

    The forced token has logit 0, the channels have their numbers less `SHIFT`, all else is impossible. The numbers:
    the negative of the step, the log-probability that the forced token had, and those of the summed closing tokens.

    Args:
        logits: `(num_rows, vocab_size)` float32, as the model gave them.
        requests: One a row.

    Returns:
        `(num_rows, vocab_size)` float32.
    """
    temperatures = logits.new_tensor([[request.temperature] for request in requests])
    log_probs = (logits / temperatures).log_softmax(-1)
    forced = torch.tensor([[request.forced[request.step]] for request in requests], device=logits.device)
    steps = logits.new_tensor([[float(request.step)] for request in requests])
    sums = [_sums(log_probs, requests, index) for index in range(NUM_CLOSINGS)]
    numbers = torch.cat([-steps, log_probs.gather(1, forced), *sums], 1)
    channels = torch.tensor([list(request.channels) for request in requests], device=logits.device)
    replaced = torch.full_like(log_probs, float("-inf")).scatter_(1, channels, numbers - SHIFT)
    return replaced.scatter_(1, forced, 0.0)


def _sums(log_probs: torch.Tensor, requests: Sequence[ForcedRequest], index: int) -> torch.Tensor:
    """Log of the summed probability of each row's `index`-th list of closing tokens; -inf where it has none.

    Returns:
        `(num_rows, 1)`.
    """
    lists = [request.closings[request.step][index : index + 1] for request in requests]
    ids = [list(found[0]) if found else [] for found in lists]
    width = max(1, *map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=log_probs.device)
    lengths = torch.tensor([[len(row)] for row in ids], device=log_probs.device)
    absent = torch.arange(width, device=log_probs.device) >= lengths
    return log_probs.gather(1, padded).masked_fill(absent, float("-inf")).logsumexp(-1, keepdim=True)
