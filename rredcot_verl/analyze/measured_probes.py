"""Known answers at every state: their log-probabilities, from which every form and choice of proposals is made."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from rredcot_verl.analyze.measuring import Context, Measurement, Unit
from rredcot_verl.analyze.policy import run_pack
from rredcot_verl.analyze.records import CostRecord, ProbeRecord, TraceRecord
from rredcot_verl.answers.grammar import canonical_form, look_up, reference_answers
from rredcot_verl.config.blocks import GROUND_TRUTH
from rredcot_verl.config.schema import parse
from rredcot_verl.passes.probe_pack import count_probe_tokens, read_probes
from rredcot_verl.probes.probe import Probe
from rredcot_verl.probes.proposals import Proposal, build_proposals
from rredcot_verl.probes.values import ProbePlace, sum_by_state

_MOST_ANSWERS = 64


@dataclass(frozen=True)
class KnownAnswer:
    """An answer that is forced after the traces of a prompt.

    Attributes:
        proposal: It, with its utility.
        is_reference, is_group: Whether it is a ground truth, and whether a trace of the group gave it.
    """

    proposal: Proposal
    is_reference: bool
    is_group: bool


class ProbeMeasurement(Measurement):
    """Forces all answers that the plugin could probe with any setting.

    Args:
        context: What the measurements share.
        traces: All traces: a group knows the answers of all its traces.
        leave_own_out: Force no answer after a trace that it alone gave: it tells how the trace ends.
    """

    name = "probes"

    def __init__(self, context: Context, traces: Sequence[TraceRecord], *, leave_own_out: bool = False) -> None:
        self._context = context
        # References, useful and useless answers of the group.
        block = context.settings.model_dump()
        block["self_value"] |= {"proposals": "union", "form": "normalized", "max_proposals": _MOST_ANSWERS}
        self._widest = parse(block)
        groups: dict[str, list[TraceRecord]] = {}
        for trace in traces:
            groups.setdefault(trace.group, []).append(trace)
        self.known = {group: self._known_answers(group, members) for group, members in groups.items()}
        self._known_after: dict[int, list[KnownAnswer]] = {}
        if leave_own_out:
            self._known_after = {
                trace.trace: self._known_answers(group, [other for other in members if other is not trace])
                for group, members in groups.items()
                for trace in members
            }

    def _known_to(self, trace: TraceRecord) -> list[KnownAnswer]:
        return self._known_after.get(trace.trace, self.known[trace.group])

    def _known_answers(self, group: str, members: Sequence[TraceRecord]) -> list[KnownAnswer]:
        """In the order in which the plugin takes them; none where no useful one is known, as in training."""
        settings, problem = self._context.settings, self._context.problems[group]
        low, high = settings.self_value.reward_range
        given = [
            (answer.text, min(max((trace.reward - low) / (high - low), 0.0), 1.0))
            for trace in members
            if (answer := self._context.answers[trace.trace]) is not None
        ]
        key = settings.self_value.reference_key
        references = problem.ground_truth if key == GROUND_TRUTH else look_up(problem.row, key)
        form = canonical_form(settings.elicitation)
        of_task, of_group = set(reference_answers(references, form)), {form(text) for text, _ in given}
        return [
            KnownAnswer(proposal, form(proposal.text) in of_task, form(proposal.text) in of_group)
            for proposal in build_proposals(self._widest, references, given)
        ]

    def units(self, trace: TraceRecord) -> list[Unit]:
        """See `Measurement`."""
        cuttings = self._context.segments.names
        return [Unit(trace, (ProbeRecord.key_of(trace.trace, cutting),), cutting) for cutting in cuttings]

    def measure(self, units: Sequence[Unit]) -> Iterable[ProbeRecord]:
        """See `Measurement`. A trace without a useful answer that can be forced has empty records."""
        for cutting in dict.fromkeys(unit.cutting for unit in units):
            traces = [unit.trace for unit in units if unit.cutting == cutting]
            plans = [self._plan(trace, cutting, self._known_to(trace)) for trace in traces]
            for trace, (known, _) in zip(traces, plans, strict=True):
                if not _any_useful(known):
                    yield ProbeRecord(trace.trace, cutting, [], [], [], [], [], [], 0.0, 0)
            asked = [n for n, (known, _) in enumerate(plans) if _any_useful(known)]
            sizes = [len(traces[n].token_ids) + count_probe_tokens(plans[n][1]) for n in asked]
            for part in self._context.packs(sizes):
                numbers = [asked[place] for place in part]
                yield from self._read([traces[n] for n in numbers], cutting, [plans[n] for n in numbers])

    def _plan(
        self, trace: TraceRecord, cutting: str, known: Sequence[KnownAnswer]
    ) -> tuple[list[KnownAnswer], list[Probe]]:
        """The answers that can be forced after a trace and are short enough, and their probes."""
        elicitation = self._context.elicitation
        boundaries = self._context.segments.boundaries(trace, cutting)
        format_name = elicitation.usual_format()

        def probes(known: Sequence[KnownAnswer]) -> list[Probe]:
            proposals = [each.proposal for each in known]
            return elicitation.probes(trace.prompt_ids, trace.response_ids, boundaries, proposals, format_name)

        own = [each for each in known if elicitation.can_append(each.proposal.text, format_name)]
        found = probes(own)
        limit = self._context.settings.self_value.max_answer_tokens
        too_long = {probe.proposal for probe in found if len(probe.token_ids) - probe.answer_from > limit}
        if too_long:
            own = [each for number, each in enumerate(own) if number not in too_long]
            found = probes(own)
        return own, found

    def _read(
        self, traces: Sequence[TraceRecord], cutting: str, plans: Sequence[tuple[list[KnownAnswer], list[Probe]]]
    ) -> Iterable[ProbeRecord]:
        scores, seconds = self._timed(traces, [probes for _, probes in plans])
        for trace, (known, probes), own, surplus in zip(traces, plans, scores, seconds, strict=True):
            sums, lengths = sum_by_state([ProbePlace.of(probe) for probe in probes], own, len(known))
            log_probs = [[value if value > -math.inf else None for value in row] for row in sums.tolist()]
            yield ProbeRecord(
                trace.trace,
                cutting,
                [each.proposal.text for each in known],
                [each.proposal.utility for each in known],
                [each.is_reference for each in known],
                [each.is_group for each in known],
                log_probs,
                lengths.tolist(),
                surplus,
                count_probe_tokens(probes),
            )

    def _timed(
        self, traces: Sequence[TraceRecord], probes: Sequence[Sequence[Probe]]
    ) -> tuple[list[list[float]], list[float]]:
        """The probes' scores, and by how much the pass is longer than one without: what training pays.

        The surplus is shared among the traces by the probes' tokens. It is a difference of two measurements, so that of
        a short pass may come out below 0.
        """
        model, watch = self._context.policy.model, self._context.watch
        sequences = [trace.token_ids for trace in traces]
        with watch.measure("log_prob"):
            run_pack(model, sequences)
        plain = watch.last
        with watch.measure("probes"):
            done = run_pack(model, sequences, probes)
            temperatures = torch.full((len(sequences),), self._context.temperature)
            scores = read_probes(done.pack, done.rows, done.logits, temperatures)
        surplus = watch.last - plain
        sizes = [count_probe_tokens(own) for own in probes]
        return scores, [surplus * size / max(1, sum(sizes)) for size in sizes]

    def reference_cost(self, traces: Sequence[TraceRecord]) -> Iterable[CostRecord]:
        """What the probes of the references alone cost, which are the plugin's default."""
        probes = []
        for trace in traces:
            references = [each for each in self._known_to(trace) if each.is_reference]
            main = self._context.segments.main
            probes.append(self._plan(trace, main, references)[1] if references else [])
        for part in self._context.packs([len(trace.token_ids) for trace in traces]):
            own = [probes[place] for place in part]
            _, seconds = self._timed([traces[place] for place in part], own)
            for place, surplus in zip(part, seconds, strict=True):
                size = count_probe_tokens(probes[place])
                yield CostRecord(traces[place].trace, "probe_reference", surplus, size)


def _any_useful(known: Sequence[KnownAnswer]) -> bool:
    return any(each.proposal.utility > 0 for each in known)
