"""What `separate_async` needs of the CPU backend: weights sent and kept, responses written in pieces."""

import asyncio
import copy
from datetime import timedelta
from types import SimpleNamespace

import pytest
import ray
import torch
from torch.distributed.fsdp import fully_shard
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient

from rredcot_verl.cpu.checkpoint_engine import CPUCheckpointEngine
from rredcot_verl.cpu.language_model import RolloutModel
from rredcot_verl.cpu.rollout_server import RolloutServer, ServerLimits
from rredcot_verl.cpu.separate_async import CPUDetachActorWorker
from tests import PATIENCE_S
from tests.cpu.test_registration_on_cpu import run_python
from tests.tiny_model import build_tiny_model


def test_chosen_by_the_environment_it_stands_under_verls_names():
    code = (
        "from verl.checkpoint_engine import CheckpointEngineRegistry\n"
        "from verl.trainer.ppo.v1 import PPOTrainer, PPOTrainerSeparateAsync, get_trainer_cls\n"
        "from rredcot_verl.cpu.separate_async import CPUSeparateAsyncMixin\n"
        "from rredcot_verl.trainer.trainer import MeasuringMixin, RREDCoTTrainerMixin\n"
        "order = get_trainer_cls('separate_async').__mro__\n"
        "assert CPUSeparateAsyncMixin in order and order.count(RREDCoTTrainerMixin) == 1\n"
        "classes = (RREDCoTTrainerMixin, PPOTrainerSeparateAsync, MeasuringMixin, PPOTrainer)\n"
        "places = [order.index(each) for each in classes]\n"
        "assert places == sorted(places)\n"
        "print(CheckpointEngineRegistry.get('rredcot_cpu').__name__)"
    )
    plugin = {"VERL_USE_EXTERNAL_MODULES": "", "VERL_USE_EXTERNAL_PLUGINS": "rredcot"}
    assert run_python(code, VERL_PLATFORM="cpu", **plugin) == "CPUCheckpointEngine"


WEIGHTS = {
    "small": torch.arange(6.0).reshape(2, 3),
    "scalar": torch.tensor(3.5),
    "half": torch.arange(5, dtype=torch.bfloat16),
    "large": torch.randn(40, 50),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "whole numbers": torch.arange(3),
}


@pytest.mark.parametrize("bucket_size", [1, 1000, 1 << 20])
def test_weights_reach_every_rollout_worker(monkeypatch, bucket_size):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    actors = [CPUCheckpointEngine(bucket_size, is_master=rank == 0) for rank in range(2)]
    rollout_workers = [CPUCheckpointEngine(bucket_size) for _ in range(3)]
    drawn = []

    def weights(rank, factor):
        for name, tensor in WEIGHTS.items():
            drawn.append((rank, name))
            yield name, tensor * factor

    async def receive(engine):
        return {name: tensor async for name, tensor in engine.receive_weights()}

    async def update(factor):
        everyone = [*actors, *rollout_workers]
        topology = CPUCheckpointEngine.build_topology(2, 3, [engine.prepare() for engine in everyone])
        addresses = [each for part in topology for each in part["addresses"]]
        assert [len(each) for each in addresses] == [3, 0, 0, 0, 0]
        for engine, own in zip(everyone, addresses, strict=True):
            engine.init_process_group(addresses=own)
        _, _, *received = await asyncio.gather(
            *(engine.send_weights(weights(rank, factor)) for rank, engine in enumerate(actors)),
            *(receive(engine) for engine in rollout_workers),
        )
        for engine in everyone:
            engine.finalize()
        return received

    for factor in (1, -2):
        drawn.clear()
        received = asyncio.run(asyncio.wait_for(update(factor), timeout=PATIENCE_S))
        for each in received:
            assert list(each) == list(WEIGHTS)
            for name, tensor in WEIGHTS.items():
                assert each[name].dtype == tensor.dtype and torch.equal(each[name], tensor * factor)
        # Gathering a tensor is a collective: the rank that sends nothing takes part.
        assert sorted(drawn) == sorted((rank, name) for rank in range(2) for name in WEIGHTS)


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=PATIENCE_S)
    )
    yield
    torch.distributed.destroy_process_group()


def test_weights_that_are_kept_do_not_follow_the_next_update(process_group):
    """On CPU, verl's own way to keep them gives the parameters themselves."""
    module = torch.nn.Linear(3, 2)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(module, mesh=mesh)
    worker = object.__new__(CPUDetachActorWorker)
    worker.config = SimpleNamespace(actor=SimpleNamespace(strategy="fsdp2"))
    worker._strategy_handlers = None
    worker.actor = SimpleNamespace(engine=SimpleNamespace(module=module))

    def values():
        return {name: parameter.full_tensor().detach().clone() for name, parameter in module.named_parameters()}

    def update():
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1.0)
        return values()

    first = values()
    worker.save_model_to_cpu(0)
    second = update()
    worker.save_model_to_cpu(1)
    for n, expected in ((0, first), (1, second)):
        worker.restore_model_from_cpu(n)
        found = values()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert not any(torch.equal(first[name], second[name]) for name in expected)
    worker.clear_cpu_model(1)
    assert list(worker.cpu_saved_models) == [0]


class Remote:
    """A method as a Ray actor's handle has it."""

    def __init__(self, function):
        self._function = function

    def remote(self, *args, **kwargs):
        result = self._function(*args, **kwargs)
        return result if asyncio.iscoroutine(result) else asyncio.ensure_future(_ready(result))


async def _ready(value):
    return value


def test_a_response_in_pieces_is_one_response():
    """What verl's client makes of a response that two weight updates cut: its parts joined, nothing lost or doubled."""
    limits = ServerLimits(prompt_length=8, response_length=400, max_model_len=408, context_length=512, max_num_seqs=8)
    server = RolloutServer(RolloutModel(copy.deepcopy(build_tiny_model()), [1], max_batch_tokens=256), limits)
    handle = SimpleNamespace(generate=Remote(server.generate))
    balancer = SimpleNamespace(
        require_acquire_fields=Remote(lambda: []),
        require_release_fields=Remote(lambda: []),
        acquire_server=Remote(lambda request_id: ("server", handle)),
        release_server=Remote(lambda server_id: None),
    )
    config = SimpleNamespace(
        actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(name="rredcot_cpu", response_length=400))
    )
    prompt = [5, 6, 7]

    async def life():
        client = FullyAsyncLLMServerClient(config, balancer)
        params = {"temperature": 1.0, "logprobs": True, "ignore_eos": True}
        running = asyncio.create_task(client.generate("a", prompt_ids=prompt, sampling_params=params))
        for version in (1, 2):
            await asyncio.sleep(0.2)
            await server.abort_all_requests()
            await server.release_kv_cache()
            await server.set_global_steps(version)
            await server.resume_kv_cache()
            await server.resume_generation()
            # The client waits for a second before it goes on.
            await asyncio.sleep(1.0)
        return await running

    output = asyncio.run(asyncio.wait_for(life(), timeout=PATIENCE_S))
    assert len(output.token_ids) == len(output.log_probs) == 400
    assert (output.extra_fields["min_global_steps"], output.extra_fields["max_global_steps"]) == (0, 2)
    with torch.no_grad():
        logits = build_tiny_model()(torch.tensor([[*prompt, *output.token_ids]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(output.token_ids)[:, None]).squeeze(-1)
    assert output.log_probs == pytest.approx(expected.tolist(), abs=1e-4)
