"""Known answers at every state: their log-probabilities, from which every form and choice of proposals is made."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rredcot_verl.analyze.budget import Stopwatch
from rredcot_verl.analyze.inputs import Problem
from rredcot_verl.analyze.model import Pass, Policy, run_pack
from rredcot_verl.analyze.records import CostRecord, ProbeRecord, TraceRecord
from rredcot_verl.answers.grammar import canonical_form, look_up, reference_answers
from rredcot_verl.config.blocks import GROUND_TRUTH
from rredcot_verl.config.schema import RREDCoTConfig, parse
from rredcot_verl.passes.probe_pack import count_probe_tokens, read_probes
from rredcot_verl.probes.elicitation import Elicitation, Probe, Proposal, ReadAnswer, build_proposals

_MOST_ANSWERS = 64


@dataclass(frozen=True)
class Answers:
    """The answers that are forced after the traces of a prompt.

    Attributes:
        proposals: In the order in which the plugin takes them: useful ones first.
        is_reference, is_group: One a proposal: whether it is a ground truth, and whether a trace of the group gave it.
    """

    proposals: list[Proposal]
    is_reference: list[bool]
    is_group: list[bool]


class Prober:
    """Builds probes and reads them.

    Args:
        policy: The model.
        elicitation: Has read all traces.
        settings: The `algorithm.rredcot` block.
        temperatures: What divides the logits; the first is the main one.
        max_pack_tokens: Most tokens of a pass.
        watch: Where seconds go.
    """

    def __init__(
        self,
        policy: Policy,
        elicitation: Elicitation,
        settings: RREDCoTConfig,
        temperatures: Sequence[float],
        max_pack_tokens: int,
        watch: Stopwatch,
    ) -> None:
        self._policy = policy
        self._elicitation = elicitation
        self._settings = settings
        self._temperatures = list(temperatures)
        self._max_pack_tokens = max_pack_tokens
        self._watch = watch
        # All that the plugin could probe with any setting: references, useful and useless answers of the group.
        block = settings.model_dump()
        block["self_value"] |= {"proposals": "union", "form": "normalized", "max_proposals": _MOST_ANSWERS}
        self._widest = parse(block)

    def answers(self, problem: Problem, members: Sequence[tuple[TraceRecord, ReadAnswer | None]]) -> Answers:
        """The answers for a prompt; none where no useful one is known, as in training.

        Args:
            problem: The prompt.
            members: Its traces with what was read of each.
        """
        low, high = self._settings.self_value.reward_range
        given = [
            (answer.text, min(max((trace.reward - low) / (high - low), 0.0), 1.0))
            for trace, answer in members
            if answer is not None
        ]
        key = self._settings.self_value.reference_key
        references = problem.ground_truth if key == GROUND_TRUTH else look_up(problem.row, key)
        proposals = build_proposals(self._widest, references, given)
        form = canonical_form(self._settings.elicitation)
        known = set(reference_answers(references, form))
        of_group = {form(text) for text, _ in given}
        return Answers(
            proposals,
            [form(proposal.text) in known for proposal in proposals],
            [form(proposal.text) in of_group for proposal in proposals],
        )

    def measure(
        self, work: Sequence[tuple[TraceRecord, ReadAnswer | None, list[int]]], cutting: str, answers: Sequence[Answers]
    ) -> list[ProbeRecord]:
        """Probe some traces under one cutting.

        Args:
            work: Trace, what was read of it, boundaries.
            cutting: Name of the cutting.
            answers: Those of each trace's prompt.

        Returns:
            A record for each trace and temperature; none for a trace without a useful answer that can be forced.
        """
        plans = [self._plan(*entry, answers=own) for entry, own in zip(work, answers, strict=True)]
        planned = [number for number, (own, _) in enumerate(plans) if any(p.utility > 0 for p in own.proposals)]
        sizes = [len(work[n][0].prompt_ids) + len(work[n][0].response_ids) + _size(plans[n][1]) for n in planned]
        records = []
        for part in split_by_size(sizes, self._max_pack_tokens):
            numbers = [planned[place] for place in part]
            records += self._read([(work[n][0], cutting, *plans[n]) for n in numbers])
        return records

    def _plan(
        self, trace: TraceRecord, answer: ReadAnswer | None, boundaries: list[int], *, answers: Answers
    ) -> tuple[Answers, list[Probe]]:
        format_name = self._elicitation.format_for(answer)
        kept = [
            number
            for number, proposal in enumerate(answers.proposals)
            if self._elicitation.can_append(proposal.text, format_name)
        ]
        own = _only(answers, kept)
        probes = self._probes(trace, answer, boundaries, own, format_name)
        limit = self._settings.self_value.max_answer_tokens
        too_long = {probe.proposal for probe in probes if len(probe.token_ids) - probe.answer_from > limit}
        if too_long:
            own = _only(own, [number for number in range(len(own.proposals)) if number not in too_long])
            probes = self._probes(trace, answer, boundaries, own, format_name)
        return own, probes

    def _probes(
        self, trace: TraceRecord, answer: ReadAnswer | None, boundaries: list[int], own: Answers, format_name: str
    ) -> list[Probe]:
        start = answer.start if answer else len(trace.response_ids)
        return self._elicitation.probes(
            trace.prompt_ids, trace.response_ids, boundaries, own.proposals, format_name, start
        )

    def _read(self, part: Sequence[tuple[TraceRecord, str, Answers, list[Probe]]]) -> list[ProbeRecord]:
        sequences = [trace.prompt_ids + trace.response_ids for trace, _, _, _ in part]
        probes_of = [probes for *_, probes in part]
        done, seconds = self._timed(sequences, probes_of)
        scores = read_at(done, self._temperatures[0], len(part))
        records = []
        for temperature in self._temperatures:
            if temperature != self._temperatures[0]:
                scores = read_at(done, temperature, len(part))
            for (trace, cutting, answers, probes), own, surplus in zip(part, scores, seconds, strict=True):
                log_probs, lengths = by_state(probes, own, len(answers.proposals))
                records.append(
                    ProbeRecord(
                        trace.trace,
                        cutting,
                        temperature,
                        [proposal.text for proposal in answers.proposals],
                        [proposal.utility for proposal in answers.proposals],
                        answers.is_reference,
                        answers.is_group,
                        log_probs,
                        lengths,
                        surplus if temperature == self._temperatures[0] else None,
                        _size(probes),
                    )
                )
        return records

    def _timed(self, sequences: Sequence[list[int]], probes: Sequence[Sequence[Probe]]) -> tuple[Pass, list[float]]:
        """A pass of the traces with their probes, and by how much it is longer than without: what training pays.

        The surplus is shared among the traces by the probes' tokens. It is a difference of two measurements, so that of
        a short pass may come out below 0.
        """
        with self._watch.measure("log_prob"):
            run_pack(self._policy.model, sequences)
        plain = self._watch.last
        with self._watch.measure("probes"):
            done = run_pack(self._policy.model, sequences, probes)
            read_at(done, self._temperatures[0], len(sequences))
        surplus = self._watch.last - plain
        sizes = [_size(own) for own in probes]
        return done, [surplus * size / max(1, sum(sizes)) for size in sizes]

    def reference_cost(
        self, work: Sequence[tuple[TraceRecord, ReadAnswer | None, list[int]]], answers: Sequence[Answers]
    ) -> list[CostRecord]:
        """What the probes of the references alone cost, which are the plugin's default."""
        probes = []
        for (trace, answer, boundaries), own in zip(work, answers, strict=True):
            references = _only(own, [number for number, flag in enumerate(own.is_reference) if flag])
            probes.append(self._plan(trace, answer, boundaries, answers=references)[1] if references.proposals else [])
        sizes = [len(trace.prompt_ids) + len(trace.response_ids) for trace, _, _ in work]
        records = []
        for part in split_by_size(sizes, self._max_pack_tokens):
            traces = [work[place][0] for place in part]
            own_probes = [probes[place] for place in part]
            _, seconds = self._timed([trace.prompt_ids + trace.response_ids for trace in traces], own_probes)
            records += [
                CostRecord(trace.trace, "probe_reference", surplus, _size(each))
                for trace, surplus, each in zip(traces, seconds, own_probes, strict=True)
            ]
        return records


def read_at(done: Pass, temperature: float, num_traces: int) -> list[list[float]]:
    """Log-probabilities of a pass's probes at a temperature, see `read_probes`."""
    return read_probes(done.pack, done.rows, done.logits, torch.full((num_traces,), temperature))


def by_state(
    probes: Sequence[Probe], scores: Sequence[float], num_answers: int
) -> tuple[list[list[float | None]], list[list[int]]]:
    """Log-probability and length of each answer at each state, from its one or two probes.

    Args:
        probes: In the order of their scores.
        scores: Probe by probe the counted tokens' log-probabilities and that of the answer's end, laid end to end.
        num_answers: Answers a state.

    Raises:
        ValueError: A log-probability is NaN or positive.
    """
    num_states = probes[-1].state + 1 if probes else 0
    log_probs = [[-math.inf] * num_answers for _ in range(num_states)]
    lengths = [[1] * num_answers for _ in range(num_states)]
    place = 0
    for probe in probes:
        size = len(probe.token_ids) - probe.scored_from + 1
        counted = scores[place : place + size]
        place += size
        # A sum over closing tokens may exceed log 1 by rounding only.
        if any(value != value or value > 1e-3 for value in counted):
            raise ValueError(f"got log-probabilities {list(counted)} for the probe {probe.token_ids}")
        row, column = probe.state, probe.proposal
        log_probs[row][column] = _log_add(log_probs[row][column], math.fsum(counted))
        lengths[row][column] = max(lengths[row][column], size)
    return [[value if value > -math.inf else None for value in row] for row in log_probs], lengths


def _log_add(first: float, second: float) -> float:
    high, low = max(first, second), min(first, second)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _size(probes: Sequence[Probe]) -> int:
    return count_probe_tokens(probes)


def _only(answers: Answers, numbers: Sequence[int]) -> Answers:
    return Answers(
        [answers.proposals[number] for number in numbers],
        [answers.is_reference[number] for number in numbers],
        [answers.is_group[number] for number in numbers],
    )


def split_by_size(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Places of consecutive entries that together do not exceed a limit; an entry above it stands alone."""
    parts: list[list[int]] = []
    room = 0
    for place, size in enumerate(sizes):
        if not parts or size > room:
            parts.append([])
            room = limit
        parts[-1].append(place)
        room -= size
    return parts
