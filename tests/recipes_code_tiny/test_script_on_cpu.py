"""The one command: a dry run that starts nothing, and a run in which programs are run and their lines get credit."""

import json

import pytest

from recipes.code.tiny import language, task
from rredcot_verl.report import Trace, load_run
from tests.recipes.launcher import run_tiny

SMALLEST = "--hidden-size 32 --num-layers 1 --batch-size 2 --num-train-rows 16 --num-val-rows 8"
# One operation, so that seconds of warm start give programs that run; many mistakes, so that groups are mixed.
EASY = (
    "--num-updates 150 --batch-size 12 --hidden-size 64 --num-layers 2 --num-elicited 1 --hard-error-rate 0.5 "
    "--easy-error-rate 0.2 --num-train-rows 32 --num-val-rows 8 --min-operations 1 --max-operations 1"
)


def test_a_dry_run_passes_and_trains_nothing(tmp_path):
    done = run_tiny("code", tmp_path, "trainer.total_training_steps=3", DRY_RUN="1", WARM_START=SMALLEST)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "nothing was started" in done.stdout
    assert "extra_info.solutions" in done.stdout and "rredcot_verl.rewards.code" in done.stdout
    assert not (tmp_path / "data").exists() and not (tmp_path / "rredcot/metrics.jsonl").exists()


def test_an_unknown_credit_is_refused(tmp_path):
    done = run_tiny("code", tmp_path, CREDIT="ppo", DRY_RUN="1")
    assert done.returncode == 2
    assert "CREDIT=ppo is not allowed; allowed: rredcot grpo" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.run
def test_programs_are_run_and_their_lines_credited(tmp_path):
    overrides = ("trainer.total_training_steps=2", "trainer.test_freq=2", "trainer.val_before_train=false")
    done = run_tiny("code", tmp_path, *overrides, "actor_rollout_ref.rollout.n=4", WARM_START=EASY)
    assert done.returncode == 0, done.stdout[-8000:]
    traces = load_run(tmp_path / "rredcot").traces
    assert {trace.step for trace in traces} == {1, 2}

    # Rewards are what running the program gives, and some are neither 0 nor 1.
    known = [(trace.reward, expected) for trace in traces if (expected := expected_reward(trace)) is not None]
    assert len(known) > len(traces) / 4
    different = [pair for pair in known if pair[0] != pytest.approx(pair[1])]
    assert not different, different
    assert {trace.reward for trace in traces} - {0.0, 1.0}

    scored = [trace for trace in traces if trace.is_scored]
    assert scored
    lines = (tmp_path / "rredcot/metrics.jsonl").read_text().splitlines()
    steps = [data for line in lines if "rredcot/rows_scored/mean" in (data := json.loads(line)["data"])]
    assert len(steps) == 2
    for step in steps:
        assert step["rredcot/rows_scored/mean"] > 0 and step["rredcot/rows_no_proposal/mean"] == 0
        assert step["rredcot/return_error/max"] < 1e-6

    # Lines of plan and program are segments of their own.
    starts = {trace.response[segment.start :].split("\n")[0] for trace in scored for segment in trace.segments}
    assert any(line.startswith("    if ") for line in starts), starts
    assert "```python" in starts and any("+" in line and "=" in line and ": " in line for line in starts)

    values = json.loads((tmp_path / "values.json").read_text())
    assert values["all"]["num_traces"] <= len(scored)
    assert (tmp_path / "report.html").exists() and (tmp_path / "summary.json").exists()


def expected_reward(trace: Trace) -> float | None:
    """The same by other means: what its lines do, one by one; None where a line is not of the language."""
    before, fence, block = trace.response.rpartition(language.FENCE_LINE)
    lines = block.splitlines(keepends=True)
    effects = [language.parse_program_line(line) for line in lines[1:-2]]
    framed = lines[:1] == [language.DEF_LINE] and lines[-2:] == [language.RETURN_LINE, language.FENCE]
    # A fence in the middle of a line opens no block.
    starts_a_line = before == "" or before.endswith("\n")
    if not fence or not starts_a_line or not framed or None in effects:
        return None
    passed = 0
    for x in task.INPUTS:
        y = x
        for effect in effects:
            y = effect.apply(y)
        passed += y == task.parse_problem(trace.prompt).value(x)
    return passed / len(task.INPUTS)
