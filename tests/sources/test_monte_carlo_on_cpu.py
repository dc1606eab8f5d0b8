"""The source of `vineppo`: from a response to its record, what it refuses, and what the trainer reports."""

import asyncio
import dataclasses
import logging

import pytest
from omegaconf import OmegaConf

from rredcot_verl.agent.scorer import ResponseScorer
from rredcot_verl.config.blocks import MonteCarloConfig
from rredcot_verl.config.schema import parse
from rredcot_verl.sources.group import Group, Member
from rredcot_verl.sources.monte_carlo import MonteCarloSource, check_monte_carlo, monte_carlo_metrics
from rredcot_verl.sources.record import NO_PROPOSAL, SCORED, UNIFORM_GROUP, CreditRecord
from rredcot_verl.sources.response import Response, as_member
from tests.probes.tiny_tokenizers import byte_level, encode
from tests.sources.toy_policy import PROMPT, RESPONSE_LENGTH, SAMPLING, ToyServer, ToyVerifier, reward, true_value

RESPONSE = [1, 0, 1, 2, 3]
BOUNDARIES = [0, 2, 3, 5]


def make_response(**fields) -> Response:
    defaults = {
        "prompt_ids": list(PROMPT),
        "response_ids": RESPONSE,
        "response_mask": [1] * len(RESPONSE),
        "log_probs": None,
        "reward": reward(tuple(RESPONSE)),
        "references": None,
        "request_id": "request-1",
        "answer": None,
        "sampling_params": SAMPLING,
        "verify": ToyVerifier(),
    }
    return Response(**(defaults | fields))


def record(server, response=None, boundaries=BOUNDARIES, source=None, **settings) -> CreditRecord:
    source = source or MonteCarloSource(MonteCarloConfig(**settings), server.generate, RESPONSE_LENGTH, 100)
    return asyncio.run(asyncio.wait_for(source.record(response or make_response(), Group(1), boundaries), 30))


def test_a_record_holds_values_errors_and_cost():
    server = ToyServer()
    found = record(server, num_rollouts=400)
    assert found.status == SCORED and found.segment_boundaries == BOUNDARIES
    assert len(found.self_values) == len(found.standard_errors) == 3
    for offset, value, error in zip(BOUNDARIES, found.self_values, found.standard_errors, strict=False):
        assert abs(value - true_value(tuple(RESPONSE[:offset]))) < 4 * error
    assert found.num_probes == len(server.requests) == 3 * 400
    assert found.num_probe_tokens == server.num_generated
    # The toy server has all but the last token of every prefix.
    assert found.num_recomputed_tokens == 3 * 400
    assert 0 < found.num_cut_short < 3 * 400 and found.num_weight_versions == 1
    assert CreditRecord(**found.to_dict()) == found


def test_a_response_of_one_segment_needs_the_prompts_state_only():
    server = ToyServer()
    found = record(server, boundaries=[0, 5], num_rollouts=3)
    assert found.segment_boundaries == [0, 5] and len(found.self_values) == 1
    assert {each["prompt_ids"] for each in server.requests} == {PROMPT}


def test_a_boundary_left_out_is_counted_and_reported_once(caplog):
    server = ToyServer()
    source = MonteCarloSource(
        MonteCarloConfig(num_rollouts=2, max_total_tokens=10), server.generate, RESPONSE_LENGTH, 100
    )
    with caplog.at_level(logging.WARNING):
        found = [record(server, source=source) for _ in range(3)]
    assert all(each.num_dropped_boundaries > 0 and each.segment_boundaries[0] == 0 for each in found)
    (message,) = [each.getMessage() for each in caplog.records]
    assert "max_total_tokens=10" in message and "of the 3 boundaries" in message


@pytest.mark.parametrize("mask", [[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]])
def test_observations_between_the_policys_own_tokens_are_refused(mask):
    server = ToyServer()
    with pytest.raises(ValueError, match="observations between its own tokens"):
        record(server, make_response(response_mask=mask))
    assert not server.requests


def test_what_follows_the_last_own_token_is_no_observation():
    assert record(ToyServer(), make_response(response_mask=[1, 1, 1, 1, 0]), num_rollouts=1).status == SCORED


@pytest.mark.parametrize("fields", [{"verify": None}, {"reward": None}])
def test_without_a_verifier_at_hand_it_is_refused(fields):
    with pytest.raises(ValueError, match="verl's reward manager"):
        record(ToyServer(), make_response(**fields))


def make_config(**rollout):
    defaults = {
        "response_length": 100,
        "full_determinism": False,
        "multi_turn": {"enable": False},
        "agent": {"default_agent_loop": "single_turn_agent"},
    }
    return OmegaConf.create({"actor_rollout_ref": {"rollout": defaults | rollout}})


@pytest.mark.parametrize(
    "rollout, block, words",
    [
        ({"full_determinism": True}, {}, ("full_determinism=True", "same seed")),
        ({"multi_turn": {"enable": True}}, {}, ("multi_turn.enable=True", "adv_estimator=rredcot")),
        ({"agent": {"default_agent_loop": "tool_agent"}}, {}, ("default_agent_loop=tool_agent",)),
        ({}, {"max_total_tokens": 899}, ("max_total_tokens=899", "num_rollouts=9", "900")),
        ({}, {"max_total_tokens": 89, "max_tokens": 10}, ("max_total_tokens=89", "up to 10 tokens", "need 90")),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_it_starts(rollout, block, words):
    with pytest.raises(ValueError) as error:
        check_monte_carlo(make_config(**rollout), parse({"monte_carlo": block}))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("block", [{}, {"max_total_tokens": 900}, {"max_total_tokens": 90, "max_tokens": 10}])
def test_a_run_that_can_work_is_not(block):
    check_monte_carlo(make_config(), parse({"monte_carlo": block}))


def test_metrics_of_a_step():
    sampled = CreditRecord(
        SCORED,
        segment_boundaries=[0, 1, 2],
        self_values=[0.5, 0.0],
        standard_errors=[0.5, 0.0],
        num_probes=4,
        num_cut_short=1,
        num_weight_versions=2,
    )
    other = dataclasses.replace(sampled, standard_errors=[0.1], num_probes=6, num_cut_short=0, num_weight_versions=1)
    assert monte_carlo_metrics([sampled, CreditRecord(NO_PROPOSAL), other]) == pytest.approx(
        {
            "rredcot/monte_carlo_standard_error/mean": 0.2,
            "rredcot/monte_carlo_cut_short/mean": 0.1,
            "rredcot/monte_carlo_weight_versions/max": 2.0,
        }
    )
    assert monte_carlo_metrics([CreditRecord(NO_PROPOSAL)]) == {}


@pytest.mark.parametrize(
    "others, block, status",
    [
        ((0.0,), {}, SCORED),
        ((1.0,), {}, UNIFORM_GROUP),
        ((1.0,), {"self_value": {"probe_uniform_groups": True}}, SCORED),
        # Two different rewards are enough: the third rollout need not be there yet.
        ((0.0, None), {}, SCORED),
    ],
)
def test_only_groups_with_an_advantage_are_sampled(others, block, status):
    server, tokenizer = ToyServer(), byte_level()
    rollout = {"name": "any", "temperature": 1.0, "response_length": 128, "max_model_len": None}
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "algorithm": {"adv_estimator": "vineppo"}})
    settings = parse({"segmentation": {"min_tokens": 2}, "monte_carlo": {"num_rollouts": 2}} | block)
    scorer = ResponseScorer(config, settings, tokenizer, server.generate, 1000)
    ids = encode(tokenizer, "First, 12 + 3 = 15.\n\nSo the answer is \\boxed{15}.\n")
    response = make_response(response_ids=ids, response_mask=[1] * len(ids), reward=1.0)

    async def credit():
        group = Group(1 + len(others))
        for number, other in enumerate(others):
            if other is not None:
                await group.arrive(number, Member(other, None))
        await group.arrive(len(others), as_member(response))
        return await scorer.credit(response, group)

    found = asyncio.run(asyncio.wait_for(credit(), 30))
    assert found.status == status
    assert len(server.requests) == found.num_probes == 2 * len(found.self_values)
    assert bool(server.requests) == (status == SCORED)
