"""Scores of probes, against a table-driven model computed directly and by the other kind of server."""

import asyncio
import math
from types import SimpleNamespace

import pytest
import torch

from rredcot_verl.config.schema import SelfValueConfig, parse
from rredcot_verl.scoring.probes import Branch, Proposal
from rredcot_verl.scoring.rollout import (
    SCORING_BACKENDS,
    BranchScore,
    BranchScorer,
    PromptLogprobScorer,
    make_scorer,
    self_values,
)
from tests.scoring.table_model import FakeServer, TableModel

MODEL = TableModel(vocab_size=12)
TRACE = [3, 1, 4, 1, 5, 9, 2, 6]
CLOSING = (7, 8, 11)
BRANCHES = [
    Branch(state=0, proposal=0, position=2, token_ids=(10, 4), answer_from=1, scored_from=1, closing_token_ids=CLOSING),
    Branch(
        state=0, proposal=1, position=2, token_ids=(10, 5, 5), answer_from=1, scored_from=1, closing_token_ids=CLOSING
    ),
    Branch(state=1, proposal=0, position=6, token_ids=(4,), answer_from=0, scored_from=0, closing_token_ids=CLOSING),
    Branch(state=1, proposal=1, position=6, token_ids=(5, 5), answer_from=0, scored_from=0, closing_token_ids=CLOSING),
]
PROPOSALS = [Proposal("4", 1.0), Proposal("55", 0.5)]


def score(scorer, branches=BRANCHES):
    return asyncio.run(scorer.score("request-1", TRACE, branches))


def directly(branch: Branch, closings=CLOSING, temperature: float = 1.0) -> tuple[list[float], float]:
    prefix = TRACE[: branch.position]
    forced = list(branch.token_ids)
    return (
        MODEL.sequence(prefix, forced, temperature),
        MODEL.any_of([*prefix, *forced], list(closings), temperature),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_branch_scorer_equals_direct_computation(temperature):
    server = FakeServer(MODEL)
    found = score(BranchScorer(server.generate, temperature))
    for branch, result in zip(BRANCHES, found, strict=True):
        tokens, closing = directly(branch, temperature=temperature)
        assert list(result.token_log_probs) == pytest.approx(tokens, abs=1e-12)
        assert result.closing_log_prob == pytest.approx(closing, abs=1e-12)
        assert result.num_forward_tokens == len(branch.token_ids)
    # One request for the whole trace, on the request that leads to its cache.
    assert len(server.requests) == 1
    assert server.requests[0]["request_id"] == "request-1" and server.requests[0]["prompt_ids"] == TRACE


@pytest.mark.parametrize("block_size", [0, 1, 2, 3, 4, 16])
@pytest.mark.parametrize("generated", [[], TRACE, [*TRACE[:2], 10, 4, 7, 7, 7], [*TRACE[:6], 5, 5, 8, 8]])
@pytest.mark.parametrize("garbage", [-0.2, 77.0, float("nan")])
def test_prompt_logprob_scorer_equals_direct_computation_and_the_other_scorer(block_size, generated, garbage):
    """Whatever the cache holds, also the probed answers themselves, or what another probe has just put there."""
    server = FakeServer(MODEL, block_size, garbage, generated)
    found = score(PromptLogprobScorer(server.generate, max_closing_tokens=3))
    other = score(BranchScorer(FakeServer(MODEL).generate, 1.0))
    for branch, result, same in zip(BRANCHES, found, other, strict=True):
        tokens, closing = directly(branch)
        counted = slice(branch.scored_from, None)
        assert list(result.token_log_probs)[counted] == pytest.approx(tokens[counted], abs=1e-12)
        assert result.closing_log_prob == pytest.approx(closing, abs=1e-12)
        assert list(result.token_log_probs)[counted] == pytest.approx(same.token_log_probs[counted], abs=1e-12)
        assert result.closing_log_prob == pytest.approx(same.closing_log_prob, abs=1e-12)
    computed = sum(result.num_forward_tokens for result in found)
    whole = sum(3 * (branch.position + len(branch.token_ids) + 1) for branch in BRANCHES)
    assert computed == whole if block_size == 0 else computed > 0


def test_the_cache_is_left_out_only_where_it_reaches_into_a_probe():
    def skipped(block_size):
        server = FakeServer(MODEL, block_size, generated=TRACE)
        (result,) = score(PromptLogprobScorer(server.generate, 1), BRANCHES[2:3])
        return [r["sampling_params"]["skip_reading_prefix_cache"] for r in server.requests], result.num_forward_tokens

    # Eight tokens, the first scored one at 6: blocks of 4 end before it, blocks of 2 right at it.
    assert skipped(4) == ([False], 4)
    assert skipped(2) == ([False, True], 2 + 8)


def test_what_is_asked_of_vllm():
    server = FakeServer(MODEL)
    score(PromptLogprobScorer(server.generate, 2), BRANCHES[:1])
    assert [r["prompt_ids"] for r in server.requests] == [[3, 1, 10, 4, 7], [3, 1, 10, 4, 8]]
    for request in server.requests:
        assert request["request_id"] == "request-1"
        assert request["sampling_params"] == {
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": 0,
            "skip_reading_prefix_cache": False,
            "detokenize": False,
        }


@pytest.mark.parametrize("kept", [1, 2])
def test_fewer_closing_tokens_give_a_lower_bound(kept):
    found = score(PromptLogprobScorer(FakeServer(MODEL).generate, kept))
    for branch, result in zip(BRANCHES, found, strict=True):
        assert result.closing_log_prob == pytest.approx(directly(branch, CLOSING[:kept])[1], abs=1e-12)
        assert result.closing_log_prob < directly(branch)[1]


def test_no_more_requests_at_once_than_allowed():
    server, running, most = FakeServer(MODEL), 0, 0

    async def slow(*args, **kwargs):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return await server.generate(*args, **kwargs)

    config = parse({"self_value": {"max_concurrency": 2, "max_closing_tokens": 3}}).self_value
    score(make_scorer("vllm", slow, config, 1.0))
    assert len(server.requests) == 12 and most == 2


def test_waiting_for_a_turn_is_no_part_of_a_requests_time():
    server = FakeServer(MODEL)

    async def slow(*args, **kwargs):
        await asyncio.sleep(0.05)
        return await server.generate(*args, **kwargs)

    config = parse({"self_value": {"max_concurrency": 1, "max_closing_tokens": 3, "timeout_s": 0.3}}).self_value
    score(make_scorer("vllm", slow, config, 1.0))
    config = parse({"self_value": {"timeout_s": 0.01}}).self_value
    with pytest.raises(asyncio.TimeoutError):
        score(make_scorer("vllm", slow, config, 1.0))


def test_missing_probes_are_refused():
    async def generate(**kwargs):
        return SimpleNamespace(extra_fields={"branch_log_probs": []})

    with pytest.raises(RuntimeError, match="scored 0 of 4 probes"):
        score(BranchScorer(generate, 1.0))

    async def nothing(**kwargs):
        return SimpleNamespace(extra_fields={})

    with pytest.raises(KeyError):
        score(BranchScorer(nothing, 1.0))
    with pytest.raises(KeyError):
        score(PromptLogprobScorer(nothing, 2))


@pytest.mark.parametrize("kind, change", [("vllm", -2), ("rredcot_cpu", -1), ("rredcot_cpu", 1)])
def test_a_list_of_another_length_is_refused(kind, change):
    """Else its last entry would be read as the closing token's."""
    server = FakeServer(MODEL)

    async def generate(*args, **kwargs):
        output = await server.generate(*args, **kwargs)
        if kind == "vllm":
            output.extra_fields["prompt_logprobs"] = output.extra_fields["prompt_logprobs"][:change]
        else:
            for result in output.extra_fields["branch_log_probs"][1:2]:
                given = result["token_log_probs"]
                result["token_log_probs"] = given[:change] if change < 0 else [*given, -1.0]
        return output

    scorer = make_scorer(kind, generate, SelfValueConfig(), 1.0)
    with pytest.raises(RuntimeError, match=r"gave \d log-probabilities of a probe, expected \d"):
        score(scorer)


def test_values_from_scores_by_hand():
    half, tenth = math.log(0.5), math.log(0.1)
    scores = [
        # What comes before `scored_from` is given and does not count.
        BranchScore([-50.0, half], half, 2),
        BranchScore([-50.0, tenth, 0.0], half, 3),
        BranchScore([0.0], half, 1),
        BranchScore([half, half], 0.0, 2),
    ]
    assert self_values("joint", BRANCHES, scores, PROPOSALS).tolist() == pytest.approx([0.275, 0.625], abs=1e-6)
    expected = [(0.25 + 0.025) / 0.3, (0.5 + 0.125) / 0.75]
    assert self_values("normalized", BRANCHES, scores, PROPOSALS).tolist() == pytest.approx(expected, abs=1e-6)
    # exp of the mean over the answer's tokens and its end: max(0.25^(1/2), ...), max(0.5^(1/2), ...).
    expected = [0.5, math.sqrt(0.5)]
    assert self_values("geometric", BRANCHES, scores, PROPOSALS).tolist() == pytest.approx(expected, abs=1e-6)


def test_joint_from_both_servers_is_the_probability_of_the_texts():
    scores = score(BranchScorer(FakeServer(MODEL).generate, 1.0))
    expected = []
    for first in (0, 2):
        total = 0.0
        for branch, proposal in zip(BRANCHES[first : first + 2], PROPOSALS, strict=True):
            tokens, closing = directly(branch)
            total += proposal.utility * math.exp(sum(tokens[branch.scored_from :]) + closing)
        expected.append(total)
    assert self_values("joint", BRANCHES, scores, PROPOSALS).tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), 0.5, 77.0])
@pytest.mark.parametrize("place", ["token", "closing"])
@pytest.mark.parametrize("form", ["joint", "normalized", "geometric"])
def test_numbers_that_are_no_log_probabilities_are_refused(bad, place, form):
    good = BranchScore([-1.0], -1.0, 1)
    faulty = BranchScore([bad], -1.0, 1) if place == "token" else BranchScore([-1.0], bad, 1)
    branches = [Branch(0, 0, 2, (4,), 0, 0, CLOSING), Branch(0, 1, 2, (5,), 0, 0, CLOSING)]
    with pytest.raises(ValueError, match="log-probabilities"):
        self_values(form, branches, [good, faulty], PROPOSALS)


def test_impossible_tokens_give_value_zero():
    branches = [Branch(0, 0, 2, (4,), 0, 0, CLOSING)]
    scores = [BranchScore([-math.inf], -1.0, 1)]
    assert self_values("joint", branches, scores, PROPOSALS[:1]).tolist() == [0.0]
    # Rounding above log 1 is no fault.
    scores = [BranchScore([0.0], 1e-7, 1)]
    assert torch.equal(self_values("joint", branches, scores, PROPOSALS[:1]), torch.ones(1))


def test_the_two_branches_of_an_answer_add_up():
    half, tenth = math.log(0.5), math.log(0.1)
    branches = [
        Branch(0, 0, 2, (10, 4, 5), 1, 1, CLOSING),
        # The same answer where the closing token holds its last token too.
        Branch(0, 0, 2, (10, 4), 1, 1, (9,)),
        Branch(0, 1, 2, (10, 6), 1, 1, CLOSING),
        Branch(1, 0, 6, (4, 5), 0, 0, CLOSING),
        Branch(1, 0, 6, (4,), 0, 0, (9,)),
        Branch(1, 1, 6, (6,), 0, 0, CLOSING),
    ]
    never = -math.inf
    scores = [
        BranchScore([-50.0, half, half], half, 3),  # 0.125
        BranchScore([-50.0, half], tenth, 2),  # 0.05
        BranchScore([-50.0, tenth], 0.0, 2),  # 0.1
        BranchScore([half, never], never, 2),  # 0
        BranchScore([half], half, 1),  # 0.25
        BranchScore([half], half, 1),  # 0.25
    ]
    expected = [0.175 + 0.5 * 0.1, 0.25 + 0.5 * 0.25]
    assert self_values("joint", branches, scores, PROPOSALS).tolist() == pytest.approx(expected, abs=1e-6)
    expected = [(0.175 + 0.05) / 0.275, (0.25 + 0.125) / 0.5]
    assert self_values("normalized", branches, scores, PROPOSALS).tolist() == pytest.approx(expected, abs=1e-6)
    # The root is that of the longer branch: two tokens and the end.
    expected = [0.175 ** (1 / 3), 0.25 ** (1 / 3)]
    assert self_values("geometric", branches, scores, PROPOSALS).tolist() == pytest.approx(expected, abs=1e-6)


def test_scorers_by_backend():
    generate = FakeServer(MODEL).generate
    kinds = [type(make_scorer(name, generate, SelfValueConfig(), 1.0)) for name in SCORING_BACKENDS]
    assert kinds == [BranchScorer, PromptLogprobScorer]
    with pytest.raises(ValueError, match="rollout.name='sglang' cannot score probes.*rredcot_cpu.*vllm"):
        make_scorer("sglang", generate, SelfValueConfig(), 1.0)
