"""`evaluate` as a whole: what the results hold, and measurements that lack something."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

from rredcot_verl.analyze import page, tables
from rredcot_verl.analyze.evaluate import SCHEMA, evaluate
from rredcot_verl.analyze.measures import NAMES
from rredcot_verl.analyze.records import load
from tests.analyze.synthetic import CUTTING, write

DOCUMENT = (Path(__file__).parents[2] / "docs/analyze.md").read_text(encoding="utf-8")
INTERVAL = {"estimate", "low", "high", "num", "num_groups", "reason"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write(tmp_path_factory.mktemp("world") / "m", num_groups=24, num_rollouts=20)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    options = {"num_groups": 6, "num_rollouts": 20, "hidden": False, "coarse": False}
    return write(tmp_path_factory.mktemp("small") / "m", **options)


@pytest.fixture(scope="module")
def results(world):
    return evaluate(world.load(), num_resamples=60)


def _walk(node, where=""):
    if isinstance(node, dict):
        yield where, node
        for name, item in node.items():
            yield from _walk(item, f"{where}.{name}")
    elif isinstance(node, list):
        for number, item in enumerate(node):
            yield from _walk(item, f"{where}[{number}]")


def test_holds_what_it_says(results):
    assert results["schema"] == SCHEMA
    for part in "run evaluation data gold chance methods labels costs gradients cuttings examples notes".split():
        assert f"| `{part}` |" in DOCUMENT and part in results
    assert results["data"]["num_traces"] == 96 and results["data"]["num_groups"] == 24
    for entry in results["methods"]:
        assert set(entry["measures"]) == {*NAMES, "blame_top1", "blame_rank", "blame_auc"}, entry["name"]
        assert (entry["name"] in ("joint:reference", "monte_carlo_gold")) == (entry["differences"] == {})


def test_every_interval_is_whole_and_every_gap_has_a_reason(results):
    json.dumps(results, allow_nan=False)
    intervals = [(where, node) for where, node in _walk(results) if "estimate" in node]
    assert len(intervals) > 1000
    for where, found in intervals:
        assert set(found) == INTERVAL, where
        if found["low"] is None:
            assert found["reason"], where
        else:
            assert found["low"] <= found["high"] and found["num"] > 0 and found["reason"] is None, where
            assert math.isfinite(found["estimate"])
        if where.endswith(".ece") and found["low"] is not None:
            assert found["low"] <= found["estimate"] <= found["high"], "noise adds to a sum of absolute gaps"


def test_same_seed_same_results(small):
    first, again = (evaluate(small.load(), num_resamples=20) for _ in range(2))
    for entry, other in zip(first["methods"], again["methods"], strict=True):
        assert entry["measures"] == other["measures"], entry["name"]
    assert first["cuttings"] == again["cuttings"]
    other = evaluate(small.load(), num_resamples=20, seed=1)["methods"]
    assert other[2]["measures"]["mse"] != first["methods"][2]["measures"]["mse"]


def test_differences_are_those_of_the_estimates(results):
    methods = {entry["name"]: entry for entry in results["methods"]}
    reference = methods["joint:reference"]["measures"]
    for name in ("calibrated", "vps", "hidden:-2"):
        for measure in ("spearman_v", "mse", "blame_top1"):
            difference = methods[name]["differences"][measure]["estimate"]
            expected = methods[name]["measures"][measure]["estimate"] - reference[measure]["estimate"]
            assert difference == pytest.approx(expected, abs=1e-12)
    same = methods["joint:union"]["differences"]["mse"]
    assert same["estimate"] == same["low"] == same["high"] == 0.0


def test_cuttings_are_compared_on_a_short_list(results):
    found = results["cuttings"]
    assert {row["cutting"] for row in found} == {CUTTING, "fixed-2"}
    main = [row for row in found if (row["cutting"], row["method"]) == (CUTTING, "joint:reference")]
    entry = next(entry for entry in results["methods"] if entry["name"] == "joint:reference")
    assert main[0]["measures"]["mse"] == entry["measures"]["mse"]


def test_true_values_are_the_gold_where_the_task_knows_them(world, results, tmp_path):
    """The same world with and without: continuations are then judged too, all of them against the truth."""
    found = evaluate(write(tmp_path / "m", num_groups=24, num_rollouts=20, truth=True).load(), num_resamples=60)
    assert found["gold"]["exact"] and found["gold"]["noise"] == 0.0 and not results["gold"]["exact"]
    methods, before = ({entry["name"]: entry for entry in each["methods"]} for each in (found, results))
    assert set(methods) == {*before, "oracle"}
    oracle, sampled = methods["oracle"]["measures"], methods["monte_carlo_gold"]["measures"]
    assert oracle["mse"]["estimate"] is None and "gold itself" in oracle["mse"]["reason"]
    assert oracle["blame_top1"]["estimate"] > 0.95
    states = [value for own in world.values for value in own]
    expected = sum(value * (1 - value) for value in states) / len(states) / 20
    assert sampled["mse"]["low"] < expected < sampled["mse"]["high"]
    assert methods["monte_carlo"]["against"] == "gold" and before["monte_carlo"]["against"] == "rest"
    assert methods["joint:reference"]["measures"]["mse"]["estimate"] == pytest.approx(
        before["joint:reference"]["measures"]["mse"]["estimate"], abs=0.01
    )


def test_examples_show_where_the_line_went_wrong(world, results):
    failed = [example for example in results["examples"] if example["why"] == "failed"]
    assert len(failed) == 3 and len(results["examples"]) == 5
    for example in failed:
        marks = [part["holds_wrong_line"] for part in example["segments"]]
        assert marks.index(True) == world.wrong[example["trace"]] and sum(marks) == 1
        assert example["segments"][-1]["gold"] == 0.0
        assert "".join(part["text"] for part in example["segments"]).startswith("line 0")


@pytest.mark.parametrize(
    "options",
    [
        {"num_groups": 1, "group_size": 3, "probes": False, "hidden": False, "weights": False},
        {"num_groups": 3, "group_size": 1, "hidden": False, "lines": False},
        {"num_groups": 2, "group_size": 2, "always_solved": True, "num_rollouts": 1},
        {"num_groups": 3, "group_size": 2, "num_segments": (1, 1), "coarse": False},
        {"num_groups": 12, "group_size": 2, "num_rollouts": 0, "coarse": False},
    ],
    ids=["nothing but rollouts", "groups of one, no lines", "solved, one rollout", "one segment", "no rollouts"],
)
def test_little_is_evaluated_as_far_as_it_goes(tmp_path, options):
    results = evaluate(write(tmp_path / "m", **options).load(), num_resamples=20)
    json.dumps(results, allow_nan=False)
    for where, found in _walk(results):
        if "estimate" in found and found["estimate"] is None:
            assert found["reason"], where
    assert "Left out" in tables.render(results) and "</html>" in page.render(results)


def test_a_method_that_lacks_traces_is_compared_on_those_it_has(small):
    measurements = small.load()
    measurements.probes[:] = [
        record if record.trace >= 20 else _without_group(record) for record in measurements.probes
    ]
    found = {entry["name"]: entry for entry in evaluate(measurements, num_resamples=20)["methods"]}
    group, reference = found["geometric:group"], found["geometric:reference"]
    assert group["coverage"] == pytest.approx(4 / 24) and reference["coverage"] == 1.0
    assert group["measures"]["mse"]["num"] == group["differences"]["mse"]["num"] < reference["measures"]["mse"]["num"]
    # Where the reference lacks the same traces, the difference is that of the two estimates.
    measurements.probes[:] = [record for record in measurements.probes if record.trace >= 20]
    alone = {entry["name"]: entry["measures"] for entry in evaluate(measurements, num_resamples=5)["methods"]}
    for name in ("mse", "bias"):
        expected = alone["geometric:group"][name]["estimate"] - alone["joint:reference"][name]["estimate"]
        assert group["differences"][name]["estimate"] == pytest.approx(expected), name


def _without_group(record):
    return dataclasses.replace(record, is_group=[False] * len(record.is_group))


def test_rewards_of_another_range(small, tmp_path):
    """Rewards in [-1, 1] give the same values, correlations and blame as the same rewards in [0, 1]."""
    folder = tmp_path / "m"
    shutil.copytree(small.folder, folder)
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "reward_range": [-1, 1]}))
    for name in ("traces.jsonl", "rollouts.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for row in rows:
            if "rewards" in row:
                row["rewards"] = [2 * reward - 1 for reward in row["rewards"]]
            else:
                row["reward"] = 2 * row["reward"] - 1
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours, theirs = (
        {entry["name"]: entry for entry in evaluate(given, num_resamples=20)["methods"]}
        for given in (load(folder), small.load())
    )
    for name in ("joint:reference", "calibrated", "monte_carlo", "leave_one_out"):
        for measure in ("spearman_v", "mse", "brier", "blame_top1"):
            assert ours[name]["measures"][measure]["estimate"] == pytest.approx(
                theirs[name]["measures"][measure]["estimate"]
            ), (name, measure)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cutting": "newline-3"},
            "cutting 'newline-3' was not measured; measured are ['fixed-2', 'keyword_entropy-6']",
        ),
    ],
)
def test_says_what_is_not_there(world, options, message):
    with pytest.raises(ValueError) as error:
        evaluate(world.load(), num_resamples=5, **options)
    assert str(error.value) == message
