"""What the rollouts of one prompt know of each other while they run."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """One finished rollout of a group.

    Attributes:
        reward: Its verified reward; None where rewards are computed later (a colocated reward model).
        answer: Text of its final answer, None where it has none.
        shaping: What was added to the verifier's score in the reward.
    """

    reward: float | None
    answer: str | None
    shaping: float = 0.0


class Group:
    """The rollouts of one prompt, gathered as they finish.

    Args:
        size: Number of rollouts that will arrive or leave.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.members: dict[int, Member] = {}
        self._absent: set[int] = set()
        self._changed = asyncio.Condition()
        self._shared: dict[Hashable, asyncio.Future[Any]] = {}

    async def arrive(self, session_id: int, member: Member) -> None:
        """A rollout is finished and verified."""
        async with self._changed:
            self.members[session_id] = member
            self._changed.notify_all()

    async def leave(self, session_id: int) -> None:
        """A rollout ended without arriving (it failed, or gave nothing); does nothing after an arrival."""
        async with self._changed:
            if session_id not in self.members:
                self._absent.add(session_id)
            self._changed.notify_all()

    @property
    def complete(self) -> bool:
        """Whether every rollout has arrived or left."""
        return len(self.members) + len(self._absent) >= self.size

    @property
    def mixed(self) -> bool:
        """Whether two arrived rollouts have different rewards: GRPO's advantage cannot be zero for all any more."""
        return len({member.reward for member in self.members.values()}) > 1

    @property
    def has_no_advantage(self) -> bool:
        """Whether GRPO's advantage is zero for all: equal rewards, or a single arrival with reward 0 (verl's rule)."""
        rewards = [member.reward for member in self.members.values()]
        if any(reward is None for reward in rewards):
            return False
        return rewards == [0.0] if len(rewards) == 1 else len(set(rewards)) <= 1

    async def decided(self, needs_all: bool) -> None:
        """Wait until it is known whether and with what answers to probe: all rollouts, or two different rewards."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.complete or (self.mixed and not needs_all))

    async def once(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        """What `make` gives: made for the first rollout that asks for the key, shared with the others, failures too."""
        if key not in self._shared:
            self._shared[key] = asyncio.ensure_future(make())
            # Who asked may have been cancelled since; asyncio would then complain of a failure nobody looked at.
            self._shared[key].add_done_callback(lambda made: made.cancelled() or made.exception())
        # Shielded: if one rollout is cancelled, the others still need it.
        shared: T = await asyncio.shield(self._shared[key])
        return shared
