#!/usr/bin/env bash
# The quickstart over several seeds, and its table: docs/results/quickstart.md. About ten minutes a seed on 2 cores.
set -euo pipefail
cd "$(dirname "$0")/.."

SEEDS=${SEEDS:-0 1 2}
RUNS=${RUNS:-$PWD/runs/quickstart}
VENV=${VENV:-$PWD/.venv}
export VENV

SUMMARIES=()
mkdir -p docs/results
for SEED in $SEEDS; do
    SEED=$SEED OUT=$RUNS/seed-$SEED scripts/quickstart.sh "$@"
    SUMMARIES+=("$RUNS/seed-$SEED/summary.json")
done
"$VENV/bin/python" -m recipes.quickstart.table "${SUMMARIES[@]}" > docs/results/quickstart.md
cat docs/results/quickstart.md
