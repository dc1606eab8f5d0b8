#!/usr/bin/env bash
# Qwen3-0.6B on math with FSDP2: one GPU of 40 GB or more. Arguments are Hydra overrides; DRY_RUN=1 checks everything and starts nothing.
# Toggles: recipes/common/README.md; data, budget and what to expect: recipes/math/README.md.
set -xeuo pipefail

# a hub id or a folder
MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-0.6B}
NNODES=${NNODES:-1}
# per node
N_GPUS=${N_GPUS:-1}

source "$(dirname "$0")/../common/launch.sh"
launch math qwen3_0.6b_fsdp "$@"
