"""The report of a training run: its figures, its errors, and the page."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from rredcot_verl.report import ReportError, load_line_checker, load_run, render, summarise
from rredcot_verl.report.__main__ import main
from rredcot_verl.report.line_checker import segment_of_line
from rredcot_verl.report.selection import extreme_traces
from rredcot_verl.report.shown_traces import choose
from rredcot_verl.report.summary import position_shares
from tests.in_browser import CHROMIUM, look

from .fake_run import BASELINE_VALIDATION, METRIC, Line, check_lines, trace, traces, write_metrics, write_run


@pytest.fixture
def run(tmp_path):
    return load_run(write_run(tmp_path / "rredcot"))


@pytest.fixture
def baseline(tmp_path):
    return load_run(write_metrics(tmp_path / "grpo", BASELINE_VALIDATION), with_traces=False)


class TestSummary:
    def test_figures_are_those_of_the_files(self, run, baseline):
        summary = summarise(run, baseline, check_lines)
        assert summary["validation"] == {
            "metric": METRIC,
            "before": 0.25,
            "after": 0.75,
            "first_step": 0,
            "last_step": 4,
        }
        reached = summary["baseline"]["validation"]
        assert (reached["before"], reached["after"]) == (0.25, 0.6875)
        assert (summary["num_steps"], summary["seconds"]) == (4, 8.0)
        assert summary["self_value"] == {
            "engine": "rollout",
            "seconds": 2.0,
            "share_of_step_seconds": 0.25,
            "probe_tokens_per_response_token": 1.25,
        }
        assert summary["max_return_error"] == 2e-6
        assert (summary["num_traces"], summary["num_scored_traces"]) == (6, 5)
        assert summary["skipped_traces"] == {"truncated": 1}

    def test_blame_counts_failed_traces_with_a_wrong_line(self, run):
        # Located: the tie, which the earlier segment wins, and the trace of two segments.
        assert summarise(run, line_checker=check_lines)["blame"] == {
            "num_traces": 4,
            "rate": 0.5,
            "chance_rate": (1 / 4 + 1 / 2 + 1 / 4 + 1 / 3) / 4,
            "last_segment_rate": 0.25,
            "num_without_negative_credit": 0,
            "num_solved_traces": 1,
            "num_solved_traces_with_wrong_line": 0,
        }

    @pytest.mark.parametrize(
        "row",
        [
            trace(["a wrong line\n", "answer"], [0.5, 0.5, 1.0]),  # solved
            trace(["a wrong line"], [0.5, 0.0]),  # one segment: nothing to choose from
            trace(["a good line\n", "answer"], [0.5, 0.5, 0.0]),  # no wrong line
            trace(["a wrong line\n", "answer"], [0.5, 0.5, 0.0], status="truncated"),
        ],
    )
    def test_blame_leaves_out_traces_that_cannot_tell(self, tmp_path, row):
        blame = summarise(load_run(write_run(tmp_path / "run", [row])), None, check_lines)["blame"]
        assert (blame["num_traces"], blame["rate"], blame["chance_rate"]) == (0, None, None)

    def test_what_counts_as_solved_is_an_option(self, tmp_path):
        parts = ["one\n", "two wrong\n", "answer"]
        folder = write_run(tmp_path / "run", [trace(parts, [0.9, 0.9, 0.1, 0.8], reward=0.8)])
        assert summarise(load_run(folder), None, check_lines)["blame"]["num_traces"] == 0
        assert summarise(load_run(folder, solved_at=1.0), None, check_lines)["blame"]["num_traces"] == 1

    def test_without_checker_and_timings_nothing_is_invented(self, tmp_path):
        folder = write_run(tmp_path / "run")
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "data": {METRIC: 0.5}}) + "\n")
        summary = summarise(load_run(folder))
        assert summary["blame"] is None and summary["baseline"] is None and summary["seconds"] is None
        assert (summary["num_steps"], summary["validation"]["before"], summary["validation"]["after"]) == (3, 0.5, 0.5)
        assert set(summary["self_value"].values()) == {None, "rollout"}

    def test_checker_that_finds_fault_with_solved_traces_is_reported(self, run):
        def reject(prompt, response):
            return [Line(0, len(response), False)]

        summary = summarise(run, None, reject)
        assert summary["blame"]["num_solved_traces_with_wrong_line"] == 1
        warning = "the checker finds a wrong line in 1 of 1 solved traces"
        assert warning in render(run, None, reject) and warning not in render(run, None, check_lines)

    @pytest.mark.parametrize(("start", "end"), [(3, 8), (3, 9), (2, 8)])
    def test_the_line_break_does_not_decide_a_lines_segment(self, tmp_path, start, end):
        for name, parts in (("after", ["ab\n", "wrong\n", "c"]), ("before", ["ab", "\nwrong", "\nc"])):
            run = load_run(write_run(tmp_path / name, [trace(parts, [0.0] * 4)]))
            assert segment_of_line(run.traces[0], Line(start, end, False)) == 1

    def test_position_shares_spread_a_segment_over_its_tokens(self, tmp_path):
        rows = [trace(["a", "b"], [0.5, 0.25, 1.0])]
        shares = position_shares(load_run(write_run(tmp_path / "run", rows)).traces, abs)
        np.testing.assert_allclose(shares, [0.05] * 5 + [0.15] * 5)

    def test_position_shares_of_nothing(self, tmp_path):
        run = load_run(write_run(tmp_path / "run", [trace(["a", "b"], [0.0, 0.0, 0.0])]))
        assert position_shares(run.traces, abs) is None
        assert "None in these traces" in render(run)

    def test_calibration_takes_the_value_before_the_last_segment(self, run):
        calibration = summarise(run)["calibration"]["last_value_before_answer"]
        # Values 0.25, 0.5, 0.0, 0.5 with reward 0, and 0.75 with reward 1.
        assert calibration["num_traces"] == 5
        assert calibration["mean_value"] == pytest.approx(0.4)
        assert calibration["brier"] == pytest.approx((0.25**2 + 0.5**2 + 0.5**2 + 0.25**2) / 5)
        assert calibration["brier_of_mean_reward"] == pytest.approx(0.2 * 0.8)
        assert [(row["low"], row["num_traces"], row["mean_reward"]) for row in calibration["bins"]] == [
            (0.0, 1, 0.0),
            (0.2, 1, 0.0),
            (0.5, 2, 0.0),
            (0.7, 1, 1.0),
        ]

    def test_calibration_is_of_the_range_of_rewards(self, tmp_path):
        ranged = [
            trace(["a", "b"], [value, value, reward], reward_range=[-1, 1])
            for value, reward in ((-0.9, -1.0), (0.05, -1.0), (0.5, 1.0))
        ]
        unit = [trace(["a", "b"], [value, value, reward]) for value, reward in ((0.05, 0.0), (0.525, 0.0), (0.75, 1.0))]
        runs = [load_run(write_run(tmp_path / name, rows)) for name, rows in (("ranged", ranged), ("unit", unit))]
        found, same = (summarise(run)["calibration"]["start_value"] for run in runs)
        assert found["brier"] == pytest.approx(same["brier"])
        assert [row["low"] for row in found["bins"]] == [row["low"] for row in same["bins"]] == [0.0, 0.5, 0.7]
        with pytest.raises(
            ReportError, match=r"'reward_range' must be the lowest and the highest reward, got \[1, 0\]"
        ):
            load_run(write_run(tmp_path / "bad", [trace(["a"], [0.5, 1.0], reward_range=[1, 0])]))

    def test_summary_is_strict_json(self, run, baseline):
        summary = summarise(run, baseline, check_lines)
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary


class TestErrors:
    def assert_fails(self, capsys, arguments, *words):
        assert main([str(argument) for argument in arguments]) == 1
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        for word in words:
            assert str(word) in message, message

    def test_missing_files(self, tmp_path, capsys):
        folder = tmp_path / "run"
        self.assert_fails(capsys, [folder], folder, "no such run folder")
        folder.mkdir()
        self.assert_fails(
            capsys, [folder], folder, "nothing to report on", "metrics.jsonl", "traces.dir", "rollout_data_dir"
        )
        shutil.rmtree(folder)
        write_metrics(folder, BASELINE_VALIDATION)
        self.assert_fails(
            capsys, [folder, "--traces", folder / "traces"], folder / "traces", "no such folder of traces"
        )
        (folder / "traces").mkdir()
        self.assert_fails(capsys, [folder, "--traces", folder / "traces"], folder / "traces", "no <step>.jsonl")

    def test_empty_file(self, tmp_path, capsys):
        folder = write_run(tmp_path / "run")
        (folder / "traces" / "2.jsonl").write_text("\n")
        self.assert_fails(capsys, [folder], folder / "traces" / "2.jsonl", "empty")
        (folder / "metrics.jsonl").write_text("")
        self.assert_fails(capsys, [folder], folder / "metrics.jsonl", "empty")

    def test_bad_json_names_file_and_line(self, tmp_path, capsys):
        folder = write_run(tmp_path / "run")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "da\n')
        self.assert_fails(capsys, [folder], f"{folder / 'metrics.jsonl'}:6", "bad JSON")

    def test_a_last_line_that_was_cut_off_is_left_out_and_said(self, tmp_path, caplog):
        folder = write_run(tmp_path / "run")
        whole = load_run(folder)
        file = folder / "metrics.jsonl"
        # In the middle of a character, too.
        file.write_bytes(file.read_bytes() + '{"step": 5, "data": {"é'.encode()[:-1])
        assert load_run(folder).metrics == whole.metrics
        assert f"{file}:6: not UTF-8 text" in caplog.text and "cut off" in caplog.text

    def test_baseline_with_another_validation_metric(self, tmp_path, capsys):
        other = tmp_path / "other"
        other.mkdir()
        (other / "metrics.jsonl").write_text('{"step": 0, "data": {"val-core/else/acc/mean@1": 1.0}}\n')
        self.assert_fails(capsys, [write_run(tmp_path / "run"), "--baseline", other], other, METRIC)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"reward": None}, ["'reward'", "None"]),
            ({"reward": float("nan")}, ["'reward'", "nan"]),
            ({"step": "one"}, ["'step'", "'one'"]),
            ({"response": 3}, ["'response'"]),
            ({"response": "ab"}, ["segment 0", "0..12", "0..2"]),
            ({"segments": None}, ["'segments'"]),
        ],
    )
    def test_malformed_trace(self, tmp_path, change, words):
        folder = write_run(tmp_path / "run")
        row = trace(["a good line\n", "answer"], [0.5, 0.5, 0.0]) | change
        (folder / "traces" / "1.jsonl").write_text("\n" + json.dumps(row))
        with pytest.raises(ReportError) as caught:
            load_run(folder)
        for word in [f"{folder / 'traces' / '1.jsonl'}:2", *words]:
            assert word in str(caught.value)

    @pytest.mark.parametrize("name", ["nothing", "no.such.module:f", "json:no_such_function", ":f"])
    def test_line_checker_that_is_none(self, name):
        with pytest.raises(ReportError, match="line checker"):
            load_line_checker(name)

    def test_line_checker_outside_the_response(self, run):
        with pytest.raises(ReportError, match="0..999"):
            summarise(run, None, lambda prompt, response: [Line(0, 999, False)])


class TestPage:
    def test_text_of_a_trace_cannot_become_markup(self, tmp_path):
        evil = "<script>alert(1)</script>\n<img src=x onerror=alert(2)>\n"
        row = trace([evil, "</td>\x00\u202e\ud800 answer"], [0.5, 0.25, 0.0], prompt=evil, ground_truth="<b>2</b>")
        run = load_run(write_run(tmp_path / "<i>run", [row]))
        page = render(run, title="<script>title</script>")
        page.encode("utf-8")
        assert "<script" not in page and "<img" not in page and "<b>2" not in page and "<i>run" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert not set(page) & {"\x00", "\u202e"}
        assert _tags(page).isdisjoint({"script", "img", "link", "iframe", "object"})

    def test_page_loads_nothing(self, run, baseline):
        page = render(run, baseline, check_lines)
        assert not re.search(r"https?:|src=|url\(|@import|<link", page)
        assert "default-src 'none'" in page

    def test_page_holds_the_figures_and_the_traces(self, run, baseline):
        page = render(run, baseline, check_lines, title="Toy run")
        assert page.count("<svg") == 6 and page.count('class="card trace"') == _num_traces(run)
        for text in ("Toy run", "0.250 → 0.750", "GRPO: 0.250 → 0.688", "50 %", "by chance 33 %", "25 % of step time"):
            assert text in page, text
        for text in ("2.0e-06", "5 of 6", "1 truncated", "first wrong line", "most negative credit", "✓", "✗", "−0.25"):
            assert text in page, text

    def test_misses_are_shown_beside_hits_and_no_trace_twice(self, run):
        for seed in range(5):
            picks = choose(run, check_lines, seed)
            assert [pick.reason.split(":")[-1].strip() for pick in picks[:4]] == [
                "the blame falls on the first wrong line",
                "the blame falls on the first wrong line",
                "the blame falls elsewhere",
                "Solved",
            ]
            assert len({id(pick.trace) for pick in picks}) == len(picks)
        assert {pick.reason for pick in choose(run, None, 0)} >= {"Failed", "Solved"}

    def test_same_seed_same_page(self, run):
        assert render(run, None, check_lines, seed=3) == render(run, None, check_lines, seed=3)

    def test_segments_that_cut_a_line_lose_no_text(self, tmp_path):
        parts = ["first wr", "ong line\n\nsec", "\n", "ond line", "\nanswer"]
        row = trace(parts, [0.5, 0.5, 0.25, 0.25, 0.25, 0.0])
        row["segments"].pop()  # and text after the last segment is shown too
        page = render(load_run(write_run(tmp_path / "run", [row])), None, check_lines)
        for text in ("first wr", "ong line", "sec", "⏎", "ond line", "answer"):
            assert f'<span class="text">{text}</span>' in page, text
        assert page.count('aria-label="wrong line"') == page.count('class="card trace"')

    def test_line_cut_before_its_last_character_has_one_mark(self, tmp_path):
        row = trace(["1+1=", "2\n3", "\nanswer"], [0.5, 0.5, 0.25, 0.0])
        page = render(load_run(write_run(tmp_path / "run", [row])), None, check_lines)
        assert page.count('aria-label="correct line"') == 2 * page.count('class="card trace"')

    def test_run_in_which_nothing_was_scored(self, tmp_path):
        rows = [trace([], [0.0], response="", status="truncated"), trace([], [0.0], response="")]
        run = load_run(write_run(tmp_path / "run", rows))
        assert summarise(run)["skipped_traces"] == {"truncated": 1, "no segment": 1}
        assert "No trace has self-values" in render(run, None, check_lines)

    def test_command_line_writes_both_files(self, tmp_path, capsys):
        folder, grpo = write_run(tmp_path / "run"), write_metrics(tmp_path / "grpo", BASELINE_VALIDATION)
        page, summary = tmp_path / "new" / "report.html", tmp_path / "new" / "summary.json"
        arguments = [folder, "--baseline", grpo, "--line-checker", f"{check_lines.__module__}:check_lines"]
        arguments += ["--title", "A title", "--out", page, "--summary", summary]
        assert main([str(argument) for argument in arguments]) == 0
        assert "<h1>A title</h1>" in page.read_text(encoding="utf-8")
        assert json.loads(summary.read_text())["blame"]["rate"] == 0.5
        assert str(page) in capsys.readouterr().out


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("window", ["1200,900", "500,900"])
def test_figures_are_there_and_nothing_overlaps_in_a_browser(tmp_path, baseline, window):
    long = "a long question without end " * 12
    listed = [trace(["x" * 90 + "\n", "b\n", "c"], [0.5, 0.5, 0.0, 0.0], prompt=long, step=2) for _ in range(6)]
    listed += [trace(["a\n", "b"], [0.5, 0.5, float(k % 2)], prompt="a guess", step=3) for k in range(6)]
    run = load_run(write_run(tmp_path / "listed", [*traces(), *listed]))
    lists = summarise(run)["prompts"]
    assert (lists["num_guessing"], lists["num_shared_blame"]) == (1, 1)
    found = look(render(run, baseline, check_lines), tmp_path, window)
    assert found == {"charts": 6, "traces": _num_traces(run), "faults": []}


def _num_traces(run) -> int:
    """Traces drawn at random, and at most three of each kind."""
    return len(choose(run, check_lines, 0)) + len(extreme_traces(run.traces, 9))


def _tags(page: str) -> set[str]:
    found: set[str] = set()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.add(tag)
    parser.feed(page)
    return found
