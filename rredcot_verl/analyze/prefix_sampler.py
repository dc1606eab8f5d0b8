"""Sampling many continuations of many prefixes with transformers: equal continuations are computed once.

Of `count` continuations of a prefix, most go the same way for a while. So a row of the batch is a *distinct* sequence,
and stands for all samples that have written it so far; where they part, the row's key-value cache is copied. Every
sample still draws every token by itself: the continuations are independent draws, only their computation is shared.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

_STRETCH = 64
"""Tokens whose random numbers are drawn at once."""
_MOST_NUMBERS = 1 << 25
"""Probabilities summed up at once, in double precision."""


@dataclass(frozen=True)
class Request:
    """Continuations wanted of one prefix.

    Attributes:
        prefix: Token ids, at least one.
        count: Number of continuations.
        max_tokens: Longest continuation, in tokens, at least 1.
        stream: Numbers that name its random numbers; equal numbers give equal draws, in whatever batch it is sampled.
    """

    prefix: Sequence[int]
    count: int
    max_tokens: int
    stream: tuple[int, ...]


@dataclass(frozen=True)
class Continuation:
    """One sampled continuation.

    Attributes:
        token_ids: The generated tokens, the one that ended it included.
        log_probs: Their log-probabilities at the sampling temperature, nats.
    """

    token_ids: list[int]
    log_probs: list[float]


class Sampler:
    """Samples from a causal language model at one temperature.

    Args:
        model: The policy, in evaluation mode.
        eos_token_ids: Tokens that end a continuation.
        temperature: Divides the logits; positive.
        seed: Of all draws.
        max_batch_tokens: Bound on the continuations of a batch times their longest length, prefix included.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos_token_ids: Sequence[int],
        temperature: float,
        seed: int,
        max_batch_tokens: int = 32768,
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"sampling needs a positive temperature, got {temperature}")
        self._model = model
        self._eos = torch.tensor(sorted(eos_token_ids), device=model.device)
        self._temperature = temperature
        self._seed = seed
        self._max_batch_tokens = max_batch_tokens
        # Continuations sampled, their tokens, and those that were computed for them, the prefixes apart.
        self.count = Counter(num_continuations=0, num_tokens=0, num_computed_tokens=0)

    def batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Numbers of the requests that are sampled together: of like length, so that little is padding."""
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prefix), requests[i].max_tokens))
        batch: list[int] = []
        num_samples = longest = 0
        for number in order:
            request = requests[number]
            length = len(request.prefix) + request.max_tokens
            if batch and (num_samples + request.count) * max(longest, length) > self._max_batch_tokens:
                yield batch
                batch, num_samples, longest = [], 0, 0
            batch.append(number)
            num_samples += request.count
            longest = max(longest, length)
        if batch:
            yield batch

    @torch.inference_mode()
    def sample(self, requests: Sequence[Request]) -> list[list[Continuation]]:
        """Sample one batch.

        Returns:
            For each request its `count` continuations, in order of drawing.
        """
        device = self._model.device
        tree = _Tree(self._model, [list(request.prefix) for request in requests], self._temperature)
        counts = torch.tensor([request.count for request in requests], device=device)
        rows = torch.arange(len(requests), device=device).repeat_interleave(counts)
        limits = torch.tensor([request.max_tokens for request in requests], device=device)[rows]
        live = torch.arange(len(rows), device=device)
        uniform = self._uniform(requests)
        tokens: list[Tensor] = []
        log_probs: list[Tensor] = []
        lengths = torch.zeros_like(rows)
        for place in range(int(limits.max())):
            drawn, drawn_log_probs = tree.draw(rows[live], next(uniform).to(device)[live])
            tokens.append(torch.zeros_like(rows).index_copy(0, live, drawn))
            log_probs.append(torch.zeros(len(rows), device=device).index_copy(0, live, drawn_log_probs))
            lengths[live] += 1
            goes_on = ~torch.isin(drawn, self._eos) & (limits[live] > place + 1)
            live, drawn = live[goes_on], drawn[goes_on]
            if not len(live):
                break
            rows[live] = tree.grow(rows[live], drawn)
        self.count.update(
            num_continuations=len(rows), num_tokens=int(lengths.sum()), num_computed_tokens=tree.num_computed_tokens
        )
        columns = zip(
            torch.stack(tokens, 1).tolist(), torch.stack(log_probs, 1).tolist(), lengths.tolist(), strict=True
        )
        each = iter([Continuation(ids[:length], values[:length]) for ids, values, length in columns])
        return [[next(each) for _ in range(request.count)] for request in requests]

    def _uniform(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        """Random numbers in [0, 1), one a continuation, for token after token."""
        generators = [np.random.Generator(np.random.Philox([self._seed, *request.stream])) for request in requests]
        while True:
            drawn = [g.random((_STRETCH, request.count)) for g, request in zip(generators, requests, strict=True)]
            yield from torch.from_numpy(np.concatenate(drawn, axis=1))


class _Tree:
    """The distinct sequences of a batch, with their key-value cache and next-token distributions."""

    def __init__(self, model: PreTrainedModel, prefixes: Sequence[list[int]], temperature: float) -> None:
        self._model = model
        self._temperature = temperature
        self.num_computed_tokens = 0
        width = max(len(prefix) for prefix in prefixes)
        # Padded on the left and masked, so that all rows go on at the same place.
        ids = torch.tensor([[0] * (width - len(prefix)) + prefix for prefix in prefixes], device=model.device)
        first = torch.tensor([width - len(prefix) for prefix in prefixes], device=model.device)
        self._mask = (torch.arange(width, device=model.device) >= first.unsqueeze(1)).long()
        self._padded = bool(first.any())
        self._next_positions = width - first
        self._cache = DynamicCache(config=model.config)
        positions = (torch.arange(width, device=model.device) - first.unsqueeze(1)).clamp(min=0)
        self._log_probs = self._forward(ids, positions)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        options: dict[str, Any] = {"attention_mask": self._mask} if self._padded else {}
        logits: Tensor = self._model(
            ids, position_ids=positions, past_key_values=self._cache, use_cache=True, logits_to_keep=1, **options
        ).logits[:, -1]
        return (logits.float() / self._temperature).log_softmax(-1)

    def draw(self, rows: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """One token for each sample, and its log-probability.

        Args:
            rows: `(num_samples,)` the row of each.
            uniform: `(num_samples,)` float64 in [0, 1).
        """
        num_rows, vocab_size = self._log_probs.shape
        tokens = torch.empty_like(rows)
        size = max(1, _MOST_NUMBERS // vocab_size)
        for first in range(0, num_rows, size):
            # Summed up in double precision: one search over many rows, the n-th taking the numbers from n to n + 1.
            steps = self._log_probs[first : first + size].double().exp_().cumsum(-1)
            steps /= steps[:, -1:].clone()
            steps += torch.arange(len(steps), device=rows.device).unsqueeze(1)
            here = (rows >= first) & (rows < first + size)
            own = rows[here] - first
            found = torch.searchsorted(steps.flatten(), uniform[here] + own, right=True)
            tokens[here] = (found - own * vocab_size).clamp(0, vocab_size - 1)
        return tokens, self._log_probs[rows, tokens]

    def grow(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Append a token to each sample that goes on; returns the samples' new rows."""
        num_rows, vocab_size = self._log_probs.shape
        new_rows: Tensor
        distinct, new_rows = torch.unique(rows * vocab_size + tokens, return_inverse=True)
        parents = distinct // vocab_size
        if len(parents) != num_rows or bool((parents != torch.arange(num_rows, device=parents.device)).any()):
            self._cache.batch_select_indices(parents)
            self._mask = self._mask[parents]
            self._next_positions = self._next_positions[parents]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(parents), 1)], dim=1)
        self._log_probs = self._forward((distinct % vocab_size).unsqueeze(1), self._next_positions.unsqueeze(1))
        self._next_positions = self._next_positions + 1
        self.num_computed_tokens += len(parents)
        return new_rows
