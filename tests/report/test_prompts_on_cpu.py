"""Figures of single prompts: where the values say the model is guessing, and where failures share a blamed segment."""

import math

import numpy as np
import pytest

from rredcot_verl.report import Thresholds, load_run, prompts_of, render, summarise
from rredcot_verl.report.prompts import is_blind, is_guessing, is_learnable
from rredcot_verl.report.shared_blame import line_of

from .fake_run import trace, write_run

LINES = ["first\n", "second\n", "third\n", "end"]


def prompts(tmp_path, rows, **thresholds):
    return prompts_of(load_run(write_run(tmp_path / "run", rows)), Thresholds(**thresholds))


def flat(reward, values=(0.5, 0.5, 0.5), **changes):
    """A trace of three segments whose values are given up to the outcome."""
    return trace(["a\n", "b\n", "c"], [*values, reward], **changes)


def failed(at, parts=None, fall=0.5, **changes):
    """A failed trace of four segments that falls at one of them."""
    values = [0.0] * 5
    for k in range(at + 1):
        values[k] = fall
    return trace(parts or LINES, values, reward=0.0, **changes)


class TestFigures:
    def test_of_one_prompt_over_all_its_groups(self, tmp_path):
        rows = [flat(1.0), flat(0.0, uid="other", step=2), flat(0.0, (0.2, 0.6, 0.4)), flat(1.0, prompt="another")]
        rows.append(trace([], [1.0], status="uniform_group", start_value=None, return_error=None))
        one, another = prompts(tmp_path, rows)
        assert (one.text, one.uids, one.num_responses, one.num_scored) == ("What is 1 + 1?", ("group", "other"), 4, 3)
        assert (one.mean_reward, one.solved, one.entropy) == (0.5, 0.5, 1.0)
        assert one.start_value == pytest.approx((0.5 + 0.5 + 0.2) / 3)
        assert one.mean_value == pytest.approx((0.5 + 0.5 + 0.4) / 3)
        assert one.spread == pytest.approx(math.sqrt((0.2**2 + 0.2**2) / 3) / 3)
        assert (another.entropy, is_learnable(another), is_learnable(one)) == (0.0, False, True)

    def test_a_trace_of_one_segment_has_no_spread(self, tmp_path):
        (prompt,) = prompts(tmp_path, [trace(["a"], [0.5, 0.0])])
        assert prompt.spread is None and prompt.start_value == 0.5

    def test_values_that_are_no_forecast(self, tmp_path):
        rows = [flat(0.0, source="vps", prompt="vps"), flat(0.0, source="leave_one_out", prompt="loo")]
        vps, weights = prompts(tmp_path, rows)
        assert (vps.start_value, vps.spread) == (None, 0.0)
        assert (weights.start_value, weights.spread) == (None, None)


class TestGuessing:
    def test_flat_values_and_mixed_outcomes(self, tmp_path):
        (prompt,) = prompts(tmp_path, [flat(1.0), flat(0.0), flat(0.0), flat(1.0)])
        assert is_guessing(prompt, Thresholds())

    def test_flat_values_far_from_the_mean_reward_see_nothing(self, tmp_path):
        (prompt,) = prompts(tmp_path, [flat(reward, (0.02, 0.0, 0.01)) for reward in (1.0, 0.0, 0.0, 1.0)])
        assert is_blind(prompt, Thresholds()) and not is_guessing(prompt, Thresholds())
        assert is_guessing(prompt, Thresholds(max_gap=0.5)) and not is_blind(prompt, Thresholds(max_gap=0.5))

    @pytest.mark.parametrize(
        "rows",
        [
            [flat(1.0), flat(0.0)],  # too few responses
            [flat(1.0), flat(1.0), flat(1.0), flat(1.0)],  # no doubt about the outcome
            [flat(1.0, (0.5, 0.7, 0.9)), flat(1.0, (0.5, 0.7, 0.9)), flat(0.0, (0.5, 0.2, 0.0)), flat(0.0)],  # moving
        ],
    )
    def test_is_not(self, tmp_path, rows):
        (prompt,) = prompts(tmp_path, rows)
        assert not is_guessing(prompt, Thresholds()) and not is_blind(prompt, Thresholds())

    def test_listed_with_figures_the_flattest_first(self, tmp_path):
        rows = [flat(reward, prompt="flat") for reward in (0.0, 1.0, 0.0, 1.0)]
        rows += [flat(reward, (0.5, 0.6, 0.5), prompt="a little") for reward in (0.0, 1.0, 0.0, 1.0)]
        run = load_run(write_run(tmp_path / "run", rows))
        summary = summarise(run)["prompts"]
        assert summary["num_guessing"] == 2 and [row["prompt"] for row in summary["guessing"]] == ["flat", "a little"]
        assert summary["guessing"][0]["mean_value"] == 0.5
        assert "<b>2</b> prompts are listed" in render(run)
        strict = summarise(run, thresholds=Thresholds(max_spread=0.01))["prompts"]
        assert [row["prompt"] for row in strict["guessing"]] == ["flat"]


class TestSharedBlame:
    def test_by_text(self, tmp_path):
        parts = ["Intro\n", "The total IS 7\n", "so\n", "end"]
        rows = [
            failed(1, parts),
            failed(1, ["x\n\n", " the  total is 9\n", "so\n", "end"]),
            failed(1, parts),
            failed(2),
        ]
        (prompt,) = prompts(tmp_path, rows, num_alike=8, max_chance=1.0)
        blame = prompt.shared_blame
        assert (blame.how, blame.what, blame.num_failures, blame.num_sharing) == ("text", "thetotal", 4, 3)
        assert (blame.share, blame.mean_credit, blame.num_last) == (0.75, -0.5, 0)
        # One example of each wording.
        assert [trace.text_of(k).strip() for trace, k in blame.examples] == ["The total IS 7", "the  total is 9"]

    def test_by_line_where_the_wording_differs(self, tmp_path):
        rows = [failed(2, ["first\n", "second\n", f"{word}\n", "end"]) for word in ("one", "two", "three")]
        (prompt,) = prompts(tmp_path, rows, max_chance=0.2)
        blame = prompt.shared_blame
        assert (blame.how, blame.what, blame.num_sharing) == ("line", "3", 3)

    def test_chance_is_that_of_segments_drawn_at_random(self, tmp_path):
        (prompt,) = prompts(tmp_path, [failed(1), failed(1), failed(1)], max_chance=1.0)
        # Three draws from four segments are the same one in 4 of 64 cases, and there are two ways to agree; the
        # tolerance is four standard errors.
        assert prompt.shared_blame.chance == pytest.approx(2 * 4 / 64, abs=8 * math.sqrt(1 / 16 * 15 / 16 / 1000))
        assert prompt.num_blamed == 3

    def test_blame_that_falls_there_in_every_prompt_is_not_shared_by_one(self, tmp_path):
        late = [failed(2, prompt=f"late {k}") for k in range(50) for _ in range(4)]
        rows = [*late, *[failed(1, prompt="early")] * 4, *[failed(2, prompt="late too")] * 4]
        found = {prompt.text: prompt.shared_blame for prompt in prompts(tmp_path, rows)}
        assert found["early"].chance < 0.01 and found["late too"] is None

    def test_of_responses_blamed_at_random_few_are_listed(self, tmp_path):
        rng = np.random.default_rng(0)
        rows = []
        for number in range(200):
            for _ in range(5):
                # Late segments are blamed more often, in every prompt alike.
                at = int(rng.choice(4, p=(0.1, 0.2, 0.3, 0.4)))
                parts = [f"{rng.integers(4)} words\n" for _ in range(4)]
                rows.append(failed(at, parts, prompt=str(number)))
        found = prompts(tmp_path, rows)
        assert sum(prompt.num_blamed >= 3 for prompt in found) == 200
        assert sum(prompt.shared_blame is not None for prompt in found) <= 0.05 * 200

    @pytest.mark.parametrize(
        ("rows", "thresholds"),
        [
            ([failed(1), failed(1)], {}),  # too few
            ([failed(0), failed(1), failed(2), failed(3)], {}),  # all different
            ([failed(1, fall=0.05)] * 4, {}),  # hardly a fall
            ([failed(1)] * 4, {"max_chance": 0.0}),  # luck is not excluded
            ([flat(1.0, (0.9, 0.2, 0.2))] * 4, {}),  # not failed
        ],
    )
    def test_is_not_shared(self, tmp_path, rows, thresholds):
        (prompt,) = prompts(tmp_path, rows, **thresholds)
        assert prompt.shared_blame is None

    def test_listed_with_examples(self, tmp_path):
        parts = ["first\n", "<b>second</b>\n", "third\n", "end"]
        run = load_run(write_run(tmp_path / "run", [failed(1, parts)] * 6))
        (row,) = summarise(run)["prompts"]["shared_blame"]
        assert (row["how"], row["num_sharing"], row["examples"][0]["segment"]) == ("text", 6, 1)
        page = render(run)
        assert "6 of 6" in page and "&lt;b&gt;second&lt;/b&gt;" in page and "<b>second" not in page

    def test_weights_of_segments_can_be_blamed_but_not_guess(self, tmp_path):
        run = load_run(write_run(tmp_path / "run", [failed(1, source="leave_one_out")] * 6))
        page = render(run)
        assert "6 of 6" in page and page.count("No trace has values that could tell") == 1

    def test_blame_in_the_last_segment_comes_last(self, tmp_path):
        rows = [failed(3, prompt="pinned")] * 8 + [failed(1, prompt="inside")] * 5
        summary = summarise(load_run(write_run(tmp_path / "run", rows)))["prompts"]
        assert [row["prompt"] for row in summary["shared_blame"]] == ["inside", "pinned"]
        assert [row["num_in_last_segment"] for row in summary["shared_blame"]] == [0, 8]

    def test_line_is_that_of_the_first_visible_character(self, tmp_path):
        run = load_run(write_run(tmp_path / "run", [trace(["a", "\n\nb\n", "c"], [0.0] * 4)]))
        assert [line_of(run.traces[0], k) for k in range(3)] == [1, 3, 4]
