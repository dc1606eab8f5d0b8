"""What waits for what in a rollout server that reads probes, and a step on a simulated engine."""

import asyncio
import contextlib

import pytest

from rredcot_verl.servers.probe_queue import FULL_LOAD, ProbeQueue, ProbingTimeout, Turns
from tests.servers.simulated_engine import Engine, Server, Size, Unbounded, VirtualLoop, lengths_of, simulate


def run(coroutine):
    """In a loop whose time goes by when all wait for it."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(asyncio.wait_for(coroutine, 10**5))
    finally:
        loop.close()


@pytest.mark.parametrize("newest_first, order", [(False, [0, 1, 2, 3, 4]), (True, [0, 1, 4, 3, 2])])
def test_turns_are_taken_in_order_and_never_more_than_the_bound(newest_first, order):
    taken, under_way = [], []

    async def take(turns, number):
        async with turns.turn():
            taken.append(number)
            under_way.append(number)
            assert len(under_way) <= 2
            await asyncio.sleep(1 + number / 10)
            under_way.remove(number)

    async def all_of_them():
        turns = Turns(lambda: 2, newest_first)
        await asyncio.gather(*[take(turns, number) for number in range(5)])

    run(all_of_them())
    assert taken == order


def test_what_is_cancelled_gives_its_turn_back_once():
    async def scenario():
        turns = Turns(lambda: 1)

        async def take():
            async with turns.turn():
                await asyncio.sleep(10)

        has_it, waits, last = (asyncio.create_task(take()) for _ in range(3))
        await asyncio.sleep(0.1)
        waits.cancel()
        await asyncio.sleep(0.1)
        has_it.cancel()
        # Given its turn and cancelled before it knows.
        await asyncio.sleep(0)
        last.cancel()
        await asyncio.gather(has_it, waits, last, return_exceptions=True)
        await asyncio.wait_for(take(), 11)
        return asyncio.get_running_loop().time()

    assert run(scenario()) == pytest.approx(10.2)


@pytest.mark.parametrize("generating, most", [(0, 30), (1, 30), (4, 8), (16, 2), (17, 1), (32, 1), (1000, 1)])
def test_the_more_is_generated_the_fewer_probes(generating, most):
    under_way = []

    async def scenario():
        queue = ProbeQueue(30)

        async def one():
            async with queue.request():
                under_way.append(under_way[-1] + 1 if under_way else 1)
                await asyncio.sleep(1)
                under_way.append(under_way[-1] - 1)

        with contextlib.ExitStack() as responses:
            for _ in range(generating):
                responses.enter_context(queue.generating())
            await asyncio.gather(*[one() for _ in range(40)])

    run(scenario())
    assert max(under_way) == most and FULL_LOAD == 32


@pytest.mark.parametrize("generating, seconds", [(32, 4), (64, 7), (128, 13)])
def test_beyond_full_load_probes_rest(generating, seconds):
    """One half of the time beside 64, a quarter beside 128; nobody waits for the rest after the last."""

    async def scenario():
        queue = ProbeQueue(30)

        async def one():
            async with queue.request():
                await asyncio.sleep(1)

        with contextlib.ExitStack() as responses:
            for _ in range(generating):
                responses.enter_context(queue.generating())
            await asyncio.gather(*[one() for _ in range(4)])
            return asyncio.get_running_loop().time()

    assert run(scenario()) == pytest.approx(seconds)


def test_a_rest_ends_with_the_load():
    async def scenario():
        queue = ProbeQueue(30)

        async def one():
            async with queue.request():
                await asyncio.sleep(1)

        with contextlib.ExitStack() as responses:
            for _ in range(64):
                responses.enter_context(queue.generating())
            await one()
            second = asyncio.ensure_future(one())
            await asyncio.sleep(0.25)
            assert not second.done()
        await second
        return asyncio.get_running_loop().time()

    assert run(scenario()) == pytest.approx(2.25)


def test_the_end_of_a_response_gives_way_to_probes():
    async def scenario():
        queue, begun = ProbeQueue(30), []

        async def one():
            async with queue.request():
                begun.append(asyncio.get_running_loop().time())
                await asyncio.sleep(100)

        with queue.generating(), queue.generating():
            probes = asyncio.gather(*[one() for _ in range(40)])
            with queue.generating(), queue.generating():
                await asyncio.sleep(1)
        await probes
        return begun

    begun = run(scenario())
    assert [begun.count(time) for time in (0.0, 1.0, 100.0, 101.0)] == [8, 22, 8, 2]


def test_a_server_that_finishes_something_is_slow_and_one_that_does_not_stands_still():
    async def scenario(num_others):
        queue = ProbeQueue(1)

        async def other():
            for _ in range(num_others):
                with queue.generating():
                    await asyncio.sleep(8)

        async def read():
            await asyncio.sleep(80)
            return "numbers"

        others = asyncio.create_task(other())
        try:
            return await queue.read(read, timeout_s=10)
        finally:
            await others

    assert run(scenario(10)) == ("numbers", 0.0)
    with pytest.raises(ProbingTimeout, match="algorithm.rredcot.self_value.timeout_s=10"):
        run(scenario(5))


def test_an_engine_that_stands_still_fails_the_traces_that_wait_and_takes_later_ones():
    async def scenario():
        engine = Engine(Size())
        server = Server(engine, ProbeQueue(8))
        probe = {"position": 20, "token_ids": [10**6] * 9, "scored_from": 8, "closing_token_ids": [7]}
        params = {"read_probes": [probe], "timeout_s": 600.0}
        reads = [server.generate([trace] * 40, dict(params), "") for trace in range(20)]
        outcomes = await asyncio.gather(*reads, return_exceptions=True)
        stopped = asyncio.get_running_loop().time()
        engine.waiting.clear()
        stepping = asyncio.create_task(engine.run())
        again = await server.generate([0] * 40, dict(params), "")
        stepping.cancel()
        return outcomes, stopped, again

    outcomes, stopped, again = run(scenario())
    assert {type(outcome) for outcome in outcomes} == {ProbingTimeout} and stopped == 600.0
    assert again.extra_fields["probe_log_probs"][0]["closing_log_prob"] == -1.0


def test_a_step_under_memory_pressure():
    """1024 responses, eight workers, a cache of an eighth of what they write."""
    lengths = lengths_of(1024, median=120, longest=1200)
    size = Size(num_blocks=sum(lengths) // 8 // 16)
    alone = simulate(lengths, size, None)
    # Far less than a trace waits: what counts is that something is finished.
    ours = simulate(lengths, size, lambda: ProbeQueue(64), timeout_s=20.0, num_segments=4)
    assert len(ours.waits) == 1024 and ours.longest > 20.0
    unbounded = simulate(lengths, size, lambda: Unbounded(64), timeout_s=10**6, num_segments=4)
    # While 64 responses or more were left, of which some were put back for want of room.
    assert alone.num_preempted > 0 and ours.loaded < 1.05 * alone.loaded
    # A prefix that was lost is computed once, and not for request after request.
    num_tokens = sum(length + 100 for length in lengths)
    assert ours.num_recomputed_tokens < num_tokens < unbounded.num_recomputed_tokens / 5
    assert ours.generated < unbounded.generated and ours.read < unbounded.read
