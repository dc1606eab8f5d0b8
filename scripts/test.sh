#!/usr/bin/env bash
# Sets up an environment and runs every check: lint, types, doctor, tests.
# Arguments go to pytest, e.g. `scripts/test.sh -m "not run"` leaves out the tests that train. TEST_WORKERS=0 runs all in
# one process, for a debugger.
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
# A test that trains waits a lot: two processes take little more than half the time on two cores. Ray clusters are apart.
# They come first, as tests/conftest.py sorts them; xdist would move them to the end.
exec python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
