"""One response from tokens to record: a real tokenizer, a table for a model, a server that fails in every way."""

import asyncio
import dataclasses
import math

import pytest
from omegaconf import OmegaConf

from rredcot_verl.agent.scorer import ResponseScorer
from rredcot_verl.config.schema import parse
from rredcot_verl.probes.elicitation import Proposal
from rredcot_verl.servers.client import ProbingTimeout
from rredcot_verl.sources.group import Group, Member
from rredcot_verl.sources.record import (
    EMPTY,
    NO_PROPOSAL,
    SCORED,
    TOO_LONG,
    UNIFORM_GROUP,
)
from rredcot_verl.sources.response import Response, as_member
from tests.passes.table_model import FakeServer, TableModel
from tests.probes.tiny_tokenizers import byte_level, encode

PROMPT = encode(byte_level(), "What is 12 + 3?\n")
TEXT = "First, 12 + 3 = 15.\n\nWait, let me see, but so 3.\nSo the answer is \\boxed{15}.\n"
BLOCK = {"segmentation": {"min_tokens": 2, "num_segments": 4}}


def verl_config(name: str = "rredcot_cpu", max_model_len: int | None = None, temperature: float = 1.0):
    rollout = {
        "name": name,
        "temperature": temperature,
        "prompt_length": 64,
        "response_length": 128,
        "max_model_len": max_model_len,
    }
    return OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}})


def make_scorer(block=None, generate=None, server=None, **config) -> ResponseScorer:
    server = server or FakeServer(TableModel(len(byte_level())))
    settings = parse(BLOCK | (block or {}))
    generate = generate or server.generate
    return ResponseScorer(verl_config(**config), settings, byte_level(), generate, config.get("max_model_len") or 10**6)


def make_response(scorer: ResponseScorer, text: str = TEXT, **fields) -> Response:
    ids = encode(byte_level(), text)
    defaults = {
        "prompt_ids": PROMPT,
        "response_ids": ids,
        "response_mask": [1] * len(ids),
        "log_probs": [-0.1 * (n % 7) for n in range(len(ids))],
        "reward": 1.0,
        "references": "15",
        "request_id": "request-1",
        "answer": scorer.elicitation.read(ids) if ids else None,
    }
    return Response(**(defaults | fields))


ONE_WRONG = (Member(0.0, "16"),)


def credit(scorer: ResponseScorer, response: Response, others=ONE_WRONG):
    async def run():
        group = Group(1 + len(others))
        for number, member in enumerate(others):
            await group.arrive(number + 1, member)
        await group.arrive(0, as_member(response))
        return await scorer.credit(response, group)

    return asyncio.run(asyncio.wait_for(run(), timeout=20))


@pytest.mark.parametrize("reward_range", [(0.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_scored_response_equals_direct_computation(reward_range, temperature):
    model = TableModel(len(byte_level()))
    block = {"self_value": {"reward_range": reward_range}}
    scorer = make_scorer(block, server=FakeServer(model), temperature=temperature)
    response = make_response(scorer)
    record = credit(scorer, response)
    assert record.status == SCORED and record.error is None
    cuts = record.segment_boundaries
    assert cuts[0] == 0 and cuts[-1] == len(response.response_ids) and response.answer.start in cuts
    assert len(record.self_values) == len(cuts) - 1 == record.num_probes > 1
    tokenizer = byte_level()
    low, high = reward_range
    for cut, value in zip(cuts, record.self_values, strict=False):
        prefix = PROMPT + response.response_ids[:cut]
        opening = "\n\nThe final answer is \\boxed{" if cut != response.answer.start else "\\boxed{"
        if tokenizer.decode(prefix).endswith("\n"):
            opening = opening.lstrip("\n")
        given, answer = encode(tokenizer, opening), encode(tokenizer, "15")
        assert encode(tokenizer, opening + "15") == given + answer
        ends = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).startswith("}")]
        log_prob = sum(model.sequence(prefix + given, answer, temperature))
        log_prob += model.any_of(prefix + given + answer, ends, temperature)
        assert value == pytest.approx(low + (high - low) * math.exp(log_prob), abs=1e-6)
    assert record.num_probe_tokens > record.num_probes
    assert record.ready_time <= record.scored_time and record.scoring_seconds > 0 and not record.truncated


def test_both_servers_give_the_same_values():
    """With every closing token summed; what vLLM finds in its cache is garbage."""
    model = TableModel(len(byte_level()))
    block = {"self_value": {"max_closing_tokens": 64}}
    cpu = make_scorer(block, server=FakeServer(model))
    vllm = make_scorer(
        block, server=FakeServer(model, block_size=4, generated=PROMPT + encode(byte_level(), TEXT)), name="vllm"
    )
    first, second = credit(cpu, make_response(cpu)), credit(vllm, make_response(vllm))
    assert first.status == second.status == SCORED
    assert first.segment_boundaries == second.segment_boundaries
    assert second.self_values == pytest.approx(first.self_values, abs=1e-9)


def test_a_server_that_does_not_answer():
    async def generate(*args, **kwargs):
        await asyncio.sleep(60)

    scorer = make_scorer({"self_value": {"timeout_s": 0.05}}, generate)
    with pytest.raises(ProbingTimeout, match="timeout_s=0.05"):
        credit(scorer, make_response(scorer))


def test_a_server_that_fails():
    async def generate(*args, **kwargs):
        raise RuntimeError("out of memory")

    scorer = make_scorer({"self_value": {"max_concurrency": 1}}, generate)

    async def three():
        group = Group(1)
        response = make_response(scorer)
        await group.arrive(0, as_member(response))
        # The slot is given back: as many failures as slots do not block the next one.
        for _ in range(3):
            with pytest.raises(RuntimeError, match="out of memory"):
                await scorer.credit(response, group)

    asyncio.run(asyncio.wait_for(three(), 20))


def test_numbers_that_are_no_log_probabilities():
    server = FakeServer(TableModel(len(byte_level())))

    async def generate(*args, **kwargs):
        output = await server.generate(*args, **kwargs)
        output.extra_fields["probe_log_probs"][1]["closing_log_prob"] = float("nan")
        return output

    scorer = make_scorer(generate=generate)
    with pytest.raises(ValueError, match="log-probabilities"):
        credit(scorer, make_response(scorer))


def test_boundaries_that_do_not_fit_the_context_are_dropped_and_counted():
    server = FakeServer(TableModel(len(byte_level())))
    whole = make_scorer(server=server)
    response = make_response(whole)
    everything = credit(whole, response)
    probes = server.requests[0]["sampling_params"]["read_probes"]
    needs = [probe["position"] + len(probe["token_ids"]) + 2 for probe in probes]
    # The answer's own opening is short: its probe may need less than the one before.
    for kept in range(1, len(needs)):
        limit = max(needs[:kept])
        if needs[kept] <= limit:
            continue
        limited = FakeServer(TableModel(len(byte_level())), max_model_len=limit)
        record = credit(make_scorer(server=limited, max_model_len=limit), response)
        assert record.status == SCORED and record.num_dropped_boundaries == len(needs) - kept
        assert record.segment_boundaries == everything.segment_boundaries[:kept] + [len(response.response_ids)]
        assert record.self_values == pytest.approx(everything.self_values[:kept], abs=1e-9)
    record = credit(make_scorer(max_model_len=needs[0] - 1), response)
    assert record.status == TOO_LONG and record.num_dropped_boundaries == len(needs)


def test_the_longest_probe_that_is_sent_to_vllm_leaves_room_to_generate():
    whole = FakeServer(TableModel(len(byte_level())))
    scorer = make_scorer(server=whole)
    response = make_response(scorer)
    credit(scorer, response)
    probe = whole.requests[0]["sampling_params"]["read_probes"][0]
    # The token that ends the answer, and the one that vLLM insists on generating.
    limit = probe["position"] + len(probe["token_ids"]) + 2
    for max_model_len, status in ((limit - 1, TOO_LONG), (limit, SCORED)):
        server = FakeServer(TableModel(len(byte_level())), max_model_len=max_model_len)
        record = credit(make_scorer(server=server, name="vllm", max_model_len=max_model_len), response)
        assert record.status == status, record.error
        assert bool(server.requests) == (status == SCORED)


@pytest.mark.parametrize("references", [None, "", {"tests": []}, True])
def test_without_a_reference_there_is_no_proposal(references):
    scorer = make_scorer()
    assert credit(scorer, make_response(scorer, references=references)).status == NO_PROPOSAL
    # The group's own right answer will do where it may be used.
    scorer = make_scorer({"self_value": {"proposals": "union"}})
    assert credit(scorer, make_response(scorer, references=references)).status == SCORED


def test_answers_that_are_too_long_are_left_out_and_counted():
    scorer = make_scorer({"self_value": {"max_answer_tokens": 4}})
    record = credit(scorer, make_response(scorer, references=["15", "a long answer of many words"]))
    assert (record.status, record.num_dropped_answers) == (SCORED, 1)
    assert record.num_probes == len(record.self_values)
    record = credit(scorer, make_response(scorer, references="a long answer of many words"))
    assert (record.status, record.num_dropped_answers) == (NO_PROPOSAL, 1)


@pytest.mark.parametrize("score_opening", [False, True])
def test_the_opening_is_no_part_of_the_answers_length(score_opening):
    for limit, status in ((2, SCORED), (1, NO_PROPOSAL)):
        scorer = make_scorer({"self_value": {"max_answer_tokens": limit, "score_opening": score_opening}})
        assert credit(scorer, make_response(scorer)).status == status


HALF = "\\frac{1}{2}"


def test_an_answer_that_ends_in_a_brace_has_two_probes_a_boundary():
    natural = encode(byte_level(), "The final answer is \\boxed{" + HALF + "}")
    model = TableModel(len(byte_level()), habit=natural)
    block = {"self_value": {"max_closing_tokens": 64}}
    server = FakeServer(model)
    cpu = make_scorer(block, server=server)
    vllm = make_scorer(block, server=FakeServer(model), name="vllm")
    response = make_response(cpu, references=["15", HALF])
    first, second = credit(cpu, response), credit(vllm, response)
    assert first.status == second.status == SCORED
    assert first.num_probes == second.num_probes == 3 * len(first.self_values)
    assert first.self_values == pytest.approx(second.self_values, rel=1e-5)
    # The model writes "}}": without the second probe nearly nothing would be left. Where the response opens its answer
    # itself, the probe is shorter than the habit.
    assert sorted(value > 0.5 for value in first.self_values) == [False] + [True] * (len(first.self_values) - 1)
    # Every value is the sum over all that was sent: utility 1 for both answers.
    sent = server.requests[0]["sampling_params"]["read_probes"]
    ids = response.prompt_ids + response.response_ids
    proposals = [Proposal("15", 1.0), Proposal(HALF, 1.0)]
    kept = cpu.elicitation.probes(
        response.prompt_ids, response.response_ids, first.segment_boundaries, proposals, "boxed", response.answer.start
    )
    by_position: dict[int, float] = {}
    for probe in sent:
        prefix = ids[: probe["position"]]
        start = next(
            b.scored_from for b in kept if (b.position, list(b.token_ids)) == (len(prefix), probe["token_ids"])
        )
        log_prob = sum(model.sequence(prefix, probe["token_ids"])[start:])
        log_prob += model.any_of([*prefix, *probe["token_ids"]], probe["closing_token_ids"])
        by_position[probe["position"]] = by_position.get(probe["position"], 0.0) + math.exp(log_prob)
    assert first.self_values == pytest.approx(list(by_position.values()), rel=1e-5)


def test_both_probes_of_an_answer_that_is_too_long_are_left_out():
    scorer = make_scorer()
    whole, *_ = scorer.elicitation.probes(PROMPT, [5, 6], [0, 2], [Proposal(HALF, 1.0)], "boxed", 2)
    length = len(whole.token_ids) - whole.answer_from
    for limit, dropped in ((length, 0), (length - 1, 1)):
        # Probes that were cut short by their merged end do not slip through.
        scorer = make_scorer({"self_value": {"max_answer_tokens": limit}})
        record = credit(scorer, make_response(scorer, references=[HALF, "15"]))
        assert (record.status, record.num_dropped_answers) == (SCORED, dropped)
        assert record.num_probes == len(record.self_values) * (1 if dropped else 3)


def test_an_empty_response_and_one_of_observations_only():
    scorer = make_scorer()
    assert credit(scorer, make_response(scorer, text="")).status == EMPTY
    response = make_response(scorer)
    holes = dataclasses.replace(response, response_mask=[0] * len(response.response_ids))
    assert credit(scorer, holes).status == EMPTY


def test_uniform_groups_are_probed_only_if_asked():
    server = FakeServer(TableModel(len(byte_level())))
    scorer = make_scorer(server=server)
    record = credit(scorer, make_response(scorer), others=(Member(1.0, "15"),))
    assert record.status == UNIFORM_GROUP and server.requests == []
    scorer = make_scorer({"self_value": {"probe_uniform_groups": True}})
    assert credit(scorer, make_response(scorer), others=(Member(1.0, "15"),)).status == SCORED


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
def test_a_rollout_log_probability_that_is_no_number_does_no_harm(bad):
    scorer = make_scorer()
    response = make_response(scorer)
    log_probs = list(response.log_probs)
    log_probs[5] = bad
    assert credit(scorer, dataclasses.replace(response, log_probs=log_probs)).status == SCORED
    assert credit(scorer, dataclasses.replace(response, log_probs=None)).status == SCORED


def test_truncated_means_no_answer_and_a_full_budget():
    scorer = make_scorer()
    full = (encode(byte_level(), "so 3 but 4 ") * 64)[:128]
    response = make_response(scorer, response_ids=full, response_mask=[1] * 128, log_probs=None, answer=None)
    assert credit(scorer, response).truncated
    short = dataclasses.replace(response, response_ids=full[:127], response_mask=[1] * 127)
    assert not credit(scorer, short).truncated
    solved = dataclasses.replace(response, answer=scorer.elicitation.read(encode(byte_level(), "\\boxed{1}")))
    assert not credit(scorer, solved).truncated


def test_a_ground_truth_that_cannot_be_written_is_not_fatal():
    from tests.probes.tiny_tokenizers import sentencepiece_like

    tokenizer = sentencepiece_like()
    server = FakeServer(TableModel(len(tokenizer)))
    scorer = ResponseScorer(verl_config(), parse(BLOCK), tokenizer, server.generate, 10**6)
    ids = encode(tokenizer, TEXT)
    response = make_response(scorer, response_ids=ids, response_mask=[1] * len(ids), log_probs=None)
    response = dataclasses.replace(response, references="日本", prompt_ids=encode(tokenizer, "What?"))
    record = credit(scorer, response)
    assert (record.status, record.num_dropped_answers, record.error) == (NO_PROPOSAL, 1, None)
    # The others are probed, as without it.
    record = credit(scorer, dataclasses.replace(response, references=["日本", "15"]))
    assert (record.status, record.num_dropped_answers) == (SCORED, 1)
    alone = credit(scorer, dataclasses.replace(response, references="15"))
    assert alone.num_dropped_answers == 0 and record.self_values == pytest.approx(alone.self_values, rel=1e-6)


@pytest.mark.parametrize("reward, utility", [(-1.0, 0.0), (0.0, 0.5), (1.0, 1.0), (3.0, 1.0)])
def test_rewards_become_utilities_in_the_range(reward, utility):
    scorer = make_scorer({"self_value": {"reward_range": [-1, 1]}})
    members = [Member(reward, "15"), Member(None, "16"), Member(1.0, None)]
    assert scorer._source._members(members) == [("15", utility)]


PROGRAM = "def f(x):\n    x = x + 1\n    return x\n"
CODE_TEXT = f"Add one to x.\nThen return it.\n\n```python\n{PROGRAM}```\n"


def test_reasoning_and_program_are_segmented_and_programs_are_probed():
    block = {
        "elicitation": {"format": "code"},
        "segmentation": {"method": "newline", "min_tokens": 2, "num_segments": 8},
        "self_value": {
            "form": "geometric",
            "proposals": "union",
            "reference_key": "extra_info.solutions",
            "max_answer_tokens": 64,
            "max_proposals": 2,
        },
    }
    scorer = make_scorer(block)
    response = make_response(scorer, CODE_TEXT, references=["def f(x):\n    return x + 1"], reward=0.5)
    record = credit(scorer, response)
    assert record.status == SCORED, record.error
    # The reference, and the response's own program with the fraction of tests it passed.
    assert record.utilities == [1.0, 0.5]
    starts = [scorer.vocabulary.decode(response.response_ids[:k]).rsplit("\n", 1) for k in record.segment_boundaries]
    assert all(rest == "" for _, *rests in starts[1:-1] for rest in rests), "segments start with lines"
    program_from = response.answer.start
    assert sum(0 < k < program_from for k in record.segment_boundaries) >= 1
    assert sum(program_from < k < len(response.response_ids) for k in record.segment_boundaries) >= 2
    assert all(0 < value < 1 for value in record.self_values[:-1])


def test_a_program_over_the_cap_is_dropped_and_counted():
    block = {
        "elicitation": {"format": "code"},
        "self_value": {"reference_key": "extra_info.solutions", "proposals": "union", "max_answer_tokens": 12},
    }
    scorer = make_scorer(block)
    record = credit(scorer, make_response(scorer, CODE_TEXT, references=["a = 1", PROGRAM]))
    assert record.status == SCORED and record.utilities == [1.0] and record.num_dropped_answers == 1
