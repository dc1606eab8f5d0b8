"""Labelled traces in the results, the tables and the page: a world in which the value falls at the wrong step."""

import json
import math

import numpy as np
import pytest

from rredcot_verl.analyze import page, tables
from rredcot_verl.analyze.evaluate import evaluate
from rredcot_verl.analyze.labelled_traces import NAMES
from rredcot_verl.analyze.records import (
    RUN_FILE,
    CuttingRecord,
    LabelRecord,
    ProbeRecord,
    RolloutRecord,
    TraceRecord,
    append,
    load,
)
from rredcot_verl.analyze.segmentations import LABELS

TOKENS = 3
"""Of a step."""


def write_world(folder, num_prompts=30, group_size=2, seed=0, blind=False, rollouts=False):
    """The value of the reference falls from 0.7 to 0.1 in the first wrong step, and by noise elsewhere."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / RUN_FILE).write_text(json.dumps({"main_cutting": LABELS, "model": "reader", "command": "none"}))
    for number in range(num_prompts * group_size):
        num_steps = int(rng.integers(2, 6))
        wrong = int(rng.integers(num_steps)) if rng.random() < 0.5 else None
        values = [0.7 if wrong is None or k <= wrong else 0.1 for k in range(num_steps + 1)]
        values = [value + 0.02 * rng.normal() for value in values]
        _write_trace(folder, number, f"p{number // group_size}", num_steps, wrong, [0.5] * 9 if blind else values, rng)
        for k in range(num_steps + 1 if rollouts else 0):
            append(folder, RolloutRecord(number, TOKENS * k, [1.0, 0.0], 0.1, 10))
    return folder


def _write_trace(folder, number, group, num_steps, wrong, values, rng):
    length = TOKENS * num_steps + 1
    text = "abc" * num_steps
    where = (None, None) if wrong is None else (TOKENS * wrong, TOKENS * (wrong + 1))
    # The right answer follows a wrong step in one of ten.
    reward = float(wrong is None or rng.random() < 0.1)
    trace = TraceRecord(
        number, group, group, text, [1], list(range(length)), (-rng.random(length)).tolist(), reward, "5", None, *where,
        True,
    )  # fmt: skip
    boundaries = [*range(0, length, TOKENS), length]
    append(folder, trace)
    append(folder, CuttingRecord(number, LABELS, boundaries, [min(place, len(text)) for place in boundaries]))
    entropies = rng.random(num_steps).tolist()
    outcome = "verified" if number % 2 else "given"
    append(folder, LabelRecord(number, boundaries, wrong, outcome, "some <model>", entropies))
    log_probs = [[math.log(value)] for value in values[: num_steps + 1]]
    ones = [[1]] * len(log_probs)
    append(folder, ProbeRecord(number, LABELS, ["5"], [1.0], [True], [False], log_probs, ones, 0.1, 3))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return evaluate(load(write_world(tmp_path_factory.mktemp("labels") / "m")), num_resamples=50)


def by_name(results):
    return {entry["name"]: entry for entry in results["labels"]["entries"]}


def test_values_that_fall_there_find_the_step(results):
    found = by_name(results)["joint:reference"]
    for name in NAMES:
        assert found["measures"][name]["estimate"] == 1.0 and found["measures"][name]["low"] == 1.0
    assert found["coverage"] == 1.0 and not found["uses_outcome"]
    # Between the noise and the fall.
    assert all(0.1 < threshold < 0.5 for threshold in found["thresholds"])
    assert found["over_chance"]["low"] > 0.5
    assert by_name(results)["calibrated"]["measures"]["f1"]["estimate"] > 0.5


def test_rules_by_hand(results, tmp_path):
    measurements = load(write_world(tmp_path / "again"))
    labels = [(record.first_wrong, len(record.entropies)) for record in measurements.labels]
    wrong = [(k, num) for k, num in labels if k is not None]
    share = 1 - len(wrong) / len(labels)
    expected = {
        "chance": ((1 - share) * sum(1 / num for _, num in wrong) / len(wrong), share),
        "first_step": (sum(k == 0 for k, _ in wrong) / len(wrong), 0.0),
        "last_step": (sum(k == num - 1 for k, num in wrong) / len(wrong), 0.0),
        "no_step": (0.0, 1.0),
    }
    for name, (of_wrong, of_right) in expected.items():
        measures = {key: value["estimate"] for key, value in by_name(results)[name]["measures"].items()}
        assert (measures["wrong"], measures["right"]) == pytest.approx((of_wrong, of_right)), name
        total = of_wrong + of_right
        assert measures["f1"] == pytest.approx(2 * of_wrong * of_right / total)
        assert measures["exact"] == pytest.approx(of_wrong * (1 - share) + of_right * share)
    for name in ("surprisal", "entropy"):
        assert by_name(results)[name]["thresholds"] and by_name(results)[name]["measures"]["f1"]["estimate"] < 0.6
    data = results["labels"]
    assert (data["num_traces"], data["num_groups"], data["num_wrong"]) == (60, 30, len(wrong))
    assert data["outcomes"] == {"given": 30, "verified": 30} and data["generators"] == ["some <model>"]
    solved = sum(t.reward > 0.5 and t.wrong_from is not None for t in measurements.traces)
    assert data["num_wrong_solved"] == solved > 0 and data["num_right_failed"] == 0


def test_the_threshold_of_a_half_comes_from_the_other(tmp_path):
    """With one trace turned round in a half, only the other half's threshold may change."""
    folder = write_world(tmp_path / "m", num_prompts=10, group_size=1)
    before = by_name(evaluate(load(folder), num_resamples=5))["joint:reference"]["thresholds"]
    changed = set()
    for number in range(10):
        measurements = load(folder)
        record = measurements.probes[number]
        small = [[3.0 * row[0]] for row in record.log_probs]
        measurements.probes[number] = ProbeRecord(**{**vars(record), "log_probs": small})
        after = by_name(evaluate(measurements, num_resamples=5))["joint:reference"]["thresholds"]
        moved = [old != new for old, new in zip(before, after, strict=True)]
        assert sum(moved) <= 1
        changed |= {k for k, each in enumerate(moved) if each}
    assert changed == {0, 1}


def test_values_that_do_not_move_find_nothing(tmp_path):
    found = by_name(evaluate(load(write_world(tmp_path / "m", blind=True)), num_resamples=5))["joint:reference"]
    assert found["measures"]["f1"]["estimate"] == 0.0


def test_without_continuations_what_needs_the_truth_is_null_with_a_reason(results):
    json.dumps(results, allow_nan=False)
    entry = next(entry for entry in results["methods"] if entry["name"] == "joint:reference")
    for name in ("spearman_v", "spearman_d", "mse", "bias"):
        assert entry["measures"][name]["estimate"] is None and entry["measures"][name]["reason"], name
    assert entry["measures"]["brier"]["estimate"] is not None
    assert entry["measures"]["blame_top1"]["estimate"] == 1.0
    assert results["gold"]["num_rollouts"]["max"] == 0


def test_one_prompt_has_no_other_half(tmp_path):
    found = by_name(evaluate(load(write_world(tmp_path / "m", num_prompts=1, group_size=4)), num_resamples=5))
    measured = found["joint:reference"]["measures"]["f1"]
    assert measured["estimate"] is None and "other half" in measured["reason"]


def test_tables_and_page_show_it(results):
    text, html = tables.render(results), page.render(results)
    for shown in (text, html):
        assert "first wrong step" in shown.lower() and "Off-policy" in shown
        assert "not measured, as no continuations were drawn" in shown
        assert "surprisal" in shown and "None" not in shown and "nan" not in shown.lower().split()
    assert text.startswith("# Credit without continuations")
    assert "| joint:reference | 1.000 (1.000 to 1.000) |" in text
    assert '<section id="labels">' in html and "some &lt;model&gt;" in html
    assert "best is" in next(line for line in text.splitlines() if "ProcessBench's F1" in line)


def test_methods_that_know_the_outcome_or_lack_traces_are_marked_and_not_named_best(results):
    changed = json.loads(json.dumps(results))
    entries = {entry["name"]: entry for entry in changed["labels"]["entries"]}
    entries["joint:reference"]["uses_outcome"] = True
    best = entries["vps"]
    best["coverage"], best["measures"]["f1"]["estimate"] = 0.4, 1.0
    text = tables.render(changed)
    assert "| joint:reference (knows the outcome) |" in text and f"| {best['name']} (on 40 % of the traces) |" in text
    told = next(line for line in text.splitlines() if "ProcessBench's F1" in line)
    assert "best is joint:reference" not in told and f"best is {best['name']} " not in told


def test_with_continuations_monte_carlo_is_judged_too(tmp_path):
    results = evaluate(load(write_world(tmp_path / "m", num_prompts=4, rollouts=True)), num_resamples=5)
    assert "monte_carlo" in by_name(results) and tables.render(results).startswith("# Credit against Monte Carlo")
