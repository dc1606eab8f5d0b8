"""Each kind of measurement against a second way to compute it."""

import asyncio
import math

import numpy as np
import pytest
import torch

from rredcot_verl.analyze.attribution import Attributor
from rredcot_verl.analyze.budget import Budget, Stopwatch, describe_duration, parse_duration
from rredcot_verl.analyze.cuttings import cut, parse_cuttings
from rredcot_verl.analyze.gradients import SKETCH_DIM, GradientSketcher
from rredcot_verl.analyze.hidden import HiddenReader, parse_layers
from rredcot_verl.analyze.inputs import Problem
from rredcot_verl.analyze.model import Policy
from rredcot_verl.analyze.probes import Prober
from rredcot_verl.analyze.records import TraceRecord
from rredcot_verl.analyze.verifier import Claim, Verifier, load_function
from rredcot_verl.config.schema import parse
from rredcot_verl.core.self_value import geometric_value, joint_value
from rredcot_verl.passes.hidden_states import project, random_projection
from rredcot_verl.probes.elicitation import Elicitation
from rredcot_verl.probes.values import ProbeScore, self_values
from rredcot_verl.probes.vocabulary import Vocabulary
from tests.agent.test_scorer_on_cpu import make_response, make_scorer
from tests.probes.tiny_tokenizers import byte_level
from tests.tiny_model import build_tiny_model, make_tokenizer

MODEL = build_tiny_model()
TOKENIZER = make_tokenizer()
POLICY = Policy(MODEL, TOKENIZER, (TOKENIZER.eos_token_id,), 512)
SETTINGS = parse({"segmentation": {"min_tokens": 2}})
TEXTS = ("1+1=2\nso 2+3=5\nAnswer: 5", "I guess\nit is\n\\boxed{7}", "no answer at all, but three\nlines\n")
BOUNDARIES = ([0, 6, 15, 24], [0, 8, 14, 23], [0, 9, 28, 34])


def make_elicitation() -> Elicitation:
    return Elicitation(Vocabulary(TOKENIZER, SETTINGS.segmentation.keywords), SETTINGS)


def make_traces(elicitation: Elicitation):
    prompt = TOKENIZER.encode("2+3=")
    traces, read = [], []
    for number, text in enumerate(TEXTS):
        ids = TOKENIZER.encode(text)
        answer = elicitation.read(ids, prompt)
        read.append(answer)
        start = answer.start if answer else None
        traces.append(
            TraceRecord(number, "0", "2+3=", text, prompt, ids, [-0.5] * len(ids), float(number == 0), "5", start)
        )
    return traces, read


PROBLEM = Problem("0", "2+3=", [], {"reward_model": {"ground_truth": "5"}})


@pytest.mark.parametrize("pack_tokens", [1, 4096])
def test_probes_are_those_of_sequences_of_their_own(pack_tokens):
    elicitation = make_elicitation()
    traces, read = make_traces(elicitation)
    prober = Prober(POLICY, elicitation, SETTINGS, [1.0, 0.5], pack_tokens, Stopwatch(MODEL.device))
    answers = prober.answers(PROBLEM, list(zip(traces, read, strict=True)))
    assert [(p.text, p.utility) for p in answers.proposals] == [("5", 1.0), ("7", 0.0)]
    assert answers.is_reference == [True, False] and answers.is_group == [True, True]
    work = [(trace, own, boundaries) for trace, own, boundaries in zip(traces, read, BOUNDARIES, strict=True)]
    records = prober.measure(work, "some-3", [answers] * 3)
    assert [(r.trace, r.temperature) for r in sorted(records, key=lambda r: (r.trace, -r.temperature))] == [
        (trace, temperature) for trace in range(3) for temperature in (1.0, 0.5)
    ]
    for record in records:
        trace, own, boundaries = work[record.trace]
        assert (record.seconds is None) == (record.temperature == 0.5) and record.num_tokens > 0
        probes = elicitation.probes(
            trace.prompt_ids,
            trace.response_ids,
            boundaries,
            answers.proposals,
            elicitation.format_for(own),
            own.start if own else len(trace.response_ids),
        )
        scores = [alone(trace, probe, record.temperature) for probe in probes]
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
    elicitation = make_elicitation()
    traces, read = make_traces(elicitation)
    prober = Prober(POLICY, elicitation, SETTINGS, [1.0], 4096, Stopwatch(MODEL.device))
    unknown = Problem("0", "", [], {"reward_model": {"ground_truth": None}})
    answers = prober.answers(unknown, [(traces[1], read[1]), (traces[2], read[2])])
    assert answers.proposals == []
    work = [(traces[1], read[1], BOUNDARIES[1])]
    assert prober.measure(work, "some-3", [answers]) == []
    (cost,) = prober.reference_cost(work, [answers])
    assert cost.what == "probe_reference" and cost.num_tokens == 0


def test_cuttings_are_the_plugins_own():
    block = {"segmentation": {"min_tokens": 2, "num_segments": 4}}
    for cutting in parse_cuttings(
        ["keyword_entropy-4", "fixed-3", "newline-8", "entropy-5", "keyword-2"], parse(block)
    ):
        method, number = cutting.name.rsplit("-", 1)
        scorer = make_scorer({"segmentation": {"min_tokens": 2, "method": method, "num_segments": int(number)}})
        response = make_response(scorer)
        found = cut(cutting, scorer.elicitation, response.response_ids, response.log_probs, response.answer.start)
        assert found == scorer.segment(response)
    assert byte_level() is not None


@pytest.mark.parametrize(
    "name, word",
    [("fixed", "METHOD-NUM"), ("fixed-x", "METHOD"), ("nothing-4", "nothing"), ("fixed-0", "num_segments")],
)
def test_a_bad_cutting_is_named(name, word):
    with pytest.raises(ValueError, match=word):
        parse_cuttings([name], SETTINGS)


def test_weights_of_the_answer_fall_on_the_segments_before_it():
    elicitation = make_elicitation()
    traces, _ = make_traces(elicitation)
    watch = Stopwatch(MODEL.device)
    attributor = Attributor(POLICY, elicitation, SETTINGS.attribution, 1.0, 4096, watch)
    offset = len(traces[0].prompt_ids)
    task = attributor.task(traces[0], BOUNDARIES[0])
    assert TOKENIZER.decode(list(task.token_ids[task.answer_from : task.answer_to])) == "5"
    # The answer's opening starts at 15, so that its own segment weighs nothing.
    assert task.boundaries == (offset, offset + 6, offset + 15)
    work = list(zip(traces, BOUNDARIES, strict=True))
    for method in ("attention_attribution", "input_x_gradient", "integrated_gradients", "leave_one_out"):
        records = {record.trace: record for record in attributor.measure(work, "some-3", method)}
        assert sorted(records) == [0, 1, 2]
        for record in records.values():
            assert len(record.weights) == 3 and record.weights[2] == 0 and min(record.weights) >= 0
        assert records[2].weights == [0.0, 0.0, 0.0] and records[2].num_tokens == 0
        assert sum(records[0].weights) > 0 and records[0].seconds > 0
        assert watch.seconds[method] > 0


def test_hidden_states_are_those_of_the_trace_alone():
    traces, _ = make_traces(make_elicitation())
    reader = HiddenReader(POLICY, [0, 1], 8, 3, 4096, Stopwatch(MODEL.device))
    found = reader.measure(traces, [own[:-1] for own in BOUNDARIES])
    for trace, boundaries, own in zip(traces, BOUNDARIES, found, strict=True):
        with torch.no_grad():
            output = MODEL(torch.tensor([trace.prompt_ids + trace.response_ids]), output_hidden_states=True)
        for offset in boundaries[:-1]:
            place = len(trace.prompt_ids) + offset - 1
            # The library applies the last norm to the last entry, so the first layer is compared.
            state = output.hidden_states[1][0, place : place + 1]
            expected = project(state, random_projection(state.shape[1], 8, 3))[0]
            assert own[offset]["layer_0"] == pytest.approx(expected.numpy(), abs=1e-4)
            assert own[offset]["layer_1"].shape == (8,)
    costs = reader.cost(traces, BOUNDARIES)
    assert sorted((c.trace, c.what) for c in costs) == [(t, w) for t in range(3) for w in ("hidden", "log_prob")]
    assert sum(c.num_tokens for c in costs) == sum(len(t.prompt_ids) + len(t.response_ids) for t in traces)


def test_layers_are_counted_from_either_end():
    assert parse_layers(["-2", "1", "0"], 2) == [0, 1]
    assert parse_layers(["all"], 3) == [0, 1, 2]
    for bad in ("2", "x"):
        with pytest.raises(ValueError, match="--layers"):
            parse_layers([bad], 2)


def test_sketches_of_segments_add_up_and_keep_inner_products():
    traces, _ = make_traces(make_elicitation())
    sketcher = GradientSketcher(POLICY, 0.8, 0, Stopwatch(MODEL.device))
    sketches = {trace.trace: sketcher.measure(trace, own) for trace, own in zip(traces, BOUNDARIES, strict=True)}
    assert all(each.shape == (3, SKETCH_DIM) for each in sketches.values())
    whole = sketcher.measure(traces[0], [0, len(traces[0].response_ids)])
    assert np.allclose(whole[0], sketches[0].sum(0), atol=1e-3 * np.abs(whole).max())
    full = {}
    for trace in traces:
        ids = torch.tensor([trace.prompt_ids + trace.response_ids])
        log_probs = (MODEL(ids).logits[0] / 0.8).log_softmax(-1)
        own = torch.arange(len(trace.prompt_ids) - 1, ids.shape[1] - 1)
        total = log_probs[own, ids[0, own + 1]].sum()
        full[trace.trace] = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(MODEL.parameters()))])
    totals = {trace: each.sum(0) for trace, each in sketches.items()}
    for first in range(3):
        for second in range(3):
            exact = float(full[first] @ full[second])
            scale = float(full[first].norm() * full[second].norm())
            assert abs(float(totals[first] @ totals[second]) - exact) < 5 / math.sqrt(SKETCH_DIM) * scale


async def slow_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    await asyncio.sleep(0)
    return {"score": float(solution_str == ground_truth) + bonus, "acc": True}


def test_verifiers_plain_and_async_are_asked_once_for_equal_claims(tmp_path):
    claims = [Claim("5", "x", "5"), Claim("6", "x", "5"), Claim("5", "x", "5")]
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
