"""Monte Carlo values on a policy that can be enumerated: right, shared, and loud when something fails."""

import asyncio
import itertools
import math
import statistics
from types import SimpleNamespace

import pytest

from rredcot_verl.config.blocks import MonteCarloConfig
from rredcot_verl.cpu.language_model import RolloutModel
from rredcot_verl.cpu.rollout_server import RolloutServer, ServerLimits
from rredcot_verl.sources.continuations import ContinuationSampler, State
from rredcot_verl.sources.group import Group
from rredcot_verl.sources.sampled_values import Estimate, Job, StateSampler
from tests import PATIENCE_S
from tests.sources.toy_policy import (
    EOS,
    PROMPT,
    RESPONSE_LENGTH,
    SAMPLING,
    ToyServer,
    ToyVerifier,
    reward,
    true_value,
)
from tests.tiny_model import build_tiny_model

RESPONSE = (1, 0, 1, 2, EOS)
BOUNDARIES = [0, 1, 2, 3, 5]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, timeout=PATIENCE_S))


def make_job(group: Group | None = None, verify=None, response=RESPONSE, request_id: str = "request-1") -> Job:
    return Job(
        prompt_ids=list(PROMPT),
        response_ids=list(response),
        reward=reward(response),
        request_id=request_id,
        sampling_params=SAMPLING,
        group=group or Group(1),
        verify=verify or ToyVerifier(),
    )


def estimate(server, boundaries=BOUNDARIES, job=None, max_length: int = 100, **settings) -> Estimate:
    async def values():
        sampler = StateSampler(MonteCarloConfig(**settings), server.generate, RESPONSE_LENGTH, max_length)
        return await sampler.values(job or make_job(), boundaries)

    return run(values())


def test_values_converge_to_the_enumerated_ones():
    found = estimate(ToyServer(), num_rollouts=1024)
    exact = [true_value(RESPONSE[:offset]) for offset in BOUNDARIES[:-1]]
    assert max(exact) - min(exact) > 0.1
    for value, error, expected in zip(found.values, found.standard_errors, exact, strict=True):
        assert 0 < error < 0.02
        assert abs(value - expected) < 4 * error


def test_few_rollouts_are_unbiased_and_the_error_falls_with_the_square_root():
    """Mean and spread of many estimates by 4, and by 16 rollouts."""
    exact, spreads = true_value(RESPONSE[:1]), []
    for num_rollouts in (4, 16):
        found = [estimate(ToyServer(seed), [0, 1, 5], num_rollouts=num_rollouts) for seed in range(200)]
        values = [each.values[1] for each in found]
        spread = statistics.stdev(values)
        assert abs(statistics.fmean(values) - exact) < 4 * spread / math.sqrt(200)
        # Its square is unbiased for the variance of the value.
        reported = math.sqrt(statistics.fmean(each.standard_errors[1] ** 2 for each in found))
        assert reported == pytest.approx(spread, rel=0.15)
        spreads.append(spread)
    assert spreads[0] / spreads[1] == pytest.approx(2, rel=0.15)


def test_each_state_gets_its_rollouts_with_the_runs_sampling_and_what_is_left_of_the_response():
    server = ToyServer()
    found = estimate(server, num_rollouts=3)
    assert len(server.requests) == found.num_rollouts == 3 * 4
    assert {request["request_id"] for request in server.requests} == {"request-1"}
    for offset in BOUNDARIES[:-1]:
        sent = [each for each in server.requests if each["prompt_ids"] == (*PROMPT, *RESPONSE[:offset])]
        params = SAMPLING | {"max_tokens": RESPONSE_LENGTH - offset, "logprobs": False}
        assert [each["sampling_params"] for each in sent] == [params] * 3
    assert found.num_tokens == server.num_generated
    assert found.weight_versions == {3}


def test_limits_that_belong_to_one_request_are_not_inherited():
    """With the rollout's own seed all continuations would be one."""
    server, job = ToyServer(), make_job()
    params = SAMPLING | {"seed": 5, "n": 1, "max_new_tokens": 2, "stop_token_ids": [9], "prompt_logprobs": 0}
    job = Job(**{**vars(job), "sampling_params": params})
    estimate(server, [0, 5], job, num_rollouts=1)
    (request,) = server.requests
    sent = SAMPLING | {"stop_token_ids": [9], "max_tokens": 5, "logprobs": False}
    assert request["sampling_params"] == sent and params["seed"] == 5


@pytest.mark.parametrize("settings, most", [({"max_tokens": 2}, [2, 2, 2, 2]), ({}, [5, 4, 3, 2])])
def test_a_continuation_has_a_longest_length(settings, most):
    server = ToyServer()
    found = estimate(server, num_rollouts=200, **settings)
    for state, offset, limit in zip(found.states, BOUNDARIES, most, strict=False):
        expected = true_value(RESPONSE[:offset], offset + limit)
        assert abs(state.value - expected) < 4 * state.standard_error + 1e-9
        assert state.num_cut_short > 0 and state.num_tokens <= 200 * limit


def test_where_nothing_fits_after_a_state_its_own_text_is_verified():
    """The context ends with the response's third token."""
    server, verifier = ToyServer(), ToyVerifier()
    found = estimate(server, job=make_job(verify=verifier), max_length=len(PROMPT) + 3, num_rollouts=2)
    last = found.states[-1]
    assert (last.value, last.standard_error, last.num_rollouts, last.num_tokens) == (0.0, 0.0, 0, 0)
    assert tuple(RESPONSE[:3]) in verifier.verified
    assert max(len(each["prompt_ids"]) + each["sampling_params"]["max_tokens"] for each in server.requests) == 5
    assert len(server.requests) == found.num_rollouts == 2 * 3


def test_neither_timing_nor_concurrency_change_the_numbers():
    found = [
        estimate(ToyServer(max_delay=delay, delay_seed=seed), num_rollouts=4, max_concurrency=concurrency)
        for seed, (delay, concurrency) in enumerate(itertools.product([0.0, 0.005], [1, 3, 64]))
    ]
    assert all(each == found[0] for each in found)
    assert estimate(ToyServer(seed=1), num_rollouts=4).values != found[0].values


def test_no_more_requests_are_under_way_than_allowed():
    for concurrency in (1, 3):
        server = ToyServer(max_delay=0.002)
        estimate(server, num_rollouts=5, max_concurrency=concurrency)
        assert server.most_under_way == concurrency


def test_the_prompts_state_is_sampled_once_a_group():
    async def three():
        server, group = ToyServer(max_delay=0.005), Group(3)
        sampler = StateSampler(MonteCarloConfig(num_rollouts=4), server.generate, RESPONSE_LENGTH, 100)
        jobs = [make_job(group, request_id=f"request-{number}") for number in range(3)]
        return server, await asyncio.gather(*(sampler.values(job, [0, 2, 5]) for job in jobs))

    server, found = run(three())
    to_prompt = [each for each in server.requests if each["prompt_ids"] == PROMPT]
    assert len(to_prompt) == 4 and len({each["request_id"] for each in to_prompt}) == 1
    assert len({each.values[0] for each in found}) == 1
    assert sum(each.num_tokens for each in found) == server.num_generated
    assert sorted(each.num_rollouts for each in found) == [4, 4, 8]


def test_a_text_is_verified_once_for_a_prompt_and_the_response_itself_never_again():
    async def both():
        server, group, verifier = ToyServer(), Group(2), ToyVerifier()
        sampler = StateSampler(MonteCarloConfig(num_rollouts=60), server.generate, RESPONSE_LENGTH, 100)
        for request_id in ("request-1", "request-2"):
            await sampler.values(make_job(group, verifier, request_id=request_id), BOUNDARIES)
        return server, verifier

    server, verifier = run(both())
    assert len(server.requests) == 60 * 7
    assert len(verifier.verified) == len(set(verifier.verified)) < 200
    assert RESPONSE not in verifier.verified


class Failing(ToyServer):
    """Fails at the n-th request."""

    def __init__(self, at: int) -> None:
        super().__init__(max_delay=0.002)
        self.at = at

    async def generate(self, *args, **kwargs):
        output = await super().generate(*args, **kwargs)
        if len(self.requests) >= self.at:
            raise RuntimeError("out of memory")
        return output


def test_a_failing_server_is_not_swallowed_and_nothing_goes_on():
    async def values():
        server = Failing(at=3)
        settings = MonteCarloConfig(num_rollouts=4, max_concurrency=2)
        sampler = StateSampler(settings, server.generate, RESPONSE_LENGTH, 100)
        with pytest.raises(RuntimeError, match="out of memory"):
            await sampler.values(make_job(), BOUNDARIES)
        await asyncio.sleep(0.05)
        assert server.under_way == 0
        return len(server.requests)

    assert run(values()) < 4 * 4


@pytest.mark.parametrize("given", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_refused(given):
    async def verify(response_ids):
        return given

    with pytest.raises(ValueError, match="must be finite"):
        estimate(ToyServer(), job=make_job(verify=verify), num_rollouts=2)


def test_a_failing_verifier_is_not_swallowed():
    async def verify(response_ids):
        raise RuntimeError("no sandbox here")

    with pytest.raises(RuntimeError, match="no sandbox here"):
        estimate(ToyServer(), job=make_job(verify=verify), num_rollouts=2)


class Aborting(ToyServer):
    """Breaks every answer off after one token, in new weights each time."""

    async def generate(self, request_id, *, prompt_ids, sampling_params):
        output = await super().generate(request_id, prompt_ids=prompt_ids, sampling_params=sampling_params)
        finished = len(output.token_ids) == 1
        version = len(prompt_ids)
        output.extra_fields = {"min_global_steps": version, "max_global_steps": version, "num_cached_tokens": None}
        output.token_ids, output.stop_reason = output.token_ids[:1], "completed" if finished else "aborted"
        return output


def test_an_aborted_continuation_goes_on_where_it_stopped(monkeypatch):
    monkeypatch.setattr("rredcot_verl.sources.continuations._PAUSE_SECONDS", 0.0)
    server = Aborting()
    found = estimate(server, num_rollouts=200)
    for state, offset in zip(found.states, BOUNDARIES, strict=False):
        assert abs(state.value - true_value(RESPONSE[:offset])) < 4 * state.standard_error
    assert len(server.requests) > 4 * 200
    assert all(
        len(each["prompt_ids"]) - len(PROMPT) + each["sampling_params"]["max_tokens"] == RESPONSE_LENGTH
        for each in server.requests
    )
    assert len(found.weight_versions) > 1 and found.states[0].num_recomputed_tokens == 0


def test_a_server_that_does_nothing_but_abort_ends_the_waiting(monkeypatch):
    monkeypatch.setattr("rredcot_verl.sources.continuations._PAUSE_SECONDS", 0.0)

    async def generate(**request):
        return SimpleNamespace(token_ids=[], stop_reason="aborted", extra_fields={})

    with pytest.raises(RuntimeError, match="aborted a continuation"):
        run(ContinuationSampler(generate, 1).sample("request-1", State([7], [8], 1), 3, SAMPLING))


def test_a_server_that_ignores_the_limit_is_caught():
    async def generate(**request):
        return SimpleNamespace(token_ids=[1] * 9, stop_reason="completed", extra_fields={})

    with pytest.raises(RuntimeError, match="generated 9 tokens"):
        run(ContinuationSampler(generate, 1).sample("request-1", State([7], [8], 1), 3, SAMPLING))


def test_what_a_group_shares_is_made_once_and_outlives_who_asked_first():
    async def scenario():
        group, made = Group(3), []

        async def make():
            made.append(1)
            await asyncio.sleep(0.01)
            return "made"

        first, second = (asyncio.ensure_future(group.once("key", make)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == await group.once("key", make) == "made"
        assert await group.once("another key", make) == "made" and len(made) == 2

    run(scenario())


def test_a_failure_is_shared_too():
    async def scenario():
        group = Group(2)

        async def fail():
            raise RuntimeError("no sandbox here")

        results = await asyncio.gather(*(group.once("key", fail) for _ in range(2)), return_exceptions=True)
        assert [str(result) for result in results] == ["no sandbox here"] * 2

    run(scenario())


def test_on_the_embedded_server_a_greedy_policy_only_repeats_itself():
    """A continuation is the rest of the response, so every value is its reward and nothing is verified again."""
    limits = ServerLimits(
        prompt_length=8, response_length=12, max_model_len=20, context_length=512, max_num_seqs=8, ignore_eos=True
    )
    greedy, prompt = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0}, [5, 6, 7]

    async def scenario():
        server = RolloutServer(RolloutModel(build_tiny_model(), [EOS], max_batch_tokens=256), limits)
        written = await server.generate(prompt, greedy, "request-1")
        verifier = ToyVerifier()
        job = Job(prompt, written.token_ids, 0.25, "request-1", greedy, Group(1), verifier)
        sampler = StateSampler(MonteCarloConfig(num_rollouts=3), server.generate, 12, 20)
        return await sampler.values(job, [0, 1, 5, 9, 12]), verifier

    found, verifier = run(scenario())
    assert found.values == [0.25] * 4 and found.standard_errors == [0.0] * 4
    assert verifier.verified == []
    assert found.num_tokens == 3 * (12 + 11 + 7 + 3)
    # That server keeps no cache: all of a state is computed again.
    assert sum(state.num_recomputed_tokens for state in found.states) == 3 * (3 * 4 + 1 + 5 + 9)
