"""A policy small enough to enumerate, and a rollout server that samples from it."""

import asyncio
import functools
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

LETTERS, EOS = (0, 1, 2), 3
PROMPT = (7, 8)
RESPONSE_LENGTH = 5
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.0, "logprobs": True}


def next_token_probabilities(prefix: tuple[int, ...]) -> list[float]:
    """Of the three letters and the end, after a response prefix."""
    weights = [random.Random(f"{prefix}/{token}").random() ** 2 for token in (*LETTERS, EOS)]
    return [weight / sum(weights) for weight in weights]


def reward(response_ids: tuple[int, ...]) -> float:
    """Share of 1 among the letters, and nothing for a response that is not finished: no state's value is 0 or 1."""
    letters = [token for token in response_ids if token in LETTERS]
    return letters.count(1) / len(letters) if letters and response_ids[-1] == EOS else 0.0


@functools.cache
def true_value(prefix: tuple[int, ...], limit: int = RESPONSE_LENGTH) -> float:
    """E[R | prefix] by enumeration of all continuations up to a length of the whole response."""
    if len(prefix) == limit or prefix[-1:] == (EOS,):
        return reward(prefix)
    chances = next_token_probabilities(prefix)
    return sum(p * true_value((*prefix, t), limit) for p, t in zip(chances, (*LETTERS, EOS), strict=True))


class ToyServer:
    """`LLMServerClient.generate` of the toy policy.

    What it answers depends on the seed, the prompt and how often that prompt was sent before, not on when.

    Args:
        seed: Seed of all answers.
        max_delay: Answers come after a random time of up to so many seconds.
        delay_seed: Seed of those times.
    """

    def __init__(self, seed: int = 0, max_delay: float = 0.0, delay_seed: int = 0) -> None:
        self.seed, self.max_delay = seed, max_delay
        self.requests: list[dict[str, Any]] = []
        self.num_generated = 0
        self.under_way = self.most_under_way = 0
        self._delays = random.Random(delay_seed)
        self._sent: Counter[tuple[int, ...]] = Counter()

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Any:
        ids = tuple(prompt_ids)
        self.requests.append({"request_id": request_id, "prompt_ids": ids, "sampling_params": dict(sampling_params)})
        draws = random.Random(f"{self.seed}/{ids}/{self._sent[ids]}")
        self._sent[ids] += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(self._delays.random() * self.max_delay)
        finally:
            self.under_way -= 1
        tokens: list[int] = []
        while len(tokens) < sampling_params["max_tokens"] and tokens[-1:] != [EOS]:
            chances = next_token_probabilities((*ids[len(PROMPT) :], *tokens))
            tokens += draws.choices((*LETTERS, EOS), chances)
        self.num_generated += len(tokens)
        return SimpleNamespace(
            token_ids=tokens,
            stop_reason="completed",
            extra_fields={"global_steps": 3, "num_cached_tokens": len(ids) - 1},
        )


class ToyVerifier:
    """Verifies responses and remembers which."""

    def __init__(self) -> None:
        self.verified: list[tuple[int, ...]] = []

    async def __call__(self, response_ids: list[int]) -> float:
        self.verified.append(tuple(response_ids))
        return reward(tuple(response_ids))
