"""Values of a response's states from continuations of them: what is sampled, verified and shared."""

import asyncio
import hashlib
from array import array
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rredcot_verl.config.blocks import MonteCarloConfig
from rredcot_verl.core.monte_carlo import monte_carlo_value
from rredcot_verl.servers.client import Generate
from rredcot_verl.sources.continuations import Continuation, ContinuationSampler, State
from rredcot_verl.sources.group import Group

T = TypeVar("T")

Verify = Callable[[list[int]], Awaitable[float]]
"""Reward of a whole response to the same prompt, from its token ids."""


@dataclass(frozen=True)
class Job:
    """A finished response whose states are to be sampled.

    Attributes:
        prompt_ids, response_ids: Its tokens, all of the response the policy's own.
        reward: Its verified reward.
        request_id: The request that generated it.
        sampling_params: What it was sampled with.
        group: Its group, which shares the prompt's state and the rewards of equal texts.
        verify: Verifies a whole response.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    reward: float
    request_id: str
    sampling_params: Mapping[str, Any]
    group: Group
    verify: Verify


@dataclass(frozen=True)
class SampledState:
    """What the continuations of one state came to.

    Attributes:
        value: Mean reward, v_k in units of reward.
        standard_error: Of the value, in units of reward.
        num_rollouts: Continuations sampled; 0 where nothing fits after the state, whose value is then its own reward.
        num_tokens: Tokens generated for them.
        num_recomputed_tokens: Tokens of the state computed again, because the server's cache had lost them.
        num_cut_short: Continuations that reached their limit.
        weight_versions: Versions of the weights that wrote them.
    """

    value: float
    standard_error: float
    num_rollouts: int
    num_tokens: int
    num_recomputed_tokens: int
    num_cut_short: int
    weight_versions: frozenset[int]


@dataclass(frozen=True)
class Estimate:
    """Monte Carlo values of one response.

    Attributes:
        states: One for each boundary but the last.
        paid: Those of the states that were sampled for this response, and not for another of its group.
    """

    states: list[SampledState]
    paid: list[SampledState]

    @property
    def values(self) -> list[float]:
        """v_0 .. v_{K-1}, in units of reward."""
        return [state.value for state in self.states]

    @property
    def standard_errors(self) -> list[float]:
        """Standard error of each value, in units of reward."""
        return [state.standard_error for state in self.states]

    @property
    def weight_versions(self) -> frozenset[int]:
        """Versions of the weights behind the values."""
        return frozenset[int]().union(*(state.weight_versions for state in self.states))

    @property
    def num_rollouts(self) -> int:
        """Continuations sampled for this response."""
        return sum(state.num_rollouts for state in self.paid)

    @property
    def num_tokens(self) -> int:
        """Tokens generated for this response."""
        return sum(state.num_tokens for state in self.paid)


class StateSampler:
    """Values of the states of a response, by continuing each of them `num_rollouts` times.

    Args:
        settings: The `algorithm.rredcot.monte_carlo` block.
        generate: `LLMServerClient.generate`.
        response_length: `rollout.response_length`, tokens.
        max_length: Longest sequence the rollout server takes, tokens.
    """

    def __init__(self, settings: MonteCarloConfig, generate: Generate, response_length: int, max_length: int) -> None:
        self._settings = settings
        self._sampler = ContinuationSampler(generate, settings.max_concurrency)
        self._response_length = response_length
        self._max_length = max_length

    async def values(self, job: Job, boundaries: Sequence[int]) -> Estimate:
        """Sample the states s_0 .. s_{K-1}.

        Args:
            job: The response.
            boundaries: Its `num_segments + 1` offsets.

        Raises:
            ValueError: A reward that is no number.
            Exception: Whatever client and verifier raise. The response's other continuations are then cancelled.
        """
        found = await _all([self._paid_state(job, offset) for offset in boundaries[:-1]])
        return Estimate(states=[state for state, _ in found], paid=[state for state, paid in found if paid])

    def max_new_tokens(self, job: Job, offset: int) -> int:
        """Longest continuation of the state at a response offset: what response budget, context and setting leave."""
        room = min(self._response_length, self._max_length - len(job.prompt_ids)) - offset
        return max(0, room if self._settings.max_tokens is None else min(room, self._settings.max_tokens))

    async def _paid_state(self, job: Job, offset: int) -> tuple[SampledState, bool]:
        """A state, and whether it was sampled for this response.

        The prompt's is the same for all rollouts of the prompt, so the first to ask samples it for all.
        """
        if offset > 0:
            return await self._state(job, offset), True
        paid = False

        async def sample() -> SampledState:
            nonlocal paid
            paid = True
            return await self._state(job, 0)

        return await job.group.once(("prompt_state", tuple(job.prompt_ids)), sample), paid

    async def _state(self, job: Job, offset: int) -> SampledState:
        most = self.max_new_tokens(job, offset)
        continuations: list[Continuation] = []
        if most == 0:
            rewards = [await self._reward(job, job.response_ids[:offset])]
        else:
            pairs = await _all([self._rollout(job, offset, most) for _ in range(self._settings.num_rollouts)])
            continuations, rewards = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        value, standard_error = monte_carlo_value(rewards)
        return SampledState(
            value=value,
            standard_error=standard_error,
            num_rollouts=len(continuations),
            num_tokens=sum(len(each.token_ids) for each in continuations),
            num_recomputed_tokens=sum(each.num_recomputed_tokens for each in continuations),
            num_cut_short=sum(each.cut_short for each in continuations),
            weight_versions=frozenset[int]().union(*(each.weight_versions for each in continuations)),
        )

    async def _rollout(self, job: Job, offset: int, max_tokens: int) -> tuple[Continuation, float]:
        state = State(job.prompt_ids, job.response_ids, offset)
        sampled = await self._sampler.sample(job.request_id, state, max_tokens, job.sampling_params)
        return sampled, await self._reward(job, job.response_ids[:offset] + sampled.token_ids)

    async def _reward(self, job: Job, response_ids: list[int]) -> float:
        """The reward of a text, verified once for all rollouts of the prompt: the last states often end alike."""
        if response_ids == job.response_ids:
            return job.reward
        # Long texts are not kept for it.
        key = hashlib.sha256(array("q", response_ids)).digest()
        return await job.group.once(("reward", key), lambda: job.verify(response_ids))


async def _all(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; after a failure the others are cancelled and waited for, so that none goes on unseen."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
