"""When probes are read: beside generation, a few at a time. Imports neither a server nor verl."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar

_T = TypeVar("_T")

MAX_TRACES = 4
"""Traces whose probes a server reads at once. A trace begins with one request alone, so it takes several to keep the
engine busy; of many at once each would lose its prefix to the others between its requests."""

FULL_LOAD = 32
"""While so many responses are generated, probes have one request under way at a time; while half as many are, two, and
so on; while twice as many, one half of the time: a request delays every response beside it. See
docs/results/rollout_scoring.md."""


class ProbingTimeout(RuntimeError):
    """A rollout server that has probes to read stands still."""


class Turns:
    """A bound on what is under way at once, which may change.

    Args:
        limit: Gives the bound; asked whenever something ends or `admit` is called.
        newest_first: Of what waits, the last to come has the next turn.
    """

    def __init__(self, limit: Callable[[], int], newest_first: bool = False) -> None:
        self._limit = limit
        self._newest_first = newest_first
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._num_under_way = 0

    def admit(self) -> None:
        """Give turns to what waits, as many as the bound allows."""
        while self._waiting and self._num_under_way < self._limit():
            turn = self._waiting.pop() if self._newest_first else self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._num_under_way += 1

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits for a turn, and has it."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self.admit()
        try:
            await turn
            yield
        finally:
            # Cancelled while it waited, it never had a turn.
            if not turn.cancelled():
                self._num_under_way -= 1
            self.admit()


class Progress:
    """Tells a server that is slow, or has others to serve, from one that stands still."""

    def __init__(self) -> None:
        self._last = 0.0

    def made(self) -> None:
        """Something was finished."""
        self._last = asyncio.get_running_loop().time()

    async def watch(self, work: Awaitable[_T], timeout_s: float) -> _T:
        """Waits for work as long as anything is finished every `timeout_s` seconds.

        Raises:
            ProbingTimeout: Nothing was; the work is cancelled.
        """
        loop = asyncio.get_running_loop()
        task, started = asyncio.ensure_future(work), loop.time()
        try:
            while not task.done():
                left = max(self._last, started) + timeout_s - loop.time()
                if left <= 0:
                    raise ProbingTimeout(
                        "the rollout server has finished no request within "
                        f"algorithm.rredcot.self_value.timeout_s={timeout_s}"
                    )
                await asyncio.wait({task}, timeout=left)
            return task.result()
        finally:
            task.cancel()


class ProbeQueue:
    """What one rollout server does at once of what it is asked.

    The more responses are generated, the fewer requests of probes are under way. Traces wait for their turn, the last
    to come first: its prefix is the one most likely to be in the cache still.

    Args:
        max_requests: Most requests of probes under way.
    """

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._num_generating = 0
        self._rests_until = 0.0
        self._requests = Turns(self._request_limit)
        self._traces = Turns(lambda: MAX_TRACES, newest_first=True)
        self._progress = Progress()

    def _request_limit(self) -> int:
        if self._num_generating == 0:
            return self._max_requests
        if self._num_generating > FULL_LOAD and asyncio.get_running_loop().time() < self._rests_until:
            return 0
        return min(self._max_requests, max(1, FULL_LOAD // self._num_generating))

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """A response is generated."""
        self._num_generating += 1
        try:
            yield
        finally:
            self._num_generating -= 1
            self._progress.made()
            self._requests.admit()

    @contextlib.asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Waits until a request of a probe may be sent, and sends it."""
        loop = asyncio.get_running_loop()
        async with self._requests.turn():
            began = loop.time()
            yield
            rest = (loop.time() - began) * (self._num_generating / FULL_LOAD - 1)
            if rest > 0:
                self._rests_until = loop.time() + rest
                loop.call_at(self._rests_until, self._requests.admit)
        self._progress.made()

    async def read(self, read: Callable[[], Awaitable[_T]], timeout_s: float) -> tuple[_T, float]:
        """Reads a trace when it is its turn.

        Args:
            read: Reads it.
            timeout_s: Seconds in which the server must finish some request, of whatever kind.

        Returns:
            What was read, and how long it waited, seconds.

        Raises:
            ProbingTimeout: The server finished none.
        """
        loop = asyncio.get_running_loop()
        asked = loop.time()

        async def in_turn() -> tuple[_T, float]:
            async with self._traces.turn():
                waited = loop.time() - asked
                return await read(), waited

        return await self._progress.watch(in_turn(), timeout_s)
