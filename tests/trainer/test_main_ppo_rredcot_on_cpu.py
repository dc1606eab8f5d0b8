"""RREDCoT through verl's own entry point, as a user starts it: an existing GRPO command plus the estimator's name."""

import re

import pytest

from tests.runs import main_ppo

PLAIN = "algorithm.adv_estimator=rredcot"

pytestmark = pytest.mark.run


def test_the_plain_command(tmp_path, ray_folder):
    run = main_ppo(tmp_path, ray_folder, PLAIN, "trainer.n_gpus_per_node=2", "+algorithm.rredcot.live_every_s=0.05")
    assert run.returncode == 0, run.output[-8000:]
    assert len(run.steps) == 2
    for said in ("step 0, loading models and servers for ", "step [12], generating for ", "step 2, "):
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
        ("+algorithm.rredcot.credit.betta=1", ("algorithm.rredcot.credit.betta=1", "unknown key", "beta")),
        ("algorithm.use_kl_in_reward=true", ("use_kl_in_reward=True", "use_kl_loss")),
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
