"""Continuations of a state, sampled by the rollout server through verl's own client: plain generation, any backend.

The request id of the rollout leads to the server that holds the state's tokens in its prefix cache, so that only what
is generated is computed there. The embedded CPU server keeps no cache between requests: it computes the prefix again.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rredcot_verl.servers.client import Generate

_NOT_INHERITED = ("max_tokens", "max_new_tokens", "seed", "n", "logprobs", "prompt_logprobs")
_ABORTED = ("aborted", "abort")
_PAUSE_SECONDS = 1.0
_MAX_PAUSES = 600


@dataclass(frozen=True)
class State:
    """A state of a response: its prompt, and its tokens before a boundary.

    Attributes:
        prompt_ids, response_ids: Tokens; shared, because there are many states of a long response.
        offset: The boundary, in response tokens.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    offset: int

    @property
    def token_ids(self) -> list[int]:
        """The tokens that are continued."""
        return [*self.prompt_ids, *self.response_ids[: self.offset]]


@dataclass(frozen=True)
class Continuation:
    """One continuation of a state.

    Attributes:
        token_ids: What was generated.
        cut_short: It reached its limit, so that it may not be finished.
        num_recomputed_tokens: Tokens of the state that the server had to compute again, as far as it tells.
        weight_versions: Versions of the weights that wrote it, as the server tells.
    """

    token_ids: list[int]
    cut_short: bool
    num_recomputed_tokens: int
    weight_versions: frozenset[int]


class ContinuationSampler:
    """Samples continuations, at most so many at once.

    Args:
        generate: `LLMServerClient.generate`.
        max_concurrency: Requests under way at once.
    """

    def __init__(self, generate: Generate, max_concurrency: int) -> None:
        self._generate = generate
        self._slots = asyncio.Semaphore(max_concurrency)

    async def sample(
        self, request_id: str, state: State, max_tokens: int, sampling_params: Mapping[str, Any]
    ) -> Continuation:
        """Generate one continuation of a state.

        There is no time limit, as verl has none for a rollout. A request that the server broke off (for new weights, in
        the asynchronous modes, where verl's client goes on by itself) is gone on with from where it stopped.

        Args:
            request_id: The request that generated the state.
            state: The state.
            max_tokens: Most tokens to generate, at least 1.
            sampling_params: Those of the rollout. Its limits are replaced; a seed is left out, with which all
                continuations would be one.

        Raises:
            RuntimeError: The server generated more than asked, or broke off again and again without a new token.
            Exception: Whatever the client raises.
        """
        params = {name: value for name, value in sampling_params.items() if name not in _NOT_INHERITED}
        tokens: list[int] = []
        versions: set[int] = set()
        num_recomputed, num_pauses = 0, 0
        async with self._slots:
            state_ids = state.token_ids
            while True:
                output = await self._generate(
                    request_id=request_id,
                    prompt_ids=state_ids + tokens,
                    sampling_params={**params, "logprobs": False, "max_tokens": max_tokens - len(tokens)},
                )
                found = [int(token) for token in output.token_ids]
                if len(found) > max_tokens - len(tokens):
                    raise RuntimeError(f"the rollout server generated {len(found)} tokens, more than it was asked for")
                num_recomputed += _num_recomputed(output.extra_fields, len(state_ids) + len(tokens))
                versions.update(_versions(output.extra_fields))
                tokens += found
                if output.stop_reason not in _ABORTED or len(tokens) >= max_tokens:
                    return Continuation(tokens, len(tokens) >= max_tokens, num_recomputed, frozenset(versions))
                num_pauses = 0 if found else num_pauses + 1
                if num_pauses > _MAX_PAUSES:
                    raise RuntimeError(
                        f"the rollout server aborted a continuation {num_pauses} times in a row without a new token"
                    )
                await asyncio.sleep(_PAUSE_SECONDS)


def _num_recomputed(extra_fields: Mapping[str, Any], num_prompt_tokens: int) -> int:
    cached = extra_fields.get("num_cached_tokens")
    return 0 if cached is None else max(0, num_prompt_tokens - int(cached))


def _versions(extra_fields: Mapping[str, Any]) -> set[int]:
    found = (extra_fields.get(name) for name in ("min_global_steps", "max_global_steps", "global_steps"))
    return {int(version) for version in found if version is not None}
