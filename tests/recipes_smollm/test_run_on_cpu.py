"""The one command, with a tiny random Llama in SmolLM2's place."""

import json
from pathlib import Path

import pytest

from recipes.smollm import warm_start
from rredcot_verl.report import load_run
from tests.recipes.launcher import run_tiny
from tests.recipes_smollm.test_warm_start_on_cpu import SMALLEST, tiny_llama

# One token a character: what the recipe gives SmolLM2 would not do.
LENGTHS = ("data.max_prompt_length=192", "data.max_response_length=64")
OPTIONS = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SMALLEST.items())


def run(out: Path, *overrides: str, **environment: str):
    data = str(out / "data")
    return run_tiny("smollm", out, *LENGTHS, *overrides, SMOLLM_DATA=data, WARM_START=OPTIONS, **environment)


@pytest.fixture
def out(tmp_path):
    warm_start.warm_start(tmp_path / "data", warm_start.WarmStartConfig(**SMALLEST), tiny_llama)
    return tmp_path


def test_a_dry_run_passes_and_trains_nothing(out):
    done = run(out, DRY_RUN="1", COMPARE="1")
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("nothing was started") == 2 and "rredcot_verl.rewards.math" in done.stdout
    assert not (out / "rredcot/metrics.jsonl").exists()


@pytest.mark.run
def test_one_command_trains_with_the_tasks_own_values(out):
    oracle = "algorithm.rredcot.source=recipes.smollm.oracle:Oracle"
    quick = ("trainer.val_before_train=false", "trainer.test_freq=-1", "actor_rollout_ref.rollout.n=2")
    quick += ("actor_rollout_ref.rollout.dtype=bfloat16",)
    done = run(out, *quick, oracle, "algorithm.rredcot.credit.form=critic", STEPS="2")
    assert done.returncode == 0, done.stdout[-8000:]
    lines = (out / "rredcot/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["data"] for line in lines]
    assert [step["training/global_step"] for step in steps] == [1, 2]
    assert all(step["rredcot/rows_scored/mean"] > 0 for step in steps)
    traces = load_run(out / "rredcot").traces
    assert len(traces) == 16 and all(trace.is_scored for trace in traces)
    # An empty prefix is worth what its problem's operations are; a prompt that is not understood would be worth 0.
    assert all(trace.start_value > 0 for trace in traces)
