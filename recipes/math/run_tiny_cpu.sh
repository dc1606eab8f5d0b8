#!/usr/bin/env bash
# The math recipe on a CPU machine, from one command: environment, warm start, data by prepare_math.py, RL with verl's
# main_ppo and the math verifier, report. Arguments go to main_ppo as Hydra overrides; environment variables: STEPS=200, and
# those of recipes/common/tiny.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

STEPS=${STEPS:-200}
OUT=${OUT:-$PWD/runs/tiny_math/seed-${SEED:-0}}
source recipes/common/tiny.sh

# The names that the quickstart's config reads.
export QUICKSTART_DATA=$OUT/data
# A verifier of mathematics wants one number. Forced, that one hardly tells early lines apart, so more responses are right
# at first than in the quickstart.
say "warm-started model (made once, then taken from $QUICKSTART_DATA)"
python -m recipes.quickstart.warm_start --out "$QUICKSTART_DATA" --seed "$SEED" --answer last --right-share 0.5 \
    "${WARM_START_OPTIONS[@]}"

say "data: $QUICKSTART_DATA/math"
python -m recipes.math.tiny_cpu.problems --warm-start "$QUICKSTART_DATA" --out "$QUICKSTART_DATA/problems" --seed "$SEED"
# A sum has no words, so that only equal ones are duplicates. The model knows the bare sum as its prompt.
python scripts/prepare_math.py --out "$QUICKSTART_DATA/math" --seed "$SEED" \
    --source "$QUICKSTART_DATA/problems/train.jsonl" --val "$QUICKSTART_DATA/problems/val.jsonl" \
    --columns question=problem answer=answer --instruction '{question}' --containment 2 \
    --tokenizer "$QUICKSTART_DATA/model" --max-prompt-length 32

run_recipes recipes/math/tiny_cpu QUICKSTART_RUN trainer.total_training_steps="$STEPS" "$@"
write_report "RREDCoT, tiny math recipe" recipes.quickstart.task:check_lines
say "done: $OUT"
