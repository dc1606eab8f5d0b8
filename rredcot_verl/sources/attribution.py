"""Attribution in a run: what a response's segments are weighed for, and the pass that weighs them.

The agent loop writes a plan into a response's record; the trainer sends it with the row to the training engine, and
reads a weight a segment back.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta

from rredcot_verl.answers.grammar import canonical_form, find_answer, reference_answers
from rredcot_verl.config.blocks import AttributionConfig
from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.config.sources import ATTENTION_ATTRIBUTION, GRADIENT_ATTRIBUTION, LEAVE_ONE_OUT
from rredcot_verl.passes.attribution_protocol import ATTENTION, GRADIENT, OPTIONS, PLANS, WEIGHTS
from rredcot_verl.passes.attribution_task import NO_PLAN, AttributionPlan, AttributionTask, decode_plan, encode_plan
from rredcot_verl.passes.leave_one_out import leave_one_out_tasks, leave_one_out_weights
from rredcot_verl.passes.protocol import PASS
from rredcot_verl.probes.elicitation import Elicitation, Proposal
from rredcot_verl.sources.group import Group
from rredcot_verl.sources.record import NO_PROPOSAL, PLANNED, SCORED, TOO_LONG, CreditRecord
from rredcot_verl.sources.response import Response
from rredcot_verl.trainer.actor_probes import Records, SeparateSequences, any_planned
from rredcot_verl.trainer.batch import put_rows

INTEGRATED_GRADIENTS = "integrated_gradients"


@dataclass(frozen=True)
class AttributionSource:
    """Plans what a response's segments are weighed for, in the agent loop.

    Attributes:
        settings: The `algorithm.rredcot` block.
        source: `attention_attribution`, `gradient_attribution` or `leave_one_out`.
        elicitation: Finds answers, and opens the reference answer.
        max_length: Longest sequence, prompt included, tokens.
    """

    settings: RREDCoTConfig
    source: str
    elicitation: Elicitation
    max_length: int

    needs_all = False

    async def record(self, response: Response, group: Group, boundaries: list[int]) -> CreditRecord:
        """The record of a response that waits for the training engine; see `Source` and `plan`."""
        plan = self.plan(response, boundaries)
        if plan is None:
            return CreditRecord(NO_PROPOSAL)
        if plan.num_tokens > self.max_length:
            return CreditRecord(TOO_LONG)
        return CreditRecord(
            PLANNED,
            segment_boundaries=list(boundaries),
            attribution=encode_plan(plan),
            num_probes=len(plan.boundaries) if self.source == LEAVE_ONE_OUT else 1,
            num_probe_tokens=num_tokens(plan, self.source, self.settings.attribution),
        )

    def plan(self, response: Response, boundaries: Sequence[int]) -> AttributionPlan | None:
        """Which answer, and which segments stand before it.

        The segment that holds the answer, and all after it, are left out of the plan: they weigh nothing (ours).

        Returns:
            None where there is no answer to weigh for, or no segment before it.
        """
        if not response.prompt_ids:
            return None
        own = self.settings.attribution.target == "own"
        return self._own(response, boundaries) if own else self._reference(response, boundaries)

    def _own(self, response: Response, boundaries: Sequence[int]) -> AttributionPlan | None:
        """For the response's own final answer; what follows it is cut off."""
        if response.answer is None:
            return None
        vocabulary = self.elicitation.vocabulary
        text = vocabulary.decode(response.response_ids)
        thinking = self.elicitation.thinking_after(response.prompt_ids)
        found = find_answer(text, self.elicitation.formats, thinking)
        if found is None:
            return None
        first = vocabulary.offset_of(response.response_ids, text, found.answer_start)
        last = vocabulary.offset_of(response.response_ids, text, found.end - 1)
        kept = [boundary for boundary in boundaries if boundary <= response.answer.start]
        return self._plan(response, kept, last + 1, (), first, last + 1)

    def _reference(self, response: Response, boundaries: Sequence[int]) -> AttributionPlan | None:
        """For the reference answer, where the response's own stands, or at its end where it has none."""
        answer_format = self.elicitation.format_for(response.answer)
        text = self._reference_text(response.references, answer_format)
        if text is None:
            return None
        if response.answer is not None:
            place = response.answer.start
            kept = [boundary for boundary in boundaries if boundary <= place]
        else:
            place = self._end_of_text(response.response_ids)
            # Nothing of the last segment is an answer: it may weigh.
            kept = [*(boundary for boundary in boundaries if boundary < place), place]
        (probe, *_) = self.elicitation.probes(
            response.prompt_ids,
            response.response_ids,
            [place, len(response.response_ids)],
            [Proposal(text, 1.0)],
            answer_format,
            place if response.answer is not None else -1,
        )
        answer_from, answer_to = place + probe.answer_from, place + len(probe.token_ids)
        return self._plan(response, kept, place, probe.token_ids, answer_from, answer_to)

    def _reference_text(self, references: object, answer_format: str) -> str | None:
        """The first reference answer that the tokenizer can write; how many tokens it has does not matter here."""
        texts = reference_answers(references, canonical_form(self.settings.elicitation))
        return next((text for text in texts if self.elicitation.can_append(text, answer_format)), None)

    def _end_of_text(self, response_ids: Sequence[int]) -> int:
        """Length of a response without the tokens that end the turn: no answer follows those."""
        ends = set(self.elicitation.vocabulary.end_of_sequence_ids())
        length = len(response_ids)
        while length and response_ids[length - 1] in ends:
            length -= 1
        return length

    @staticmethod
    def _plan(
        response: Response,
        kept: Sequence[int],
        num_kept: int,
        appended: Sequence[int],
        answer_from: int,
        answer_to: int,
    ) -> AttributionPlan | None:
        """A plan from offsets in the response."""
        if len(kept) < 2 or answer_from >= answer_to:
            return None
        start = len(response.prompt_ids)
        return AttributionPlan(
            start + num_kept,
            tuple(appended),
            tuple(start + boundary for boundary in kept),
            start + answer_from,
            start + answer_to,
        )


def num_tokens(plan: AttributionPlan, source: str, settings: AttributionConfig) -> int:
    """Tokens computed to weigh one response's segments.

    A backward pass counts as one forward pass: it makes no gradients of weights.
    """
    if source == ATTENTION_ATTRIBUTION:
        return plan.num_tokens
    if source == GRADIENT_ATTRIBUTION:
        num_steps = settings.num_steps if settings.gradient == INTEGRATED_GRADIENTS else 1
        return 2 * num_steps * plan.num_tokens
    # The whole trace, and once without each segment.
    num_segments = len(plan.boundaries) - 1
    return (num_segments + 1) * plan.num_tokens - (plan.boundaries[-1] - plan.boundaries[0])


class _Sequences(SeparateSequences):
    """Whole sequences through `compute_log_prob`."""

    def answer_log_probs(self, tasks: Iterable[AttributionTask]) -> Iterator[float]:
        """Log-probability of each task's answer, with which its tokens end; nats."""
        answers: deque[tuple[int, int]] = deque()

        def sequences() -> Iterator[tuple[int, ...]]:
            for task in tasks:
                answers.append((task.answer_from, task.answer_to))
                yield tuple(task.token_ids)

        for part in self._parts(sequences()):
            for row in self._log_probs(part):
                # Entry i of a sequence is the log-probability of token i + 1; the last one has no meaning.
                first, last = answers.popleft()
                yield row[first - 1 : last - 1].double().sum().item()


@dataclass(frozen=True)
class AttributionPass:
    """Weighs the segments of a batch on the training engine.

    Attributes:
        worker_group: verl's actor workers.
        source: `attention_attribution`, `gradient_attribution` or `leave_one_out`.
        settings: The `algorithm.rredcot.attribution` block.
        num_ranks: Data-parallel ranks.
        temperature: Of the rollout.
        max_tokens: Tokens of one rank's pass, for `leave_one_out`.
    """

    worker_group: Any
    source: str
    settings: AttributionConfig
    num_ranks: int
    temperature: float
    max_tokens: int

    def run(self, batch: KVBatchMeta, records: Records) -> None:
        """Weigh the segments of all rows that wait for it and store the weights beside the rows; see `weighed`."""
        if self.source == LEAVE_ONE_OUT:
            self._leave_one_out(batch, records)
            return
        put_rows(batch, PLANS, [torch.tensor(_encoded(record), dtype=torch.int64) for record in records])
        before = dict(batch.extra_info)
        batch.extra_info.update(self._extra_info())
        self.worker_group.compute_log_prob(batch)
        batch.extra_info.clear()
        batch.extra_info.update(before)

    def _extra_info(self) -> dict[str, Any]:
        is_attention = self.source == ATTENTION_ATTRIBUTION
        gradient = (self.settings.gradient, self.settings.num_steps)
        return {
            PASS: ATTENTION if is_attention else GRADIENT,
            OPTIONS: (self.settings.layers,) if is_attention else gradient,
            "calculate_entropy": False,
            "compute_loss": False,
            "temperature": self.temperature,
        }

    def _leave_one_out(self, batch: KVBatchMeta, records: Records) -> None:
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["input_ids"])
        plans = [decode_plan(_encoded(record)) for record in records]
        workers = _Sequences(self.worker_group, self.num_ranks, self.temperature, 1, self.max_tokens)
        # Made as they are sent: all at once they would be many times the batch.
        tasks = (
            task
            for trace, plan in zip(data["input_ids"].unbind(), plans, strict=True)
            if plan is not None
            for task in leave_one_out_tasks(plan.task(trace.tolist()))
        )
        log_probs = workers.answer_log_probs(tasks)
        weights = [
            # The whole trace, and without each segment.
            [] if plan is None else leave_one_out_weights(list(itertools.islice(log_probs, len(plan.boundaries))))
            for plan in plans
        ]
        put_rows(batch, WEIGHTS, [torch.tensor(own or [0.0]) for own in weights])


def weighed(batch: KVBatchMeta, records: Records) -> list[CreditRecord | None]:
    """The records with the weights that a pass has found, scored.

    Args:
        batch: The batch.
        records: Its records, as they were when the pass was run.

    Returns:
        The same records; one that waited has a weight >= 0 for each of its segments, 0 for the answer's own and what
        follows it.

    Raises:
        RuntimeError: The pass gave another number of weights than the row has segments, or one that is no number.
    """
    if not any_planned(records):
        return list(records)
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=[WEIGHTS])
    rows = data[WEIGHTS].unbind()
    return [
        record
        if record is None or record.status != PLANNED
        else dataclasses.replace(record, status=SCORED, weights=_weights(key, record, row.tolist()))
        for key, record, row in zip(batch.keys, records, rows, strict=True)
    ]


def _weights(key: str, record: CreditRecord, weights: list[float]) -> list[float]:
    plan = decode_plan(record.attribution)
    assert plan is not None
    expected = len(plan.boundaries) - 1
    if len(weights) != expected or not all(0 <= weight < float("inf") for weight in weights):
        raise RuntimeError(f"a pass gave the weights {weights} for the segments of {key}, expected {expected} of them")
    return weights + [0.0] * (len(record.segment_boundaries) - 1 - expected)


def without_attribution(batch: KVBatchMeta) -> KVBatchMeta:
    """The same batch, with nothing of this for its next readers to fetch."""
    if batch.fields is not None:
        batch.fields = [field for field in batch.fields if field not in (PLANS, WEIGHTS)]
    return batch


def _encoded(record: CreditRecord | None) -> Sequence[int]:
    return record.attribution if record is not None and record.status == PLANNED else NO_PLAN
