#!/usr/bin/env bash
# The main job on a fresh CPU machine: environment, task and model, RL with verl's main_ppo, report.
# Arguments go to both training runs as Hydra overrides.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-$PWD/.venv}
SEED=${SEED:-0}
OUT=${OUT:-$PWD/runs/quickstart/seed-$SEED}
# The paired GRPO run; 0 leaves it out.
COMPARE=${COMPARE:-1}
export VENV

scripts/setup.sh
PATH=$VENV/bin:$PATH
QUICKSTART_DATA=$OUT/data
# Threads that wait for work must not take it from others.
export PATH QUICKSTART_DATA OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
STARTED=$SECONDS

say() { printf '\n== [%3d s] %s\n' $((SECONDS - STARTED)) "$*"; }

say "task and warm-started model (made once, then taken from $QUICKSTART_DATA)"
python -m recipes.quickstart.warm_start --out "$QUICKSTART_DATA" --seed "$SEED"

train() {
    local name=$1
    shift
    export QUICKSTART_RUN=$OUT/$name
    rm -rf "$QUICKSTART_RUN"
    mkdir -p "$QUICKSTART_RUN"
    exec scripts/train_on_cpu.sh "$QUICKSTART_RUN" --config-path "$PWD/recipes/quickstart" --config-name "$name" \
        data.seed="$SEED" actor_rollout_ref.rollout.seed="$SEED" actor_rollout_ref.actor.data_loader_seed="$SEED" "$@"
}

# Both at once, each in a process of its own: a run keeps little more than one core busy.
RECIPES=(rredcot)
BASELINE=()
if [ "$COMPARE" = 1 ]; then
    RECIPES+=(grpo)
    BASELINE=(--baseline "$OUT/grpo")
fi
say "training: ${RECIPES[*]} (logs: $OUT/*/train.log)"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for name in "${RECIPES[@]}"; do
    train "$name" "$@" &
done
for _ in "${RECIPES[@]}"; do
    wait -n
done

say "report"
python -m rredcot_verl.report "$OUT/rredcot" "${BASELINE[@]}" --title "RREDCoT quickstart, seed $SEED" \
    --line-checker recipes.quickstart.task:check_lines --out "$OUT/report.html" --summary "$OUT/summary.json"
python -m recipes.quickstart.table "$OUT/summary.json"
say "done: open $OUT/report.html"
