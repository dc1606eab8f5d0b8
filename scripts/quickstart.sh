#!/usr/bin/env bash
# The main job on a fresh CPU machine: environment, task and model, RL with verl's main_ppo, report.
# Arguments go to both training runs as Hydra overrides.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-$PWD/.venv}
OUT=${OUT:-$PWD/runs/quickstart}
SEED=${SEED:-0}
# The paired GRPO run; 0 leaves it out.
COMPARE=${COMPARE:-1}
export VENV

scripts/setup.sh
PATH=$VENV/bin:$PATH
export PATH
STARTED=$SECONDS

say() { printf '\n== [%3d s] %s\n' $((SECONDS - STARTED)) "$*"; }

say "task and warm-started model (made once, then cached in $OUT/data-$SEED)"
QUICKSTART_DATA=$OUT/data-$SEED
export QUICKSTART_DATA
python -m recipes.quickstart.warm_start --out "$QUICKSTART_DATA" --seed "$SEED"

train() {
    local name=$1
    shift
    QUICKSTART_RUN=$OUT/$name-$SEED
    rm -rf "$QUICKSTART_RUN"
    mkdir -p "$QUICKSTART_RUN"
    export QUICKSTART_RUN
    say "training with $name (log: $QUICKSTART_RUN/train.log)"
    scripts/train_on_cpu.sh "$QUICKSTART_RUN" \
        --config-path "$PWD/recipes/quickstart" --config-name "$name" \
        data.seed="$SEED" actor_rollout_ref.rollout.seed="$SEED" actor_rollout_ref.actor.data_loader_seed="$SEED" "$@"
}

BASELINE=()
train rredcot "$@"
if [ "$COMPARE" = 1 ]; then
    train grpo "$@"
    BASELINE=(--baseline "$OUT/grpo-$SEED")
fi

say "report"
python -m rredcot_verl.report "$OUT/rredcot-$SEED" "${BASELINE[@]}" \
    --line-checker recipes.quickstart.task:check_lines --title "RREDCoT quickstart, seed $SEED" \
    --out "$OUT/report-$SEED.html" --summary "$OUT/summary-$SEED.json"
say "done: open $OUT/report-$SEED.html; figures in $OUT/summary-$SEED.json"
