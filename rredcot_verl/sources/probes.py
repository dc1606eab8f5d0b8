"""Probes as a source of segment values: known answers, forced at every boundary."""

import dataclasses
from collections.abc import Iterable, Sequence

from rredcot_verl.config.blocks import SelfValueConfig
from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.passes.probe_codec import encode, num_probe_tokens
from rredcot_verl.probes.elicitation import Elicitation, Probe, Proposal, build_proposals
from rredcot_verl.probes.values import state_values
from rredcot_verl.servers.client import ProbeReader
from rredcot_verl.sources.group import Group, Member
from rredcot_verl.sources.record import NO_PROPOSAL, PLANNED, SCORED, TOO_LONG, CreditRecord
from rredcot_verl.sources.response import Response


class ProbeSource:
    """Self-values from the log-probabilities of known answers.

    Args:
        settings: The `algorithm.rredcot` block.
        elicitation: How answers are asked for.
        reader: The rollout server's; None where the training engine reads the probes later.
        max_length: Longest sequence that can be scored, tokens.
    """

    def __init__(
        self, settings: RREDCoTConfig, elicitation: Elicitation, reader: ProbeReader | None, max_length: int
    ) -> None:
        self.needs_all = settings.self_value.proposals != "reference"
        self._settings = settings
        self._elicitation = elicitation
        self._reader = reader
        self._max_length = max_length

    async def record(self, response: Response, group: Group, boundaries: list[int]) -> CreditRecord:
        """See `Source`.

        Raises:
            Exception: Whatever the rollout client raises; `ProbingTimeout` for a request that took too long.
        """
        settings = self._settings.self_value
        known = build_proposals(self._settings, response.references, self._members(group.members.values()))
        answer_format = self._elicitation.format_for(response.answer)
        proposals = [proposal for proposal in known if self._elicitation.can_append(proposal.text, answer_format)]
        probes = self._elicitation.probes(
            response.prompt_ids, response.response_ids, boundaries, proposals, answer_format, response.answer_start
        )
        proposals, probes = _drop_long_answers(proposals, probes, settings.max_answer_tokens)
        num_dropped_answers = len(known) - len(proposals)
        if not any(proposal.utility > 0 for proposal in proposals):
            return CreditRecord(NO_PROPOSAL, num_dropped_answers=num_dropped_answers)
        boundaries, probes, num_dropped = _drop_boundaries(boundaries, probes, self._max_length)
        if not probes:
            return CreditRecord(TOO_LONG, num_dropped_answers=num_dropped_answers, num_dropped_boundaries=num_dropped)
        utilities = [proposal.utility for proposal in proposals]
        record = CreditRecord(
            PLANNED,
            segment_boundaries=boundaries,
            utilities=utilities,
            num_probes=len(probes),
            num_dropped_answers=num_dropped_answers,
            num_dropped_boundaries=num_dropped,
        )
        if self._reader is None:
            return _planned(record, probes, settings)
        trace_ids = response.prompt_ids + response.response_ids
        scores = await self._reader.read(response.request_id, trace_ids, probes)
        return dataclasses.replace(
            record,
            status=SCORED,
            self_values=state_values(settings, probes, scores, utilities),
            num_probe_tokens=sum(score.num_forward_tokens for score in scores),
            num_recomputed_tokens=sum(score.num_recomputed_tokens for score in scores),
        )

    def _members(self, members: Iterable[Member]) -> list[tuple[str, float]]:
        low, high = self._settings.self_value.reward_range
        return [
            (member.answer, min(max((member.reward - low) / (high - low), 0.0), 1.0))
            for member in members
            if member.answer is not None and member.reward is not None
        ]


def _planned(record: CreditRecord, probes: Sequence[Probe], settings: SelfValueConfig) -> CreditRecord:
    """The record with its probes, for the training engine."""
    encoded = encode(probes)
    num_tokens = num_probe_tokens(encoded)
    if not settings.share_prefix:
        # A sequence for each of the closing tokens that are summed.
        num_tokens = sum(
            (probe.position + len(probe.token_ids) + 1) * min(len(probe.closing_token_ids), settings.max_closing_tokens)
            for probe in probes
        )
    return dataclasses.replace(record, probes=encoded, num_probe_tokens=num_tokens)


def _drop_long_answers(
    proposals: Sequence[Proposal], probes: Sequence[Probe], max_tokens: int
) -> tuple[list[Proposal], list[Probe]]:
    """Leave out answers of more than `max_tokens` tokens."""
    too_long = {probe.proposal for probe in probes if len(probe.token_ids) - probe.answer_from > max_tokens}
    kept = [number for number in range(len(proposals)) if number not in too_long]
    renumbered = {number: place for place, number in enumerate(kept)}
    short = [
        dataclasses.replace(probe, proposal=renumbered[probe.proposal])
        for probe in probes
        if probe.proposal in renumbered
    ]
    return [proposals[number] for number in kept], short


def _drop_boundaries(
    boundaries: list[int], probes: Sequence[Probe], max_length: int
) -> tuple[list[int], list[Probe], int]:
    """Leave out boundaries at which a probe would not fit; the third result counts them.

    Room is needed for the token that ends the answer, and for the one that vLLM insists on generating.
    """
    too_long = {probe.state for probe in probes if probe.position + len(probe.token_ids) + 2 > max_length}
    if not too_long:
        return boundaries, list(probes), 0
    # Probes grow with the prefix: what does not fit is at the end, and its segments join the last one that does.
    first = min(too_long)
    return boundaries[:first] + boundaries[-1:], [b for b in probes if b.state < first], len(boundaries) - 1 - first
