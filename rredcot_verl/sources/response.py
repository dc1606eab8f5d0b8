"""A rollout as the sources of segment values see it, and what they are given to work with."""

import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from rredcot_verl.probes.elicitation import Elicitation, ReadAnswer
from rredcot_verl.servers.client import Generate
from rredcot_verl.sources.group import Member


@dataclasses.dataclass(frozen=True)
class Response:
    """A finished and verified rollout.

    Attributes:
        prompt_ids, response_ids, response_mask: As in verl's `AgentLoopOutput`.
        log_probs: Rollout log-probability of each response token, None where the server gave none.
        reward: Verified reward, None where it is computed later.
        shaping: What was added to the verifier's score in it.
        references: What the row holds under `self_value.reference_key`, None where it is missing.
        request_id: The request that generated it; the same id reaches the same server.
        answer: Its final answer, if it has one.
        sampling_params: What it was sampled with.
        verify: The score of another response to the same prompt, given its tokens; None where rewards come later.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[int]
    log_probs: list[float] | None
    reward: float | None
    references: object
    request_id: str
    answer: ReadAnswer | None
    sampling_params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    verify: Callable[[list[int]], Awaitable[float]] | None = None
    shaping: float = 0.0

    @property
    def answer_start(self) -> int:
        """Offset of the first token of its answer's opening; its length where it has no answer."""
        return self.answer.start if self.answer else len(self.response_ids)

    def as_member(self) -> Member:
        """What the group needs to know of it."""
        # A verifier may give a tensor, which is equal to no other.
        reward = None if self.reward is None else float(self.reward)
        return Member(reward, self.answer.text if self.answer else None, self.shaping)


@dataclasses.dataclass(frozen=True)
class AgentTools:
    """What an agent loop worker gives the run's source.

    Attributes:
        elicitation: How answers are found and asked for, with the policy's vocabulary.
        generate: `LLMServerClient.generate`.
        max_length: Longest sequence that can be measured, tokens.
        response_length: `rollout.response_length`, tokens.
        temperature: The rollout's.
        rollout_name: `rollout.name`.
    """

    elicitation: Elicitation
    generate: Generate
    max_length: int
    response_length: int
    temperature: float
    rollout_name: str
