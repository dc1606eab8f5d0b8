"""Real `main_ppo` runs on the CPU backend, for the tests marked `run`."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests import PATIENCE_S
from tests.tiny_model import make_tiny_data, make_tiny_model

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        returncode: Exit status.
        output: Standard output and error.
        steps: Metrics of each logged step.
    """

    returncode: int
    output: str
    steps: list[dict]


def main_ppo(
    folder: Path,
    ray_folder: str,
    *overrides: str,
    config: tuple[str, str] = ("pkg://tests.cpu", "grpo_on_cpu"),
    environment: Mapping[str, str] | None = None,
) -> Run:
    """Train the tiny model with verl's own entry point, in a Ray cluster of its own under `ray_folder`."""
    train_file, val_file = make_tiny_data(folder / "data")
    token = folder / "ray_token"
    token.write_text(secrets.token_hex(32))
    metrics = folder / "metrics.jsonl"
    inherited = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    command = [
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        f"--config-path={config[0]}",
        f"--config-name={config[1]}",
        f"++ray_kwargs.ray_init._temp_dir={ray_folder}/r",
        f"actor_rollout_ref.model.path={make_tiny_model(folder / 'model')}",
        f"data.train_files={train_file}",
        f"data.val_files={val_file}",
        *overrides,
    ]
    environment = (
        inherited
        | {
            "VERL_PLATFORM": "cpu",
            "VERL_FILE_LOGGER_PATH": str(metrics),
            "RAY_AUTH_TOKEN_PATH": str(token),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "RREDCOT_CPU_THREADS": "1",
        }
        | dict(environment or {})
    )
    done = _run(command, environment)
    if done.returncode and "EADDRINUSE" in done.stdout:
        # verl and Ray choose a free port, let go of it, and take it seconds later: another run may have been first.
        metrics.unlink(missing_ok=True)
        done = _run(command, environment)
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return Run(done.returncode, done.stdout, [json.loads(line)["data"] for line in lines])


def _run(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment,
        cwd=REPOSITORY,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE_S,
        check=False,
    )
