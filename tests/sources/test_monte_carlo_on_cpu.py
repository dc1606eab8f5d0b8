"""The source of `vineppo`: from a response to its record, what it refuses, and what the trainer reports."""

import asyncio

import pytest
from omegaconf import OmegaConf

from rredcot_verl.sources.group import Group, Member
from rredcot_verl.sources.record import Record, Status
from rredcot_verl.sources.response import Response
from tests import PATIENCE_S
from tests.sources.toy_policy import PROMPT, RESPONSE_LENGTH, SAMPLING, ToyServer, ToyVerifier, reward, true_value
from tests.sources.world import Agent, World, source_of

RESPONSE = [1, 0, 1, 2, 3]
BOUNDARIES = [0, 2, 3, 5]


def make_agent(server, response_length=RESPONSE_LENGTH, block=None, **settings) -> Agent:
    block = {"monte_carlo": settings} | (block or {})
    return Agent("vineppo", block, generate=server.generate, response_length=response_length, max_length=100)


def make_response(**fields) -> Response:
    agent, verify = make_agent(ToyServer()), ToyVerifier()
    defaults = {"prompt_ids": list(PROMPT), "response_ids": RESPONSE, "log_probs": None, "references": None}
    defaults |= {"reward": reward(tuple(RESPONSE)), "answer": None, "sampling_params": SAMPLING, "verify": verify}
    return agent.response(**(defaults | fields))


def record(server, response=None, boundaries=BOUNDARIES, agent=None, **settings) -> Record:
    source = (agent or make_agent(server, **settings)).source
    plan = asyncio.run(asyncio.wait_for(source.plan(response or make_response(), Group(1), boundaries), PATIENCE_S))
    assert plan.rows == {}
    return plan.record


def test_a_record_holds_values_errors_and_cost(monkeypatch):
    server = ToyServer()
    found = record(server, num_rollouts=400)
    payload = found.payload
    assert found.status is Status.SCORED and found.segment_boundaries == BOUNDARIES
    assert len(payload["values"]) == len(payload["standard_errors"]) == 3
    for offset, value, error in zip(BOUNDARIES, payload["values"], payload["standard_errors"], strict=False):
        assert abs(value - true_value(tuple(RESPONSE[:offset]))) < 4 * error
    assert found.num_probes == len(server.requests) == 3 * 400
    assert found.num_probe_tokens == server.num_generated
    # The toy server has all but the last token of every prefix.
    assert found.num_recomputed_tokens == 3 * 400
    assert 0 < payload["num_cut_short"] < 3 * 400 and payload["num_weight_versions"] == 1
    rows = World(monkeypatch, [found, Record(Status.UNIFORM_GROUP), None]).rows()
    assert source_of("vineppo").values(rows) == [payload["values"], [], []]


def test_a_response_of_one_segment_needs_the_prompts_state_only():
    server = ToyServer()
    found = record(server, boundaries=[0, 5], num_rollouts=3)
    assert found.segment_boundaries == [0, 5] and len(found.payload["values"]) == 1
    assert {each["prompt_ids"] for each in server.requests} == {PROMPT}


@pytest.mark.parametrize("mask", [[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]])
def test_observations_between_the_policys_own_tokens_are_refused(mask):
    server = ToyServer()
    with pytest.raises(ValueError, match="observations between its own tokens"):
        record(server, make_response(response_mask=mask))
    assert not server.requests


def test_what_follows_the_last_own_token_is_no_observation():
    assert record(ToyServer(), make_response(response_mask=[1, 1, 1, 1, 0]), num_rollouts=1).status is Status.SCORED


@pytest.mark.parametrize("fields", [{"verify": None}, {"reward": None}])
def test_without_a_verifier_at_hand_it_is_refused(fields):
    with pytest.raises(ValueError, match="verl's reward manager"):
        record(ToyServer(), make_response(**fields))


def make_config(**rollout):
    defaults = {
        "full_determinism": False,
        "multi_turn": {"enable": False},
        "agent": {"default_agent_loop": "single_turn_agent"},
    }
    reward_model = {"reward_model": {"enable": False}}
    return OmegaConf.create({"actor_rollout_ref": {"rollout": defaults | rollout}, "reward": reward_model})


@pytest.mark.parametrize(
    "rollout, words",
    [
        ({"full_determinism": True}, ("full_determinism=True", "same seed")),
        ({"multi_turn": {"enable": True}}, ("multi_turn.enable=True", "adv_estimator=rredcot")),
        ({"agent": {"default_agent_loop": "tool_agent"}}, ("default_agent_loop=tool_agent",)),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_it_starts(rollout, words):
    found = source_of("vineppo").check(make_config(**rollout))
    assert found is not None and [word for word in words if word not in found] == []


def test_a_run_that_can_work_is_not():
    assert source_of("vineppo").check(make_config()) is None


@pytest.mark.parametrize("pool", [True, False])
def test_rewards_are_needed_while_it_rolls_out(pool):
    config = make_config()
    config.reward.reward_model = {"enable": True, "enable_resource_pool": pool}
    found = source_of("vineppo").check(config)
    assert (found is None) == pool
    assert pool or "needs the rewards of its continuations while they are rolled out" in found


def test_metrics_of_a_step():
    def sampled(errors, num_probes, num_cut_short, versions):
        payload = {"values": [0.5], "standard_errors": errors, "num_cut_short": num_cut_short}
        return Record(Status.SCORED, payload=payload | {"num_weight_versions": versions}, num_probes=num_probes)

    source, unsampled = source_of("vineppo"), Record(Status.NO_PROPOSAL)
    found = source.metrics([sampled([0.5, 0.0], 4, 1, 2), unsampled, sampled([0.1], 6, 0, 1)])
    assert found == pytest.approx(
        {
            "rredcot/monte_carlo_standard_error/mean": 0.2,
            "rredcot/monte_carlo_cut_short/mean": 0.1,
            "rredcot/monte_carlo_weight_versions/max": 2.0,
        }
    )
    assert source.metrics([unsampled]) == {}


@pytest.mark.parametrize(
    "others, block, status",
    [
        ((0.0,), {}, Status.SCORED),
        ((1.0,), {}, Status.UNIFORM_GROUP),
        ((1.0,), {"self_value": {"probe_uniform_groups": True}}, Status.SCORED),
    ],
)
def test_only_groups_with_an_advantage_are_sampled(others, block, status):
    server = ToyServer()
    agent = make_agent(server, response_length=128, block=block, num_rollouts=2)
    response = agent.response(prompt_ids=list(PROMPT), sampling_params=SAMPLING, verify=ToyVerifier())
    found = agent.record(response, [Member(other, None) for other in others]).record
    assert found.status is status
    assert len(server.requests) == found.num_probes == 2 * len(found.payload.get("values", []))
    assert bool(server.requests) == (status is Status.SCORED)
    assert (found.measuring_seconds > 0) == (status is Status.SCORED)
