"""Monte Carlo values through verl's own entry point: `algorithm.adv_estimator=vineppo` trains as `rredcot` does."""

import json
import math
from collections import defaultdict

import pytest

from tests.runs import main_ppo

pytestmark = pytest.mark.run

NUM_ROLLOUTS, MAX_TOKENS = 3, 4


def test_continuations_are_sampled_verified_and_credited(tmp_path, ray_folder):
    traces = tmp_path / "traces"
    run = main_ppo(
        tmp_path,
        ray_folder,
        "algorithm.adv_estimator=vineppo",
        f"+algorithm.rredcot.monte_carlo.num_rollouts={NUM_ROLLOUTS}",
        f"+algorithm.rredcot.monte_carlo.max_tokens={MAX_TOKENS}",
        # The tiny model writes random letters: only their number ends a segment.
        "+algorithm.rredcot.segmentation.method=fixed",
        "+algorithm.rredcot.segmentation.min_tokens=2",
        f"+algorithm.rredcot.traces.dir={traces}",
        "trainer.n_gpus_per_node=2",
    )
    assert run.returncode == 0, run.output[-8000:]
    assert len(run.steps) == 2
    for number, step in enumerate(run.steps, start=1):
        assert step["training/rollout_actor_probs_pearson_corr"] > 0.999
        assert step["actor/grad_norm"] > 0
        assert step["rredcot/return_error/max"] < 1e-6
        assert step["rredcot/rows_scored/mean"] > 0
        assert step["rredcot/segments_per_response/mean"] > 1
        assert step["rredcot/probes/sum"] >= NUM_ROLLOUTS * 4
        assert 0 < step["rredcot/probe_tokens/sum"] <= MAX_TOKENS * step["rredcot/probes/sum"]
        assert step["rredcot/monte_carlo_standard_error/mean"] > 0
        assert 0 <= step["rredcot/monte_carlo_cut_short/mean"] <= 1
        assert step["rredcot/monte_carlo_weight_versions/max"] == 1
        assert step["timing_s/self_value"] > 0
        lines = [json.loads(line) for line in (traces / f"{number}.jsonl").read_text().splitlines()]
        starts = defaultdict(set)
        for line in (line for line in lines if line["status"] == "scored"):
            starts[line["uid"]].add(line["start_value"])
            total = line["start_value"] + math.fsum(part["segment_reward"] for part in line["segments"])
            assert total == pytest.approx(line["reward"], abs=1e-6)
            assert 0 <= line["start_value"] <= 1
        # The state before the first token is the prompt's, sampled once for all its rollouts.
        assert starts and all(len(values) == 1 for values in starts.values())
