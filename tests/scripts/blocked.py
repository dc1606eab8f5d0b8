"""Runs a script as on a machine that has torch and transformers and nothing of verl."""

import os
import subprocess
import sys
from pathlib import Path

from tests import PATIENCE_S

ROOT = Path(__file__).parents[2]
MISSING = ("verl", "ray", "vllm", "tensordict", "megatron", "pydantic", "omegaconf", "hydra", "wrapt", "peft")
_CODE = """
import os, runpy, sys
script, missing, *sys.argv[1:] = sys.argv[1:]
sys.modules.update(dict.fromkeys(missing.split(",")))
sys.argv[0] = script
sys.path[0] = os.path.dirname(script)
runpy.run_path(script, run_name="__main__")
"""


def run_blocked(script: Path, *arguments: str, missing: tuple[str, ...] = MISSING) -> subprocess.CompletedProcess[str]:
    """A script of this repository in a process of its own, in which to import what is missing fails."""
    command = [sys.executable, "-c", _CODE, str(script), ",".join(missing), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
