#!/usr/bin/env bash
# Which credit is right on a pretrained model: the bench on the policy after its supervised start, Monte Carlo as the gold.
# Arguments go to both calls of the bench (python -m rredcot_verl.analyze --help), e.g. --budget 2h. What is there is not
# made again: the same command goes on where it stopped. Environment: recipes/common/tiny.sh, and
#   PROMPTS=24 ROLLOUTS=8    prompts of four traces (0: none), continuations of a state; 42 s a trace on two cores
#   FORM_PROMPTS=0           prompts whose gradients are taken under each form of credit; some 50 minutes for 64
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=${OUT:-$PWD/runs/smollm/bench-${SEED:-0}}
source recipes/common/tiny.sh
source recipes/smollm/prepare.sh

# bench FOLDER TITLE [option...]: in relative paths, which run.json repeats.
bench() {
    local name=$1 title=$2
    shift 2
    say "bench: $title ($OUT/$name)"
    python -m rredcot_verl.analyze --model "${SMOLLM_DATA#"$PWD"/}/model" --out "${OUT#"$PWD"/}/$name" --title "$title" \
        --seed "$SEED" --reward-function pkg://rredcot_verl.rewards.math:compute_score --reward-set answer_format=boxed \
        --line-checker recipes.smollm.task:check_lines --max-response-tokens 144 \
        --set segmentation.min_tokens=4 elicitation.format=boxed --cuttings newline-34 "$@"
}
# The sources, with continuations from every state; layers from a quarter of the way up, and the one a run reads.
if [ "${PROMPTS:-24}" -gt 0 ]; then
    bench sources "SmolLM2 after its supervised start" --prompts "${SMOLLM_DATA#"$PWD"/}/val.parquet" \
        --num-prompts "${PROMPTS:-24}" --group-size 4 --rollouts "${ROLLOUTS:-8}" \
        --methods rredcot vps mig vineppo hidden --layers 7 14 21 -2 -1 "$@"
fi
# The forms need many prompts, and of each its probes alone; the task's own values are the ceiling. Steps as in training.
if [ "${FORM_PROMPTS:-0}" -gt 0 ]; then
    bench forms "Forms of credit after the supervised start" --prompts "${SMOLLM_DATA#"$PWD"/}/train.parquet" \
        --num-prompts "$FORM_PROMPTS" --gradients "$FORM_PROMPTS" --group-size 4 --batch-prompts 4 \
        --methods rredcot --rollouts 0 --true-values recipes.smollm.oracle:Chances "$@"
fi
say "done: open report.html in the folders of $OUT"
