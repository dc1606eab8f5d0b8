"""What our vLLM server asks of vLLM and reads from it, both ways, against a table-driven model computed directly."""

import asyncio
import math

import pytest
import torch

from rredcot_verl.servers import vllm_forced, vllm_tree
from rredcot_verl.servers.vllm_forced import NUM_CHANNELS, SHIFT, ForcedRequest, paths_of, replace_rows
from rredcot_verl.servers.vllm_requests import completion_of, parse_request
from rredcot_verl.servers.vllm_tree import MAX_TOKEN_IDS, ClosingMass, questions_of
from tests.passes.table_model import TableModel
from tests.servers.fake_vllm import FakeVLLM, check

MODEL = TableModel(vocab_size=12)
TRACE = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
CLOSING = (7, 8, 11)
# Two boundaries with the same answers: "4 5" with one end, "4 5" that ends in a merged token, and "4 6 6".
PROBES = [
    {"position": position, "token_ids": token_ids, "scored_from": 1, "closing_token_ids": closing}
    for position in (4, 9)
    for token_ids, closing in (((10, 4, 5), CLOSING), ((10, 4), (0, 2)), ((10, 4, 6, 6), CLOSING))
]


WAYS = [None, vllm_forced.read_places]
both_ways = pytest.mark.parametrize("way", WAYS, ids=["tree", "forced"])


def read(engine, probes=PROBES, way=None, temperature=1.0, max_model_len=10**6):
    params = {"read_probes": probes, "temperature": temperature}
    return asyncio.run(engine.read_probes(TRACE, params, max_model_len, way))


@both_ways
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("generated", [[], TRACE, [*TRACE[:9], 10, 4, 5, 7, 7]])
@pytest.mark.parametrize("scored_from", [0, 1, 2])
def test_scores_equal_direct_computation(way, temperature, generated, scored_from):
    probes = [probe | {"scored_from": scored_from} for probe in PROBES]
    found = read(FakeVLLM(MODEL, 4, generated), probes, way, temperature)
    check(MODEL, TRACE, probes, found, temperature)


@both_ways
def test_probes_of_one_answer_may_be_scored_from_different_tokens(way):
    probes = [probe | {"scored_from": 2 if index % 3 else 0} for index, probe in enumerate(PROBES)]
    check(MODEL, TRACE, probes, read(FakeVLLM(MODEL), probes, way))


def test_probes_that_begin_alike_share_requests():
    engine = FakeVLLM(MODEL)
    read(engine)
    asked = [(prompt, fields["logprob_token_ids"]) for prompt, fields in engine.requests]
    # The longest prefix comes first, one request a place: after "10", after "10 4", and after each answer.
    assert asked[0] == ([*TRACE[:9], 10], [4])
    assert [(prompt[9:], ids) for prompt, ids in asked if prompt[:9] == TRACE[:9]] == [
        ([10], [4]),
        ([10, 4], [5, 6, 0, 2]),
        ([10, 4, 5], [7, 8, 11]),
        ([10, 4, 6], [6]),
        ([10, 4, 6, 6], [7, 8, 11]),
    ]
    assert len(engine.requests) == 10
    assert all(prompt[:4] == TRACE[:4] for prompt, _ in engine.requests)


def test_what_is_asked_of_vllm_does_not_depend_on_how_the_rollout_samples():
    assert vllm_tree.sampling_fields([5, 7], 0.7) == {
        "max_tokens": 1,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "logprob_token_ids": [5, 7],
        "detokenize": False,
    }


def test_answers_that_begin_with_another_ride_along():
    probes, _ = parse_request({"read_probes": PROBES}, 12, 100, 12)
    assert [(path.position, path.start, path.token_ids) for path in paths_of(probes)] == [
        (4, 1, (10, 4, 6, 6)),
        (9, 1, (10, 4, 6, 6)),
        (4, 1, (10, 4, 5)),
        (9, 1, (10, 4, 5)),
    ]
    engine = FakeVLLM(MODEL)
    read(engine, way=vllm_forced.read_places)
    # The longest prefix comes first, and the opening is part of the prompt.
    assert [prompt for prompt, _ in engine.requests][:2] == [[*TRACE[:9], 10], [*TRACE[:4], 10]]
    assert [fields["max_tokens"] for _, fields in engine.requests] == [4, 4, 3, 3]


@pytest.mark.parametrize("num_lists", [1, 2, 3, 5])
def test_more_closings_at_a_place_than_a_path_sums(num_lists):
    lists = [tuple(range(start, start + 3)) for start in range(num_lists)]
    probes = [{"position": 5, "token_ids": (4,), "scored_from": 0, "closing_token_ids": ids} for ids in lists]
    engine = FakeVLLM(MODEL)
    check(MODEL, TRACE, probes, read(engine, probes, vllm_forced.read_places))
    assert len(engine.requests) == (num_lists + 1) // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_hand_over_their_numbers_as_log_probabilities(dtype):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[2, 9] = -math.inf
    requests = [
        ForcedRequest([7, 4, 40], [[[5, 6]], [], [[8]]], [0, 1, 2, 3], 1.0, []),
        ForcedRequest([7, 4, 40], [[], [[5, 6, 7], [1]], []], [0, 1, 2, 3], 0.5, [7]),
        # vLLM's list may be longer than what is forced.
        ForcedRequest([9], [[[9]]], [3, 2, 1, 0], 2.0, [9, 9]),
    ]
    log_probs = replace_rows(logits, requests).log_softmax(-1)
    assert log_probs.argmax(-1).tolist() == [7, 4, 9]
    numbers = [(log_probs[row, list(request.channels)] + SHIFT).tolist() for row, request in enumerate(requests)]
    expected = [(logits[row] / request.temperature).log_softmax(-1) for row, request in enumerate(requests)]
    assert numbers[0] == pytest.approx(
        [0, expected[0][7].item(), expected[0][[5, 6]].logsumexp(0).item(), -math.inf], abs=1e-5
    )
    assert numbers[1] == pytest.approx(
        [-1, expected[1][4].item(), expected[1][[5, 6, 7]].logsumexp(0).item(), expected[1][1].item()], abs=1e-5
    )
    assert numbers[2] == pytest.approx([0, -math.inf, -math.inf, -math.inf], abs=1e-5)


def test_an_engine_that_does_not_force_is_noticed():
    class Free(FakeVLLM):
        def _log_probs(self, context, output_ids, fields):
            return self.model.log_probs(context, 1.0)

    with pytest.raises(RuntimeError, match="was forced"):
        read(Free(MODEL), way=vllm_forced.read_places)


def test_an_answer_read_at_the_wrong_step_is_noticed():
    """vLLM's list of what it generated lags behind: an answer of equal tokens would look right."""

    class Late(FakeVLLM):
        def _log_probs(self, context, output_ids, fields):
            return super()._log_probs(context, output_ids[:-1], fields)

    probe = {"position": 5, "token_ids": (4, 4), "scored_from": 0, "closing_token_ids": CLOSING}
    assert NUM_CHANNELS == 4
    with pytest.raises(RuntimeError, match="was forced"):
        read(Late(MODEL), [probe], vllm_forced.read_places)


def test_computed_tokens_are_counted_once():
    found = read(FakeVLLM(MODEL, 4, TRACE), way=vllm_forced.read_places)
    # Two paths of four and of three tokens begin at the place that the first probe reads first.
    assert [result["num_forward_tokens"] for result in found] == [4 + 3, 0, 0] * 2
    assert [result["num_recomputed_tokens"] for result in found] == [0] * 6
    found = read(FakeVLLM(MODEL, 4, TRACE))
    # Places "10" and "10 4" belong to the first probe, which has a third one; the second has none of its own.
    assert [result["num_forward_tokens"] for result in found] == [1 + 2 + 3, 0, 3 + 4] * 2
    assert [result["num_recomputed_tokens"] for result in found] == [0] * 6


@both_ways
def test_what_the_cache_lost_of_a_trace_is_computed_once(way):
    engine = FakeVLLM(MODEL, 4)
    found = read(engine, way=way)
    # Eight of the nine tokens are whole blocks, and the first request at the longest prefix computes them for all.
    assert [result["num_recomputed_tokens"] for result in found] == [0, 0, 0, 8, 0, 0]
    # At most the rest of a block and the probe itself.
    assert max(engine.num_computed[1:]) <= 3 + 4


@pytest.mark.parametrize("num_closing", [1, 127, 128, 129, 400])
def test_a_place_that_is_checked_reads_every_closing_token(num_closing):
    model = TableModel(vocab_size=500)
    closing = tuple(range(100, 100 + num_closing))
    probe = {"position": 3, "token_ids": (5,), "scored_from": 0, "closing_token_ids": closing}
    engine = FakeVLLM(model)
    found = read(engine, [probe])
    check(model, TRACE, [probe], found)
    assert len(engine.requests) == 1 + -(-num_closing // MAX_TOKEN_IDS)
    # What a request without check would have left out: all that does not fit.
    left = list(closing[MAX_TOKEN_IDS:])
    lost = math.exp(model.any_of([*TRACE[:3], 5], left)) if left else 0.0
    assert found[0]["lost_closing_mass"] == pytest.approx(lost, abs=1e-12)
    check(model, TRACE, [probe], read(FakeVLLM(model), [probe], vllm_forced.read_places))


class Ending(TableModel):
    """Answers end with tokens 450 and 300, wherever they stand in the list, and with nothing else worth a word."""

    def log_probs(self, prefix, temperature=1.0):
        return torch.full((500,), -20.0).double().index_fill(0, torch.tensor([300, 450]), 0.0).log_softmax(0)


def test_closing_tokens_with_mass_are_asked_for_from_then_on():
    model, closing = Ending(500), tuple(range(100, 500))
    probes = [
        {"position": at, "token_ids": (5,), "scored_from": 0, "closing_token_ids": closing} for at in (3, 5, 7, 9)
    ]
    engine = FakeVLLM(model)
    first = read(engine, probes)
    # Nothing was known before: the first place in the list was read in full, and says what the others lost.
    assert first[0]["closing_log_prob"] == pytest.approx(0.0, abs=1e-5)
    assert [result["lost_closing_mass"] > 0.99 for result in first] == [True, False, False, False]
    engine.requests.clear()
    again = read(engine, probes)
    assert [result["closing_log_prob"] for result in again] == pytest.approx([0.0] * 4, abs=1e-5)
    assert again[0]["lost_closing_mass"] < 1e-5
    # Four places for tokens, four for ends, and three requests more for the one that is checked.
    assert len(engine.requests) == 4 + 4 + 3


def test_tokens_with_mass_that_are_more_than_a_request_holds_are_all_asked_for():
    mass = ClosingMass()
    mass.see({token: math.log(0.004) for token in range(300, 500)} | {7: -30.0})
    assert sorted(mass.chosen(tuple(range(500)), 50)) == list(range(300, 500))
    assert mass.chosen(tuple(range(500)), 202)[200:] == [0, 1]
    assert ClosingMass().chosen((5, 3, 9), 2) == [5, 3]


def test_closing_tokens_of_several_probes_at_a_place_share_its_room():
    first, second = tuple(range(100, 400)), tuple(range(390, 490))
    place = (3, (5,))
    probes = [
        {"position": 3, "token_ids": [5], "closing_token_ids": first},
        {"position": 3, "token_ids": [5], "closing_token_ids": second},
        {"position": 3, "token_ids": [5, 9], "closing_token_ids": (1,)},
    ]
    parsed, _ = parse_request({"read_probes": probes}, 12, 100, 500)
    asked = questions_of(parsed)[place]
    # What a probe has next is never left out; then the likeliest of each list in turn.
    assert list(asked.next_ids) == [9] and asked.room == MAX_TOKEN_IDS - 1
    assert asked.closing_ids()[:4] == [100, 390, 101, 391] and len(asked.closing_ids()) == 390


@both_ways
def test_a_probe_may_have_no_tokens_or_no_closings(way):
    probes = [{"position": 5, "token_ids": [], "closing_token_ids": CLOSING}, {"position": 5, "token_ids": [4]}]
    check(MODEL, TRACE, probes, read(FakeVLLM(MODEL), probes, way))
    assert read(FakeVLLM(MODEL), [], way) == []


def test_impossible_tokens():
    def impossible(output):
        for entry in output.outputs[0].logprobs[0].values():
            entry.logprob = -math.inf
        return output

    (result,) = read(FakeVLLM(MODEL, edit=impossible), PROBES[:1])
    assert result["token_log_probs"][1:] == [-math.inf] * 2 and result["closing_log_prob"] == -math.inf


def _without(name, value):
    def edit(output):
        setattr(output.outputs[0], name, value)
        return output

    return edit


def _no_outputs(output):
    output.outputs = []
    return output


def _not_a_number(output):
    next(reversed(output.outputs[0].logprobs[0].values())).logprob = math.nan
    return output


def _another_token(output):
    output.outputs[0].logprobs = [{} for _ in output.outputs[0].logprobs]
    return output


@pytest.mark.parametrize(
    "edit, error, message",
    [
        (_without("finish_reason", "abort"), RuntimeError, "was aborted"),
        (_without("logprobs", None), RuntimeError, "was aborted"),
        (_without("logprobs", []), RuntimeError, "was aborted"),
        (_no_outputs, RuntimeError, "no output"),
        (_another_token, RuntimeError, "no log-probability of the tokens"),
        (_not_a_number, ValueError, "not numbers"),
    ],
)
@both_ways
def test_an_answer_that_is_none_is_an_error_and_never_a_number(way, edit, error, message):
    with pytest.raises(error, match=message):
        read(FakeVLLM(MODEL, edit=edit), way=way)


def test_no_output_at_all_is_an_error():
    with pytest.raises(RuntimeError, match="aborted"):
        completion_of(None, 1)


@pytest.mark.parametrize("changes", [{"token_ids": [12]}, {"closing_token_ids": [-1]}])
def test_tokens_that_the_model_has_not_are_refused(changes):
    probe = {"position": 3, "token_ids": [11], "closing_token_ids": [0]}
    assert parse_request({"read_probes": [probe]}, 12, 100, vocab_size=12)
    with pytest.raises(ValueError, match="the model has 12"):
        parse_request({"read_probes": [probe | changes]}, 12, 100, vocab_size=12)


def test_the_longest_probe_leaves_room_for_one_token():
    probe = PROBES[0] | {"token_ids": (1,) * 95}
    assert len(read(FakeVLLM(MODEL), [probe], max_model_len=100)) == 1
    with pytest.raises(ValueError, match="a probe has 100 tokens with its prefix, max_model_len=100 leaves no room"):
        read(FakeVLLM(MODEL), [probe | {"token_ids": (1,) * 96}], max_model_len=100)
