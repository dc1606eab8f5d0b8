#!/usr/bin/env bash
# Sets up an environment and runs every check: lint, types, doctor, tests.
# Arguments go to pytest, e.g. `scripts/test.sh -m "not run"` leaves out the tests that train.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-$PWD/.venv}
export VENV
scripts/setup.sh
PATH=$VENV/bin:$PATH
export PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy
echo "== doctor"
python -m rredcot_verl.doctor
echo "== pytest"
exec python -m pytest "$@"
