"""A race's results: lines made of metrics, and arms compared."""

import json
import math

import numpy as np
import pytest

from rredcot_verl.report import ReportError
from rredcot_verl.report.race import compare, named
from rredcot_verl.report.race_page import render, table
from rredcot_verl.report.race_results import measure, read
from tests.in_browser import CHROMIUM, look

METRIC = "val-core/toy/acc/mean@4"
# Accuracy before each of nine steps of 100 samples: it rises by so much a step.
SLOPES = {"grpo": 0.02, "fast": 0.04, "slow": 0.005}
NUM_STEPS = 9


def line(arm, seed, slope, **changes):
    """A run whose accuracy is a line through 0.2, a hundredth higher for each seed."""
    start = 0.2 + 0.01 * seed
    series = {
        "step": list(range(1, NUM_STEPS + 1)),
        "reward": [start + slope * k for k in range(NUM_STEPS)],
        "response_tokens": [10.0] * NUM_STEPS,
        "seconds": [2.0] * NUM_STEPS,
    }
    row = {"task": "toy", "arm": arm, "seed": seed, "steps": NUM_STEPS, "digest": arm, "overrides": ["a.b=1"]}
    row |= {"start": f"model {seed}", "commit": "abc", "dirty": False, "machine": {"cores": 2}, "num_epochs": 1}
    row |= {"samples_per_step": 100, "series": series, "totals": {}}
    accuracy = [start, start + 0.2, start + slope * NUM_STEPS]
    return row | {"validation": {"metric": METRIC, "step": [0, 5, 9], "accuracy": accuracy}} | changes


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def results(tmp_path):
    return read(
        [write(tmp_path / "r.jsonl", [line(arm, seed, SLOPES[arm]) for seed in (0, 1, 2) for arm in ("fast", "grpo")])]
    )


class TestLines:
    def test_a_run_becomes_a_line(self, tmp_path):
        run = tmp_path / "run"
        run.mkdir()
        rows = [{"step": 0, "data": {METRIC: 0.123456}}]
        for step in (1, 2, 3):
            data = {"critic/score/mean": step / 7, "timing_s/step": 2.0, "response_length/mean": 20.5}
            data |= {"training/epoch": 0, "actor/grad_norm": -1.23456789e-5, "actor/entropy": None}
            rows.append({"step": step, "data": data | ({METRIC: 0.5} if step == 3 else {})})
        write(run / "metrics.jsonl", rows)
        measured = measure(run, 16, 512)
        assert measured["series"] == {
            "step": [1, 2, 3],
            "reward": [0.1429, 0.2857, 0.4286],
            "response_tokens": [20.5] * 3,
            "seconds": [2.0] * 3,
            "grad_norm": [-1.235e-05] * 3,
        }
        assert measured["validation"] == {
            "metric": METRIC,
            "step": [0, 3],
            "accuracy": [0.1235, 0.5],
            "num_responses": 512,
        }
        assert measured["totals"] == {"seconds": 6.0, "tokens": 984, "samples": 48}
        assert (measured["num_epochs"], measured["samples_per_step"]) == (1, 16)

    def test_a_run_in_which_nothing_was_solved_has_a_curve(self, tmp_path):
        rows = [{"step": step, "data": {"critic/score/mean": 0.0, "timing_s/step": 2.0}} for step in (1, 2)]
        write(tmp_path / "metrics.jsonl", rows)
        assert measure(tmp_path, 16, None)["series"]["reward"] == [0.0, 0.0]

    def test_a_run_without_steps_is_none(self, tmp_path):
        write(tmp_path / "metrics.jsonl", [{"step": 0, "data": {METRIC: 0.5}}])
        with pytest.raises(ReportError, match="no step"):
            measure(tmp_path, 16, None)

    def test_the_later_of_two_equal_runs_counts(self, tmp_path):
        files = [write(tmp_path / name, [line("grpo", 0, slope)]) for name, slope in (("a", 0.1), ("b", 0.2))]
        assert [run.per_step("reward")[1] for run in read(files)] == [pytest.approx(0.4)]

    @pytest.mark.parametrize("key", ["task", "seed", "digest", "series", "totals"])
    def test_another_file_is_refused(self, tmp_path, key):
        row = line("grpo", 0, 0.1)
        del row[key]
        with pytest.raises(ReportError, match=rf"r.jsonl:1.*{key}"):
            read([write(tmp_path / "r.jsonl", [row])])


class TestComparison:
    def test_figures_are_those_of_the_lines(self, results):
        (comparison,) = compare(results, levels=[0.32])
        assert (comparison.task, comparison.num_steps, comparison.curve, comparison.window) == ("toy", 9, "training", 1)
        grpo, fast = comparison.arms
        assert (grpo.name, fast.name) == ("grpo", "fast")
        # The reward of a step is that of the policy before it: the last one after eight steps.
        assert grpo.figures["final"]["estimate"] == pytest.approx(0.21 + 8 * 0.02)
        assert fast.differences["final"] == pytest.approx({"estimate": 0.16, "low": 0.16, "high": 0.16, "num": 3})
        assert fast.differences["area"]["estimate"] == pytest.approx(4 * 0.02)
        assert fast.differences["validation"]["estimate"] == pytest.approx(9 * 0.02 / 3)
        assert grpo.differences == {} and grpo.reached[0].ratio is None

    def test_what_it_takes_to_reach_a_level(self, results):
        grpo, fast = compare(results, levels=[0.33])[0].arms
        half, _, final, fixed = fast.reached
        # Half of GRPO's 0.16 is 0.08: two steps instead of four.
        assert (half.level, half.samples, half.tokens, half.seconds) == pytest.approx((0.29, 200, 2000, 4.0))
        assert [half.ratio[key] for key in ("estimate", "low", "high")] == pytest.approx([0.5] * 3)
        assert (final.level, final.samples) == pytest.approx((0.37, 400))
        assert grpo.reached[2].samples == pytest.approx(800)
        assert fixed.samples == pytest.approx(300) and fixed.num_seeds == 3

    def test_seeds_that_do_not_reach_it_are_counted(self, tmp_path):
        rows = [line(arm, seed, SLOPES[arm]) for seed in (0, 1) for arm in ("grpo", "slow")]
        grpo, slow = compare(read([write(tmp_path / "r.jsonl", rows)]), levels=[0.365])[0].arms
        reached = slow.reached[-1]
        assert (reached.num_seeds, reached.samples, reached.tokens) == (0, math.inf, None)
        assert reached.ratio["at_least"] == pytest.approx(800 / grpo.reached[-1].samples)
        # Of GRPO, which ends at 0.36 and 0.37, one seed does.
        assert grpo.reached[-1].num_seeds == 1

    def test_validation_is_the_curve_where_problems_came_twice(self, tmp_path):
        rows = [line(arm, 0, SLOPES[arm], num_epochs=2) for arm in ("grpo", "fast")]
        comparison = compare(read([write(tmp_path / "r.jsonl", rows)]))[0]
        assert comparison.curve == "validation"
        assert comparison.arms[1].curves.samples.tolist() == [0.0, 500.0, 900.0]
        assert comparison.arms[1].differences["final"]["estimate"] == pytest.approx(0.18)

    def test_runs_that_differ_have_names_that_differ(self, tmp_path):
        kinds = {"1": ["a.b=1"], "2": ["a.b=1", "actor.optim.lr=1e-4"], "3": ["a.b=1"]}
        rows = [line("grpo", seed, 0.1, digest=d, overrides=o) for seed in (1, 0) for d, o in kinds.items()]
        arms = named(read([write(tmp_path / "r.jsonl", rows)]))
        assert list(arms) == ["grpo", "grpo lr=1e-4", "grpo (3)"]
        assert [run.seed for run in arms["grpo"]] == [0, 1]

    def test_other_models_are_told_and_a_missing_baseline_refused(self, tmp_path):
        rows = [line("grpo", 0, 0.1), line("fast", 0, 0.1, start="another")]
        results = read([write(tmp_path / "r.jsonl", rows)])
        assert any("Not paired" in note and "[0]" in note for note in compare(results)[0].notes)
        with pytest.raises(ReportError, match="no arm 'ppo'.*grpo, fast"):
            compare(results, "ppo")


class TestPages:
    def test_table_holds_the_figures(self, results):
        text = table(compare(results))
        head, *rows = [row.split(" | ") for row in text.splitlines() if row.startswith("|")]
        assert {len(row) for row in rows[1:]} == {len(head)}
        assert "| fast | 3 | 0.530<br>+0.160 (+0.160 to +0.160) |" in text
        assert "200<br>× 0.50 (0.50 to 0.50); 3 of 3 seeds" in text and "cores 2" in text

    def test_page_escapes_and_draws_each_arm_beside_the_baseline(self, tmp_path):
        rows = [line(arm, seed, 0.02 + 0.01 * seed) for seed in (0, 1) for arm in ("grpo", "<b>", "c")]
        page = render(compare(read([write(tmp_path / "r.jsonl", rows)])), "<i>")
        assert "<b>" not in page and "<i>" not in page
        # Two arms, and the ratios for three levels.
        assert page.count("<svg") == 5 and page.count('class="band run"') == page.count('class="band baseline"') == 2

    @pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
    @pytest.mark.parametrize("window", ["1200,900", "500,900"])
    def test_nothing_overlaps_in_a_browser(self, tmp_path, window):
        rng, arms = np.random.default_rng(0), {"grpo": 0.02, "td lambda 0.5, calibrated": 0.04, "shuffled": 0.018}
        rows = [line(arm, seed, slope + rng.normal(0, 0.004)) for seed in range(5) for arm, slope in arms.items()]
        page = render(compare(read([write(tmp_path / "r.jsonl", rows)])), "A race")
        assert look(page, tmp_path, window)["faults"] == []
