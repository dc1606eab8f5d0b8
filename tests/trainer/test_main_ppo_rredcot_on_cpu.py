"""RREDCoT through verl's own entry point, as a user starts it: an existing GRPO command plus the estimator's name."""

import json
import re

import pytest

from tests.runs import main_ppo

PLAIN = "algorithm.adv_estimator=rredcot"
# The tiny model writes 16 random letters: only their number ends a segment.
SHORT = ("+algorithm.rredcot.segmentation.method=fixed", "+algorithm.rredcot.segmentation.min_tokens=2")
# A probe after 16 response tokens needs room for the answer.
ROOM = ("actor_rollout_ref.rollout.max_model_len=96",)

pytestmark = pytest.mark.run


def test_the_plain_command(tmp_path, ray_folder):
    run = main_ppo(tmp_path, ray_folder, PLAIN, "trainer.n_gpus_per_node=2", "+algorithm.rredcot.live_every_s=0.05")
    assert run.returncode == 0, run.output[-8000:]
    assert len(run.steps) == 2
    for said in ("step 0, loading models and servers for ", "step 1, generating for ", "step 2, "):
        assert re.search(f"rredcot: {said}", run.output), said
    assert re.search(
        "for [0-9]+ s; [0-9]+ tokens of a batch; 8 generated; 8 verified; 8 measured; [0-9]+ passes", run.output
    )
    for step in run.steps:
        assert step["training/rollout_actor_probs_pearson_corr"] > 0.999
        assert step["rredcot/return_error/max"] < 1e-6
        statuses = [
            value for name, value in step.items() if name.startswith("rredcot/rows_") and "truncated" not in name
        ]
        assert sum(statuses) == pytest.approx(1.0)
        assert step["rredcot/rows_scored/mean"] > 0
        assert step["rredcot/probes/sum"] > 0
        assert step["timing_s/self_value"] > 0
        assert 0 < step["rredcot/silence_seconds/max"] < step["timing_s/step"]


def test_segments_are_credited_and_traces_written(tmp_path, ray_folder):
    traces = tmp_path / "traces"
    run = main_ppo(tmp_path, ray_folder, PLAIN, *SHORT, *ROOM, f"+algorithm.rredcot.traces.dir={traces}")
    assert run.returncode == 0, run.output[-8000:]
    for number, step in enumerate(run.steps, start=1):
        assert step["rredcot/segments_per_response/mean"] > 2
        lines = [json.loads(line) for line in (traces / f"{number}.jsonl").read_text().splitlines()]
        assert len(lines) == 8
        for line in lines:
            total = line["start_value"] + sum(part["segment_reward"] for part in line["segments"])
            assert total == pytest.approx(line["reward"], abs=1e-6)
            assert line["segments"][0]["start"] == 0
            assert line["segments"][-1]["end"] == len(line["response"])
            # The default with lambda 1: each segment has R - v_{k-1}, on one scale.
            advantages = [part["advantage"] for part in line["segments"]]
            left = [line["reward"] - value for value in (line["start_value"], *(p["value"] for p in line["segments"]))]
            for advantage, rest in zip(advantages, left, strict=False):
                assert advantage * left[0] == pytest.approx(advantages[0] * rest, abs=1e-4)
                assert advantage * rest >= 0
        assert any(part["advantage"] != 0 for line in lines for part in line["segments"])


def test_another_estimator_reads_the_redistributed_rewards(tmp_path, ray_folder):
    run = main_ppo(
        tmp_path,
        ray_folder,
        "algorithm.adv_estimator=reinforce_plus_plus",
        "+algorithm.rredcot.enable=true",
        *SHORT,
        *ROOM,
    )
    assert run.returncode == 0, run.output[-8000:]
    assert run.steps[-1]["rredcot/rows_scored/mean"] > 0
    assert run.steps[-1]["rredcot/return_error/max"] < 1e-6


def test_with_another_estimator_the_plugin_changes_nothing(tmp_path, ray_folder):
    """Greedy rollouts and groups of one: such a run can be repeated, and still learns.

    Up to float32 rounding: which requests share a batch of the server depends on when they arrive.
    """
    settings = ("actor_rollout_ref.rollout.n=1", "actor_rollout_ref.rollout.top_k=1")
    without = {"VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_USE_EXTERNAL_MODULES": "tests.cpu.backend_plugin"}
    runs = []
    for name, environment in (("with", {}), ("without", without)):
        (tmp_path / name).mkdir()
        runs.append(main_ppo(tmp_path / name, f"{ray_folder}/{name[-1]}", *settings, environment=environment))
        assert runs[-1].returncode == 0, runs[-1].output[-8000:]
    machine = ("timing", "perf/", "throughput")
    ours, theirs = (
        [{key: value for key, value in step.items() if not any(word in key for word in machine)} for step in run.steps]
        for run in runs
    )
    assert any(step["actor/grad_norm"] > 0 for step in theirs)
    for step, same in zip(ours, theirs, strict=True):
        # Differences of log-probabilities, as verl reports them, are rounding and nothing else.
        assert step == pytest.approx(same, rel=1e-5, abs=2e-5)


def test_a_failing_server_stops_the_training(tmp_path, ray_folder):
    settings = ("+algorithm.rredcot.self_value.engine=rollout", "+algorithm.rredcot.self_value.timeout_s=1e-6")
    run = main_ppo(tmp_path, ray_folder, PLAIN, *settings)
    assert run.returncode != 0
    assert "could not be verified or scored" in run.output and "self_value.timeout_s=1e-06" in run.output
    assert not run.steps


def test_a_faulty_setting_stops_the_job_before_any_worker(tmp_path, ray_folder):
    run = main_ppo(tmp_path, ray_folder, PLAIN, "+algorithm.rredcot.credit.beta=-1")
    assert run.returncode != 0
    assert "algorithm.rredcot.credit.beta=-1" in run.output and "greater than or equal to 0" in run.output
    assert "WorkerDict" not in run.output and "AgentLoopWorker" not in run.output


@pytest.mark.parametrize(
    "overrides, words",
    [
        ("algorithm.rredcot.credit.beta=-1", ("algorithm.rredcot.credit.beta=-1", "greater than or equal to 0")),
        ("+algorithm.rredcot.credit.betta=1", ("algorithm.rredcot.credit.betta=1", "unknown key", "beta")),
        ("algorithm.rredcot.self_value.form=normalized", ("self_value.form=normalized", "proposals=group or union")),
        ("algorithm.use_kl_in_reward=true", ("use_kl_in_reward=True", "use_kl_loss")),
        (
            "actor_rollout_ref.rollout.name=trtllm algorithm.rredcot.self_value.engine=rollout",
            ("trtllm", "cannot score", "vllm", "engine=actor"),
        ),
        (
            "trainer.v1.trainer_mode=separate_async algorithm.rredcot.self_value.engine=rollout",
            ("separate_async", "engine=actor"),
        ),
    ],
)
def test_with_the_overlay_a_fault_is_found_before_ray(tmp_path, ray_folder, overrides, words):
    config = ("pkg://rredcot_verl.config", "rredcot_trainer")
    run = main_ppo(
        tmp_path,
        ray_folder,
        "actor_rollout_ref.rollout.name=vllm",
        *overrides.split(),
        f"hydra.run.dir={tmp_path}",
        config=config,
    )
    assert run.returncode == 1
    for word in words:
        assert word in run.output, run.output[-3000:]
    assert "ray init kwargs" not in run.output and "Traceback" not in run.output
