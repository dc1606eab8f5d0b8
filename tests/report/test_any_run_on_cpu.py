"""The report takes what a run has: traces or not, verl's own dumps, metrics with and without validation."""

import json
import shutil
import subprocess
import sys

import pytest

from rredcot_verl.report import ReportError, load_run, prompts_of, render, summarise
from rredcot_verl.report.__main__ import main
from rredcot_verl.report.frame import learn_frame, without_frame
from rredcot_verl.report.run_files import RunFiles
from rredcot_verl.report.trace import read_trace

from .fake_run import VALIDATION, response, trace, write_dump, write_metrics, write_run

ROLLOUTS = [
    response(1, "a", 1.0),
    response(1, "a", 0.0, uid="a_1_0"),
    response(1, "b", 0.0),
    response(2, "a", 1.0, output="<b>last</b>"),
]


def rendered(folder, **options):
    run = load_run(folder, **options)
    return run, summarise(run), render(run)


class TestWhatThereIs:
    def test_rollouts_alone(self, tmp_path):
        write_dump(tmp_path / "run/any/name", ROLLOUTS)
        run, summary, page = rendered(tmp_path / "run")
        assert run.curve.points == [(1, pytest.approx(1 / 3)), (2, 1.0)]
        assert summary["curve"]["metric"] == "mean score of the rollout dumps" and summary["validation"] is None
        assert (summary["num_traces"], summary["num_rollouts"], summary["num_steps"]) == (0, 4, 2)
        notes = " ".join(summary["notes"])
        for words in ("no metrics file", "No validation was logged", "no credited traces"):
            assert words in notes and words in page
        assert page.count("<svg") == 1 and "&lt;b&gt;last&lt;/b&gt;" in page and "Solved, without segments" in page
        assert "there is no credit of segments" in page and "No trace has values that could tell" in page

    def test_only_the_last_outputs_of_a_session_count(self, tmp_path):
        rows = [response(1, "a", 1.0, uid=f"a_0_{output}", output=f"turn {output}") for output in range(3)]
        write_dump(tmp_path / "run/rollouts", rows)
        (only,) = load_run(tmp_path / "run").rollouts
        assert (only.uid, only.response) == ("a", "turn 2")

    def test_dumps_without_uid_are_grouped_by_prompt(self, tmp_path):
        rows = [{k: v for k, v in row.items() if k != "uid"} for row in ROLLOUTS]
        write_dump(tmp_path / "run/rollouts", rows)
        prompts = summarise(load_run(tmp_path / "run"))["prompts"]
        assert (prompts["num_prompts"], prompts["num_learnable"]) == (2, 1)

    def test_validation_dumps_alone(self, tmp_path):
        write_dump(tmp_path / "run/validation", [response(0, "a", 0.0), response(0, "b", 1.0), response(4, "a", 1.0)])
        _, summary, page = rendered(tmp_path / "run")
        assert summary["curve"]["name"] == "Validation score" and "0.500 → 1.000" in page
        assert summary["prompts"]["num_prompts"] == 0

    def test_metrics_without_validation(self, tmp_path):
        _, summary, page = rendered(write_metrics(tmp_path / "run", {}))
        curve = {"before": 0.125, "after": 0.5, "first_step": 1, "last_step": 4}
        assert summary["curve"] == {"name": "Mean training reward", "metric": "critic/score/mean", **curve}
        assert "No validation was logged: the curve is of training (critic/score/mean)." in page

    def test_metrics_without_any_reward(self, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "data": {"perf/mfu": 0.1}}\n')
        _, summary, page = rendered(tmp_path / "run")
        assert summary["curve"] is None and "there is no learning curve" in page

    def test_traces_alone(self, tmp_path):
        folder = write_run(tmp_path / "run")
        (folder / "metrics.jsonl").unlink()
        _, summary, page = rendered(folder)
        assert summary["curve"]["name"] == "Mean reward of the traces" and "a selection" in page
        assert summary["seconds"] is None and "Worst blamed: its largest fall is 0.50" in page

    def test_files_deep_down_under_any_name(self, tmp_path):
        folder = write_run(tmp_path / "run")
        (folder / "x/y").mkdir(parents=True)
        (folder / "traces").rename(folder / "x/y/credit")
        (folder / "metrics.jsonl").rename(folder / "x/experiment.jsonl")
        write_dump(folder / "global_step_5/ignored", ROLLOUTS)
        run = load_run(folder)
        assert len(run.traces) == 6 and [value for _, value in run.validation] == list(VALIDATION.values())
        assert run.rollouts == ()

    def test_the_folder_of_traces_itself(self, tmp_path):
        assert len(load_run(write_run(tmp_path / "run") / "traces").traces) == 6

    def test_rollouts_and_validation_are_told_apart(self, tmp_path):
        write_dump(tmp_path / "run/generations", ROLLOUTS)
        write_dump(tmp_path / "run/val_generations", [response(0, "a", 0.25)])
        run = load_run(tmp_path / "run")
        assert len(run.rollouts) == 4 and run.validation_scores == ((0, 0.25),)

    def test_steps_narrow_what_is_read(self, tmp_path):
        folder = write_run(tmp_path / "run")
        assert {trace.step for trace in load_run(folder, steps=(2, 3)).traces} == {2, 3}
        with pytest.raises(ReportError, match="no file for steps 8 to 9; it has 1 to 4"):
            load_run(folder, steps=(8, 9))

    def test_texts_of_large_dumps_are_not_kept(self, tmp_path):
        write_dump(tmp_path / "run/rollouts", ROLLOUTS)
        assert [bool(row.response) for row in load_run(tmp_path / "run").rollouts] == [False, False, False, True]


class TestChoice:
    def test_several_folders_need_a_choice(self, tmp_path):
        folder = write_run(tmp_path / "run")
        (folder / "traces").rename(folder / "one")
        shutil.copytree(folder / "one", folder / "two")
        with pytest.raises(ReportError, match=r"several folders of traces \(one, two\): choose one with --traces"):
            load_run(folder)
        assert load_run(folder, given=RunFiles(traces=folder / "two")).files.traces == folder / "two"

    def test_options_name_files(self, tmp_path, capsys):
        folder = write_run(tmp_path / "run")
        elsewhere = write_dump(tmp_path / "elsewhere", ROLLOUTS)
        page = tmp_path / "page.html"
        summary = tmp_path / "summary.json"
        options = ["--rollouts", elsewhere, "--traces", folder / "traces", "--metrics", folder / "metrics.jsonl"]
        options += ["--steps", "1-2", "--out", page, "--summary", summary]
        assert main([str(option) for option in [folder, *options]]) == 0
        found = json.loads(summary.read_text())
        assert (found["num_rollouts"], found["num_traces"]) == (4, 2)
        assert main([str(folder), "--rollouts", str(tmp_path / "no")]) == 1
        assert "no such folder of rollouts" in capsys.readouterr().err

    def test_malformed_dump_names_the_line(self, tmp_path):
        write_dump(tmp_path / "run/rollouts", [response(1, "a", 1.0), response(1, "b", None)])
        with pytest.raises(ReportError, match=r"rollouts/1.jsonl:2: 'score' must be a finite number"):
            load_run(tmp_path / "run")


class TestSources:
    def test_source_and_engine_are_shown(self, tmp_path):
        rows = [trace(["a", "b"], [0.5, 0.25, 0.0], source="vineppo", engine="9 continuations")]
        _, summary, page = rendered(write_run(tmp_path / "run", rows))
        assert summary["source"] == "vineppo"
        assert "<code>vineppo</code>, read by 9 continuations" in page and ">vineppo</text>" in page

    def test_traces_of_older_runs_are_rredcots(self, tmp_path):
        run, summary, page = rendered(write_run(tmp_path / "run"))
        assert summary["source"] == "rredcot" and run.traces[0].index is None and ">RREDCoT</text>" in page

    def test_values_that_know_the_outcome_are_not_called_forecasts(self, tmp_path):
        rows = [trace(["a", "b"], [0.5, 0.25, 0.0], source="leave_one_out")]
        _, summary, page = rendered(write_run(tmp_path / "run", rows))
        assert set(summary["calibration"].values()) == {None} and "made of it" in page
        assert summary["credit_by_position"]

    @pytest.mark.parametrize(
        ("changes", "weighs"),
        [
            ({}, False),
            ({"source": "attention_attribution"}, True),
            ({"source": "new", "weighs": True}, True),
            ({"source": "leave_one_out", "weighs": False}, False),
        ],
    )
    def test_whether_values_are_weights_is_said_by_the_row_or_known_by_the_source(self, changes, weighs):
        found = read_trace(trace(["a", "b"], [0.5, 0.25, 0.0], **changes), "here")
        assert (found.weighs, found.is_forecast) == (weighs, not weighs)
        with pytest.raises(ReportError, match="here: 'weighs' must be true or false"):
            read_trace(trace(["a", "b"], [0.5, 0.25, 0.0], weighs="no"), "here")


def test_the_report_is_light():
    """A run is read where verl and torch are not installed."""
    code = "import sys, rredcot_verl.report.__main__, rredcot_verl.report.sample_formats; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "verl", "ray", "transformers", "pydantic", "pyarrow", "pandas"} & set(loaded)


class TestFrame:
    def test_template_is_learnt_from_a_few(self):
        inputs = [f"system\nBe brief.\nuser\nWhat is {k}?\nassistant\n" for k in range(5)]
        frame = learn_frame(inputs, {"What is 1?", "What is 3?", "is", "something else"})
        assert frame == ("system\nBe brief.\nuser\n", "\nassistant\n")
        assert without_frame(inputs[4], frame) == "What is 4?"
        assert without_frame("another text ", frame) == "another text"

    def test_no_template(self):
        assert learn_frame(["abc", "d"], {"abc"}) == ("", "")
        assert learn_frame([], {"abc"}) == learn_frame(["abc"], set()) == ("", "")

    def test_rollouts_join_the_traces_of_their_prompt(self, tmp_path):
        rows = [trace(["x", "y"], [0.5, 0.25, 0.0], uid="a", prompt="Question a?")]
        folder = write_run(tmp_path / "run", rows)
        write_dump(folder / "rollouts", ROLLOUTS)
        run = load_run(folder)
        found = {prompt.text: prompt for prompt in prompts_of(run)}
        # Step 2 has no trace of the prompt; its frame was learnt from step 1.
        assert set(found) == {"Question a?", "Question b?"}
        assert (found["Question a?"].num_responses, found["Question a?"].num_scored) == (3, 1)
        assert found["Question a?"].mean_reward == pytest.approx(2 / 3)
