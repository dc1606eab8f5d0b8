"""Stock GRPO through verl's own entry point on the CPU backend: it trains, and weights reach the rollout server."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.tiny_model import make_tiny_data, make_tiny_model

REPOSITORY = Path(__file__).parents[2]
CORRELATION = "training/rollout_actor_probs_pearson_corr"
PROBS_DIFF = "training/rollout_probs_diff_max"
# Far too high to learn with, high enough that a step moves the policy well away from the initial one.
HIGH_LEARNING_RATE = ("actor_rollout_ref.actor.optim.lr=0.05", "actor_rollout_ref.actor.optim.lr_warmup_steps=0")

pytestmark = pytest.mark.run


@pytest.fixture
def ray_folder():
    # Ray's sockets have paths of at most 107 characters, too few for pytest's own folders.
    folder = tempfile.mkdtemp(prefix="rc", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def train(folder, ray_folder, *overrides, plugin="tests.cpu.backend_plugin"):
    """Runs `main_ppo` and returns the metrics of each step."""
    train_file, val_file = make_tiny_data(folder / "data")
    token = folder / "ray_token"
    token.write_text(secrets.token_hex(32))
    metrics = folder / "metrics.jsonl"
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | {
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": plugin,
        "VERL_USE_EXTERNAL_PLUGINS": "none",
        "VERL_FILE_LOGGER_PATH": str(metrics),
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        "--config-path=pkg://tests.cpu",
        "--config-name=grpo_on_cpu",
        f"ray_kwargs.ray_init._temp_dir={ray_folder}/r",
        f"actor_rollout_ref.model.path={make_tiny_model(folder / 'model')}",
        f"data.train_files={train_file}",
        f"data.val_files={val_file}",
        *overrides,
    ]
    done = subprocess.run(
        command,
        env=environment,
        cwd=REPOSITORY,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return [json.loads(line)["data"] for line in metrics.read_text().splitlines()]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_grpo_trains_and_the_server_follows_the_actor(tmp_path, ray_folder, num_ranks):
    steps = train(tmp_path, ray_folder, f"trainer.n_gpus_per_node={num_ranks}", *HIGH_LEARNING_RATE)
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
