"""Attributions through verl's own entry point."""

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest

from tests.runs import main_ppo

pytestmark = pytest.mark.run

# The tiny model writes random letters: only their number ends a segment.
SEGMENTS = ("+algorithm.rredcot.segmentation.method=fixed", "+algorithm.rredcot.segmentation.min_tokens=2")


def traces_of(folder: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{step}.jsonl").read_text().splitlines()]


def test_gradient_attribution_shares_the_advantage_out(tmp_path, ray_folder):
    run = main_ppo(
        tmp_path,
        ray_folder,
        "algorithm.adv_estimator=gradient_attribution",
        # It writes no answer in a format: its last small letter is one.
        "+algorithm.rredcot.elicitation.format=custom",
        "+algorithm.rredcot.elicitation.opening='Result:'",
        "+algorithm.rredcot.elicitation.pattern='([a-z])'",
        f"+algorithm.rredcot.traces.dir={tmp_path / 'traces'}",
        "trainer.n_gpus_per_node=2",
        "trainer.total_training_steps=1",
        *SEGMENTS,
    )
    assert run.returncode == 0, run.output[-8000:]
    (step,) = run.steps
    # verl's own passes are what they are without us.
    assert step["training/rollout_actor_probs_pearson_corr"] > 0.999
    assert step["actor/grad_norm"] > 0
    assert step["rredcot/return_error/max"] < 1e-6
    assert step["rredcot/rows_scored/mean"] > 0 and step["rredcot/probes/sum"] > 0
    lines = traces_of(tmp_path / "traces", 1)
    rewards = defaultdict(list)
    for line in lines:
        rewards[line["uid"]].append(line["reward"])
    scored = [line for line in lines if line["status"] == "scored"]
    assert scored and {line["source"] for line in lines} == {"gradient_attribution"}
    for line in scored:
        baseline = fmean(rewards[line["uid"]])
        assert line["start_value"] == pytest.approx(baseline, abs=1e-6)
        shares = [segment["segment_reward"] / (line["reward"] - baseline) for segment in line["segments"]]
        assert min(shares) >= 0 and math.fsum(shares) == pytest.approx(1.0, abs=1e-5)
    assert any(max(segment["weight"] for segment in line["segments"]) > 1.001 for line in scored)
