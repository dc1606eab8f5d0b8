#!/usr/bin/env bash
# verl's main_ppo on CPU, in a Ray cluster of its own that leaves nothing behind.
# Usage: train_on_cpu.sh RUN_DIR [main_ppo arguments]. Writes RUN_DIR/train.log and RUN_DIR/metrics.jsonl.
set -euo pipefail

RUN_DIR=$1
shift

# Ray's sockets have a short limit on the length of their path.
RAY_DIR=$(mktemp -d "${TMPDIR:-/tmp}/ray.XXXXXX")
PID=
PROGRESS=
clean_up() {
    if [ -n "$PID" ]; then
        kill $PID $PROGRESS 2>/dev/null || true
        # Ray's own processes follow the driver; one that does not end by itself is ended.
        for _ in $(seq 30); do
            kill -0 $PID 2>/dev/null || break
            sleep 1
        done
        kill -9 $PID 2>/dev/null || true
        sleep 1
    fi
    rm -rf "$RAY_DIR" "$RAY_DIR.token"
}
trap clean_up EXIT
export VERL_PLATFORM=cpu VERL_FILE_LOGGER_PATH=$RUN_DIR/metrics.jsonl
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} RREDCOT_CPU_THREADS=${RREDCOT_CPU_THREADS:-1} TOKENIZERS_PARALLELISM=false HYDRA_FULL_ERROR=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# Ray would write a token into the home folder.
export RAY_AUTH_TOKEN_PATH=$RAY_DIR.token
python -c 'import secrets; print(secrets.token_hex(32))' > "$RAY_AUTH_TOKEN_PATH"
# An empty value means "no GPU" to CUDA, and an error to Ray.
[ -n "${CUDA_VISIBLE_DEVICES:-}" ] || unset CUDA_VISIBLE_DEVICES

python -m verl.trainer.main_ppo "$@" ++ray_kwargs.ray_init._temp_dir="$RAY_DIR" > "$RUN_DIR/train.log" 2>&1 &
PID=$!
python -m recipes.quickstart.progress "$RUN_DIR" $PID &
PROGRESS=$!
STATUS=0
wait $PID || STATUS=$?
kill $PROGRESS 2>/dev/null || true
if [ $STATUS -ne 0 ]; then
    echo "training failed with exit code $STATUS; the last lines of $RUN_DIR/train.log:" >&2
    tail -n 25 "$RUN_DIR/train.log" >&2
    exit $STATUS
fi
