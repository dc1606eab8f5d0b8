"""What the GPU recipes would start, recorded by a stand-in for Python; and runs of the CPU recipes' scripts."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import PATIENCE_S

REPOSITORY = Path(__file__).parents[2]
TASKS = ("math", "code")
SCRIPTS = sorted(path for task in TASKS for path in (REPOSITORY / "recipes" / task).glob("run_qwen3*.sh"))
MODES = ("sync", "colocate_async", "separate_async")
SERVERS = ("vllm", "sglang")
RECORDER = """#!/bin/sh
printf '%s\\0' "$@"
"""


@dataclass(frozen=True)
class Launch:
    """What a script came to.

    Attributes:
        returncode: Exit status of the script.
        module: What follows `python -m`.
        arguments: What follows the module.
        errors: Standard error, tracing included.
    """

    returncode: int
    module: str
    arguments: tuple[str, ...]
    errors: str

    @property
    def overrides(self) -> list[str]:
        """Hydra overrides: all but --config-path and --config-name."""
        return list(self.arguments[4:])

    @property
    def config(self) -> tuple[str, str]:
        """Package and name of the config."""
        flags = dict(zip(self.arguments[0:4:2], self.arguments[1:4:2], strict=True))
        return flags["--config-path"].removeprefix("pkg://"), flags["--config-name"]


def record(script: Path, folder: Path, arguments: Sequence[str] = (), **environment: object) -> Launch:
    """Run a script with a recorder in Python's place and read what it was given.

    Args:
        script: One of SCRIPTS.
        folder: For the recorder.
        arguments: The script's own.
        environment: Toggles; eight GPUs a node unless given, so that every mode has enough.
    """
    python = folder / "python"
    if not python.exists():
        python.write_text(RECORDER)
        python.chmod(0o755)
    toggles = {"PYTHON": python, "OUT": folder / "out", "EXPERIMENT": "a", "N_GPUS": 8, **environment}
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [str(script), *arguments],
        env=inherited | {name: str(value) for name, value in toggles.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    given = done.stdout.split("\0")[:-1]
    return Launch(done.returncode, given[1] if given else "", tuple(given[2:]), done.stderr)


def run_tiny(task: str, out: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the CPU recipe of a task in this environment, results in `out`; errors are in its standard output."""
    (script,) = (REPOSITORY / "recipes" / task).glob("run_*_cpu.sh")
    inherited = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    settings = {"SETUP": "0", "VENV": sys.prefix, "OUT": str(out), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [script, *overrides],
        env=inherited | settings | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE_S,
        check=False,
    )
