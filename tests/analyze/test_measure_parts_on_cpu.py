"""Each kind of measurement against a second way to compute it."""

import asyncio

import numpy as np
import pytest
import torch

from rredcot_verl.analyze.measured_costs import CostMeasurement
from rredcot_verl.analyze.measured_hidden import HiddenStateMeasurement, parse_layers
from rredcot_verl.analyze.measured_probes import ProbeMeasurement
from rredcot_verl.analyze.measured_truth import TruthMeasurement, load_true_values
from rredcot_verl.analyze.measured_weights import WeightMeasurement
from rredcot_verl.analyze.measuring import Segments
from rredcot_verl.analyze.problems import Problem
from rredcot_verl.analyze.records import TraceRecord
from rredcot_verl.analyze.segmentations import parse_segmentations
from rredcot_verl.analyze.timing import Budget, describe_duration, parse_duration
from rredcot_verl.analyze.verifier import Verifier, load_function
from rredcot_verl.config.schema import parse
from rredcot_verl.core.self_value import geometric_value, joint_value
from rredcot_verl.passes.hidden_states import project, random_projection
from rredcot_verl.probes.values import ProbeScore, self_values
from tests.analyze.context import make_context
from tests.sources.world import Agent
from tests.tiny_model import build_tiny_model, make_tokenizer

MODEL = build_tiny_model()
TOKENIZER = make_tokenizer()
TEXTS = ("1+1=2\nso 2+3=5\nAnswer: 5", "I guess\nit is\n\\boxed{7}", "no answer at all, but three\nlines\n")
BOUNDARIES = ([0, 6, 15, 24], [0, 8, 14, 23], [0, 9, 28, 34])
PROBLEM = Problem("0", "2+3=", [], {"reward_model": {"ground_truth": "5"}})
STARTS = (15, 14, None)


def make(problem=PROBLEM, **options):
    """The traces of a prompt, and what their measurements share."""
    prompt = TOKENIZER.encode("2+3=")
    traces = []
    for number, (text, start) in enumerate(zip(TEXTS, STARTS, strict=True)):
        ids = TOKENIZER.encode(text)
        reward = float(number == 0)
        traces.append(TraceRecord(number, "0", "2+3=", text, prompt, ids, [-0.5] * len(ids), reward, "5", start))
    context = make_context(MODEL, TOKENIZER, traces, dict(enumerate(BOUNDARIES)), [problem], **options)
    assert [answer and answer.start for answer in context.answers.values()] == list(STARTS)
    return traces, context


def units(measurement, traces):
    return [unit for trace in traces for unit in measurement.units(trace)]


def measured(measurement, traces):
    records = list(measurement.measure(units(measurement, traces)))
    wanted = {key for unit in units(measurement, traces) for key in unit.keys}
    assert sorted(record.key for record in records) == sorted(wanted), "what is asked for is what is left"
    return records


@pytest.mark.parametrize("pack_tokens", [1, 4096])
def test_probes_are_those_of_sequences_of_their_own(pack_tokens):
    traces, context = make(max_pack_tokens=pack_tokens, temperature=0.5)
    measurement = ProbeMeasurement(context, traces)
    known = measurement.known["0"]
    assert [(each.proposal.text, each.proposal.utility) for each in known] == [("5", 1.0), ("7", 0.0)]
    assert [(each.is_reference, each.is_group) for each in known] == [(True, True), (False, True)]
    elicitation = context.elicitation
    for record in measured(measurement, traces):
        trace = traces[record.trace]
        assert record.num_tokens > 0
        probes = elicitation.probes(
            trace.prompt_ids,
            trace.response_ids,
            BOUNDARIES[record.trace],
            [each.proposal for each in known],
            elicitation.usual_format(),
        )
        scores = [alone(trace, probe, 0.5) for probe in probes]
        log_probs = torch.tensor(record.log_probs, dtype=torch.float64)
        utilities = torch.tensor(record.utilities, dtype=torch.float64)
        expected = self_values("joint", probes, scores, record.utilities)
        assert joint_value(log_probs, utilities).tolist() == pytest.approx(expected.tolist(), abs=1e-5)
        expected = self_values("geometric", probes, scores, record.utilities)
        found = geometric_value(log_probs, utilities, torch.tensor(record.lengths))
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def alone(trace, probe, temperature) -> ProbeScore:
    sequence = [*(trace.prompt_ids + trace.response_ids)[: probe.position], *probe.token_ids]
    with torch.no_grad():
        log_probs = (MODEL(torch.tensor([sequence])).logits[0] / temperature).log_softmax(-1)
    tokens = [log_probs[probe.position + n - 1, token].item() for n, token in enumerate(probe.token_ids)]
    return ProbeScore(tokens, log_probs[-1, list(probe.closing_token_ids)].logsumexp(0).item(), 0)


def test_a_group_without_a_useful_answer_is_not_probed():
    traces, context = make(Problem("0", "", [], {"reward_model": {"ground_truth": None}}))
    measurement = ProbeMeasurement(context, traces[1:])
    assert measurement.known == {"0": []}
    assert all(record.answers == [] and record.num_tokens == 0 for record in measured(measurement, traces[1:]))
    assert [(cost.what, cost.num_tokens) for cost in measurement.reference_cost(traces[1:])] == [
        ("probe_reference", 0)
    ] * 2


def test_cuttings_are_the_plugins_own():
    num_cuts = 0
    block = {"segmentation": {"min_tokens": 2, "num_segments": 4}}
    for name, rule in parse_segmentations(
        ["keyword_entropy-18", "fixed-9", "newline-18", "entropy-12", "keyword-2"], parse(block)
    ).items():
        method, number = name.rsplit("-", 1)
        agent = Agent(block={"segmentation": {"min_tokens": 2, "method": method, "num_segments": int(number)}})
        response = agent.response()
        segments = Segments({name: rule}, agent.tools.elicitation, agent.tools.response_length)
        trace = TraceRecord(0, "0", "", "", response.prompt_ids, response.response_ids, response.log_probs, 1.0)
        (record,) = segments.measure(segments.units(trace))
        assert record.boundaries == agent.recorder.segment(response)
        num_cuts += len(record.boundaries) - 2
    assert num_cuts == 10


@pytest.mark.parametrize(
    "name, word",
    [("fixed", "METHOD-NUM"), ("fixed-x", "METHOD"), ("nothing-4", "nothing"), ("fixed-0", "num_segments")],
)
def test_a_bad_cutting_is_named(name, word):
    with pytest.raises(ValueError, match=word):
        parse_segmentations([name], parse({}))


def test_weights_of_the_answer_fall_on_the_segments_before_it():
    traces, context = make()
    offset = len(traces[0].prompt_ids)
    task = WeightMeasurement(context, "leave_one_out").task(traces[0])
    assert TOKENIZER.decode(list(task.token_ids[task.answer_from : task.answer_to])) == "5"
    # The answer's opening starts at 15, so that its own segment weighs nothing.
    assert task.boundaries == (offset, offset + 6, offset + 15)
    for method in ("attention_attribution", "input_x_gradient", "leave_one_out"):
        records = {record.trace: record for record in measured(WeightMeasurement(context, method), traces)}
        assert sorted(records) == [0, 1, 2]
        for record in records.values():
            assert len(record.weights) == 3 and record.weights[2] == 0 and min(record.weights) >= 0
        assert records[2].weights == [0.0, 0.0, 0.0] and records[2].num_tokens == 0
        assert sum(records[0].weights) > 0 and records[0].seconds > 0
        assert context.watch.seconds[method] > 0


def test_hidden_states_are_those_of_the_trace_alone():
    traces, context = make()
    measurement = HiddenStateMeasurement(context, [0, 1], 8, 3)
    for trace, boundaries, own in zip(traces, BOUNDARIES, measured(measurement, traces), strict=True):
        with torch.no_grad():
            output = MODEL(torch.tensor([trace.token_ids]), output_hidden_states=True)
        assert own.arrays["offsets"].tolist() == boundaries[:-1]
        for number, offset in enumerate(boundaries[:-1]):
            place = len(trace.prompt_ids) + offset - 1
            # The library applies the last norm to the last entry, so the first layer is compared.
            state = output.hidden_states[1][0, place : place + 1]
            expected = project(state, random_projection(state.shape[1], 8, 3))[0]
            assert own.arrays["layer_0"][number] == pytest.approx(expected.numpy(), abs=1e-4)
            assert own.arrays["layer_1"][number].shape == (8,)
    costs = measured(CostMeasurement(measurement, ProbeMeasurement(context, traces)), traces)
    assert sum(c.num_tokens for c in costs if c.what == "log_prob") == sum(len(t.token_ids) for t in traces)


def test_layers_are_counted_from_either_end():
    assert parse_layers(["-2", "1", "0"], 2) == [0, 1]
    assert parse_layers(["all"], 3) == [0, 1, 2]
    for bad in ("2", "x"):
        with pytest.raises(ValueError, match="--layers"):
            parse_layers([bad], 2)


def length(prompt, response):
    """A task's own value of a state; not known before the first line."""
    return None if "\n" not in response else float(len(prompt) + len(response))


def test_true_values_are_asked_of_the_text_so_far():
    traces, context = make()
    found = measured(TruthMeasurement(context, load_true_values(f"{__name__}:length"), traces), traces)
    expected = [
        [None if "\n" not in text[:b] else float(4 + b) for b in own[:-1]]
        for text, own in zip(TEXTS, BOUNDARIES, strict=True)
    ]
    assert [record.values for record in found] == expected
    assert expected[0] == [None, 10.0, 19.0]


class Counts:
    def __init__(self):
        self.told = []

    def learn(self, prompt, response):
        self.told.append((prompt, response))

    def __call__(self, prompt, response):
        return float(len(self.told))


def test_what_counts_is_told_all_traces_first():
    traces, context = make()
    counts = load_true_values(f"{__name__}:Counts")
    found = measured(TruthMeasurement(context, counts, traces), traces[:1])
    assert found[0].values == [3.0, 3.0, 3.0] and counts.told == [("2+3=", text) for text in TEXTS]


@pytest.mark.parametrize("name", ["", "length", "nowhere:f", f"{__name__}:no_such", f"{__name__}:TEXTS"])
def test_a_missing_function_of_true_values_is_named(name):
    with pytest.raises(ValueError, match="--true-values"):
        load_true_values(name)


async def slow_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    await asyncio.sleep(0)
    return {"score": float(solution_str == ground_truth) + bonus, "acc": True}


def test_verifiers_plain_and_async_are_asked_once_for_equal_claims(tmp_path):
    claims = [(PROBLEM, "5"), (PROBLEM, "6"), (PROBLEM, "5")]
    assert Verifier(slow_score, {"bonus": 0.25}).rewards(claims) == [1.25, 0.25, 1.25]
    calls = []

    def plain(data_source, solution_str, ground_truth, extra_info=None):
        calls.append(solution_str)
        return (np.float32(solution_str == ground_truth), "why")

    assert Verifier(plain).rewards(claims) == [1.0, 0.0, 1.0] and calls == ["5", "6"]
    with pytest.raises(ValueError, match="finite"):
        Verifier(lambda **kwargs: {"score": float("nan")}).rewards(claims)
    file = tmp_path / "reward.py"
    file.write_text("def compute_score(**kwargs):\n    return 1\n\n\ndef other(**kwargs):\n    return 2\n")
    assert load_function(str(file))() == 1
    assert load_function(f"{file}:other")() == 2
    assert load_function("pkg://rredcot_verl.rewards.math").__name__ == "compute_score"
    assert load_function(None).__name__ == "default_compute_score"


@pytest.mark.parametrize(
    "name", ["nowhere.py", "pkg://rredcot_verl.no_such", "pkg://rredcot_verl.rewards.math:no_such"]
)
def test_a_missing_verifier_is_named(name):
    with pytest.raises(ValueError, match="--reward-function"):
        load_function(name)


def test_durations():
    assert [parse_duration(text) for text in ("90s", "30m", "1.5h", "1h30m")] == [90, 1800, 5400, 5400]
    assert [describe_duration(s) for s in (12, 600, 7500)] == ["12 s", "10 min", "2 h 05 min"]
    for bad in ("", "30", "m", "0s", "3 parsecs"):
        with pytest.raises(ValueError, match="--budget"):
            parse_duration(bad)
    assert Budget(None).allows(1e9) and not Budget(10).allows(11)
