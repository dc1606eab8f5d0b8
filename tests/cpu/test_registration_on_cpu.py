"""The CPU backend is chosen, never detected, and reaches verl's registries in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from rredcot_verl.cpu.replay_buffer import fast_polling_replay_buffer

REPOSITORY = Path(__file__).parents[2]
RANK_VARIABLES = ("WG_PREFIX", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_python(code, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in ("VERL_PLATFORM", *RANK_VARIABLES)}
    environment |= {
        "PYTHONPATH": str(REPOSITORY),
        "VERL_USE_EXTERNAL_PLUGINS": "none",
        "VERL_USE_EXTERNAL_MODULES": "tests.cpu.backend_plugin",
        **variables,
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=REPOSITORY, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_chosen_by_the_environment_it_reaches_every_registry():
    code = (
        "import torch\n"
        "from verl.utils.device import get_device_name, get_torch_device, get_device_id\n"
        "from verl.workers.engine import EngineRegistry\n"
        "from verl.workers.rollout.base import get_rollout_class\n"
        "from verl.workers.rollout.replica import get_rollout_replica_class\n"
        "module = get_torch_device()\n"
        "module.empty_cache(); module.synchronize(); assert module.memory_allocated() == 0\n"
        "assert torch.equal(module.get_rng_state(), torch.get_rng_state())\n"
        "assert torch.zeros(1).to(get_device_id()).device.type == 'cpu'\n"
        "classes = [EngineRegistry.get_engine_cls('language_model', 'fsdp2'), get_rollout_class('rredcot_cpu'),\n"
        "           get_rollout_replica_class('rredcot_cpu')]\n"
        "print(get_device_name(), *(each.__name__ for each in classes))"
    )
    assert run_python(code, VERL_PLATFORM="cpu") == "cpu CPUFSDPEngineWithLMHead CPUServerAdapter CPUReplica"


def test_never_detected():
    code = "from verl.utils.device import get_device_name\nprint(get_device_name())"
    assert run_python(code) != "cpu"


@pytest.mark.parametrize("missing", [None, "WG_PREFIX", "VERL_PLATFORM"])
def test_process_group_starts_in_training_workers_only(missing):
    variables = {
        "VERL_PLATFORM": "cpu",
        "WG_PREFIX": "worker",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "VERL_USE_EXTERNAL_MODULES": "",
    }
    variables.pop(missing, None)
    code = (
        "import rredcot_verl.cpu.process_group, torch.distributed as group\nprint(group.is_initialized(), flush=True)"
    )
    assert run_python(code, **variables) == str(missing is None)


@pytest.fixture
def config():
    with initialize_config_module("tests.cpu", version_base=None):
        yield compose("grpo_on_cpu")


def test_configuration_composes_and_overrides_verl(config):
    assert config.trainer.device == "cpu"
    assert config.actor_rollout_ref.rollout.name == "rredcot_cpu"
    assert config.actor_rollout_ref.ref.strategy == "fsdp2"
    assert config.actor_rollout_ref.ref.log_prob_use_dynamic_bsz
    config.trainer.n_gpus_per_node = 2
    assert config.ray_kwargs.ray_init.num_gpus == 2


def test_replay_buffer_polls_fast_and_drops_no_setting(config):
    sampler = config.trainer.v1.sampler
    arguments = {
        "trainer_config": OmegaConf.create({}),
        "max_off_policy_threshold": 8,
        "max_off_policy_strategy": "drop",
        "refill_fn": None,
    }
    for mode, name in (("sync", "ReplayBuffer"), ("colocate_async", "ReplayBufferAsync")):
        buffer = fast_polling_replay_buffer(trainer_mode=mode, sampler_kwargs=sampler.sampler_kwargs, **arguments)
        assert (type(buffer).__name__, buffer.poll_interval) == (name, 0.1)
    config.algorithm.filter_groups.enable = True
    with pytest.raises(ValueError, match="filter_groups"):
        fast_polling_replay_buffer(trainer_mode="sync", sampler_kwargs=sampler.sampler_kwargs, **arguments)
