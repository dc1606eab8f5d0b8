"""Probes of known answers: from a response to its record, by either reader; and from log-probabilities to values."""

import asyncio
import dataclasses
import math

import pytest
import torch

from rredcot_verl.passes.probe_codec import decode, num_probe_tokens
from rredcot_verl.passes.probe_codec import encode as encode_probes
from rredcot_verl.passes.protocol import FIELDS
from rredcot_verl.probes.probe import Probe
from rredcot_verl.probes.proposals import Proposal
from rredcot_verl.probes.values import ProbePlace
from rredcot_verl.sources.base import PassRequest
from rredcot_verl.sources.group import Group, Member
from rredcot_verl.sources.probes import _drop_long_answers
from rredcot_verl.sources.record import Record, Status
from rredcot_verl.sources.sequences import SeparateSequences
from tests import PATIENCE_S
from tests.passes.architectures import build_model, naive_scores, random_traces
from tests.passes.table_model import FakeServer, TableModel
from tests.probes.tiny_tokenizers import byte_level, encode, sentencepiece_like
from tests.sources.world import PROMPT, TEMPERATURE, TEXT, Agent, SequenceWorkers, World, source_of

NAMES = ("rredcot", "vps", "mig")


def values_of(plan) -> list[float]:
    """What the rollout server gave."""
    assert plan.record.status is Status.SCORED and plan.rows == {}
    return plan.record.payload["values"]


@pytest.mark.parametrize("reward_range", [(0.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_scored_response_equals_direct_computation(reward_range, temperature):
    model = TableModel(len(byte_level()))
    block = {"self_value": {"reward_range": reward_range}}
    agent = Agent(block=block, generate=FakeServer(model).generate, temperature=temperature)
    response = agent.response()
    plan = agent.record(response)
    record = plan.record
    cuts = record.segment_boundaries
    assert cuts[0] == 0 and cuts[-1] == len(response.response_ids)
    assert len(values_of(plan)) == len(cuts) - 1 == record.num_probes > 1 and record.error is None
    tokenizer = byte_level()
    # One prefix has opened an answer itself: nothing is forced there but the answer.
    opened = [cut for cut in cuts if tokenizer.decode(response.response_ids[:cut]).endswith("\\boxed{")]
    assert len(opened) == 1
    low, high = reward_range
    for cut, value in zip(cuts, values_of(plan), strict=False):
        prefix = PROMPT + response.response_ids[:cut]
        opening = "" if cut in opened else "\n\nThe final answer is \\boxed{"
        if tokenizer.decode(prefix).endswith("\n"):
            opening = opening.lstrip("\n")
        given, answer = encode(tokenizer, opening), encode(tokenizer, "15")
        assert encode(tokenizer, opening + "15") == given + answer
        ends = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).startswith("}")]
        log_prob = sum(model.sequence(prefix + given, answer, temperature))
        log_prob += model.any_of(prefix + given + answer, ends, temperature)
        assert value == pytest.approx(low + (high - low) * math.exp(log_prob), abs=1e-6)
    assert record.num_probe_tokens > record.num_probes


def test_both_servers_give_the_same_values():
    """With every closing token summed; what vLLM finds in its cache is garbage."""
    model, block = TableModel(len(byte_level())), {"self_value": {"max_closing_tokens": 64}}
    vllm = FakeServer(model, block_size=4, generated=PROMPT + encode(byte_level(), TEXT))
    first = Agent(block=block, generate=FakeServer(model).generate).record()
    second = Agent(block=block, generate=vllm.generate, rollout_name="vllm").record()
    assert first.record.segment_boundaries == second.record.segment_boundaries
    assert values_of(second) == pytest.approx(values_of(first), abs=1e-9)


def test_a_server_that_fails():
    async def generate(*args, **kwargs):
        raise RuntimeError("out of memory")

    agent = Agent(block={"self_value": {"max_concurrency": 1}}, generate=generate)

    async def three():
        group, response = Group(1), agent.response()
        await group.arrive(0, response.as_member())
        # The slot is given back: as many failures as slots do not block the next one.
        for _ in range(3):
            with pytest.raises(RuntimeError, match="out of memory"):
                await agent.recorder.record(response, group)

    asyncio.run(asyncio.wait_for(three(), PATIENCE_S))


def test_numbers_that_are_no_log_probabilities():
    server = FakeServer(TableModel(len(byte_level())))

    async def generate(*args, **kwargs):
        output = await server.generate(*args, **kwargs)
        output.extra_fields["probe_log_probs"][1]["closing_log_prob"] = float("nan")
        return output

    with pytest.raises(ValueError, match="got log-probability nan"):
        Agent(generate=generate).record()


def test_boundaries_that_do_not_fit_the_context_are_dropped_and_counted():
    server = FakeServer(TableModel(len(byte_level())))
    agent = Agent(generate=server.generate)
    everything, response = agent.record(), agent.response()
    probes = server.requests[0]["sampling_params"]["read_probes"]
    needs = [probe["position"] + len(probe["token_ids"]) + 2 for probe in probes]
    # The answer's own opening is short: its probe may need less than the one before.
    for kept in range(1, len(needs)):
        limit = max(needs[:kept])
        if needs[kept] <= limit:
            continue
        limited = FakeServer(TableModel(len(byte_level())), max_model_len=limit)
        plan = Agent(generate=limited.generate, max_length=limit).record()
        assert plan.record.num_dropped_boundaries == len(needs) - kept
        cuts = everything.record.segment_boundaries[:kept] + [len(response.response_ids)]
        assert plan.record.segment_boundaries == cuts
        assert values_of(plan) == pytest.approx(values_of(everything)[:kept], abs=1e-9)
    record = Agent(max_length=needs[0] - 1).record().record
    assert (record.status, record.num_dropped_boundaries) == (Status.TOO_LONG, len(needs))
    assert record.segment_boundaries == [] and record.num_probes == 0


def test_the_longest_probe_that_is_sent_to_vllm_leaves_room_to_generate():
    whole = FakeServer(TableModel(len(byte_level())))
    Agent(generate=whole.generate).record()
    probe = whole.requests[0]["sampling_params"]["read_probes"][0]
    # The token that ends the answer, and the one that vLLM insists on generating.
    limit = probe["position"] + len(probe["token_ids"]) + 2
    for max_length, status in ((limit - 1, Status.TOO_LONG), (limit, Status.SCORED)):
        server = FakeServer(TableModel(len(byte_level())), max_model_len=max_length)
        record = Agent(generate=server.generate, rollout_name="vllm", max_length=max_length).record().record
        assert record.status is status and bool(server.requests) == (status is Status.SCORED)


@pytest.mark.parametrize("references", [None, "", {"tests": []}, True])
def test_without_a_reference_there_is_no_proposal(references):
    agent = Agent()
    assert agent.record(agent.response(references=references)).record.status is Status.NO_PROPOSAL
    # Another's right answer will do where it may be used.
    agent, others = Agent(block={"self_value": {"proposals": "union"}}), [Member(1.0, "15"), Member(0.0, "16")]
    assert agent.record(agent.response(references=references), others).record.status is Status.SCORED


def test_answers_that_are_too_long_are_left_out_and_counted():
    agent, long = Agent(block={"self_value": {"max_answer_tokens": 4}}), "a long answer of many words"
    record = agent.record(agent.response(references=["15", long])).record
    assert (record.status, record.num_dropped_answers) == (Status.SCORED, 1)
    assert record.num_probes == len(record.payload["values"])
    record = agent.record(agent.response(references=long)).record
    assert (record.status, record.num_dropped_answers) == (Status.NO_PROPOSAL, 1)


def test_how_long_an_answer_is_does_not_depend_on_how_the_response_goes_on():
    # Behind an opening of the response's own it has a token more.
    probes = [Probe(state, 0, 10 + state, (7,) * (5 + state), 2, 2, (9,)) for state in (0, 1)]
    answers = [Proposal("15", 1.0)]
    for limit, kept in ((3, True), (2, False)):
        assert _drop_long_answers(answers, probes, limit) == ((answers, probes) if kept else ([], []))


@pytest.mark.parametrize("score_opening", [False, True])
def test_the_opening_is_no_part_of_the_answers_length(score_opening):
    for limit, status in ((2, Status.SCORED), (1, Status.NO_PROPOSAL)):
        agent = Agent(block={"self_value": {"max_answer_tokens": limit, "score_opening": score_opening}})
        assert agent.record().record.status is status


HALF = "\\frac{1}{2}"


def test_an_answer_that_ends_in_a_brace_has_two_probes_a_boundary():
    natural = encode(byte_level(), "The final answer is \\boxed{" + HALF + "}")
    model = TableModel(len(byte_level()), habit=natural)
    block = {"self_value": {"max_closing_tokens": 64}}
    server = FakeServer(model)
    cpu = Agent(block=block, generate=server.generate)
    vllm = Agent(block=block, generate=FakeServer(model).generate, rollout_name="vllm")
    response = cpu.response(references=["15", HALF])
    first, second = cpu.record(response), vllm.record(response)
    values = values_of(first)
    assert first.record.num_probes == second.record.num_probes == 3 * len(values)
    assert values == pytest.approx(values_of(second), rel=1e-5)
    # The model writes "}}": without the second probe nearly nothing would be left.
    assert min(values[:-1]) > 0.5
    # The last prefix holds the "{" of a number, after which this model writes anything but its habit.
    assert byte_level().decode(response.response_ids[: first.record.segment_boundaries[-2]]).endswith("\\boxed{")
    assert values[-1] < 0.1
    # Every value is the sum over all that was sent: utility 1 for both answers.
    sent = server.requests[0]["sampling_params"]["read_probes"]
    ids = response.prompt_ids + response.response_ids
    proposals = [Proposal("15", 1.0), Proposal(HALF, 1.0)]
    cuts = first.record.segment_boundaries
    kept = cpu.tools.elicitation.probes(response.prompt_ids, response.response_ids, cuts, proposals, "boxed")
    by_position: dict[int, float] = {}
    for probe in sent:
        prefix = ids[: probe["position"]]
        start = next(
            b.scored_from for b in kept if (b.position, list(b.token_ids)) == (len(prefix), probe["token_ids"])
        )
        log_prob = sum(model.sequence(prefix, probe["token_ids"])[start:])
        log_prob += model.any_of([*prefix, *probe["token_ids"]], probe["closing_token_ids"])
        by_position[probe["position"]] = by_position.get(probe["position"], 0.0) + math.exp(log_prob)
    assert values == pytest.approx(list(by_position.values()), rel=1e-5)


def test_both_probes_of_an_answer_that_is_too_long_are_left_out():
    elicitation = Agent().tools.elicitation
    whole, *_ = elicitation.probes(PROMPT, [5, 6], [0, 2], [Proposal(HALF, 1.0)], "boxed")
    length = len(whole.token_ids) - whole.answer_from
    for limit, dropped in ((length, 0), (length - 1, 1)):
        # Probes that were cut short by their merged end do not slip through.
        agent = Agent(block={"self_value": {"max_answer_tokens": limit}})
        record = agent.record(agent.response(references=[HALF, "15"])).record
        assert (record.status, record.num_dropped_answers) == (Status.SCORED, dropped)
        assert record.num_probes == len(record.payload["values"]) * (1 if dropped else 3)


def test_a_ground_truth_that_cannot_be_written_is_not_fatal():
    agent = Agent(tokenizer=sentencepiece_like())
    response = agent.response(references="日本", prompt_ids=encode(agent.tokenizer, "What?"), log_probs=None)
    record = agent.record(response).record
    assert (record.status, record.num_dropped_answers, record.error) == (Status.NO_PROPOSAL, 1, None)
    # The others are probed, as without it.
    both = agent.record(dataclasses.replace(response, references=["日本", "15"]))
    alone = agent.record(dataclasses.replace(response, references="15"))
    assert (both.record.num_dropped_answers, alone.record.num_dropped_answers) == (1, 0)
    assert values_of(both) == pytest.approx(values_of(alone), rel=1e-6)


BY_ACTOR = {"engine": "actor"}


@pytest.mark.parametrize("reward, utility", [(0.0, 0.5), (1.0, 1.0), (3.0, 1.0)])
def test_rewards_of_the_group_are_utilities_in_their_range(reward, utility):
    block = {"self_value": BY_ACTOR | {"reward_range": [-1, 1], "proposals": "group"}}
    # Answers without a reward, and rewards without an answer, are of no use.
    others = (Member(reward, "17"), Member(None, "16"), Member(1.0, None))
    agent = Agent(block=block)
    plan = agent.record(agent.response(reward=-1.0), others)
    assert plan.record.payload["utilities"] == [utility]


PROGRAM = "def f(x):\n    x = x + 1\n    return x\n"
CODE_TEXT = f"Add one to x.\nThen return it.\n\n```python\n{PROGRAM}```\n"


def test_reasoning_and_program_are_segmented_and_programs_are_probed():
    block = {
        "elicitation": {"format": "code"},
        "segmentation": {"method": "newline", "min_tokens": 2, "num_segments": 64},
        "self_value": {
            "form": "geometric",
            "proposals": "union",
            "reference_key": "extra_info.solutions",
            "max_answer_tokens": 64,
            "max_proposals": 2,
        },
    }
    block["self_value"] |= BY_ACTOR
    agent = Agent(block=block)
    response = agent.response(CODE_TEXT, references=["def f(x):\n    return x + 1"], reward=0.5)
    record = agent.record(response, [Member(0.25, "def f(x):\n    return 1"), Member(0.0, None)]).record
    # The reference, and another's program with the fraction of tests it passed; not the response's own.
    assert record.status is Status.SCORED and record.payload["utilities"] == [1.0, 0.25]
    decode_ids, cuts = agent.tools.elicitation.vocabulary.decode, record.segment_boundaries
    starts = [decode_ids(response.response_ids[:k]).rsplit("\n", 1) for k in cuts]
    assert all(rest == "" for _, *rests in starts[1:-1] for rest in rests), "segments start with lines"
    program_from = response.answer.start
    assert sum(0 < k < program_from for k in cuts) >= 1
    assert sum(program_from < k < len(response.response_ids) for k in cuts) >= 2
    block["self_value"]["engine"] = "rollout"
    agent = Agent(block=block)
    assert all(0 < value < 1 for value in values_of(agent.record(response))[:-1])


def test_a_program_over_the_cap_is_dropped_and_counted():
    block = {
        "elicitation": {"format": "code"},
        "self_value": BY_ACTOR
        | {"reference_key": "extra_info.solutions", "proposals": "union", "max_answer_tokens": 12},
    }
    agent = Agent(block=block)
    record = agent.record(agent.response(CODE_TEXT, references=["a = 1", PROGRAM])).record
    assert record.payload["utilities"] == [1.0] and record.num_dropped_answers == 1


# --- read by the training engine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_probes_are_left_for_the_training_engine(name, share_prefix):
    agent = Agent(name, {"self_value": BY_ACTOR | {"share_prefix": share_prefix, "max_closing_tokens": 2}})
    plan = agent.record(agent.response(references=["15", HALF]))
    record, probes = plan.record, decode(plan.rows[FIELDS["probes"].payload])
    assert set(plan.rows) == set(agent.source.payload_fields) == {"rredcot_probes"}
    assert record.status is Status.SCORED and record.payload["utilities"] == [1.0, 1.0]
    # Two answers, the second with two ends, at every boundary but the last.
    assert record.num_probes == len(probes) == 3 * (len(record.segment_boundaries) - 1)
    places = [(probe.state, probe.proposal, len(probe.token_ids) - probe.scored_from + 1) for probe in probes]
    assert record.payload["places"] == [number for place in places for number in place]
    # What they cost: their own tokens, or whole sequences, one for each closing token that is summed.
    sequences = sum(
        (probe.position + len(probe.token_ids) + 1) * min(len(probe.closing_token_ids), 2) for probe in probes
    )
    in_pass = num_probe_tokens(plan.rows[FIELDS["probes"].payload])
    assert record.num_probe_tokens == (in_pass if share_prefix else sequences)
    assert (record.num_recomputed_tokens, record.measuring_seconds) == (0, 0.0)


def test_the_sources_of_probes_cut_and_ask_alike():
    plans = [Agent(name, {"self_value": BY_ACTOR}).record() for name in NAMES]
    for plan in plans[1:]:
        assert plan.rows == plans[0].rows and plan.record.payload == plans[0].record.payload


LENGTHS = (12, 20, 5, 1)
TRACES = random_traces(LENGTHS)
KEYS = ["a_0_0", "a_1_0", "b_0_0", "pad_0_0"]
UTILITIES = [1.0, 0.25]
RANGE = {"reward_range": (-1.0, 3.0)}


def probes_of(length: int) -> list[Probe]:
    """Two answers at three boundaries; the second ends in two ways at one of them, as after a brace."""
    probes = []
    for state, position in enumerate((2, length // 2 + 1, length)):
        probes.append(Probe(state, 0, position, (7, 8, 9), 2, 2, (3, 4, 5)))
        probes.append(Probe(state, 1, position, (7, 8, 10, 11), 2, 1, (5, 3)))
        if state == 1:
            probes.append(Probe(state, 1, position, (7, 8, 10), 2, 1, (60,)))
    return probes


PROBES = [probes_of(LENGTHS[0]), probes_of(LENGTHS[1]), [], []]


def waiting(probes) -> Record:
    places = [number for probe in probes for number in ProbePlace.of(probe)]
    return Record(Status.SCORED, [0, 1, 2, 3], {"utilities": UTILITIES, "places": places})


RECORDS = [waiting(PROBES[0]), waiting(PROBES[1]), Record(Status.NO_PROPOSAL), None]
DONE = [Record(Status.SCORED, [0, 2], {"values": [0.5]}), Record(Status.NO_PROPOSAL), None]
SETTINGS = {"self_value": RANGE | {"share_prefix": False, "max_closing_tokens": 64}}
RESULT = FIELDS["probes"].result


@pytest.fixture(scope="module")
def model():
    return build_model("qwen3-untied")


@pytest.fixture
def world(monkeypatch):
    payloads = [encode_probes(own) for own in PROBES]
    return World(monkeypatch, RECORDS, KEYS, [3.0, -1.0, 3.0, 0.0], input_ids=TRACES, rredcot_probes=payloads)


def expected_values(model, trace, probes) -> list[float]:
    """Summed probability of the answers, by hand: the mass on each boundary, scaled to the range of rewards."""
    values = [0.0] * 3
    for probe in probes:
        log_prob = sum(naive_scores(model, trace, [probe], TEMPERATURE))
        values[probe.state] += UTILITIES[probe.proposal] * math.exp(log_prob)
    return [-1 + 4 * value for value in values]


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("max_tokens_per_call", [1, 60, 2**22])
def test_probes_as_sequences_of_their_own(world, model, monkeypatch, num_ranks, max_tokens_per_call):
    monkeypatch.setattr(SeparateSequences, "MAX_TOKENS_PER_CALL", max_tokens_per_call)
    workers = SequenceWorkers(model, num_ranks)
    source = source_of("rredcot", **SETTINGS)
    source.measure(world.recorded(), workers.as_workers())
    for found, trace, own in zip(world.column(RESULT), TRACES, PROBES, strict=True):
        assert found == pytest.approx(naive_scores(model, trace, own, TEMPERATURE) or [0.0], abs=1e-5)
    num_sequences = sum(len(probe.closing_token_ids) for own in PROBES for probe in own)
    if max_tokens_per_call == 1:
        assert len(workers.calls) == num_sequences
    if max_tokens_per_call == 2**22:
        assert [len(call) for call in workers.calls] == [-(-num_sequences // num_ranks) * num_ranks]
    values = source.values(world.rows())
    assert values[2:] == [[], []]
    for own, trace, probes in zip(values, TRACES, PROBES, strict=False):
        assert own == pytest.approx(expected_values(model, trace, probes) if probes else [], rel=1e-4)
    # New highs of the same probabilities.
    highs = source_of("mig", self_value=RANGE | {"form": "joint"}).values(world.rows())
    assert highs[1] == [values[1][0], max(values[1][:2]), max(values[1])]


def test_ranks_get_sequences_of_equal_length(monkeypatch):
    """As many each, the longest spread; results in the order asked."""
    lengths = [900, 10, 800, 20, 700, 30, 5, 600, 40, 50, 15]

    class Workers(SequenceWorkers):
        def compute_log_prob(self, data):
            rows = list(data["input_ids"].unbind())
            per_rank = len(rows) // self.num_ranks
            self.tokens = [sum(map(len, rows[first : first + per_rank])) for first in range(0, len(rows), per_rank)]
            return {"log_probs": torch.nested.as_nested_tensor([row.float() for row in rows], layout=torch.jagged)}

    workers = Workers(None, 4)
    sequences = [[number] * length for number, length in enumerate(lengths)]
    found = list(SeparateSequences(workers.as_workers()).log_probs(sequences))
    assert [row.tolist() for row in found] == sequences
    assert max(workers.tokens) - min(workers.tokens) <= max(lengths)
    # In the order they came, the first rank would have had 1710 of them and the last 65.
    assert max(workers.tokens) < 1000


def test_fewer_closing_tokens_give_a_lower_bound(world, model):
    rows = []
    for count in (64, 2, 1):
        SeparateSequences(SequenceWorkers(model).as_workers()).read_probes(world.batch, count)
        rows.append(torch.tensor(world.column(RESULT)[0]))
    everything, two, one = rows
    # Three closing tokens, two, and one; counted tokens do not change.
    assert (everything >= two).all() and (two >= one).all()
    ends = [1, 5, 7, 11, 14, 16, 20]
    changed = (two > one).nonzero().flatten().tolist()
    assert set(changed) <= set(ends) and len(changed) >= 6


@pytest.mark.parametrize("name", NAMES)
def test_what_the_training_engine_is_asked_for(world, monkeypatch, name):
    assert source_of(name, self_value=RANGE).passes(world.recorded()) == (PassRequest("probes", fuses=False),)
    fused = source_of(name, self_value=RANGE | {"fuse": True})
    assert fused.passes(world.recorded()) == (PassRequest("probes", fuses=True),)
    # Nothing of a pass where every probe is a sequence of its own, and nothing at all where nothing waits.
    assert source_of(name, **SETTINGS).passes(world.recorded()) == ()
    done = World(monkeypatch, DONE)
    for source in (source_of(name), source_of(name, **SETTINGS)):
        source.measure(done.recorded(), None)
        assert source.passes(done.recorded()) == ()
        assert source.values(done.rows()) == [[0.5], [], []]
    assert RESULT not in {name for fields in done.queue.reads for name in fields}


def test_with_a_hidden_feature_one_pass_reads_both(monkeypatch):
    block = {
        "self_value": BY_ACTOR | {"calibration": "logistic"},
        "readout": {"use_hidden": True, "layer": 1, "dim": 6},
    }
    agent = Agent(block=block)
    plan = agent.record()
    starts = [len(PROMPT) + boundary - 1 for boundary in plan.record.segment_boundaries[:-1]]
    assert set(agent.source.payload_fields) == set(plan.rows) == {"rredcot_probes", "rredcot_hidden_positions"}
    assert plan.rows["rredcot_hidden_positions"] == starts
    hidden = PassRequest("hidden", (1, 6, 0))
    recorded = World(monkeypatch, [plan.record, None]).recorded()
    assert agent.source.passes(recorded) == (PassRequest("probes", fuses=False), hidden)
    # Hidden states are read of what the server has valued, too.
    assert agent.source.passes(World(monkeypatch, DONE).recorded()) == (hidden,)


@pytest.mark.parametrize("bad", [float("nan"), 0.5])
def test_numbers_that_are_none_stop_the_training(world, bad):
    counts = [sum(len(b.token_ids) - b.scored_from + 1 for b in own) or 1 for own in PROBES]
    world.put(**{RESULT: [[bad] * count for count in counts]})
    with pytest.raises(ValueError, match="nan|0.5"):
        source_of("rredcot", self_value=RANGE).values(world.rows())


def test_a_row_of_another_length_is_named(world):
    world.put(**{RESULT: [[0.0] * 3, [0.0], [0.0], [0.0]]})
    with pytest.raises(RuntimeError, match="gave 3 log-probabilities of the probes of a_0_0, expected 21"):
        source_of("rredcot", self_value=RANGE).values(world.rows())


@pytest.mark.parametrize("calibration", ["none", "logistic"])
def test_a_value_does_not_know_the_own_answer(calibration):
    """Among the group's answers, known to be right, it would tell the own outcome at every boundary."""
    agent = Agent(block={"self_value": BY_ACTOR | {"proposals": "group", "calibration": calibration}})
    own_alone = agent.record(others=[Member(0.0, "16"), Member(0.0, "17")]).record
    assert own_alone.status is Status.NO_PROPOSAL
    shared = agent.record(others=[Member(0.0, "16"), Member(1.0, "15")]).record
    assert shared.payload["utilities"] == [1.0]
    # One and the same verdict for both; a verifier may give tensors.
    response = agent.response(reward=torch.tensor(1.0))
    assert agent.record(response, others=[Member(0.0, "16"), Member(1.0, "15")]).record.payload == shared.payload
    assert agent.record(response, others=[Member(1.0, "15")] * 2).record.status is Status.UNIFORM_GROUP


# --- how the group spelled it

SPELLINGS = {"\\dfrac{1}{2}": 3, "0.5": 2, "$\\frac{1}{2}$": 1}
GROUP = [Member(1.0, text) for text, count in SPELLINGS.items() for _ in range(count)] + [Member(0.0, "0.25")]


NO_ANSWER = "so 3.\nWait, let me see.\nFirst, 12 + 3.\n"


@pytest.mark.parametrize("proposals", ["reference", "union", "group"])
def test_the_spellings_of_the_group_are_branches_whose_probabilities_add_up(proposals):
    tokenizer = byte_level()
    # A model that writes the group's favourite, never the reference's.
    model = TableModel(len(tokenizer), habit=encode(tokenizer, "The final answer is \\boxed{\\dfrac{1}{2}}"))
    block = BY_ACTOR | {"proposals": proposals}
    agent = Agent(block={"self_value": block})
    response = agent.response(NO_ANSWER, references=HALF, reward=0.0)
    plan = agent.record(response, GROUP)
    num_texts = len(plan.record.payload["utilities"])
    assert num_texts == (3 if proposals == "group" else 4) and set(plan.record.payload["utilities"]) == {1.0}
    log_probs, expected = [], [0.0] * (len(plan.record.segment_boundaries) - 1)
    for probe in decode(plan.rows[FIELDS["probes"].payload]):
        written = [*(PROMPT + response.response_ids)[: probe.position], *probe.token_ids]
        read = model.sequence(written[: probe.position], list(probe.token_ids))[probe.scored_from :]
        read.append(model.any_of(written, list(probe.closing_token_ids)))
        log_probs += read
        expected[probe.state] += math.exp(sum(read))
    values = agent.source._of_log_probs("key", plan.record, log_probs)
    assert values == pytest.approx(expected) and min(values) > 0.5


def test_a_spelling_costs_its_own_tokens():
    """And not the opening's, where prefixes are shared: in the tree of a boundary it is one branch more."""
    agent, one = Agent(block={"self_value": BY_ACTOR}), Agent(block={"self_value": BY_ACTOR | {"max_proposals": 1}})
    response = agent.response(NO_ANSWER, references=HALF)
    several, alone = agent.record(response, GROUP).record, one.record(response, GROUP).record
    # "{\\" is shared with the reference, and "{" by two of them.
    more = sum(len(encode(byte_level(), text)) for text in ("dfrac{1}{2}", "{", "0.5", "$\\frac{1}{2}$"))
    num_states = len(several.segment_boundaries) - 1
    assert several.num_probe_tokens == alone.num_probe_tokens + num_states * more
    assert alone.payload["utilities"] == [1.0]


@pytest.mark.parametrize(
    "block, known",
    [
        (BY_ACTOR, True),
        (BY_ACTOR | {"share_prefix": False}, False),
        (BY_ACTOR | {"share_prefix": False, "proposals": "union"}, True),
        ({"engine": "rollout"}, False),
        ({"engine": "rollout", "proposals": "union"}, True),
    ],
)
def test_spellings_are_known_where_the_whole_group_is(block, known):
    agent = Agent(block={"self_value": block})
    record = agent.record(agent.response(references=HALF), GROUP).record
    # "}}" makes it two probes for all but "0.5" and "$\\frac{1}{2}$".
    texts = 4 if known else 1
    assert record.num_probes == (len(record.segment_boundaries) - 1) * {4: 6, 1: 2}[texts]
    assert agent.source.needs_all is known


@pytest.mark.parametrize("calibration", ["none", "logistic"])
def test_the_own_spelling_does_not_enter_the_own_values(calibration):
    """It would tell at every boundary how the response ends."""
    agent = Agent(block={"self_value": BY_ACTOR | {"calibration": calibration}})
    response = agent.response("so \\boxed{\\tfrac{1}{2}}\n", references=HALF)
    for others, num_texts in (([Member(0.0, "16")], 1), ([Member(0.0, "16"), Member(1.0, "\\tfrac{1}{2}")], 2)):
        assert agent.record(response, others).record.payload["utilities"] == [1.0] * num_texts
