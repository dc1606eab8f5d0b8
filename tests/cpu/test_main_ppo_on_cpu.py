"""Stock GRPO through verl's own entry point on the CPU backend: it trains, and weights reach the rollout server."""

import pytest

from tests.runs import main_ppo

CORRELATION = "training/rollout_actor_probs_pearson_corr"
PROBS_DIFF = "training/rollout_probs_diff_max"
# Far too high to learn with, high enough that a step moves the policy well away from the initial one.
HIGH_LEARNING_RATE = ("actor_rollout_ref.actor.optim.lr=0.05", "actor_rollout_ref.actor.optim.lr_warmup_steps=0")

pytestmark = pytest.mark.run


def train(folder, ray_folder, *overrides, plugin="tests.cpu.backend_plugin"):
    """Runs with the CPU backend alone: RREDCoT's own entry point is switched off."""
    environment = {"VERL_USE_EXTERNAL_MODULES": plugin, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    run = main_ppo(folder, ray_folder, *overrides, environment=environment)
    assert run.returncode == 0, run.output[-8000:]
    return run.steps


def test_grpo_trains_and_the_servers_follow_the_actor(tmp_path, ray_folder):
    """On two ranks; the runs below have one."""
    steps = train(tmp_path, ray_folder, "trainer.n_gpus_per_node=2", *HIGH_LEARNING_RATE)
    assert [step["training/global_step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["actor/grad_norm"] > 0
        assert step[CORRELATION] > 0.999
        assert step[PROBS_DIFF] < 1e-4


def test_reference_model(tmp_path, ray_folder):
    steps = train(
        tmp_path, ray_folder, "actor_rollout_ref.actor.use_kl_loss=true", "actor_rollout_ref.rollout.temperature=0.8"
    )
    assert steps[0]["actor/kl_loss"] == pytest.approx(0.0, abs=1e-6)
    assert all(step[CORRELATION] > 0.999 for step in steps)


def test_the_correlation_tells_when_weight_sync_is_cut_off(tmp_path, ray_folder):
    steps = train(
        tmp_path,
        ray_folder,
        "trainer.total_training_steps=4",
        "trainer.total_epochs=4",
        *HIGH_LEARNING_RATE,
        plugin="tests.cpu.cut_off_plugin",
    )
    assert steps[0][CORRELATION] > 0.999
    assert steps[-1][CORRELATION] < 0.98
    assert steps[-1][PROBS_DIFF] > 1e-2
