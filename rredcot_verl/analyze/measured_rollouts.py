"""Continuations from every state, each verified: what all other values are compared with."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from rredcot_verl.analyze.measuring import Context, Measurement, Unit
from rredcot_verl.analyze.prefix_sampler import Continuation, Request, Sampler
from rredcot_verl.analyze.records import RolloutRecord, TraceRecord
from rredcot_verl.analyze.verifier import Verifier

ROLLOUT_STREAM = 1
"""First number of the random streams of continuations; that of the traces is another."""


@dataclass(frozen=True)
class RolloutMeasurement(Measurement):
    """Samples and verifies continuations; states of different cuttings share them.

    Attributes:
        context: What the measurements share.
        sampler: Of the policy, at the sampling temperature.
        verifier: Gives the rewards.
        max_response_tokens: Budget of a whole response; a continuation has what is left of it.
        counts: Continuations of a state of the main cutting, and of any other state; 0 for none.
        groups: The prompts whose states have any.
    """

    name = "rollouts"

    context: Context
    sampler: Sampler
    verifier: Verifier
    max_response_tokens: int
    counts: tuple[int, int]
    groups: Collection[str]

    def units(self, trace: TraceRecord) -> list[Unit]:
        """See `Measurement`."""
        if trace.group not in self.groups:
            return []
        offsets = [offset for offset in self.context.segments.states(trace) if self._count(trace, offset)]
        return [Unit(trace, (RolloutRecord.key_of(trace.trace, offset),), offset=offset) for offset in offsets]

    def measure(self, units: Sequence[Unit]) -> Iterable[RolloutRecord]:
        """See `Measurement`. A state's rewards are independent draws: every part of them is a sample of its own."""
        watch = self.context.watch
        requests = [self._request(unit.trace, unit.offset) for unit in units]
        for batch in self.sampler.batches(requests):
            with watch.measure("rollouts"):
                results = self.sampler.sample([requests[number] for number in batch])
            per_token = watch.last / max(1, sum(len(c.token_ids) for own in results for c in own))
            with watch.measure("verify_rollouts"):
                rewards = self._verify([units[number] for number in batch], results)
            for number, own, values in zip(batch, results, rewards, strict=True):
                num_tokens = sum(len(each.token_ids) for each in own)
                unit = units[number]
                yield RolloutRecord(unit.trace.trace, unit.offset, values, per_token * num_tokens, num_tokens)

    def _count(self, trace: TraceRecord, offset: int) -> int:
        main, other = self.counts
        return main if offset in self.context.segments.boundaries(trace)[:-1] else other

    def _request(self, trace: TraceRecord, offset: int) -> Request:
        limits = [self.max_response_tokens - offset]
        if self.context.policy.max_length is not None:
            limits.append(self.context.policy.max_length - len(trace.prompt_ids) - offset)
        if self.context.settings.monte_carlo.max_tokens is not None:
            limits.append(self.context.settings.monte_carlo.max_tokens)
        prefix = trace.prompt_ids + trace.response_ids[:offset]
        return Request(prefix, self._count(trace, offset), max(1, min(limits)), (ROLLOUT_STREAM, trace.trace, offset))

    def _verify(self, units: Sequence[Unit], results: Sequence[Sequence[Continuation]]) -> list[list[float]]:
        asked = []
        for unit, own in zip(units, results, strict=True):
            prefix = unit.trace.response_ids[: unit.offset]
            # Equal continuations are decoded once.
            distinct = dict.fromkeys(tuple(each.token_ids) for each in own)
            texts = {ids: self.context.elicitation.vocabulary.decode([*prefix, *ids]) for ids in distinct}
            problem = self.context.problems[unit.trace.group]
            asked += [(problem, texts[tuple(each.token_ids)]) for each in own]
        rewards = iter(self.verifier.rewards(asked))
        return [[next(rewards) for _ in own] for own in results]
