"""The tiny math recipe by its own script: prepared data, the math verifier, credit for segments."""

import json
import re

import pytest

from recipes.quickstart.task import counts_for
from rredcot_verl.report import load_run
from tests.recipes.launcher import run_tiny

# Two operations on small numbers, so that seconds of warm start give answers, right and wrong ones.
WARM_START = (
    "--num-updates 240 --hidden-size 64 --num-layers 2 --min-operations 2 --max-operations 2 --max-operand 5 "
    "--max-value 12 --remark-words 0 --right-share 0.5 --without-rule 2 --num-train-rows 32 --num-val-rows 8"
)


def _expected_reward(trace) -> float | None:
    """The same by other means; None where the answer is no plain number."""
    lines = [line for line in trace.response.split("\n") if "Answer:" in line]
    if not lines:
        return 0.0
    answer = lines[-1].partition("Answer:")[2].strip()
    start, *operands = map(int, trace.prompt.replace("-", "+-").split("+"))
    right = start + sum(counts_for(position, operand) for position, operand in enumerate(operands))
    return float(int(answer) == right) if re.fullmatch(r"-?[0-9]+", answer) else None


@pytest.mark.run
def test_one_command_prepares_verifies_and_credits(tmp_path):
    batch = ("actor_rollout_ref.rollout.n=4", "data.train_batch_size=8")
    overrides = (*batch, "trainer.val_before_train=false", "trainer.test_freq=2")
    done = run_tiny("math", tmp_path, *overrides, WARM_START=WARM_START, STEPS="2")
    assert done.returncode == 0, done.stdout[-8000:]
    lines = (tmp_path / "rredcot/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["data"] for line in lines]
    assert {step["training/global_step"] for step in steps} == {1, 2}
    for step in steps:
        assert step["rredcot/rows_scored/mean"] > 0
        assert step["rredcot/segments_per_response/mean"] > 1
        assert step["rredcot/return_error/max"] < 1e-6

    # A comparison of texts, as the quickstart's own verifier makes, would hold no answer equal to "$5$".
    manifest = json.loads((tmp_path / "data/math/manifest.json").read_text())
    assert manifest["outputs"]["train.parquet"]["num_rows"] > 100
    traces = load_run(tmp_path / "rredcot").traces
    known = [(trace, expected) for trace in traces if (expected := _expected_reward(trace)) is not None]
    assert len(known) > len(traces) / 2
    different = [(trace.response, trace.reward) for trace, expected in known if trace.reward != expected]
    assert not different, different
    assert {trace.reward for trace in traces} == {0.0, 1.0}
    assert any(len(trace.segments) > 1 for trace in traces if trace.is_scored)


def test_an_unknown_credit_is_refused(tmp_path):
    done = run_tiny("math", tmp_path, CREDIT="ppo")
    assert done.returncode == 2 and "allowed: rredcot grpo" in done.stdout
