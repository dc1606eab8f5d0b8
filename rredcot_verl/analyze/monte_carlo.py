"""The gold: continuations from every state, each verified."""

from collections.abc import Iterable, Sequence

from rredcot_verl.analyze.budget import Stopwatch
from rredcot_verl.analyze.inputs import Problem
from rredcot_verl.analyze.records import RolloutRecord, TraceRecord
from rredcot_verl.analyze.sampling import Continuation, Request, Sampler
from rredcot_verl.analyze.traces import ROLLOUT_STREAM, claim
from rredcot_verl.analyze.verifier import Verifier
from rredcot_verl.probes.vocabulary import Vocabulary


class MonteCarlo:
    """Samples and verifies continuations.

    Args:
        sampler: Of the policy, at the sampling temperature.
        vocabulary: Of its tokenizer.
        verifier: Gives the rewards.
        max_response_tokens: Budget of a whole response; a continuation has what is left of it.
        max_tokens: Longest continuation; None for what is left.
        watch: Where seconds go.
    """

    def __init__(
        self,
        sampler: Sampler,
        vocabulary: Vocabulary,
        verifier: Verifier,
        max_response_tokens: int,
        max_tokens: int | None,
        watch: Stopwatch,
    ) -> None:
        self._sampler = sampler
        self._vocabulary = vocabulary
        self._verifier = verifier
        self._max_response_tokens = max_response_tokens
        self._max_tokens = max_tokens
        self._watch = watch

    def run(
        self, states: Sequence[tuple[TraceRecord, int, int]], problems: dict[str, Problem], max_length: int | None
    ) -> Iterable[RolloutRecord]:
        """Continue each state.

        Args:
            states: Trace, offset in its response, and number of continuations.
            problems: By group.
            max_length: Longest sequence the model takes, tokens.

        Yields:
            A record a state, as batches are done. A state's rewards are independent draws: every part of them is a
            sample of its own.
        """
        requests = [
            Request(
                trace.prompt_ids + trace.response_ids[:offset],
                count,
                self._room(trace, offset, max_length),
                (ROLLOUT_STREAM, trace.trace, offset),
            )
            for trace, offset, count in states
        ]
        for batch in self._sampler.batches(requests):
            with self._watch.measure("rollouts"):
                results = self._sampler.sample([requests[number] for number in batch])
            per_token = self._watch.last / max(1, sum(len(c.token_ids) for own in results for c in own))
            with self._watch.measure("verify_rollouts"):
                rewards = self._verify([states[number] for number in batch], results, problems)
            for number, own, values in zip(batch, results, rewards, strict=True):
                trace, offset, _ = states[number]
                num_tokens = sum(len(each.token_ids) for each in own)
                yield RolloutRecord(trace.trace, offset, values, per_token * num_tokens, num_tokens)

    def _room(self, trace: TraceRecord, offset: int, max_length: int | None) -> int:
        room = self._max_response_tokens - offset
        if max_length is not None:
            room = min(room, max_length - len(trace.prompt_ids) - offset)
        if self._max_tokens is not None:
            room = min(room, self._max_tokens)
        return max(1, room)

    def _verify(
        self,
        states: Sequence[tuple[TraceRecord, int, int]],
        results: Sequence[Sequence[Continuation]],
        problems: dict[str, Problem],
    ) -> list[list[float]]:
        claims = []
        for (trace, offset, _), own in zip(states, results, strict=True):
            prefix = trace.response_ids[:offset]
            # Equal continuations are decoded once.
            texts = {tuple(each.token_ids): "" for each in own}
            texts = {ids: self._vocabulary.decode([*prefix, *ids]) for ids in texts}
            claims += [claim(problems[trace.group], texts[tuple(each.token_ids)]) for each in own]
        rewards = iter(self._verifier.rewards(claims))
        return [[next(rewards) for _ in own] for own in results]
