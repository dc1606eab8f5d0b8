#!/usr/bin/env bash
# Qwen3-4B on code with FSDP2: 8 GPUs of 80 GB. Arguments are Hydra overrides; DRY_RUN=1 checks everything and starts nothing.
# Toggles: recipes/common/README.md; data, budget and what to expect: recipes/code/README.md.
set -xeuo pipefail

# a hub id or a folder
MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-4B}
NNODES=${NNODES:-1}
# per node
N_GPUS=${N_GPUS:-8}

source "$(dirname "$0")/../common/launch.sh"
launch code qwen3_4b_fsdp "$@"
