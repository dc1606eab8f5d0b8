"""Attribution from the response to the weights in its record: which answer, which segments, what travels."""

import asyncio
import copy
import dataclasses

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from rredcot_verl.config.schema import parse
from rredcot_verl.passes.attribution import attention_attribution, gradient_attribution, leave_one_out_attribution
from rredcot_verl.passes.attribution_protocol import ATTENTION, GRADIENT, OPTIONS, PLANS, WEIGHTS
from rredcot_verl.passes.attribution_task import NO_PLAN, AttributionPlan, decode_plan, encode_plan
from rredcot_verl.passes.protocol import PASS
from rredcot_verl.probes.elicitation import Elicitation
from rredcot_verl.probes.vocabulary import Vocabulary
from rredcot_verl.run.capabilities import why_no_attribution
from rredcot_verl.sources import attribution as attribution_pass
from rredcot_verl.sources.attribution import (
    AttributionPass,
    AttributionSource,
    num_tokens,
    weighed,
    without_attribution,
)
from rredcot_verl.sources.record import NO_PROPOSAL, PLANNED, SCORED, TOO_LONG, CreditRecord
from rredcot_verl.sources.response import Response
from rredcot_verl.trainer import batch as batch_module
from tests.fake_queue import stand_in
from tests.passes.architectures import build_model, random_traces
from tests.probes.tiny_tokenizers import byte_level, encode

SOURCES = ("attention_attribution", "gradient_attribution", "leave_one_out")
TOKENIZER = byte_level()
PROMPT = encode(TOKENIZER, "What is 12 + 3?\n")
FIRST, SECOND = "First, 12 + 3 = 15.\n\n", "Wait, let me see, but so 3.\n"
ANSWER = "So the answer is \\boxed{15}.\n"


def make_source(source="attention_attribution", max_length=10**6, **block) -> AttributionSource:
    settings = parse(block)
    return AttributionSource(settings, source, Elicitation(Vocabulary(TOKENIZER), settings), max_length)


def make_response(source: AttributionSource, ids: list[int], **fields) -> Response:
    defaults = {
        "prompt_ids": PROMPT,
        "response_ids": ids,
        "response_mask": [1] * len(ids),
        "log_probs": None,
        "reward": 1.0,
        "references": "72",
        "request_id": "request-1",
        "answer": source.elicitation.read(ids) if ids else None,
    }
    return Response(**(defaults | fields))


def offsets(*texts: str) -> tuple[list[int], list[int]]:
    """Tokens of the texts, and where each starts and the last one ends."""
    ids: list[int] = []
    starts = [0]
    for text in texts:
        ids += encode(TOKENIZER, text)
        starts.append(len(ids))
    return ids, starts


def sequence_of(plan: AttributionPlan, response: Response) -> list[int]:
    return list(plan.task(response.prompt_ids + response.response_ids).token_ids)


def text_of(plan: AttributionPlan, response: Response) -> tuple[str, str]:
    """What stands before the answer, and the answer."""
    ids = sequence_of(plan, response)
    return TOKENIZER.decode(ids[: plan.answer_from]), TOKENIZER.decode(ids[plan.answer_from : plan.answer_to])


def segments_of(plan: AttributionPlan, response: Response) -> list[str]:
    ids = sequence_of(plan, response)
    pairs = zip(plan.boundaries, plan.boundaries[1:], strict=False)
    return [TOKENIZER.decode(ids[start:end]) for start, end in pairs]


@pytest.mark.parametrize("after", ["", "Is it \\box? 3 but 4.\n" * 3])
def test_the_responses_own_answer(after):
    source = make_source()
    ids, starts = offsets(FIRST, SECOND, "So the answer is ", "\\boxed{15}.\n", after)
    response = make_response(source, ids)
    assert response.answer.start == starts[3]
    plan = source.plan(response, starts)
    before, answer = text_of(plan, response)
    assert (before, answer) == (TOKENIZER.decode(PROMPT) + FIRST + SECOND + "So the answer is \\boxed{", "15")
    # The segment with the answer, and what follows it, are not there.
    assert segments_of(plan, response) == [FIRST, SECOND, "So the answer is "]
    assert plan.num_tokens == plan.answer_to == len(sequence_of(plan, response)) and not plan.appended


def test_tokens_that_hold_more_than_the_answer():
    """A brace around the answer may be part of its first or last token: the token is the answer's."""
    source = make_source()
    ids, starts = offsets(FIRST, "It is ", "\\boxed{\\frac{1}{2}}\n")
    response = make_response(source, ids)
    assert text_of(source.plan(response, starts), response)[1] == "{\\frac{1}{2}}\n"
    ids, starts = offsets(FIRST, "Answer: 4\n")
    response = make_response(source, ids)
    assert text_of(source.plan(response, starts), response)[1].strip() == "4"


def test_a_segment_that_the_answer_cuts_in_two_is_the_answers():
    source = make_source()
    ids, starts = offsets(FIRST, SECOND + ANSWER)
    response = make_response(source, ids)
    assert starts[1] < response.answer.start < starts[2]
    assert segments_of(source.plan(response, starts), response) == [FIRST]


def test_the_reference_answer_in_place_of_the_responses_own():
    source = make_source(attribution={"target": "reference"})
    ids, starts = offsets(FIRST, SECOND, "So the answer is ", "\\boxed{15}.\n")
    response = make_response(source, ids)
    plan = source.plan(response, starts)
    before, answer = text_of(plan, response)
    assert (before, answer) == (TOKENIZER.decode(PROMPT) + FIRST + SECOND + "So the answer is \\boxed{", "72")
    assert segments_of(plan, response) == [FIRST, SECOND, "So the answer is "]


@pytest.mark.parametrize("end", ["<|im_end|>", ""])
def test_the_reference_answer_after_a_response_without_one(end):
    """Before the token that ends the turn, and in the format that other responses use."""
    source = make_source(attribution={"target": "reference"})
    ids, starts = offsets(FIRST, SECOND)
    ids = [*ids, *([TOKENIZER.convert_tokens_to_ids(end)] if end else [])]
    response = make_response(source, ids)
    assert response.answer is None
    source.elicitation.read(encode(TOKENIZER, ANSWER))
    plan = source.plan(response, [*starts[:-1], len(ids)])
    before, answer = text_of(plan, response)
    assert before == TOKENIZER.decode(PROMPT) + FIRST + SECOND + "The final answer is \\boxed{"
    assert answer == "72" and segments_of(plan, response) == [FIRST, SECOND]


@pytest.mark.parametrize("references", [None, "", [], {"tests": 1}, "日本"])
def test_a_reference_that_is_none_or_cannot_be_written(references):
    source = make_source(attribution={"target": "reference"})
    ids, starts = offsets(FIRST, ANSWER)
    response = make_response(source, ids, references=references)
    writable = references == "日本"
    assert (source.plan(response, starts) is None) != writable
    second = dataclasses.replace(response, references=["", "72"])
    assert text_of(source.plan(second, starts), second)[1] == "72"


def record_of(source, response, boundaries) -> CreditRecord:
    return asyncio.run(source.record(response, None, boundaries))


@pytest.mark.parametrize("name", SOURCES)
def test_the_record_waits_for_the_training_engine(name):
    source = make_source(name)
    ids, starts = offsets(FIRST, SECOND, "So the answer is ", "\\boxed{15}.\n")
    response = make_response(source, ids)
    record = record_of(source, response, starts)
    plan = source.plan(response, starts)
    assert record.status == PLANNED and record.segment_boundaries == starts
    assert decode_plan(record.attribution) == plan and record.weights == [] == record.self_values
    assert record.num_probes == (4 if name == "leave_one_out" else 1)
    length = len(PROMPT) + starts[3] + len(encode(TOKENIZER, "\\boxed{15"))
    parts = [length - (end - start) for start, end in zip(starts[:3], starts[1:4], strict=True)]
    expected = {
        "attention_attribution": length,
        "gradient_attribution": 2 * length,
        "leave_one_out": length + sum(parts),
    }
    assert record.num_probe_tokens == expected[name]
    assert record_of(make_source(name, max_length=length), response, starts).status == PLANNED
    assert record_of(make_source(name, max_length=length - 1), response, starts).status == TOO_LONG


def test_integrated_gradients_cost_their_steps():
    settings = parse({"attribution": {"gradient": "integrated_gradients", "num_steps": 5}}).attribution
    plan = AttributionPlan(20, (), (2, 9), 12, 14)
    assert num_tokens(plan, "gradient_attribution", settings) == 5 * 2 * 20


@pytest.mark.parametrize("text", [FIRST + SECOND, "\\boxed{15}" + FIRST, "<think>" + FIRST + ANSWER])
def test_without_an_answer_or_anything_before_it_there_is_one_segment(text):
    source = make_source()
    ids, starts = offsets(text)
    record = record_of(source, make_response(source, ids), starts)
    assert record.status == NO_PROPOSAL and record.segment_boundaries == [] == record.attribution


LENGTHS = (24, 30, 6, 1)
TRACES = random_traces(LENGTHS)
KEYS = ["a_0_0", "a_1_0", "b_0_0", "pad_0_0"]
PLANS_OF = [AttributionPlan(20, (), (3, 8, 14), 17, 20), AttributionPlan(25, (4, 5, 6), (2, 12, 12, 25), 26, 28)]
RECORDS = [
    CreditRecord(PLANNED, segment_boundaries=[0, 5, 11, 16, 21], attribution=encode_plan(PLANS_OF[0])),
    CreditRecord(PLANNED, segment_boundaries=[0, 10, 10, 23], attribution=encode_plan(PLANS_OF[1])),
    CreditRecord(NO_PROPOSAL),
    None,
]
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def model():
    return build_model("qwen3-untied")


@pytest.fixture
def queue(monkeypatch):
    return stand_in(monkeypatch, (batch_module, attribution_pass), KEYS, TRACES)


def make_batch(fields=None) -> KVBatchMeta:
    extra_info = {"temperature": 0.1, "global_steps": 3}
    return KVBatchMeta(keys=KEYS, tags=[{}] * 4, partition_id="train", fields=fields, extra_info=extra_info)


class Workers:
    """verl's actor workers: an engine that weighs segments, and log-probabilities of whole sequences."""

    def __init__(self, model, stored) -> None:
        self.model, self.stored, self.seen = model, stored, []

    def compute_log_prob(self, data):
        if isinstance(data, KVBatchMeta):
            return self._weigh(data)
        return self._log_probs(data)

    def _weigh(self, batch: KVBatchMeta) -> None:
        self.seen.append(dict(batch.extra_info))
        plans = [decode_plan(row.tolist()) for row in self.stored[PLANS].unbind()]
        rows = []
        for trace, plan in zip(TRACES, plans, strict=True):
            rows.append(torch.tensor(self._weights(plan.task(trace), batch.extra_info) if plan else [0.0]))
        self.stored[WEIGHTS] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        batch.extra_info = {"of the worker": 1}

    def _weights(self, task, extra_info) -> list[float]:
        if extra_info[PASS] == ATTENTION:
            return attention_attribution(self.model, [task], layers=extra_info[OPTIONS][0])[0]
        method, num_steps = extra_info[OPTIONS]
        temperature = extra_info["temperature"]
        return gradient_attribution(self.model, [task], method=method, num_steps=num_steps, temperature=temperature)[0]

    @torch.no_grad()
    def _log_probs(self, data: TensorDict) -> dict:
        log_probs = []
        for row in data["input_ids"].unbind():
            logits = self.model(row.unsqueeze(0)).logits[0].float() / data["temperature"]
            log_probs.append(logits.log_softmax(-1)[torch.arange(len(row)), torch.cat([row[1:], row[:1]])])
        self.seen.append(len(data))
        return {"log_probs": torch.nested.as_nested_tensor(log_probs, layout=torch.jagged)}


def make_pass(workers, source, num_ranks=1, **settings) -> AttributionPass:
    return AttributionPass(workers, source, parse({"attribution": settings}).attribution, num_ranks, TEMPERATURE, 10)


EXPECTED = {
    ("attention_attribution", "all"): lambda model, task: attention_attribution(model, [task]),
    ("attention_attribution", "last"): lambda model, task: attention_attribution(model, [task], layers="last"),
    ("gradient_attribution", "all"): lambda model, task: gradient_attribution(model, [task], temperature=TEMPERATURE),
    ("leave_one_out", "all"): lambda model, task: leave_one_out_attribution(model, [task], temperature=TEMPERATURE),
}


@pytest.mark.parametrize("source, layers", EXPECTED)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_weights_reach_the_records(queue, model, source, layers, num_ranks):
    workers = Workers(model, queue)
    batch = make_batch(["input_ids"])
    make_pass(workers, source, num_ranks, layers=layers).run(batch, RECORDS)
    assert batch.extra_info == {"temperature": 0.1, "global_steps": 3}
    records = weighed(batch, RECORDS)
    assert [record and record.status for record in records] == [SCORED, SCORED, NO_PROPOSAL, None]
    for record, before, plan, trace in zip(records[:2], RECORDS, PLANS_OF, TRACES, strict=False):
        assert dataclasses.replace(record, status=PLANNED, weights=[]) == before
        (expected,) = EXPECTED[source, layers](model, plan.task(trace))
        padding = len(record.segment_boundaries) - 1 - len(expected)
        assert record.weights == pytest.approx([*expected, *[0.0] * padding], abs=1e-4)
        assert len(record.weights) == len(record.segment_boundaries) - 1
    assert any(records[1].weights)
    assert records[0].weights[-2:] == [0.0, 0.0]
    assert without_attribution(batch).fields == ["input_ids"]
    if source == "leave_one_out":
        # Three sequences for the first row, four for the second, filled up to a multiple of the ranks.
        assert workers.seen == [7 if num_ranks == 1 else 9] and PLANS not in queue
    else:
        assert [row.tolist() for row in queue[PLANS].unbind()[2:]] == [list(NO_PLAN)] * 2


def test_what_the_training_engine_is_told(queue, model):
    workers = Workers(model, queue)
    make_pass(workers, "attention_attribution", layers="last").run(make_batch(), RECORDS)
    make_pass(workers, "gradient_attribution", gradient="integrated_gradients", num_steps=2).run(make_batch(), RECORDS)
    of_both = {
        "calculate_entropy": False,
        "compute_loss": False,
        "temperature": TEMPERATURE,
        "global_steps": 3,
    }
    assert workers.seen == [
        of_both | {PASS: ATTENTION, OPTIONS: ("last",)},
        of_both | {PASS: GRADIENT, OPTIONS: ("integrated_gradients", 2)},
    ]


@pytest.mark.parametrize("source", SOURCES)
def test_a_batch_in_which_nothing_waits(queue, model, source):
    records = [CreditRecord(NO_PROPOSAL)] * 3 + [None]
    assert weighed(make_batch(), records) == records
    # The pass is harmless all the same.
    make_pass(Workers(model, queue), source).run(make_batch(), records)
    assert weighed(make_batch(), records) == records


@pytest.mark.parametrize("bad", [[0.5], [0.5, float("nan")], [0.5, -0.1], [0.5, float("inf")], [0.1, 0.2, 0.3]])
def test_weights_that_are_none_stop_the_training(queue, bad):
    rows = [torch.tensor(bad), torch.zeros(3), torch.zeros(1), torch.zeros(1)]
    queue[WEIGHTS] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    with pytest.raises(RuntimeError, match="for the segments of a_0_0, expected 2"):
        weighed(make_batch(), RECORDS)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_model("qwen3-untied").save_pretrained(folder)
    with initialize_config_module("rredcot_verl.config", version_base=None):
        composed = compose("rredcot_trainer", overrides=["actor_rollout_ref.rollout.name=vllm"])
    with open_dict(composed):
        composed.actor_rollout_ref.model.path = str(folder)
    return composed


OBSTACLES = [
    ("actor_rollout_ref.actor.strategy", "megatron", SOURCES[:2]),
    ("actor_rollout_ref.actor.ulysses_sequence_parallel_size", 2, SOURCES[:2]),
    ("actor_rollout_ref.model.use_fused_kernels", True, SOURCES[:2]),
    ("actor_rollout_ref.model.enable_activation_offload", True, SOURCES[1:2]),
]


@pytest.mark.parametrize("key, value, refused", OBSTACLES)
def test_engines_that_cannot_are_named_before_the_run(config, key, value, refused):
    config = copy.deepcopy(config)
    assert [why_no_attribution(config, source) for source in SOURCES] == [None] * 3
    with open_dict(config):
        OmegaConf.update(config, key, value, force_add=True)
    for source in SOURCES:
        reason = why_no_attribution(config, source)
        assert (reason is None) == (source not in refused)
        if reason is not None:
            assert f"adv_estimator={source}" in reason and f"{key}={value}" in reason.replace(
                "ulysses_sequence_parallel_size=2", f"{key}=2"
            )
            assert "leave_one_out runs on any engine" in reason
