"""Continuations from every state, each verified: what all other values are compared with."""

from collections.abc import Iterable, Sequence

from rredcot_verl.analyze.measuring import Context, Measurement, Unit
from rredcot_verl.analyze.prefix_sampler import Continuation, Request, Sampler
from rredcot_verl.analyze.records import RolloutRecord, TraceRecord
from rredcot_verl.analyze.verifier import Verifier

ROLLOUT_STREAM = 1
"""First number of the random streams of continuations; that of the traces is another."""


class RolloutMeasurement(Measurement):
    """Samples and verifies continuations; states of different cuttings share them.

    Args:
        context: What the measurements share.
        sampler: Of the policy, at the sampling temperature.
        verifier: Gives the rewards.
        max_response_tokens: Budget of a whole response; a continuation has what is left of it.
        counts: Continuations of a state of the main cutting, and of any other state.
    """

    name = "rollouts"

    def __init__(
        self, context: Context, sampler: Sampler, verifier: Verifier, max_response_tokens: int, counts: tuple[int, int]
    ) -> None:
        self._context = context
        self._sampler = sampler
        self._verifier = verifier
        self._max_response_tokens = max_response_tokens
        self._counts = counts

    def units(self, trace: TraceRecord) -> list[Unit]:
        """See `Measurement`."""
        offsets = self._context.segments.states(trace)
        return [Unit(trace, (RolloutRecord.key_of(trace.trace, offset),), offset=offset) for offset in offsets]

    def measure(self, units: Sequence[Unit]) -> Iterable[RolloutRecord]:
        """See `Measurement`. A state's rewards are independent draws: every part of them is a sample of its own."""
        watch = self._context.watch
        requests = [self._request(unit.trace, unit.offset) for unit in units]
        for batch in self._sampler.batches(requests):
            with watch.measure("rollouts"):
                results = self._sampler.sample([requests[number] for number in batch])
            per_token = watch.last / max(1, sum(len(c.token_ids) for own in results for c in own))
            with watch.measure("verify_rollouts"):
                rewards = self._verify([units[number] for number in batch], results)
            for number, own, values in zip(batch, results, rewards, strict=True):
                num_tokens = sum(len(each.token_ids) for each in own)
                unit = units[number]
                yield RolloutRecord(unit.trace.trace, unit.offset, values, per_token * num_tokens, num_tokens)

    def _request(self, trace: TraceRecord, offset: int) -> Request:
        main, other = self._counts
        count = main if offset in self._context.segments.boundaries(trace)[:-1] else other
        limits = [self._max_response_tokens - offset]
        if self._context.policy.max_length is not None:
            limits.append(self._context.policy.max_length - len(trace.prompt_ids) - offset)
        if self._context.settings.monte_carlo.max_tokens is not None:
            limits.append(self._context.settings.monte_carlo.max_tokens)
        prefix = trace.prompt_ids + trace.response_ids[:offset]
        return Request(prefix, count, max(1, min(limits)), (ROLLOUT_STREAM, trace.trace, offset))

    def _verify(self, units: Sequence[Unit], results: Sequence[Sequence[Continuation]]) -> list[list[float]]:
        asked = []
        for unit, own in zip(units, results, strict=True):
            prefix = unit.trace.response_ids[: unit.offset]
            # Equal continuations are decoded once.
            distinct = dict.fromkeys(tuple(each.token_ids) for each in own)
            texts = {ids: self._context.elicitation.vocabulary.decode([*prefix, *ids]) for ids in distinct}
            problem = self._context.problems[unit.trace.group]
            asked += [(problem, texts[tuple(each.token_ids)]) for each in own]
        rewards = iter(self._verifier.rewards(asked))
        return [[next(rewards) for _ in own] for own in results]
