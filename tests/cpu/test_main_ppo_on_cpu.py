"""A control of what the other runs' servers are judged by."""

import pytest

from tests.runs import main_ppo

CORRELATION = "training/rollout_actor_probs_pearson_corr"
PROBS_DIFF = "training/rollout_probs_diff_max"
# Far too high to learn with, high enough that a step moves the policy well away from the initial one.
HIGH_LEARNING_RATE = ("actor_rollout_ref.actor.optim.lr=0.05", "actor_rollout_ref.actor.optim.lr_warmup_steps=0")

pytestmark = pytest.mark.run


def test_the_correlation_tells_when_weight_sync_is_cut_off(tmp_path, ray_folder):
    """With the CPU backend alone: RREDCoT's own entry point is switched off."""
    environment = {"VERL_USE_EXTERNAL_MODULES": "tests.cpu.cut_off_plugin", "VERL_USE_EXTERNAL_PLUGINS": "none"}
    lengths = ("trainer.total_training_steps=4", "trainer.total_epochs=4")
    run = main_ppo(tmp_path, ray_folder, *lengths, *HIGH_LEARNING_RATE, environment=environment)
    assert run.returncode == 0, run.output[-8000:]
    steps = run.steps
    assert steps[0][CORRELATION] > 0.999
    assert steps[-1][CORRELATION] < 0.98
    assert steps[-1][PROBS_DIFF] > 1e-2
