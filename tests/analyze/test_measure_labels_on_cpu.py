"""`--labels` as a user runs it, and the command without continuations."""

import json

import pytest

from rredcot_verl.analyze import bench
from rredcot_verl.analyze.__main__ import main
from rredcot_verl.analyze.bench import measure
from rredcot_verl.analyze.command_line import read_options
from rredcot_verl.analyze.records import load
from tests.tiny_model import make_tiny_data, make_tiny_model, make_tokenizer

SUMS = (("1+2=", "3"), ("2+3=", "5"), ("3+3=", "6"), ("4+4=", "8"), ("5+4=", "9"), ("2+2=", "4"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    make_tiny_model(folder / "model")
    make_tiny_data(folder, num_rows=2)
    rows = []
    for prompt, answer in SUMS:
        right = {"prompt": prompt, "ground_truth": answer, "generator": "a"}
        rows.append(right | {"steps": [f"so {prompt}{answer}", f"Answer: {answer}"], "first_wrong": None})
        wrong = right | {"steps": ["let us see", f"so {prompt}7", "Answer: 7"], "first_wrong": 1}
        rows.append(wrong | {"final_correct": False})
    (folder / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(place, out, *extra, source="set.jsonl"):
    return [
        *("--model", str(place / "model"), "--labels", str(place / source), "--out", str(place / out)),
        *("--layers", "all", "--dim", "4", "--num-resamples", "20", *extra),
    ]


@pytest.fixture(scope="module")
def whole(place):
    assert main(command(place, "whole")) == 0
    return load(place / "whole")


def test_labelled_traces_are_measured(place, whole):
    assert len(whole.traces) == len(whole.labels) == 12 and not whole.rollouts and not whole.costs
    assert [trace.group for trace in whole.traces] == [str(k // 2) for k in range(12)]
    # The right ones were verified, the others are as the set says.
    assert [trace.reward for trace in whole.traces] == [1.0, 0.0] * 6
    right, wrong = whole.traces[0], whole.traces[1]
    assert right.response == "so 1+2=3\n\nAnswer: 3" and right.response_ids[-1] == make_tokenizer().eos_token_id
    assert right.wrong_from is None and right.lines_checked
    assert wrong.response[wrong.wrong_from : wrong.wrong_to] == "so 1+2=7\n\n"
    label, length = whole.labels[1], len(wrong.response_ids)
    assert label.boundaries == [0, 12, 22, 31, 32] and length == 32
    assert (label.first_wrong, label.outcome, label.generator) == (1, "given", "a")
    # One token a character, so a third of the vocabulary's logarithm is far below what a random policy has.
    assert len(label.entropies) == 3 and all(1.0 < entropy < 5.0 for entropy in label.entropies)
    cutting = next(record for record in whole.cuttings if record.trace == 1)
    assert (cutting.cutting, cutting.boundaries) == ("labels", label.boundaries)
    probes = next(record for record in whole.probes if record.trace == 1)
    # A value before the first step and after each.
    assert len(probes.log_probs) == 4 and probes.answers == ["3"]


def test_what_a_trace_alone_answers_is_not_forced_after_it(whole):
    for record in whole.probes:
        assert "7" not in record.answers or not record.trace % 2
    assert next(record for record in whole.probes if record.trace == 0).answers == ["3", "7"]


def test_results_have_every_kind_of_value(place, whole):
    results = json.loads((place / "whole" / "results.json").read_text())
    found = {entry["name"]: entry for entry in results["labels"]["entries"]}
    assert {"chance", "surprisal", "entropy", "joint:reference", "geometric:reference", "vps", "mig"} <= set(found)
    assert {"calibrated", "hidden:0", "hidden:1", "both:0", "both:1"} <= set(found)
    assert found["chance"]["measures"]["right"]["estimate"] == 0.5
    assert results["run"]["main_cutting"] == "labels" and results["labels"]["outcomes"] == {"verified": 6, "given": 6}
    for name in ("tables.md", "report.html"):
        assert "first wrong step" in (place / "whole" / name).read_text().lower()


def test_it_goes_on_where_it_stopped(place, whole):
    """In the middle of the traces: labels stand before their traces."""
    out = place / "cut"
    out.mkdir()
    for path in (place / "whole").glob("*.json*"):
        lines = path.read_text().splitlines(keepends=True)
        keep = {"traces.jsonl": 5, "labels.jsonl": 7, "cuttings.jsonl": 2, "probes.jsonl": 1}.get(path.name, len(lines))
        (out / path.name).write_text("".join(lines[:keep]))
    found = measure(read_options(command(place, "cut")))
    assert [vars(trace) | {"log_probs": []} for trace in found.traces] == [
        vars(trace) | {"log_probs": []} for trace in whole.traces
    ]
    for got, expected in zip(sorted(found.labels, key=lambda each: each.trace), whole.labels, strict=True):
        assert got.boundaries == expected.boundaries and got.entropies == pytest.approx(expected.entropies, abs=1e-5)


@pytest.mark.parametrize("pack_tokens", ["1", "64"])
def test_entropies_and_log_probs_do_not_depend_on_the_packing(place, whole, pack_tokens):
    found = measure(read_options(command(place, f"pack-{pack_tokens}", "--pack-tokens", pack_tokens)))
    for got, expected in zip(found.labels, whole.labels, strict=True):
        assert got.entropies == pytest.approx(expected.entropies, abs=1e-5)
    for got, expected in zip(found.traces, whole.traces, strict=True):
        assert got.log_probs == pytest.approx(expected.log_probs, abs=1e-5)


def test_traces_that_are_too_long_are_left_out_and_said(place, capsys):
    arguments = command(place, "short", "--max-response-tokens", "25", "--methods", "vps")
    for _ in range(2):
        assert main(arguments) == 0
        assert "measured 6 of 6 traces (100 %)" in capsys.readouterr().out
    found = load(place / "short")
    assert len(found.labels) == 6 and [note for note in found.run["notes"] if "25 takes are left out" in note]


def test_other_cuttings_come_after_the_labels(place):
    options = read_options(command(place, "x", "--cuttings", "fixed-3"))
    assert list(options.cuttings) == ["labels", "fixed-3"]
    assert options.num_rollouts == (0, 0) and options.measured == ("probes", "hidden")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--gradients", "2"), ["--gradients 2", "--labels"]),
        (("--line-checker", "a:b"), ["--line-checker a:b", "--labels"]),
        (("--rollouts", "1"), ["--rollouts 1", "0 for none"]),
        (("--labels-format", "processbench"), ["row 1", "'steps'"]),
    ],
)
def test_what_does_not_go_together_is_said_before_a_model_is_loaded(place, extra, words, monkeypatch, capsys):
    monkeypatch.setattr(bench, "load_policy", None)
    (place / "bad.jsonl").write_text(json.dumps({"problem": "2+3=", "label": 0}) + "\n")
    assert main(command(place, "refused", *extra, source="bad.jsonl" if "format" in extra[0] else "set.jsonl")) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_without_continuations(place, capsys):
    """Of sampled traces: no gold, and the rest of the results, the tables and the page."""
    (place / "verifier.py").write_text(
        "def compute_score(**kwargs):\n    return float(len(kwargs['solution_str']) % 2)\n"
    )
    arguments = [
        *("--model", str(place / "model"), "--prompts", str(place / "train.parquet"), "--out", str(place / "plain")),
        *("--rollouts", "0", "-n", "3", "--max-response-tokens", "24", "--reward-function", str(place / "verifier.py")),
        *("--cuttings", "fixed-3", "--set", "segmentation.min_tokens=3", "--num-resamples", "10"),
    ]
    assert main(arguments) == 0
    results = json.loads((place / "plain" / "results.json").read_text())
    assert results["gold"]["num_rollouts"]["max"] == 0 and results["labels"] is None
    assert "monte_carlo" not in {entry["name"] for entry in results["methods"]}
    for entry in results["methods"]:
        assert entry["measures"]["mse"]["estimate"] is None and entry["measures"]["mse"]["reason"]
    text, html = ((place / "plain" / name).read_text() for name in ("tables.md", "report.html"))
    assert text.startswith("# Credit without continuations") and "gold: none" in text
    assert "no continuations were drawn" in html and 'id="labels"' not in html
