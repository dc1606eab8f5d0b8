"""Weights of segments: which answer, which segments, what travels, and what becomes of the weights."""

import copy

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf, open_dict

from rredcot_verl.passes.attribution_task import AttributionPlan, decode_plan, encode_plan
from rredcot_verl.passes.leave_one_out import leave_one_out_tasks, leave_one_out_weights
from rredcot_verl.sources.base import PassRequest
from rredcot_verl.sources.record import Record, Status
from rredcot_verl.sources.response import Response
from tests.passes.architectures import build_model, plain_log_probs, random_traces
from tests.probes.tiny_tokenizers import byte_level, encode
from tests.sources.world import PROMPT, TEMPERATURE, Agent, SequenceWorkers, World, source_of

ATTENTION, GRADIENT, LEFT_OUT = SOURCES = ("attention_attribution", "gradient_attribution", "leave_one_out")
TOKENIZER = byte_level()
FIRST, SECOND = "First, 12 + 3 = 15.\n\n", "Wait, let me see, but so 3.\n"
ANSWER = "So the answer is \\boxed{15}.\n"


def plan_of(agent: Agent, response: Response, boundaries: list[int]) -> AttributionPlan | None:
    return agent.source.plan_for_answer(response, boundaries)


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
    agent = Agent("attention_attribution")
    ids, starts = offsets(FIRST, SECOND, "So the answer is ", "\\boxed{15}.\n", after)
    response = agent.response(response_ids=ids, references="72")
    assert response.answer.start == starts[3]
    plan = plan_of(agent, response, starts)
    before, answer = text_of(plan, response)
    assert (before, answer) == (TOKENIZER.decode(PROMPT) + FIRST + SECOND + "So the answer is \\boxed{", "15")
    # The segment with the answer, and what follows it, are not there.
    assert segments_of(plan, response) == [FIRST, SECOND, "So the answer is "]
    assert plan.answer_to == len(sequence_of(plan, response))


def test_tokens_that_hold_more_than_the_answer():
    """A brace around the answer may be part of its first or last token: the token is the answer's."""
    agent = Agent("attention_attribution")
    ids, starts = offsets(FIRST, "It is ", "\\boxed{\\frac{1}{2}}\n")
    response = agent.response(response_ids=ids, references="72")
    assert text_of(plan_of(agent, response, starts), response)[1] == "{\\frac{1}{2}}\n"
    ids, starts = offsets(FIRST, "Answer: 4\n")
    response = agent.response(response_ids=ids, references="72")
    assert text_of(plan_of(agent, response, starts), response)[1].strip() == "4"


def test_of_a_segment_that_the_answer_cuts_in_two_the_part_before_it_weighs():
    agent = Agent("attention_attribution")
    ids, starts = offsets(FIRST, SECOND + ANSWER)
    response = agent.response(response_ids=ids, references="72")
    assert starts[1] < response.answer.start < starts[2]
    before = TOKENIZER.decode(response.response_ids[starts[1] : response.answer.start])
    assert segments_of(plan_of(agent, response, starts), response) == [FIRST, before]


@pytest.mark.parametrize("name", SOURCES)
def test_the_plan_is_left_for_the_training_engine(name):
    agent = Agent(name)
    response = agent.response(FIRST + SECOND + ANSWER)
    plan = agent.record(response)
    record, cuts = plan.record, plan.record.segment_boundaries
    assert record.status is Status.SCORED and record.measuring_seconds == 0.0
    assert set(plan.rows) == set(agent.source.payload_fields)
    found = decode_plan(plan.rows[agent.source.payload_fields[0]])
    assert found == plan_of(agent, response, cuts)
    parts = [after - before for before, after in zip(found.boundaries, found.boundaries[1:], strict=False)]
    assert record.payload == {"num_weights": len(parts)} and len(parts) < len(cuts) - 1
    assert record.num_probes == (1 + len(parts) if name == LEFT_OUT else 1)
    # The whole trace once; forward and backward; once more without each segment.
    length = found.answer_to
    expected = {ATTENTION: length, GRADIENT: 2 * length, LEFT_OUT: (1 + len(parts)) * length - sum(parts)}
    assert record.num_probe_tokens == expected[name]
    for room, status in ((length, Status.SCORED), (length - 1, Status.TOO_LONG)):
        limited = Agent(name, max_length=room).record(response)
        assert limited.record.status is status and bool(limited.rows) == (status is Status.SCORED)


@pytest.mark.parametrize("text", [FIRST + SECOND, "\\boxed{15}" + FIRST, "<think>" + FIRST + ANSWER])
def test_without_an_answer_or_anything_before_it_there_is_one_segment(text):
    agent = Agent(ATTENTION)
    plan = agent.record(agent.response(text))
    assert plan.record.status is Status.NO_PROPOSAL and plan.record.segment_boundaries == [] and not plan.rows


LENGTHS = (24, 30, 6, 1)
TRACES = random_traces(LENGTHS)
KEYS = ["a_0_0", "a_1_0", "b_0_0", "pad_0_0"]
PLANS = [AttributionPlan((3, 8, 14), 17, 20), AttributionPlan((2, 12, 12, 25), 26, 28)]
RECORDS = [
    Record(Status.SCORED, [0, 5, 11, 16, 21], {"num_weights": 2}),
    Record(Status.SCORED, [0, 10, 11, 23], {"num_weights": 3}),
    Record(Status.NO_PROPOSAL),
    None,
]


def make_world(monkeypatch, records=RECORDS, **columns) -> World:
    return World(monkeypatch, records, KEYS, [1.0, 0.0, 1.0, 0.0], [21, 23, 4, 1], **columns)


@pytest.mark.parametrize("name, request_", [(ATTENTION, "attention"), (GRADIENT, "gradient")])
def test_what_the_training_engine_is_told(monkeypatch, name, request_):
    source = source_of(name)
    assert source.passes(make_world(monkeypatch).recorded()) == (PassRequest(request_, fuses=False),)
    source.measure(make_world(monkeypatch).recorded(), None)


@pytest.mark.parametrize("name", SOURCES)
def test_shares_of_the_outcome_by_weight(monkeypatch, name):
    """b = 0.5: R - b is shared by the segments before the answer; the others get nothing."""
    source = source_of(name)
    world = make_world(monkeypatch).put(**{source.result_fields[0]: [[1.0, 3.0], [0.0, 0.0, 2.0], [0.0], [0.0]]})
    values = source.values(world.rows())
    assert values == [[0.5, 0.625, 1.0, 1.0], [0.5, 0.5, 0.5], [], []]
    # Where no segment weighs anything, nothing is said of them.
    world.put(**{source.result_fields[0]: [[0.0, 0.0], [1.0, 1.0, 2.0], [0.0], [0.0]]})
    assert source.values(world.rows()) == [[], [0.5, 0.375, 0.25], [], []]


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_leave_one_out_by_sequences(monkeypatch, num_ranks):
    """Against the whole trace's log-probability of the answer and that without each segment, one at a time."""
    model, source = build_model("qwen3-untied"), source_of(LEFT_OUT)
    payloads = [encode_plan(plan) for plan in PLANS] + [[-1], [-1]]
    world = make_world(monkeypatch, input_ids=TRACES, **{source.payload_fields[0]: payloads})
    workers = SequenceWorkers(model, num_ranks)
    source.measure(world.recorded(), workers.as_workers())
    found = world.column(source.result_fields[0])
    for weights, plan, trace in zip(found, PLANS, TRACES, strict=False):
        log_probs = [
            plain_log_probs(model, list(task.token_ids), TEMPERATURE)[task.answer_from - 1 : task.answer_to - 1]
            for task in leave_one_out_tasks(plan.task(trace))
        ]
        assert weights == pytest.approx(leave_one_out_weights([each.sum().item() for each in log_probs]), abs=1e-4)
        assert len(weights) == len(plan.boundaries) - 1
    assert any(found[0] + found[1]) and found[2:] == [[0.0], [0.0]]
    # Three sequences for the first row, four for the second, filled up to a multiple of the ranks.
    assert [len(call) for call in workers.calls] == [7 if num_ranks == 1 else 9]
    assert source.passes(world.recorded()) == ()


@pytest.mark.parametrize("name", SOURCES)
def test_a_batch_in_which_nothing_waits(monkeypatch, name):
    world, source = make_world(monkeypatch, [Record(Status.NO_PROPOSAL)] * 3 + [None]), source_of(name)
    source.measure(world.recorded(), None)
    assert source.passes(world.recorded()) == () and source.values(world.rows()) == [[]] * 4


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("bad", [[0.5], [0.5, float("nan")], [0.5, -0.1], [0.5, float("inf")], [0.1, 0.2, 0.3]])
def test_weights_that_are_none_stop_the_training(monkeypatch, name, bad):
    source = source_of(name)
    world = make_world(monkeypatch).put(**{source.result_fields[0]: [bad, [0.0] * 3, [0.0], [0.0]]})
    with pytest.raises(RuntimeError, match="for the segments of a_0_0, expected 2"):
        source.values(world.rows())


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
    ("actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size", 4, SOURCES[:2]),
    ("actor_rollout_ref.model.use_fused_kernels", True, SOURCES[:2]),
    ("actor_rollout_ref.model.enable_activation_offload", True, SOURCES[1:2]),
]


@pytest.mark.parametrize("name", SOURCES)
def test_who_measures(config, name, caplog):
    choice = source_of(name).choose_engine(config)
    assert (choice.engine, choice.share_prefix) == ("actor", name != LEFT_OUT)
    (said,) = caplog.records
    assert said.getMessage().startswith(f"rredcot: {name}: {choice.what}, by actor; ")


@pytest.mark.parametrize("key, value, refused", OBSTACLES)
def test_engines_that_cannot_are_named_before_the_run(config, key, value, refused):
    config = copy.deepcopy(config)
    with open_dict(config):
        OmegaConf.update(config, key, value, force_add=True)
    for name in SOURCES:
        if name not in refused:
            source_of(name).choose_engine(config)
            continue
        with pytest.raises(ValueError, match=f"adv_estimator={name} needs.*leave_one_out runs on any engine") as error:
            source_of(name).choose_engine(config)
        assert f"{key.rpartition('.')[2]}={value}" in str(error.value)
