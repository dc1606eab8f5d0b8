# Sourced by the run_*.sh of the GPU recipes: `launch TASK CONFIG [overrides]` starts verl's main_ppo, or with DRY_RUN=1 its
# preflight, with the recipe's config and what the environment asks for. The caller sets MODEL_PATH, NNODES and N_GPUS; the other
# toggles have defaults here, and recipes/common/README.md lists them all.
{ set +x; } 2>/dev/null
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

# one_of NAME VALUE...: the variable must hold one of the values.
one_of() {
    local name=$1 value
    shift
    for value in "$@"; do
        if [ "${!name}" = "$value" ]; then return; fi
    done
    fail "$name='${!name}': expected one of: $*"
}

# A positive number, or with a second argument one of at least that.
number() {
    [[ ${!1} =~ ^[0-9]+$ ]] && [ "${!1}" -ge "${2:-1}" ] || fail "$1='${!1}': expected a whole number of at least ${2:-1}"
}

# Local paths are made absolute: Ray's workers start elsewhere.
absolute() {
    case $1 in
        /* | *://*) echo "$1" ;;
        *) if [ -e "$1" ] || [ "${2:-}" = file ]; then realpath -m "$1"; else echo "$1"; fi ;;
    esac
}

# Which GPUs train and which generate, as overrides in PLACEMENT.
place() {
    if [ "$MODE" != separate_async ]; then
        PLACEMENT=(trainer.nnodes="$NNODES" trainer.n_gpus_per_node="$N_GPUS")
        return
    fi
    # By default half of the nodes generate, on one node half of its GPUs.
    if [ "$NNODES" -gt 1 ]; then
        ROLLOUT_NNODES=${ROLLOUT_NNODES:-$((NNODES / 2))} ROLLOUT_GPUS=${ROLLOUT_GPUS:-$N_GPUS}
        number ROLLOUT_NNODES
        local train_nnodes=$((NNODES - ROLLOUT_NNODES)) train_gpus=$N_GPUS
    else
        ROLLOUT_NNODES=1 ROLLOUT_GPUS=${ROLLOUT_GPUS:-$((N_GPUS / 2))}
        local train_nnodes=1 train_gpus=$((N_GPUS - ROLLOUT_GPUS))
    fi
    if [ "$train_nnodes" -lt 1 ] || [ "$train_gpus" -lt 1 ] || [ "$ROLLOUT_GPUS" -lt 1 ]; then
        fail "MODE=separate_async needs GPUs that train and GPUs that generate, got NNODES=$NNODES N_GPUS=$N_GPUS" \
            "ROLLOUT_NNODES=$ROLLOUT_NNODES ROLLOUT_GPUS=$ROLLOUT_GPUS; set e.g. N_GPUS=2"
    fi
    PLACEMENT=(
        trainer.nnodes="$train_nnodes" trainer.n_gpus_per_node="$train_gpus"
        actor_rollout_ref.rollout.nnodes="$ROLLOUT_NNODES" actor_rollout_ref.rollout.n_gpus_per_node="$ROLLOUT_GPUS"
    )
}

# LoRA as overrides in ADAPTER. The two engines read different keys.
adapt() {
    local backend=$1 model=actor_rollout_ref.model
    if [ "$LORA_RANK" = 0 ]; then
        ADAPTER=(adapter=none)
    elif [ "$backend" = megatron ]; then
        ADAPTER=(adapter=lora_megatron "$model.lora.rank=$LORA_RANK" "$model.lora.alpha=$LORA_ALPHA")
    else
        ADAPTER=(adapter=lora_fsdp "$model.lora_rank=$LORA_RANK" "$model.lora_alpha=$LORA_ALPHA")
        # verl sends a standalone server plain weights only: without merging it would never see the adapter.
        if [ "$MODE" = separate_async ]; then ADAPTER+=("$model.lora.merge=true"); fi
    fi
}

launch() {
    local task=$1 config=$2
    shift 2
    DRY_RUN=${DRY_RUN:-0} SUBMIT=${SUBMIT:-0} CREDIT=${CREDIT:-rredcot} MODE=${MODE:-sync} ROLLOUT=${ROLLOUT:-vllm}
    # Full fine-tuning.
    LORA_RANK=${LORA_RANK:-0}
    # Made by scripts/prepare_TASK.py.
    DATA_DIR=${DATA_DIR:-$HOME/data/rredcot/$task}
    TRAIN_FILE=${TRAIN_FILE:-$DATA_DIR/train.parquet}
    VAL_FILE=${VAL_FILE:-$DATA_DIR/val.parquet}
    one_of DRY_RUN 0 1
    one_of SUBMIT 0 1
    one_of CREDIT rredcot grpo
    one_of MODE sync colocate_async separate_async
    one_of ROLLOUT vllm sglang
    number NNODES && number N_GPUS && number LORA_RANK 0
    LORA_ALPHA=${LORA_ALPHA:-$((2 * LORA_RANK))}
    place
    adapt "${config##*_}"

    local name=$config-$CREDIT-$MODE
    if [ "$LORA_RANK" != 0 ]; then name+=-lora; fi
    OUT=$(absolute "${OUT:-$ROOT/runs/$task/$name}" file)
    # Quoted for Hydra, which reads commas, equal signs and blanks.
    local args=(
        --config-path "pkg://recipes.$task" --config-name "$config"
        credit="$CREDIT" mode="$MODE" server="$ROLLOUT"
        "${ADAPTER[@]}"
        "${PLACEMENT[@]}"
        actor_rollout_ref.model.path="'$(absolute "$MODEL_PATH")'"
        data.train_files="'$(absolute "$TRAIN_FILE" file)'"
        data.val_files="'$(absolute "$VAL_FILE" file)'"
        trainer.experiment_name="${EXPERIMENT:-$name}"
        trainer.default_local_dir="'$OUT'"
        +ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH="'$OUT/metrics.jsonl'"
    )
    # The recipes are a package of this repository.
    export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
    if [ "$DRY_RUN" = 1 ]; then
        exec "${PYTHON:-python}" -m rredcot_verl.preflight "${args[@]}" "$@"
    fi
    mkdir -p "$OUT"
    # verl's file logger begins its file anew, also when a run is resumed.
    if [ -e "$OUT/metrics.jsonl" ]; then mv "$OUT/metrics.jsonl" "$OUT/metrics-until-$(date +%Y%m%d-%H%M%S).jsonl"; fi
    set -x
    if [ "$SUBMIT" = 1 ]; then
        exec ray job submit --address "${RAY_ADDRESS:?SUBMIT=1 needs the address of the jobs server, http://HEAD:8265}" \
            --working-dir "$ROOT" -- python -m verl.trainer.main_ppo "${args[@]}" "$@"
    fi
    exec "${PYTHON:-python}" -m verl.trainer.main_ppo "${args[@]}" "$@"
}
