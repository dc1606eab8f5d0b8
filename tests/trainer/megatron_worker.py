"""Named as `external_lib`: training workers of a `main_ppo` run on CPU get verl's Megatron engine (`megatron_cpu`)."""

import os

from rredcot_verl.cpu.process_group import is_cpu_training_worker

if is_cpu_training_worker():
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from tests.passes.megatron_cpu import stand_in_for_cuda

    stand_in_for_cuda()
