"""From a finished response to its record: when it is segmented at all, where it is cut, and what is noted beside."""

import asyncio
import dataclasses
import itertools
import time

import pytest

from rredcot_verl.passes.probe_codec import decode
from rredcot_verl.sources.group import Group, Member
from rredcot_verl.sources.record import Status
from tests import PATIENCE_S
from tests.passes.table_model import FakeServer, TableModel
from tests.probes.tiny_tokenizers import byte_level, encode, token
from tests.sources.world import ONE_WRONG, PROMPT, Agent

ALL_RIGHT = (Member(1.0, "15"),)
CRITIC = {"credit": {"form": "critic"}, "self_value": {"calibration": "logistic"}}


def test_segments_cover_the_response_and_the_answer_is_one():
    agent = Agent()
    response = agent.response()
    cuts = agent.recorder.segment(response)
    assert cuts == agent.record(response).record.segment_boundaries == sorted(set(cuts))
    assert cuts[0] == 0 and cuts[-1] == len(response.response_ids)
    texts = [agent.tokenizer.decode(response.response_ids[a:b]) for a, b in itertools.pairwise(cuts)]
    assert len(texts) == 4 and texts[-2:] == ["So the answer is \\boxed{", "15}.\n"]


def test_the_prompt_may_open_the_thinking_and_the_budget_sets_the_spacing():
    agent = Agent()
    response = agent.response("so \\boxed{3}, but so 3.\n</think> so the answer is \\boxed{15}.")
    thought = dataclasses.replace(response, prompt_ids=[*response.prompt_ids, token(agent.tokenizer, "<think>")])
    assert len(agent.recorder.segment(thought)) == len(agent.recorder.segment(response))
    openings = [agent.tokenizer.decode(response.response_ids[:cut]) for cut in agent.recorder.segment(thought)]
    assert openings[-2].endswith("so the answer is \\boxed{")
    short = Agent(response_length=10**6).recorder
    assert len(short.segment(response)) == 4


def test_an_empty_response_and_one_of_observations_only():
    agent = Agent()
    assert agent.record(agent.response("")).record.status is Status.EMPTY
    response = agent.response()
    holes = dataclasses.replace(response, response_mask=[0] * len(response.response_ids))
    assert agent.record(holes).record.status is Status.EMPTY


def test_how_a_response_ends_does_not_enter_the_probes_along_it():
    """Neither the format of its answer nor the token that ends it; those of earlier responses do."""
    found = []
    for ending in ("So \\boxed{15}.\n", "So\n#### 15 ", "And so on"):
        agent = Agent(block={"self_value": {"engine": "actor"}})
        plan = agent.record(agent.response("Now 3 and 12 make 15.\n\n" + ending))
        found.append([probe for probe in decode(plan.rows["rredcot_probes"]) if probe.position == len(PROMPT)])
    assert found[0] == found[1] == found[2] != []
    for _ in range(3):
        agent.record(agent.response("#### 15"))
    plan = agent.record(agent.response("Now 3 and 12 make 15.\n\nSo \\boxed{15}.\n"))
    (probe, *_) = decode(plan.rows["rredcot_probes"])
    assert "####" in agent.tokenizer.decode(probe.token_ids)


def test_uniform_groups_are_probed_only_if_asked():
    server = FakeServer(TableModel(len(byte_level())))
    plan = Agent(generate=server.generate).record(others=ALL_RIGHT)
    assert plan.record.status is Status.UNIFORM_GROUP and server.requests == []
    assert plan.record.segment_boundaries == [] and plan.rows == {}
    for block in ({"self_value": {"probe_uniform_groups": True}}, CRITIC):
        assert Agent(block=block).record(others=ALL_RIGHT).record.status is Status.SCORED


@pytest.mark.parametrize("proposals, waits", [("reference", False), ("union", True)])
def test_it_waits_for_as_much_of_the_group_as_its_source_needs(proposals, waits):
    """Two different rewards are enough where no answer of the group is used."""
    agent = Agent(block={"self_value": {"proposals": proposals}})
    response = agent.response()

    async def run():
        group = Group(3)
        await group.arrive(0, response.as_member())
        await group.arrive(1, ONE_WRONG[0])
        recorded = asyncio.ensure_future(agent.recorder.record(response, group))
        await asyncio.sleep(0.2)
        waited = not recorded.done()
        await group.arrive(2, Member(1.0, "15"))
        return waited, (await recorded).record

    waited, record = asyncio.run(asyncio.wait_for(run(), PATIENCE_S))
    assert waited == waits and record.status is Status.SCORED


def test_where_every_group_is_measured_it_waits_for_none():
    agent = Agent(block=CRITIC)
    response = agent.response()

    async def run():
        group = Group(3)
        await group.arrive(0, response.as_member())
        return await agent.recorder.record(response, group)

    assert asyncio.run(asyncio.wait_for(run(), PATIENCE_S)).record.status is Status.SCORED


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
def test_a_rollout_log_probability_that_is_no_number_does_no_harm(bad):
    agent = Agent()
    response = agent.response()
    log_probs = list(response.log_probs)
    log_probs[5] = bad
    assert agent.record(dataclasses.replace(response, log_probs=log_probs)).record.status is Status.SCORED
    assert agent.record(dataclasses.replace(response, log_probs=None)).record.status is Status.SCORED


def test_truncated_means_no_answer_and_a_full_budget():
    agent = Agent()
    full = agent.response(response_ids=(encode(byte_level(), "so 3 but 4 ") * 64)[:128])
    assert full.answer is None and agent.record(full).record.truncated
    short = dataclasses.replace(full, response_ids=full.response_ids[:127], response_mask=[1] * 127, log_probs=None)
    assert not agent.record(short).record.truncated
    solved = dataclasses.replace(full, answer=agent.tools.elicitation.read(encode(byte_level(), "\\boxed{1}")))
    assert not agent.record(solved).record.truncated


@pytest.mark.parametrize("engine, measured", [("rollout", True), ("actor", False)])
def test_times(engine, measured):
    """What the training engine measures takes no time here."""
    before = time.time()
    record = Agent(block={"self_value": {"engine": engine}}).record().record
    assert before <= record.ready_time <= record.recorded_time <= time.time()
    assert (record.measuring_seconds > 0) == measured
    assert record.measuring_seconds <= record.recorded_time - record.ready_time
