"""The command as a user runs it: sampled and given traces, going on, budgets, and what it refuses."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from rredcot_verl.analyze import bench
from rredcot_verl.analyze.__main__ import main
from rredcot_verl.analyze.bench import measure
from rredcot_verl.analyze.command_line import read_options
from rredcot_verl.analyze.estimators import CREDITED
from rredcot_verl.analyze.problems import read_prompts, read_traces
from rredcot_verl.analyze.records import load
from rredcot_verl.analyze.trace_maker import PromptEncoder
from tests.tiny_model import make_tiny_data, make_tiny_model, make_tokenizer

VERIFIER = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(ground_truth in solution_str)}
"""
CHECKER = "tests.analyze.test_measure_bench_on_cpu:check_lines"
TRUTH = "tests.analyze.test_measure_bench_on_cpu:true_value"


class Line:
    def __init__(self, start, end, ok):
        self.start, self.end, self.ok = start, end, ok


def check_lines(prompt, response):
    """The second half of a response is wrong."""
    half = len(response) // 2
    return [Line(half, len(response), False), Line(0, half, True)] if response else []


def true_value(prompt, response):
    """Falls with the length."""
    return 1 / (1 + len(response))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    make_tiny_model(folder / "model")
    make_tiny_data(folder, num_rows=4)
    (folder / "verifier.py").write_text(VERIFIER)
    return folder


def command(place, out, *extra, source=("--prompts", "train.parquet")):
    flag, *paths = source
    return [
        *("--model", str(place / "model"), flag, *(str(place / path) for path in paths), "--out", str(place / out)),
        *("--reward-function", str(place / "verifier.py"), "--num-prompts", "2", "--group-size", "3"),
        *("--max-response-tokens", "24", "--rollouts", "4", "--main-rollouts", "8", "--layers", "all", "--dim", "4"),
        *("--set", "segmentation.min_tokens=3", "--cuttings", "fixed-3", "newline-4", "--gradients", "4"),
        *("--line-checker", CHECKER, "--true-values", TRUTH, "--rollout-prompts", "1"),
        *("--num-resamples", "20", *extra),
    ]


@pytest.fixture(scope="module")
def whole(place):
    return measure(read_options(command(place, "whole")))


def by_key(records, *names):
    return {tuple(getattr(record, name) for name in names): record for record in records}


def test_everything_is_measured(place, whole):
    assert [trace.trace for trace in whole.traces] == list(range(6))
    assert [trace.group for trace in whole.traces] == ["0"] * 3 + ["1"] * 3
    assert {(c.trace, c.cutting) for c in whole.cuttings} == {
        (t, c) for t in range(6) for c in ("fixed-3", "newline-4")
    }
    boundaries = {key: record.boundaries for key, record in by_key(whole.cuttings, "trace", "cutting").items()}
    rollouts = by_key(whole.rollouts, "trace", "offset")
    for trace in whole.traces:
        own = {offset for cutting in ("fixed-3", "newline-4") for offset in boundaries[trace.trace, cutting][:-1]}
        # The second prompt has no continuations.
        own = own if trace.group == "0" else set()
        assert {offset for number, offset in rollouts if number == trace.trace} == own
        for offset in own:
            main_state = offset in boundaries[trace.trace, "fixed-3"]
            assert len(rollouts[trace.trace, offset].rewards) == (8 if main_state else 4)
        assert len(trace.log_probs) == len(trace.response_ids)
        assert trace.lines_checked and trace.wrong_to == len(trace.response)
        characters = by_key(whole.cuttings, "trace", "cutting")[trace.trace, "fixed-3"].characters
        assert characters[0] == 0 and characters[-1] == len(trace.response)
    both = {(t, c) for t in range(6) for c in ("fixed-3", "newline-4")}
    assert {(p.trace, p.cutting) for p in whole.probes} == both == {(r.trace, r.cutting) for r in whole.truth}
    for record in whole.truth:
        places = by_key(whole.cuttings, "trace", "cutting")[record.trace, record.cutting].characters
        assert record.values == [1 / (1 + place) for place in places[:-1]]
    assert len(whole.weights) == 6 * 3
    assert {c.what for c in whole.costs} == {"generate", "log_prob", "hidden", "probe_reference"}
    with np.load(place / "whole" / "hidden" / "newline-4.npz") as arrays:
        states = sum(len(boundaries[t, "newline-4"]) - 1 for t in range(6))
        assert arrays["layer_0"].shape == arrays["layer_1"].shape == (states, 4)
        assert arrays["states"][0] == 0 and arrays["traces"].tolist() == sorted(arrays["traces"].tolist())
    gradients = json.loads((place / "whole" / "gradients.json").read_text())
    assert gradients["num_prompts"] == 2 and gradients["whole"]
    assert {row["method"] for row in gradients["rows"]} == {"", *CREDITED}
    run = json.loads((place / "whole" / "run.json").read_text())
    assert run["num_traces"] == {"asked": 6, "made": 6, "whole": 6}
    assert run["main_cutting"] == "fixed-3" and run["layers"] == [0, 1] and run["seconds"]["rollouts"] > 0


def test_a_run_that_was_cut_off_goes_on_to_the_same_numbers(place, whole):
    out = place / "cut"
    shutil.copytree(place / "whole", out)
    # Cut off in the middle of a line, and of a group of traces.
    for name, keep in (("rollouts", 0.4), ("probes", 0.5), ("weights", 0.3), ("costs", 0.8), ("cuttings", 0.5)):
        path = out / f"{name}.jsonl"
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])
    shutil.rmtree(out / "hidden")
    lines = (out / "traces.jsonl").read_text().splitlines(keepends=True)
    (out / "traces.jsonl").write_text("".join(lines[:4]) + lines[4][:50])
    found = measure(read_options(command(place, "cut")))
    for got, expected in zip(found.traces, whole.traces, strict=True):
        # Sampled in another batch, so equal up to rounding.
        assert got.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
        assert dataclasses.replace(got, log_probs=[]) == dataclasses.replace(expected, log_probs=[])
    assert by_key(found.cuttings, "trace", "cutting") == by_key(whole.cuttings, "trace", "cutting")
    for kind, names, values in (
        ("rollouts", ("trace", "offset"), "rewards"),
        ("probes", ("trace", "cutting"), "log_probs"),
        ("weights", ("trace", "cutting", "method"), "weights"),
    ):
        expected, got = by_key(getattr(whole, kind), *names), by_key(getattr(found, kind), *names)
        assert expected.keys() == got.keys()
        for key, record in expected.items():
            numbers = np.array(getattr(record, values), dtype=float)
            assert np.array(getattr(got[key], values), dtype=float) == pytest.approx(numbers, abs=1e-5), (kind, key)
    assert len(found.rollouts) == len(whole.rollouts) and len(found.weights) == len(whole.weights)
    with np.load(out / "hidden" / "fixed-3.npz") as new, np.load(place / "whole" / "hidden" / "fixed-3.npz") as old:
        assert all(new[name] == pytest.approx(old[name], abs=1e-5) for name in old)

    # What is there is not done again, and what was told is kept.
    counts = load(out).run["sampling"]
    sizes = {path.name: path.stat().st_size for path in out.glob("*.jsonl")}
    measure(read_options(command(place, "cut")))
    assert {path.name: path.stat().st_size for path in out.glob("*.jsonl")} == sizes
    assert load(out).run["sampling"] == counts and counts["num_continuations"] > 0


def test_another_measurement_in_the_same_folder_is_refused_before_the_model_is_loaded(
    place, whole, monkeypatch, capsys
):
    monkeypatch.setattr(bench, "load_policy", None)
    assert main(command(place, "whole", "--temperature", "0.5")) == 1
    error = capsys.readouterr().err
    assert "another measurement" in error and "temperature: 1.0 there, 0.5 now" in error
    (place / "foreign").mkdir()
    (place / "foreign" / "note.txt").write_text("mine")
    assert main(command(place, "foreign")) == 1
    assert "not empty" in capsys.readouterr().err


def test_a_budget_stops_between_traces_and_tells_how_much_was_done(place, monkeypatch):
    spent = iter([0.0] * 4 + [1e9] * 10000)
    monkeypatch.setattr(bench.Budget, "spent", property(lambda self: next(spent)))
    found = measure(read_options(command(place, "short", "--budget", "30m")))
    assert len(found.traces) == 5
    kept = {trace.trace for trace in found.traces}
    assert {record.trace for record in found.truth} == kept == {record.trace for record in found.weights}
    assert found.run["num_traces"] == {"asked": 6, "made": 6, "whole": len(kept)}
    monkeypatch.undo()
    assert len(measure(read_options(command(place, "short"))).traces) == 6


def test_prompts_can_be_added(place):
    few = measure(read_options(command(place, "grown", "--num-prompts", "1")))
    assert [trace.trace for trace in few.traces] == [0, 1, 2]
    many = measure(read_options(command(place, "grown", "--num-prompts", "3")))
    assert [trace.trace for trace in many.traces] == list(range(9)) and many.traces[:3] == few.traces
    assert [record for record in many.rollouts if record.trace < 3] == few.rollouts
    assert [trace.trace for trace in measure(read_options(command(place, "grown"))).traces] == list(range(6))


def test_the_command_writes_results_tables_and_page(place, whole, capsys):
    assert main(command(place, "whole")) == 0
    results = json.loads((place / "whole" / "results.json").read_text())
    assert results and (place / "whole" / "tables.md").read_text().strip()
    assert "<html" in (place / "whole" / "report.html").read_text()
    assert "measured 6 of 6 traces (100 %)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "extra, words",
    [
        (("--set", "segmentation.min_token=4"), ("algorithm.rredcot.segmentation.min_token", "min_tokens")),
        (("--set", "segmentation.min_tokens"), ("--set", "KEY=VALUE")),
        (("--cuttings", "fixed"), ("--cuttings", "METHOD-NUM_SEGMENTS")),
        (("--methods", "magic"), ("magic", "rredcot")),
        (("--budget", "soon"), ("--budget", "30m")),
        (("--rollouts", "-1"), ("--rollouts", "at least 0")),
        (("--true-values", "", "--rollouts", "1"), ("--rollouts", "at least 2", "--true-values")),
        (("--true-values", "tests.nowhere:f"), ("--true-values", "tests.nowhere")),
        (("--dtype", "int8"), ("--dtype", "bfloat16")),
        (("--temperature", "0"), ("--temperature",)),
        (("--reward-function", "nowhere.py"), ("--reward-function", "nowhere.py")),
        (
            (
                "--reward-function",
                "pkg://verl.utils.reward_score:default_compute_score",
                "--prompts",
                "{place}/odd.jsonl",
            ),
            ("--reward-function", "data_source='odd'"),
        ),
        (("--line-checker", "tests.nowhere:f"), ("tests.nowhere",)),
        (("--model", "no_model"), ("--model", "no such folder")),
        (("--config", "no.yaml"), ("--config", "no such file")),
        (("--prompts", "no.parquet"), ("no.parquet", "no such file")),
        (("--set", "credit.bta=2"), ("algorithm.rredcot.credit.bta=2", "unknown key")),
        (("--set", "elicitation.format=custom"), ("elicitation.opening",)),
        (("--forms", "critic"), ("--forms critic", "'critic, lambda 1'")),
        (("--forms", "td, lambda 1", "--gradients", "0"), ("--forms 'td, lambda 1'", "--gradients")),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(place, extra, words, monkeypatch, capsys):
    monkeypatch.setattr(bench, "load_policy", None)
    write(place / "odd.jsonl", [{"prompt": "2+3=", "ground_truth": "5", "data_source": "odd"}])
    assert main(command(place, "refused", *(each.format(place=place) for each in extra))) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (place / "refused").exists()


def test_a_device_that_is_not_there_is_said(place, capsys):
    assert main(command(place, "refused", "--device", "cuda:99")) == 1
    assert "cannot be loaded on cuda:99" in capsys.readouterr().err


def test_settings_come_from_a_file_with_overrides_on_top(place):
    (place / "run.yaml").write_text("algorithm:\n  rredcot:\n    segmentation: {min_tokens: 5, num_segments: 6}\n")
    arguments = command(place, "x", "--config", str(place / "run.yaml"), "--set", "+algorithm.rredcot.credit.beta=2.0")
    settings = read_options(arguments).settings
    assert settings.segmentation.num_segments == 6 and settings.credit.beta == 2.0
    # The command's own override goes before the file.
    assert settings.segmentation.min_tokens == 3


def test_a_name_that_is_given_twice_is_measured_once(place):
    twice = ("--methods", "rredcot", "rredcot", "--gradients", "2", "--forms", "td, lambda 1", "td, lambda 1")
    options = read_options(command(place, "x", *twice))
    assert (options.methods, options.forms) == (["rredcot"], ["td, lambda 1"])


PROMPT = "user\n2+3=\nassistant\n"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_three_kinds_of_traces_are_read(place):
    dumps = place / "dumps"
    dumps.mkdir()
    verl_row = {"input": PROMPT, "output": "It is 5", "gts": "5", "score": 1.0, "step": 9, "uid": "a_b_0_0"}
    write(dumps / "10.jsonl", [verl_row | {"step": 10}])
    write(dumps / "9.jsonl", [verl_row, verl_row | {"uid": "c_0_0", "output": "6"}, verl_row | {"uid": "a_b_1_0"}])
    traces = read_traces([str(dumps)], "some/task", 10)
    assert [(t.problem.group, t.response) for t in traces] == [
        *(("0", "It is 5"), ("0", "It is 5"), ("1", "6"), ("2", "It is 5")),
    ]
    assert traces[0].problem.ground_truth == "5" and traces[0].problem.data_source == "some/task"
    own = {
        "step": 1,
        "uid": "u",
        "prompt": "2+3=",
        "response": "5",
        "ground_truth": "5",
        "reward": 1.0,
        "truncated": True,
    }
    write(place / "own.jsonl", [own])
    (trace,) = read_traces([str(place / "own.jsonl")], "", 10)
    assert trace.truncated is True and trace.problem.messages == [{"role": "user", "content": "2+3="}]
    write(place / "plain.jsonl", [{"prompt": "2+3=", "response": "5", "ground_truth": 5}])
    (trace,) = read_traces([str(place / "plain.jsonl")], "", 10)
    assert trace.reward is None and trace.problem.ground_truth == 5
    # The prompt of a dump is found inside its chat template again, special tokens and all.
    tokenizer = make_tokenizer()
    encoder = PromptEncoder(tokenizer, {})
    assert encoder.encode(traces[0].problem) == encoder.encode(trace.problem)
    assert encoder.question(traces[0].problem) == "2+3=" and encoder.num_approximate == 0


@pytest.mark.parametrize(
    "row, word", [({"text": "x"}, "'input' and 'output'"), ({"prompt": 3, "response": "x"}, "prompt")]
)
def test_traces_without_text_are_refused(place, row, word):
    write(place / "bad.jsonl", [row])
    with pytest.raises(ValueError, match=word):
        read_traces([str(place / "bad.jsonl")], "", 10)


def test_prompts_without_ground_truth_are_refused(place):
    write(place / "bad_prompts.jsonl", [{"prompt": "2+3="}])
    with pytest.raises(ValueError, match="ground truth"):
        read_prompts(str(place / "bad_prompts.jsonl"), 10)


def test_given_traces_are_measured(place, capsys):
    rows = [
        {"prompt": "2+3=", "response": text, "ground_truth": "5", "reward": reward, "uid": "u"}
        for text, reward in (("so it is\nAnswer: 5", 1.0), ("maybe 6\nAnswer: 6", 1.0), ("no idea at all here", 0.0))
    ]
    write(place / "given.jsonl", rows)
    found = measure(read_options(command(place, "given", source=("--traces", "given.jsonl"))))
    assert [trace.reward for trace in found.traces] == [1.0, 0.0, 0.0]
    assert all(trace.response_ids[-1] == make_tokenizer().eos_token_id for trace in found.traces)
    assert [trace.response for trace in found.traces] == [row["response"] for row in rows]
    # Log-probabilities are the model's: their first token is one of the prompt's continuation.
    assert all(len(trace.log_probs) == len(trace.response_ids) and max(trace.log_probs) < 0 for trace in found.traces)
    assert found.run["notes"] == load(place / "given").run["notes"] and len(found.run["notes"]) == 2
    assert "note: 1 given traces have another reward" in capsys.readouterr().out


def test_a_part_of_a_group_is_no_group(place):
    rows = [{"prompt": "2+3=", "response": "5", "ground_truth": "5", "uid": str(k // 3)} for k in range(9)]
    write(place / "groups.jsonl", rows)
    for limit, expected in ((9, 9), (8, 6), (5, 3), (2, 2)):
        assert len(read_traces([str(place / "groups.jsonl")], "", limit)) == expected


@pytest.mark.parametrize(
    "response, verifier, words",
    [
        ("so it is " * 20 + "Answer: 5", VERIFIER, ["--max-response-tokens 24", "trace 0"]),
        ("Answer: 5", "def compute_score(**kwargs):\n    return -1.0\n", ["reward -1.0", "reward_range=[0.0, 1.0]"]),
        ("Answer: 5", "def compute_score(**kwargs):\n    raise OSError('no service')\n", ["OSError: no service"]),
    ],
    ids=["too long", "out of range", "verifier fails"],
)
def test_what_would_give_wrong_numbers_is_refused(place, response, verifier, words):
    write(place / "given2.jsonl", [{"prompt": "2+3=", "response": response, "ground_truth": "5", "uid": "u"}] * 3)
    (place / "verifier2.py").write_text(verifier)
    arguments = command(place, f"refused-{len(response)}-{len(verifier)}", source=("--traces", "given2.jsonl"))
    arguments[arguments.index(str(place / "verifier.py"))] = str(place / "verifier2.py")
    with pytest.raises(ValueError) as raised:
        measure(read_options(arguments))
    assert all(word in str(raised.value) for word in words), raised.value


def test_settings_that_are_not_read_are_said(place):
    options = read_options(command(place, "x", "--set", "credit.beta=3", "self_value.form=geometric"))
    assert options.unread() == ["credit", "self_value.form"]
    assert read_options(command(place, "x")).unread() == []
