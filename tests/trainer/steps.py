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
        """verl's pass, with what it is asked for besides; or whole sequences, whose log-probabilities are all -2."""
        if not isinstance(batch, KVBatchMeta):
            if (SEQUENCES, self.weights) not in self.passes:
                self.passes.append((SEQUENCES, self.weights))
            likely = [torch.full((len(row),), -2.0) for row in batch["input_ids"].unbind()]
            return {"log_probs": torch.nested.as_nested_tensor(likely, layout=torch.jagged)}
        requests = batch.extra_info.get(PASSES)
        self.passes.append(((requests, batch.extra_info[ALONE]) if requests else OWN, self.weights))
        self.asked.append((dict(batch.extra_info), None if batch.fields is None else list(batch.fields)))
        if requests and self._results is not None:
            self._results(batch, [name for name, _ in requests])
        if batch.fields is not None:
            batch.fields = [*batch.fields, *(FIELDS[name].result for name, _ in requests or ())]
        return batch


def make_trainer(
    mode: str = "sync",
    estimator: str = "rredcot",
    bypass: bool = False,
    workers: NotingWorkers | None = None,
    engine: EngineChoice | None = None,
    **block: Any,
) -> RREDCoTTrainerMixin:
    """A trainer; what its constructors make is put in by hand."""
    trainer: Any = object.__new__(TRAINER_REGISTRY[mode])
    rollout = {"temperature": 0.7, "log_prob_max_token_len_per_gpu": 100}
    trainer.config = OmegaConf.create(
        {
            "algorithm": {
                "adv_estimator": estimator,
                "rollout_correction": {"bypass_mode": bypass},
                "norm_adv_by_std_in_grpo": True,
                "gamma": 1.0,
                "lam": 1.0,
            },
            "actor_rollout_ref": {"rollout": rollout},
            "trainer": {"logger": ["console"]},
        }
    )
    trainer.rredcot = parse(block)
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
