#!/usr/bin/env bash
# Which credit is right, on the quickstart: task and model, RL, and the bench on the policy before, in the middle and after.
# Arguments go to both calls of the bench (python -m rredcot_verl.analyze --help), e.g. --budget 10m or --num-prompts 16.
# What is there is not made again: the same command goes on where it stopped. Environment: recipes/common/tiny.sh, and
#   STEPS=200   optimiser steps of the RL, an even number
#   TRUE_VALUES=MODULE:NAME   the task's own values, as the gold in place of continuations
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-$PWD/runs/analyze/seed-${SEED:-0}}
STEPS=${STEPS:-200}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
source recipes/common/tiny.sh

export QUICKSTART_DATA=$OUT/data OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
say "task and warm-started model (made once, then taken from $QUICKSTART_DATA)"
python -m recipes.quickstart.warm_start --out "$QUICKSTART_DATA" --seed "$SEED" "${WARM_START_OPTIONS[@]}"

CHECKPOINTS=$OUT/${RECIPES[0]}/checkpoints
step() { echo "$CHECKPOINTS/global_step_$1/actor/huggingface"; }
if [ ! -f "$(step "$STEPS")/model.safetensors" ] || [ "$DRY_RUN" = 1 ]; then
    run_recipes recipes/quickstart QUICKSTART_RUN trainer.total_training_steps="$STEPS" trainer.save_freq="$((STEPS / 2))" \
        trainer.default_local_dir="$CHECKPOINTS" "actor_rollout_ref.actor.checkpoint.save_contents=[model,hf_model]"
fi

GOLD=(--rollouts 32 --main-rollouts 128)
TRUTH=(--rollout-prompts 0)
if [ -n "${TRUE_VALUES:-}" ]; then
    GOLD=(--rollouts 0 --true-values "$TRUE_VALUES")
    TRUTH=("${GOLD[@]}")
fi
# bench FOLDER MODEL TITLE [option...]: in relative paths, which run.json repeats; on held-out problems but for the forms.
bench() {
    local name=$1 model=$2 title=$3
    shift 3
    say "bench: $title ($OUT/$name)"
    python -m rredcot_verl.analyze --model "${model#"$PWD"/}" --prompts "${QUICKSTART_DATA#"$PWD"/}/val.parquet" \
        --out "${OUT#"$PWD"/}/$name" --title "$title" --seed "$SEED" \
        --reward-function recipes/quickstart/task.py --line-checker recipes.quickstart.task:check_lines \
        --group-size 8 --max-response-tokens 128 --set segmentation.min_tokens=4 "$@"
}
SOURCES=(--num-prompts 64 "${GOLD[@]}" --layers all
    --cuttings newline-34 keyword_entropy-34 keyword_entropy-10 fixed-18 fixed-8 entropy-34 keyword-34)
# What a form of credit is worth needs many prompts, and of each its probes alone; steps as in training, 4 x 4.
FORMS=(--prompts "${QUICKSTART_DATA#"$PWD"/}/train.parquet" --num-prompts 512 --gradients 512 --group-size 4 --batch-prompts 4
    --methods rredcot "${TRUTH[@]}" --cuttings newline-34)
bench warm_start "$QUICKSTART_DATA/model" "The quickstart's policy after its warm start" "${SOURCES[@]}" "$@"
bench after_rl "$(step "$STEPS")" "The quickstart's policy after $STEPS steps of RL (${RECIPES[0]})" "${SOURCES[@]}" "$@"
bench forms_at_start "$QUICKSTART_DATA/model" "Forms of credit after the warm start" "${FORMS[@]}" "$@"
for number in $((STEPS / 2)) "$STEPS"; do
    bench "forms_at_$number" "$(step "$number")" "Forms of credit after $number steps of RL (${RECIPES[0]})" "${FORMS[@]}" "$@"
done
say "done: open report.html in $OUT/warm_start, after_rl and forms_at_*"
