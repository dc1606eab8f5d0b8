"""A verl trainer without Ray, workers that note what they are asked for, and a step's batch of real records."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import PPOTrainer
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

from rredcot_verl.config.schema import parse
from rredcot_verl.passes.attribution_task import decode_plan
from rredcot_verl.passes.probe_codec import decode
from rredcot_verl.passes.protocol import ALONE, FIELDS, NOTHING, PASSES
from rredcot_verl.sources.base import Source
from rredcot_verl.sources.engines import EngineChoice
from rredcot_verl.sources.group import Member
from rredcot_verl.sources.registry import make_source
from rredcot_verl.trainer.trainer import RREDCoTTrainerMixin
from tests.probes.tiny_tokenizers import byte_level
from tests.sources.world import PROMPT, TEXT, Agent, World

OWN, SEQUENCES = "verl's own", "sequences"


class NotingWorkers:
    """verl's actor workers: weights have a name, and every pass is noted with the weights it saw.

    Args:
        weights: Their name.
        results: What a pass of ours gives: from the batch and the names of the passes.
    """

    def __init__(self, weights: str = "now", results: Callable[[KVBatchMeta, list[str]], None] | None = None) -> None:
        self.weights = weights
        self.kept: dict[int, str] = {}
        self.passes: list[tuple[Any, str]] = []
        self.asked: list[tuple[dict[str, Any], list[str] | None]] = []
        self._results = results
        self._dispatch_info = {"actor": [0]}

    def save_model_to_cpu(self, n: int) -> None:
        """See verl."""
        self.kept[n] = self.weights

    def restore_model_from_cpu(self, n: int) -> None:
        """See verl."""
        self.weights = self.kept[n]

    def clear_cpu_model(self, n: int) -> None:
        """See verl."""
        del self.kept[n]

    def compute_log_prob(self, batch: Any) -> Any:
        """verl's pass, with what it is asked for besides; or whole sequences, the likelier the longer they are."""
        if not isinstance(batch, KVBatchMeta):
            if (SEQUENCES, self.weights) not in self.passes:
                self.passes.append((SEQUENCES, self.weights))
            likely = [torch.full((len(row),), -200.0 / len(row)) for row in batch["input_ids"].unbind()]
            return {"log_probs": torch.nested.as_nested_tensor(likely, layout=torch.jagged)}
        requests = batch.extra_info.get(PASSES)
        self.passes.append(((requests, batch.extra_info[ALONE]) if requests else OWN, self.weights))
        self.asked.append((dict(batch.extra_info), None if batch.fields is None else list(batch.fields)))
        if requests and self._results is not None:
            self._results(batch, [name for name, _ in requests])
        if batch.fields is not None:
            batch.fields = [*batch.fields, *(FIELDS[name].result for name, _ in requests or ())]
        return batch


def pass_results(world: World, dim: int) -> Callable[[KVBatchMeta, list[str]], None]:
    """What passes of ours give of the payloads in the queue: numbers of the right shape, the same every time."""

    def of_row(name: str, payload: list[int], row: int) -> torch.Tensor:
        if tuple(payload) == NOTHING:
            return torch.zeros(1)
        if name == "probes":
            num_numbers = sum(len(probe.token_ids) - probe.scored_from + 1 for probe in decode(payload))
        elif name == "hidden":
            num_numbers = len(payload) * dim
        else:
            plan = decode_plan(payload)
            num_numbers = len(plan.boundaries) - 1 if plan else 1
        numbers = torch.rand(num_numbers, generator=torch.Generator().manual_seed(row))
        return -numbers if name == "probes" else numbers

    def put(batch: KVBatchMeta, names: list[str]) -> None:
        for name in names:
            payloads = world.column(FIELDS[name].payload)
            world.put(**{FIELDS[name].result: [of_row(name, own, row) for row, own in enumerate(payloads)]})

    return put


def make_trainer(
    mode: str = "sync",
    estimator: str = "rredcot",
    bypass: bool = False,
    workers: NotingWorkers | None = None,
    engine: EngineChoice | None = None,
    strategy: str = "fsdp2",
    **block: Any,
) -> RREDCoTTrainerMixin:
    """A trainer; what its constructors make is put in by hand."""
    trainer: Any = object.__new__(TRAINER_REGISTRY[mode])
    rollout = {"temperature": 0.7, "log_prob_max_token_len_per_gpu": 100, "n": 2}
    trainer.config = OmegaConf.create(
        {
            "algorithm": {
                "adv_estimator": estimator,
                "rollout_correction": {"bypass_mode": bypass},
                "norm_adv_by_std_in_grpo": True,
                "gamma": 1.0,
                "lam": 1.0,
                "use_kl_in_reward": False,
            },
            "reward": {},
            "actor_rollout_ref": {"rollout": rollout, "actor": {"strategy": strategy}},
            "trainer": {"logger": ["console"], "default_local_dir": "checkpoints/run", "resume_mode": "auto"},
        }
    )
    trainer.rredcot = parse({"credit": {"form": "reweight"}} | dict(block))
    trainer._source = make_source(trainer.rredcot, estimator)
    trainer._engine = engine or EngineChoice("actor", True, "")
    trainer._measuring_seconds, trainer.local_trigger_step, trainer.global_steps = 0.0, 0, 1
    trainer.tokenizer, trainer.logger = byte_level(), None
    trainer.actor_rollout_wg = workers or NotingWorkers()
    return trainer


def verls_old_log_prob(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's base trainer asks its workers, or nobody in bypass mode."""

    def compute(self: Any, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        if not self.config.algorithm.rollout_correction.bypass_mode:
            self.actor_rollout_wg.compute_log_prob(batch)
        return batch

    monkeypatch.setattr(PPOTrainer, "_compute_old_log_prob", compute)


def make_step(
    monkeypatch: pytest.MonkeyPatch,
    estimator: str = "rredcot",
    texts: Sequence[str] = (TEXT, "Hmm, but so.\n\nThen it is \\boxed{16}.\n"),
    rewards: Sequence[float] = (1.0, 0.0),
    fields: Sequence[str] | None = None,
    **block: Any,
) -> tuple[World, Source]:
    """A group as agent loop workers leave it, and a padding row that is a copy of its first one."""
    agent = Agent(estimator, block)
    responses = [agent.response(text, reward=reward) for text, reward in zip(texts, rewards, strict=True)]
    plans = [
        agent.record(response, [Member(other, None) for place, other in enumerate(rewards) if place != number])
        for number, response in enumerate(responses)
    ]
    columns: dict[str, list[Any]] = {
        "input_ids": [[*PROMPT, *response.response_ids] for response in responses],
        "prompts": [list(PROMPT) for _ in responses],
        "responses": [list(response.response_ids) for response in responses],
    }
    for name in agent.source.payload_fields:
        columns[name] = [torch.tensor(plan.rows.get(name, NOTHING), dtype=torch.int32) for plan in plans]
    lengths = [*(len(response.response_ids) for response in responses), 1]
    padded = {name: [*column, column[0]] for name, column in columns.items()}
    world = World(
        monkeypatch,
        [*(plan.record for plan in plans), None],
        rewards=[*rewards, 0.0],
        lengths=lengths,
        fields=fields,
        **padded,
    )
    return world, agent.source
