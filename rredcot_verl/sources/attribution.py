"""Segments share the advantage by their weight for the answer: three peers that ask what the answer was made of.

The RREDCoT paper compares with attention attribution, gradient attribution and leave-one-out. Ours in all three: that
the answer is the response's own, that the segment that holds it weighs nothing, and shares of R less the group's mean
(`core.values.attribution_values`).
"""

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from omegaconf import DictConfig

from rredcot_verl.answers.grammar import find_answer
from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.core.values import attribution_values
from rredcot_verl.passes.attribution_task import AttributionPlan, AttributionTask, decode_plan, encode_plan
from rredcot_verl.passes.leave_one_out import leave_one_out_tasks, leave_one_out_weights
from rredcot_verl.passes.protocol import FIELDS, PassFields
from rredcot_verl.sources.base import PassRequest, Source, Workers
from rredcot_verl.sources.engines import EngineChoice, ulysses_size, why_not_separate, why_not_shared
from rredcot_verl.sources.group import Group
from rredcot_verl.sources.queue import RecordedBatch, Rows, put_rows, read_rows
from rredcot_verl.sources.record import Plan, Record, Status
from rredcot_verl.sources.response import Response
from rredcot_verl.sources.sequences import SeparateSequences

logger = logging.getLogger(__name__)


class Attribution(Source):
    """What the three have in common; a record's payload is `num_weights`, how many segments stand before the answer."""

    weighs = True
    forecasts = False
    fields: PassFields
    """Row fields in which plans and weights travel."""

    def __init__(self, settings: RREDCoTConfig, name: str) -> None:
        super().__init__(settings, name)
        self.payload_fields, self.result_fields = (self.fields.payload,), (self.fields.result,)

    # Before anything starts

    def choose_engine(self, config: DictConfig) -> EngineChoice:
        """See `Source`."""
        obstacle = self.why_not_on(config)
        if obstacle is not None:
            raise ValueError(
                f"algorithm.adv_estimator={self.name} needs verl's FSDP engine and a model whose traces it can pack: "
                f"{obstacle}; algorithm.adv_estimator=leave_one_out runs on any engine"
            )
        return self._said(EngineChoice("actor", True, "a pass of its own over the traces", self.name.replace("_", " ")))

    def why_not_on(self, config: DictConfig) -> str | None:
        """Why the training engine of a run cannot weigh segments; None where it can."""
        actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
        if actor.strategy == "megatron":
            return "actor_rollout_ref.actor.strategy=megatron"
        obstacle = why_not_shared(config)
        if obstacle is not None:
            return obstacle
        if ulysses_size(actor) > 1:
            return f"ulysses_sequence_parallel_size={ulysses_size(actor)}: its passes hold whole traces on a rank"
        if model.get("use_fused_kernels"):
            return "actor_rollout_ref.model.use_fused_kernels=True makes no logits"
        return None

    def _said(self, choice: EngineChoice) -> EngineChoice:
        logger.warning("rredcot: %s: %s, by %s; %s", self.name, choice.what, choice.engine, choice.reason)
        return choice

    def describe(self) -> str:
        """See `Source`."""
        return f"{self.name} of the response's own answer"

    def way_out(self) -> str:
        """See `Source`."""
        return "check algorithm.rredcot.elicitation.format"

    # In an agent loop worker

    async def plan(self, response: Response, group: Group, boundaries: list[int]) -> Plan:
        """See `Source`."""
        plan = self.plan_for_answer(response, boundaries)
        if plan is None:
            return Plan(Record(Status.NO_PROPOSAL))
        if plan.answer_to > self.tools.max_length:
            return Plan(Record(Status.TOO_LONG))
        record = Record(
            Status.SCORED,
            segment_boundaries=list(boundaries),
            payload={"num_weights": len(plan.boundaries) - 1},
            num_probes=self.num_sequences(plan),
            num_probe_tokens=self.num_tokens(plan),
        )
        return Plan(record, {self.fields.payload: encode_plan(plan)})

    def num_sequences(self, plan: AttributionPlan) -> int:
        """Sequences computed to weigh one response's segments."""
        del plan
        return 1

    def num_tokens(self, plan: AttributionPlan) -> int:
        """Tokens computed to weigh one response's segments."""
        return plan.answer_to

    def plan_for_answer(self, response: Response, boundaries: Sequence[int]) -> AttributionPlan | None:
        """The response's own final answer, and what of the segments stands before its opening.

        What follows the answer is cut off; it, its opening and all after it weigh nothing (ours).

        Returns:
            None where there is no answer to weigh for, or no segment before it.
        """
        if not response.prompt_ids or response.answer is None:
            return None
        vocabulary = self.tools.elicitation.vocabulary
        words = self.tools.elicitation.written(response.response_ids, response.response_mask)
        text = vocabulary.decode(words)
        thinking = self.tools.elicitation.thinking_after(response.prompt_ids)
        found = find_answer(text, self.tools.elicitation.formats, thinking)
        if found is None:
            return None
        start = len(response.prompt_ids)
        first = vocabulary.offset_of(words, text, found.answer_start)
        end = vocabulary.offset_of(words, text, found.end - 1) + 1
        kept = [*(boundary for boundary in boundaries if boundary < response.answer.start), response.answer.start]
        if len(kept) < 2 or first >= end:
            return None
        return AttributionPlan(tuple(start + boundary for boundary in kept), start + first, start + end)

    # In the trainer's step

    def _waiting(self, recorded: RecordedBatch) -> bool:
        return any(record is not None and record.payload for record in recorded.records)

    def values(self, rows: Rows) -> list[list[float]]:
        """See `Source`.

        Raises:
            RuntimeError: A row has another number of weights than segments, or one that is no number.
        """
        values: list[list[float]] = [[] for _ in rows.keys]
        if not self._waiting(rows.recorded):
            return values
        weights = rows.read(self.fields.result)
        for row in rows.scored:
            record = rows.records[row]
            assert record is not None
            own, expected = weights[row].tolist(), record.payload["num_weights"]
            if len(own) != expected or not all(0 <= weight < float("inf") for weight in own):
                raise RuntimeError(
                    f"a pass gave the weights {own} for the segments of {rows.keys[row]}, expected {expected} of them"
                )
            rest = [0.0] * (len(record.segment_boundaries) - 1 - expected)
            baseline = rows.score_groups.mean[row].item()
            values[row] = attribution_values(own + rest, rows.scores[row].item(), baseline)
        return values


class AttentionAttribution(Attribution):
    """Segments share the advantage by how much the tokens that give the answer attend to them.

    Attention as credit is ABC's (Chan et al., "Dense Reward for Free in RLHF", arXiv 2402.00782), which spreads a
    reward model's score over tokens by its last layer's attention. Ours: the policy's own attention, from the rows that
    predict the answer, averaged over heads and layers, summed by segment. One more pass over the traces.
    """

    fields = FIELDS["attention"]

    def passes(self, recorded: RecordedBatch) -> tuple[PassRequest, ...]:
        """See `Source`."""
        request = PassRequest("attention", fuses=False)
        return (request,) if self._waiting(recorded) else ()


class GradientAttribution(Attribution):
    """Segments share the advantage by the gradient of the answer's log-probability in their embeddings.

    Input x gradient (Shrikumar et al., arXiv 1605.01713). Ours: the absolute value of the sum over a segment's tokens.
    One forward and one backward pass over the traces.
    """

    fields = FIELDS["gradient"]

    def why_not_on(self, config: DictConfig) -> str | None:
        """See `Attribution`."""
        obstacle = super().why_not_on(config)
        if obstacle is None and config.actor_rollout_ref.model.get("enable_activation_offload"):
            return "actor_rollout_ref.model.enable_activation_offload=True follows whole training steps"
        return obstacle

    def num_tokens(self, plan: AttributionPlan) -> int:
        """See `Attribution`. A backward pass counts as one forward pass: it makes no gradients of weights."""
        return 2 * plan.answer_to

    def passes(self, recorded: RecordedBatch) -> tuple[PassRequest, ...]:
        """See `Source`."""
        request = PassRequest("gradient", fuses=False)
        return (request,) if self._waiting(recorded) else ()


class LeaveOneOut(Attribution):
    """Segments share the advantage by how far the answer's log-probability falls without them.

    Ours: the rest closes up, and rises count as 0. A sequence of the trace's length for every segment; any engine.
    """

    fields = PassFields("rredcot_left_out_plans", "rredcot_left_out_weights")

    def choose_engine(self, config: DictConfig) -> EngineChoice:
        """See `Source`."""
        obstacle = why_not_separate(config)
        if obstacle is not None:
            raise ValueError(f"algorithm.adv_estimator={self.name}: {obstacle}; set its mode to disabled")
        return self._said(EngineChoice("actor", False, "sequences without one segment each", "leave-one-out"))

    def num_sequences(self, plan: AttributionPlan) -> int:
        """See `Attribution`."""
        return len(plan.boundaries)

    def num_tokens(self, plan: AttributionPlan) -> int:
        """See `Attribution`: the whole trace, and once without each segment."""
        return len(plan.boundaries) * plan.answer_to - (plan.boundaries[-1] - plan.boundaries[0])

    def measure(self, recorded: RecordedBatch, workers: Workers) -> None:
        """See `Source`."""
        if not self._waiting(recorded):
            return
        traces = read_rows(recorded.batch, "input_ids")
        plans = [decode_plan(row.tolist()) for row in read_rows(recorded.batch, self.fields.payload)]
        # Made as they are sent: all at once they would be many times the batch.
        tasks = (
            task
            for trace, plan in zip(traces, plans, strict=True)
            if plan is not None
            for task in leave_one_out_tasks(plan.task(trace.tolist()))
        )
        log_probs = _answer_log_probs(SeparateSequences(workers), tasks)
        weights = [
            # The whole trace, and without each segment.
            [] if plan is None else leave_one_out_weights(list(itertools.islice(log_probs, len(plan.boundaries))))
            for plan in plans
        ]
        put_rows(recorded.batch, self.fields.result, [torch.tensor(own or [0.0]) for own in weights])


def _answer_log_probs(sequences: SeparateSequences, tasks: Iterable[AttributionTask]) -> Iterator[float]:
    """Log-probability of each task's answer, with which its tokens end; nats."""
    answers: deque[tuple[int, int]] = deque()

    def token_ids() -> Iterator[Sequence[int]]:
        for task in tasks:
            answers.append((task.answer_from, task.answer_to))
            yield tuple(task.token_ids)

    for row in sequences.log_probs(token_ids()):
        # Entry i of a sequence is the log-probability of token i + 1; the last one has no meaning.
        first, last = answers.popleft()
        yield row[first - 1 : last - 1].double().sum().item()
