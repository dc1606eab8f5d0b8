"""One request for each place of a trace's probes: one token, and the log-probabilities that matter there.

`SamplingParams.logprob_token_ids` names them: the tokens that probes have next, and closing tokens where probes end.
What vLLM samples is not used. Exact at the rollout temperature with vLLM's processed log-probabilities, verl's default.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rredcot_verl.servers.probe_requests import Place, Probe, log_sum_exp, longest_prefix_first
from rredcot_verl.servers.vllm_requests import Readings, Send, completion_of, log_probs_of, num_recomputed

MAX_TOKEN_IDS = 128
"""Most `logprob_token_ids` vLLM takes in a request (its `MAX_LOGPROB_TOKEN_IDS`)."""


@dataclass
class Question:
    """What is asked at a place: tokens that probes have next, and the closing tokens of probes that end there."""

    next_ids: dict[int, None] = field(default_factory=dict)
    closings: list[tuple[int, ...]] = field(default_factory=list)

    def wanted(self) -> list[int]:
        """Tokens to ask for: all next ones, and closing tokens as far as one request holds them, likeliest first."""
        room = max(0, MAX_TOKEN_IDS - len(self.next_ids))
        in_turn = (token for tokens in itertools.zip_longest(*self.closings) for token in tokens if token is not None)
        closing = dict.fromkeys(token for token in in_turn if token not in self.next_ids)
        return [*self.next_ids, *list(closing)[:room]]


def questions_of(probes: Sequence[Probe]) -> dict[Place, Question]:
    """What is asked at each place at which some probe needs a log-probability."""
    questions: dict[Place, Question] = {}
    for probe in probes:
        for place, token in probe.scored:
            questions.setdefault(place, Question()).next_ids[token] = None
        if probe.closing_token_ids:
            questions.setdefault(probe.end, Question()).closings.append(probe.closing_token_ids)
    return questions


def sampling_fields(token_ids: list[int], temperature: float) -> dict[str, Any]:
    """Fields of the `SamplingParams` that ask for one token and the log-probabilities of `token_ids`.

    Whatever the rollout samples with: no truncation and no penalty, so that processed log-probabilities are those of
    the whole distribution at `temperature`.
    """
    return {
        "max_tokens": 1,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": -1,
        "logprob_token_ids": token_ids,
        "detokenize": False,
    }


async def read_places(
    send: Send, trace_ids: Sequence[int], probes: Sequence[Probe], temperature: float, block_size: int
) -> Readings:
    """See `vllm_requests.ReadPlaces`.

    At most 128 tokens are asked for at a place, the likeliest closing tokens: with more the closing probability is a
    lower bound.
    """
    readings = Readings()

    async def read(place: Place, question: Question) -> None:
        position, forced = place
        prompt = [*trace_ids[:position], *forced]
        wanted = question.wanted()
        log_probs: dict[int, float] = {}
        readings.num_forward_tokens[place] = len(forced)
        for start in range(0, len(wanted), MAX_TOKEN_IDS):
            part = wanted[start : start + MAX_TOKEN_IDS]
            output = await send(prompt, sampling_fields(part, temperature))
            log_probs |= zip(part, log_probs_of(completion_of(output, 1).logprobs[0], part), strict=True)
            readings.num_recomputed_tokens[place] += num_recomputed(len(prompt), position, output, block_size)
        readings.log_probs.update(((place, token), log_probs[token]) for token in question.next_ids)
        for ids in question.closings:
            known = [log_probs[token] for token in ids if token in log_probs]
            readings.closings[place, ids] = log_sum_exp(known)

    questions = questions_of(probes).items()
    await longest_prefix_first([(place[0], functools.partial(read, place, asked)) for place, asked in questions])
    return readings
