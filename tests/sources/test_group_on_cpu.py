"""What the rollouts of a prompt wait for, in which order."""

import asyncio

import pytest

from rredcot_verl.sources.group import Group, Member
from tests import PATIENCE_S


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), timeout=PATIENCE_S))


def test_reference_proposals_go_on_at_two_different_rewards():
    async def scenario():
        group = Group(4)
        first = asyncio.create_task(group.decided(needs_all=False))
        second = asyncio.create_task(group.decided(needs_all=True))
        await group.arrive(0, Member(1.0, "4"))
        await group.arrive(2, Member(1.0, "4"))
        await settle()
        assert not first.done() and not group.mixed
        await group.arrive(1, Member(0.0, None))
        await settle()
        assert group.mixed and first.done() and not second.done()
        assert not group.complete and not group.has_no_advantage
        await group.arrive(3, Member(1.0, "4"))
        await second

    run(scenario)


def test_equal_rewards_wait_for_all():
    async def scenario():
        group = Group(2)
        await group.arrive(0, Member(0.0, None))
        waiting = asyncio.create_task(group.decided(needs_all=False))
        await settle()
        assert not waiting.done()
        await group.arrive(1, Member(0.0, None))
        await waiting
        assert group.complete and group.has_no_advantage

    run(scenario)


@pytest.mark.parametrize("needs_all", [False, True])
def test_failed_sessions_keep_nobody_waiting(needs_all):
    async def session(group, number, fails):
        try:
            await asyncio.sleep(0.001 * number)
            if fails:
                raise RuntimeError("the rollout failed")
            await group.arrive(number, Member(1.0, "4"))
            await group.decided(needs_all)
        finally:
            await group.leave(number)

    async def scenario():
        group = Group(4)
        sessions = [session(group, number, number in (1, 3)) for number in range(4)]
        results = await asyncio.gather(*sessions, return_exceptions=True)
        assert [isinstance(result, RuntimeError) for result in results] == [False, True, False, True]
        assert group.complete and sorted(group.members) == [0, 2]

    run(scenario)


def test_leaving_after_arriving_counts_once():
    async def scenario():
        group = Group(2)
        await group.arrive(0, Member(1.0, "4"))
        await group.leave(0)
        await group.leave(0)
        assert not group.complete
        await group.leave(1)
        await group.leave(1)
        assert group.complete

    run(scenario)


@pytest.mark.parametrize(
    "rewards, expected", [([0.0, 0.0], True), ([1.0, 1.0], True), ([0.0, 1.0], False), ([None, None], False)]
)
def test_has_no_advantage(rewards, expected):
    group = Group(len(rewards))
    group.members = {number: Member(reward, None) for number, reward in enumerate(rewards)}
    assert group.has_no_advantage is expected


@pytest.mark.parametrize("reward, expected", [(0.0, True), (1.0, False)])
def test_a_group_of_one_follows_verls_rule(reward, expected):
    """verl's GRPO takes mean 0 and deviation 1 there, so the reward itself is the advantage."""

    async def scenario():
        group = Group(1)
        await group.arrive(0, Member(reward, "4"))
        await group.decided(needs_all=True)
        assert group.has_no_advantage is expected

    run(scenario)


@pytest.mark.parametrize("reward, expected", [(0.0, True), (1.0, False), (None, False)])
def test_the_only_survivor_of_a_group_follows_verls_rule_too(reward, expected):
    async def scenario():
        group = Group(4)
        await group.arrive(0, Member(reward, "4"))
        for number in (1, 2, 3):
            await group.leave(number)
        await group.decided(needs_all=True)
        assert group.has_no_advantage is expected

    run(scenario)
