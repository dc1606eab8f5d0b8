"""A training step's rollouts on a vLLM engine of arithmetic, in a loop whose clock is the engine's.

What vLLM's scheduler does with rows, blocks and the prefix cache is followed; what a step takes is a formula. What
waits for what is decided by our own server and client.
"""

import asyncio
import functools
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from rredcot_verl.probes.probe import Probe
from rredcot_verl.servers import vllm_tree
from rredcot_verl.servers.client import ProbeReader
from rredcot_verl.servers.probe_queue import ProbeQueue, Turns
from rredcot_verl.servers.probe_requests import parse_probes
from rredcot_verl.servers.probing_server import ProbingServerMixin
from rredcot_verl.servers.vllm_requests import read_probes

BLOCK = 16
LOADED = 64
FORCED, CLOSING = 10**6, (7, 8)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time goes by when all wait for it, and takes none."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        select = self._selector.select  # type: ignore[attr-defined]

        def jump(timeout: float | None = None) -> Any:
            assert timeout is not None, "nothing will ever happen"
            self._now += timeout
            return select(0)

        self._selector.select = jump  # type: ignore[attr-defined]

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._now


@dataclass(frozen=True)
class Size:
    """An engine and what its steps cost; about an 8B model on one large GPU.

    Attributes:
        max_num_seqs: Most rows at once.
        max_tokens: Most tokens a step.
        num_blocks: Of the cache.
        step: Seconds of a step, whatever it holds.
        row: Seconds for each row besides.
        prompt_token: Seconds for each token of a prompt besides.
    """

    max_num_seqs: int = 256
    max_tokens: int = 8192
    num_blocks: int = 20_000
    step: float = 0.010
    row: float = 60e-6
    prompt_token: float = 35e-6


@dataclass(eq=False)
class Block:
    """A block of the cache; a free one still holds what it is named for."""

    name: tuple[int, int] | None = None
    users: int = 0


@dataclass(eq=False)
class Row:
    """A request of `shared` tokens of a trace and `own` others, which goes on with the trace if it has no others."""

    trace: int
    shared: int
    own: int
    max_tokens: int
    done: asyncio.Future
    num_generated: int = 0
    num_computed: int = 0
    num_cached: int | None = None
    blocks: list[Block] = field(default_factory=list)
    num_named: int = 0

    @property
    def num_tokens(self) -> int:
        return self.shared + self.own + self.num_generated

    @property
    def num_of_trace(self) -> int:
        return self.shared if self.own else self.num_tokens


class Engine:
    """vLLM's scheduler: `generate` and, in a task of its own, `run`.

    Args:
        size: What it has.
        probes_first: By priority, probes before responses; else first come, first served.
    """

    def __init__(self, size: Size, probes_first: bool = False) -> None:
        self.size, self.probes_first = size, probes_first
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.free: OrderedDict[Block, None] = OrderedDict((Block(), None) for _ in range(size.num_blocks))
        self.named: dict[tuple[int, int], Block] = {}
        self.num_preempted = 0
        self._work = asyncio.Event()

    async def generate(self, trace: int, shared: int, own: int, max_tokens: int) -> Row:
        """The finished request."""
        row = Row(trace, shared, own, max_tokens, asyncio.get_running_loop().create_future())
        if self.probes_first and own:
            # Probes stand before responses, in their own order.
            self.waiting.insert(sum(each.own > 0 for each in self.waiting), row)
        else:
            self.waiting.append(row)
        self._work.set()
        await row.done
        return row

    async def run(self) -> None:
        """Steps, for ever."""
        while True:
            self._work.clear()
            if not self.waiting and not self.running:
                await self._work.wait()
            rows, num_prompt_tokens = self._schedule()
            size = self.size
            await asyncio.sleep(size.step + size.row * len(rows) + size.prompt_token * num_prompt_tokens)
            for row in rows:
                self._advance(row)

    def _schedule(self) -> tuple[list[Row], int]:
        """Rows of the next step, and tokens of prompts among theirs."""
        budget, rows, is_full = self.size.max_tokens, [], False
        place = 0
        while place < len(self.running) and budget > 0:
            row = self.running[place]
            num_new = min(row.num_tokens - row.num_computed, budget)
            while not self._reserve(row, row.num_computed + num_new):
                is_full = True
                self._preempt(self.running.pop())
                if row not in self.running[place:]:
                    break
            else:
                row.num_computed += num_new
                budget -= num_new
                rows.append(row)
                place += 1
        while not is_full and self.waiting and len(self.running) < self.size.max_num_seqs and budget > 0:
            row = self.waiting[0]
            found = self._find(row)
            num_new = min(row.num_tokens - BLOCK * len(found), budget)
            num_free = len(self.free) - sum(block.users == 0 for block in found)
            if -(-(BLOCK * len(found) + num_new) // BLOCK) - len(found) > num_free:
                break
            self.waiting.popleft()
            self._use(row, found)
            self._reserve(row, BLOCK * len(found) + num_new)
            row.num_computed = BLOCK * len(found) + num_new
            row.num_cached = BLOCK * len(found) if row.num_cached is None else row.num_cached
            budget -= num_new
            self.running.append(row)
            rows.append(row)
        return rows, self.size.max_tokens - budget - len(rows)

    def _find(self, row: Row) -> list[Block]:
        """Blocks that hold its trace, short of its last token."""
        found = []
        for index in range(min(row.num_of_trace, row.num_tokens - 1) // BLOCK):
            block = self.named.get((row.trace, index))
            if block is None:
                break
            found.append(block)
        return found

    def _use(self, row: Row, found: list[Block]) -> None:
        for block in found:
            if block.users == 0:
                del self.free[block]
            block.users += 1
        row.blocks, row.num_named = list(found), len(found)

    def _reserve(self, row: Row, num_tokens: int) -> bool:
        """Blocks for so many tokens, if there are."""
        needed = -(-num_tokens // BLOCK) - len(row.blocks)
        if needed > len(self.free):
            return False
        for _ in range(needed):
            block, _ = self.free.popitem(last=False)
            if block.name is not None:
                del self.named[block.name]
            block.name, block.users = None, 1
            row.blocks.append(block)
        return True

    def _leave(self, row: Row) -> None:
        # The end of a sequence is forgotten first.
        for block in reversed(row.blocks):
            block.users -= 1
            if block.users == 0:
                self.free[block] = None
        row.blocks, row.num_named = [], 0

    def _preempt(self, row: Row) -> None:
        self._leave(row)
        row.num_computed = 0
        self.waiting.insert(sum(each.own > 0 for each in self.waiting) if self.probes_first else 0, row)
        self.num_preempted += 1

    def _advance(self, row: Row) -> None:
        for index in range(row.num_named, min(row.num_computed, row.num_of_trace) // BLOCK):
            name = row.trace, index
            if name not in self.named:
                self.named[name], row.blocks[index].name = row.blocks[index], name
            row.num_named = index + 1
        if row.num_computed < row.num_tokens:
            return
        row.num_generated += 1
        if row.num_generated == row.max_tokens:
            self.running.remove(row)
            self._leave(row)
            row.done.set_result(None)


class Generation:
    """Where verl's server stands: responses of given lengths."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.global_steps = engine, 0

    async def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **_: Any) -> Any:
        await self.engine.generate(prompt_ids[0], len(prompt_ids), 0, sampling_params["max_tokens"])
        return SimpleNamespace()


class Server(ProbingServerMixin, Generation):
    """Our server on the engine: a trace's tokens are all its number, a probe's own are `FORCED`."""

    def __init__(self, engine: Engine, probe_queue: ProbeQueue) -> None:
        super().__init__(engine)
        self.probe_queue, self._mass = probe_queue, vllm_tree.ClosingMass()

    async def _read_probes(self, trace_ids: list[int], sampling_params: dict[str, Any], request_id: str) -> Any:
        probes, temperature = parse_probes(sampling_params, len(trace_ids))
        return await read_probes(
            functools.partial(vllm_tree.read_places, mass=self._mass), self._send, trace_ids, probes, temperature, BLOCK
        )

    async def _send(self, prompt_ids: list[int], fields: dict[str, Any]) -> Any:
        shared = prompt_ids.index(FORCED)
        async with self.probe_queue.request():
            row = await self.engine.generate(prompt_ids[0], shared, len(prompt_ids) - shared, 1)
        logprobs = [dict.fromkeys(fields["logprob_token_ids"], SimpleNamespace(logprob=-1.0))]
        completion = SimpleNamespace(finish_reason="length", token_ids=[0], logprobs=logprobs)
        return SimpleNamespace(outputs=[completion], num_cached_tokens=row.num_cached)


class Unbounded(ProbeQueue):
    """No rule but a number of requests: what is measured against."""

    def __init__(self, max_requests: int) -> None:
        super().__init__(max_requests)
        self._traces = Turns(lambda: sys.maxsize)

    def _request_limit(self) -> int:
        return self._max_requests


@dataclass
class Outcome:
    """A simulated step.

    Attributes:
        loaded: Until when at least `LOADED` responses were generated, seconds.
        generated: When the last response was there, seconds.
        read: When the last probe was read, seconds.
        num_preempted: Rows that the engine put back.
        num_traces: Responses.
        num_recomputed_traces: Those of whose prefix something was computed again.
        num_recomputed_tokens: Tokens that were.
        waits: Of each trace, seconds.
        longest: From a response to its last probe, seconds.
    """

    loaded: float = 0.0
    generated: float = 0.0
    read: float = 0.0
    num_preempted: int = 0
    num_traces: int = 0
    num_recomputed_traces: int = 0
    num_recomputed_tokens: int = 0
    waits: list[float] = field(default_factory=list)
    longest: float = 0.0


def probes_of(length: int, num_prompt: int, num_segments: int) -> list[Probe]:
    """Two answers at each boundary that share an opening: three requests."""
    forced = (FORCED, FORCED, FORCED, FORCED, FORCED, FORCED, FORCED, FORCED)
    return [
        Probe(k, answer, num_prompt + length * k // num_segments, (*forced, FORCED + answer), 8, 8, CLOSING)
        for k in range(num_segments)
        for answer in range(2)
    ]


def lengths_of(number: int, median: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths of responses, as long reasoning has them: log-normal, cut at the longest."""
    chosen = random.Random(seed)
    return [min(longest, max(16, int(median * chosen.lognormvariate(0.0, 0.8)))) for _ in range(number)]


def simulate(
    lengths: list[int],
    size: Size,
    make_queue: Callable[[], ProbeQueue] | None,
    num_workers: int = 8,
    max_concurrency: int = 64,
    timeout_s: float = 600.0,
    num_segments: int = 10,
    num_prompt: int = 100,
    probes_first: bool = False,
) -> Outcome:
    """Generates all responses and reads the probes of each as soon as it is there; without a queue, of none."""
    outcome = Outcome(num_traces=len(lengths))

    async def run() -> None:
        engine, loop = Engine(size, probes_first), asyncio.get_running_loop()
        server = Server(engine, make_queue() if make_queue else ProbeQueue(1))

        async def generate(request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Any:
            return await server.generate(prompt_ids, sampling_params, request_id)

        readers = [ProbeReader(generate, 1.0, max_concurrency, timeout_s) for _ in range(num_workers)]

        async def roll_out(trace: int, length: int) -> None:
            await server.generate([trace] * num_prompt, {"max_tokens": length}, f"{trace}")
            outcome.generated = finished = loop.time()
            left.remove(trace)
            if len(left) >= LOADED:
                outcome.loaded = finished
            if make_queue is None:
                return
            probes = probes_of(length, num_prompt, num_segments)
            reading = await readers[trace % num_workers].read(f"{trace}", [trace] * (num_prompt + length), probes)
            recomputed = sum(score.num_recomputed_tokens for score in reading.scores)
            outcome.num_recomputed_traces += recomputed > 0
            outcome.num_recomputed_tokens += recomputed
            outcome.waits.append(reading.waiting_seconds)
            outcome.longest = max(outcome.longest, loop.time() - finished)

        left = set(range(len(lengths)))
        stepping = asyncio.create_task(engine.run())
        await asyncio.gather(*[roll_out(trace, length) for trace, length in enumerate(lengths)])
        stepping.cancel()
        outcome.read, outcome.num_preempted = loop.time(), engine.num_preempted

    loop = VirtualLoop()
    try:
        loop.run_until_complete(run())
    finally:
        loop.close()
    return outcome
