#!/usr/bin/env bash
# Qwen3-1.7B on math with FSDP2: one GPU of 80 GB. Arguments are Hydra overrides; DRY_RUN=1 checks everything and starts nothing.
# Toggles: recipes/common/README.md; data, budget and what to expect: recipes/math/README.md.
set -xeuo pipefail

# a hub id or a folder
MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-1.7B}
NNODES=${NNODES:-1}
# per node
N_GPUS=${N_GPUS:-1}

source "$(dirname "$0")/../common/launch.sh"
launch math qwen3_1.7b_fsdp "$@"
