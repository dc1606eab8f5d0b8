"""A rollout as the sources of segment values see it."""

import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from rredcot_verl.probes.elicitation import ReadAnswer
from rredcot_verl.sources.group import Group, Member
from rredcot_verl.sources.record import CreditRecord


@dataclasses.dataclass(frozen=True)
class Response:
    """A finished and verified rollout.

    Attributes:
        prompt_ids, response_ids, response_mask: As in verl's `AgentLoopOutput`.
        log_probs: Rollout log-probability of each response token, None where the server gave none.
        reward: Verified reward, None where it is computed later.
        references: What the row holds under `self_value.reference_key`, None where it is missing.
        request_id: The request that generated it; the same id reaches the same server.
        answer: Its final answer, if it has one.
        sampling_params: What it was sampled with.
        verify: The reward of another response to the same prompt, given its tokens; None where rewards come later.
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

    @property
    def answer_start(self) -> int:
        """Offset of the first token of its answer's opening; its length where it has no answer."""
        return self.answer.start if self.answer else len(self.response_ids)


class Source(Protocol):
    """Where the values of a response's segments come from."""

    needs_all: bool
    """Whether all rollouts of a prompt must be there, or two with different rewards are enough."""

    async def record(self, response: Response, group: Group, boundaries: list[int]) -> CreditRecord:
        """Values of a response of the group, or what the trainer needs to get them.

        Args:
            response: The response; at least one of its tokens is the policy's.
            group: Its group, decided.
            boundaries: Its segment boundaries, `num_segments + 1` offsets.
        """
        ...


def as_member(response: Response) -> Member:
    """What the group needs to know of a response."""
    return Member(response.reward, response.answer.text if response.answer else None)
