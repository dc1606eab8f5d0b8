"""Weights of the segments for the answer, by the peers' functions in `rredcot_verl.passes.attribution`."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from rredcot_verl.analyze.budget import Stopwatch
from rredcot_verl.analyze.model import Policy
from rredcot_verl.analyze.probes import split_by_size
from rredcot_verl.analyze.records import TraceRecord, WeightRecord
from rredcot_verl.answers.grammar import find_answer
from rredcot_verl.config.blocks import AttributionConfig
from rredcot_verl.passes.attribution import attention_attribution, gradient_attribution, leave_one_out_attribution
from rredcot_verl.passes.attribution_task import AttributionTask
from rredcot_verl.probes.elicitation import Elicitation

METHODS = ("attention_attribution", "input_x_gradient", "integrated_gradients", "leave_one_out")

Weigh = Callable[[PreTrainedModel, Sequence[AttributionTask]], list[list[float]]]


class Attributor:
    """Weighs the segments of traces for the answers that the traces give themselves.

    Args:
        policy: The model.
        elicitation: Finds the answers.
        settings: `algorithm.rredcot.attribution`.
        temperature: Sampling temperature.
        max_pack_tokens: Most tokens of a pass.
        watch: Where seconds go.
    """

    def __init__(
        self,
        policy: Policy,
        elicitation: Elicitation,
        settings: AttributionConfig,
        temperature: float,
        max_pack_tokens: int,
        watch: Stopwatch,
    ) -> None:
        self._policy = policy
        self._elicitation = elicitation
        self._max_pack_tokens = max_pack_tokens
        self._watch = watch
        steps = settings.num_steps
        self._weigh: dict[str, Weigh] = {
            "attention_attribution": lambda model, tasks: attention_attribution(model, tasks, layers=settings.layers),
            "input_x_gradient": lambda model, tasks: gradient_attribution(
                model, tasks, method="input_x_gradient", temperature=temperature
            ),
            "integrated_gradients": lambda model, tasks: gradient_attribution(
                model, tasks, method="integrated_gradients", num_steps=steps, temperature=temperature
            ),
            "leave_one_out": lambda model, tasks: leave_one_out_attribution(
                model, tasks, temperature=temperature, max_tokens=max_pack_tokens
            ),
        }
        self._num_steps = steps

    def task(self, trace: TraceRecord, boundaries: Sequence[int]) -> AttributionTask | None:
        """The answer of a trace and the segments before it; None for a trace without answer."""
        text = trace.response
        found = find_answer(text, self._elicitation.formats, self._elicitation.thinking_after(trace.prompt_ids))
        if found is None or trace.answer_start is None:
            return None
        vocabulary, ids, offset = self._elicitation.vocabulary, trace.response_ids, len(trace.prompt_ids)
        answer_from = vocabulary.offset_of(ids, text, found.answer_start)
        answer_to = vocabulary.offset_of(ids, text, found.end - 1) + 1
        before = [offset + boundary for boundary in boundaries if boundary <= min(trace.answer_start, answer_from)]
        sequence = (trace.prompt_ids + ids)[: offset + answer_to]
        return AttributionTask(tuple(sequence), tuple(before), offset + answer_from, offset + answer_to)

    def measure(self, work: Sequence[tuple[TraceRecord, list[int]]], cutting: str, method: str) -> list[WeightRecord]:
        """Weigh some traces under one cutting.

        Args:
            work: Trace and boundaries.
            cutting: Name of the cutting.
            method: One of `METHODS`.

        Returns:
            A record a trace; one whose answer is not found has weights of 0.
        """
        tasks = [self.task(*entry) for entry in work]
        asked = [(number, task) for number, task in enumerate(tasks) if task is not None]
        records = [
            WeightRecord(trace.trace, cutting, method, [0.0] * (len(boundaries) - 1), 0.0, 0)
            for (trace, boundaries), task in zip(work, tasks, strict=True)
            if task is None
        ]
        for part in split_by_size([task.answer_to for _, task in asked], self._max_pack_tokens):
            chosen = [asked[place] for place in part]
            with self._watch.measure(method):
                weights = self._weigh[method](self._policy.model, [task for _, task in chosen])
            costs = [self._num_tokens(method, task) for _, task in chosen]
            for (number, _), own, cost in zip(chosen, weights, costs, strict=True):
                trace, boundaries = work[number]
                # The answer's own segment, and what follows it, weighs nothing.
                padded = [*own, *[0.0] * (len(boundaries) - 1 - len(own))]
                seconds = self._watch.last * cost / max(1, sum(costs))
                records.append(WeightRecord(trace.trace, cutting, method, padded, seconds, cost))
        return records

    def _num_tokens(self, method: str, task: AttributionTask) -> int:
        """Tokens computed; a backward pass for the embeddings alone counts as one forward pass."""
        if method == "leave_one_out":
            spans = zip(task.boundaries, task.boundaries[1:], strict=False)
            return task.answer_to + sum(task.answer_to - (end - start) for start, end in spans)
        passes = {"attention_attribution": 1, "input_x_gradient": 2, "integrated_gradients": 2 * self._num_steps}
        return passes[method] * task.answer_to
