"""Weights of the segments for the answer, by the peers' functions in `rredcot_verl.passes.attribution`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from rredcot_verl.analyze.measuring import Context, Measurement, Unit
from rredcot_verl.analyze.records import TraceRecord, WeightRecord
from rredcot_verl.answers.grammar import find_answer
from rredcot_verl.passes.attribution import (
    attention_attribution,
    gradient_attribution,
    leave_one_out_attribution,
)
from rredcot_verl.passes.attribution_task import AttributionTask

Weigh = Callable[[PreTrainedModel, Sequence[AttributionTask]], list[list[float]]]


@dataclass(frozen=True)
class WeightMeasurement(Measurement):
    """Weighs the segments of traces, under the main cutting, for the answers that the traces give themselves.

    Attributes:
        context: What the measurements share.
        name: `attention_attribution`, `input_x_gradient` or `leave_one_out`.
    """

    context: Context
    name: str

    def units(self, trace: TraceRecord) -> list[Unit]:
        """See `Measurement`."""
        return [Unit(trace, (WeightRecord.key_of(trace.trace, self.context.segments.main, self.name),))]

    def task(self, trace: TraceRecord) -> AttributionTask | None:
        """The answer of a trace and the segments before it; None for a trace without answer."""
        text, elicitation = trace.response, self.context.elicitation
        found = find_answer(text, elicitation.formats, elicitation.thinking_after(trace.prompt_ids))
        if found is None or trace.answer_start is None:
            return None
        vocabulary, ids, offset = elicitation.vocabulary, trace.response_ids, len(trace.prompt_ids)
        answer_from = vocabulary.offset_of(ids, text, found.answer_start)
        answer_to = vocabulary.offset_of(ids, text, found.end - 1) + 1
        boundaries = self.context.segments.boundaries(trace)
        place = min(trace.answer_start, answer_from)
        before = [offset + boundary for boundary in [*(b for b in boundaries if b < place), place]]
        sequence = trace.token_ids[: offset + answer_to]
        return AttributionTask(tuple(sequence), tuple(before), offset + answer_from, offset + answer_to)

    def measure(self, units: Sequence[Unit]) -> Iterable[WeightRecord]:
        """See `Measurement`. A trace whose answer is not found has weights of 0."""
        asked: list[tuple[TraceRecord, AttributionTask]] = []
        for unit in units:
            task = self.task(unit.trace)
            if task is None:
                yield self._record(unit.trace, [], 0.0, 0)
            else:
                asked.append((unit.trace, task))
        weigh, watch = self._weigh(), self.context.watch
        for part in self.context.packs([task.answer_to for _, task in asked]):
            chosen = [asked[place] for place in part]
            with watch.measure(self.name):
                weights = weigh(self.context.policy.model, [task for _, task in chosen])
            costs = [self._num_tokens(task) for _, task in chosen]
            for (trace, _), own, cost in zip(chosen, weights, costs, strict=True):
                yield self._record(trace, own, watch.last * cost / max(1, sum(costs)), cost)

    def _record(self, trace: TraceRecord, weights: list[float], seconds: float, num_tokens: int) -> WeightRecord:
        segments = self.context.segments
        # The answer, and what follows it, weighs nothing.
        padding = [0.0] * (len(segments.boundaries(trace)) - 1 - len(weights))
        return WeightRecord(trace.trace, segments.main, self.name, [*weights, *padding], seconds, num_tokens)

    def _weigh(self) -> Weigh:
        temperature, limit = self.context.temperature, self.context.max_pack_tokens
        if self.name == "attention_attribution":
            return attention_attribution
        if self.name == "leave_one_out":
            return lambda model, tasks: leave_one_out_attribution(
                model, tasks, temperature=temperature, max_tokens=limit
            )
        return lambda model, tasks: gradient_attribution(model, tasks, temperature=temperature)

    def _num_tokens(self, task: AttributionTask) -> int:
        """Tokens computed; a backward pass for the embeddings alone counts as one forward pass."""
        if self.name == "leave_one_out":
            spans = zip(task.boundaries, task.boundaries[1:], strict=False)
            return task.answer_to + sum(task.answer_to - (end - start) for start, end in spans)
        return {"attention_attribution": 1, "input_x_gradient": 2}[self.name] * task.answer_to
