#!/usr/bin/env bash
# The quickstart over several seeds, and one table of all: $RUNS/table.md (recorded in docs/results/quickstart.md).
set -euo pipefail
cd "$(dirname "$0")/.."

SEEDS=${SEEDS:-0 1 2}
RUNS=${RUNS:-$PWD/runs/quickstart}
VENV=${VENV:-$PWD/.venv}
export VENV

SUMMARIES=()
mkdir -p "$RUNS"
for SEED in $SEEDS; do
    SEED=$SEED OUT=$RUNS/seed-$SEED scripts/quickstart.sh "$@"
    SUMMARIES+=("$RUNS/seed-$SEED/summary.json")
done
"$VENV/bin/python" -m recipes.quickstart.table "${SUMMARIES[@]}" > "$RUNS/table.md"
cat "$RUNS/table.md"
