"""One request for each place of a trace's probes: one token, and the log-probabilities that matter there.

`SamplingParams.logprob_token_ids` names them: the tokens that probes have next, and closing tokens where probes end.
What vLLM samples is not used. Exact at the rollout temperature with vLLM's processed log-probabilities, verl's default.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rredcot_verl.servers.probe_requests import Place, Probe, log_sum_exp, longest_prefix_first
from rredcot_verl.servers.vllm_requests import Readings, Send, completion_of, log_probs_of, num_recomputed

MAX_TOKEN_IDS = 128
"""Most `logprob_token_ids` vLLM takes in a request (its `MAX_LOGPROB_TOKEN_IDS`)."""


LEAST_MASS = 1e-4
"""A token that ended an answer with so much probability, anywhere, is asked for from then on."""


class ClosingMass:
    """Which of too many closing tokens have probability, as seen by one server since it started."""

    def __init__(self) -> None:
        self._largest: dict[int, float] = {}

    def chosen(self, closing_ids: Sequence[int], room: int) -> list[int]:
        """At least as many as there is room for: those that ever had mass, then the likeliest.

        Args:
            closing_ids: The likeliest first.
            room: Tokens that one request holds besides.
        """
        ranked = sorted(closing_ids, key=lambda token: -self._largest.get(token, 0.0))
        return ranked[: max(room, sum(token in self._largest for token in ranked))]

    def see(self, log_probs: Mapping[int, float]) -> None:
        """Learn from a place at which all were read; log-probabilities by token, nats."""
        for token, value in log_probs.items():
            mass = math.exp(value)
            if mass >= LEAST_MASS:
                self._largest[token] = max(mass, self._largest.get(token, 0.0))


@dataclass
class Question:
    """What is asked at a place: tokens that probes have next, and the closing tokens of probes that end there."""

    next_ids: dict[int, None] = field(default_factory=dict)
    closings: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def room(self) -> int:
        """Closing tokens that one request holds."""
        return max(0, MAX_TOKEN_IDS - len(self.next_ids))

    def closing_ids(self) -> list[int]:
        """Closing tokens that are no next ones, the likeliest of each list in turn."""
        in_turn = (token for tokens in itertools.zip_longest(*self.closings) for token in tokens if token is not None)
        return list(dict.fromkeys(token for token in in_turn if token not in self.next_ids))


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
    send: Send,
    trace_ids: Sequence[int],
    probes: Sequence[Probe],
    temperature: float,
    block_size: int,
    mass: ClosingMass,
) -> Readings:
    """See `vllm_requests.ReadPlaces`.

    Where more closing tokens are asked for than a request holds, a trace's first such place reads all of them, in
    several requests; the others those that `mass` chooses, whose probability is then a lower bound. What it leaves out
    is measured at the first place, before it learns from it.
    """
    readings = Readings()
    questions = questions_of(probes)
    crowded = (place for place, asked in questions.items() if len(asked.closing_ids()) > asked.room)
    checked = next(crowded, None)

    async def read(place: Place, question: Question) -> None:
        position, forced = place
        prompt = [*trace_ids[:position], *forced]
        closing_ids = question.closing_ids()
        chosen = mass.chosen(closing_ids, question.room)
        wanted = [*question.next_ids, *(closing_ids if place == checked else chosen)]
        log_probs: dict[int, float] = {}
        readings.num_forward_tokens[place] = len(forced)
        for start in range(0, len(wanted), MAX_TOKEN_IDS):
            part = wanted[start : start + MAX_TOKEN_IDS]
            output = await send(prompt, sampling_fields(part, temperature))
            log_probs |= zip(part, log_probs_of(completion_of(output, 1).logprobs[0], part), strict=True)
            readings.num_recomputed_tokens[place] += num_recomputed(len(prompt), position, output, block_size)
        readings.log_probs.update(((place, token), log_probs[token]) for token in question.next_ids)
        if place == checked:
            left_out = set(closing_ids).difference(chosen)
            readings.lost_closing_mass[place] = math.fsum(math.exp(log_probs[token]) for token in left_out)
            mass.see({token: log_probs[token] for token in closing_ids})
        for ids in question.closings:
            known = [log_probs[token] for token in ids if token in log_probs]
            readings.closings[place, ids] = log_sum_exp(known)

    requests = [(place[0], functools.partial(read, place, asked)) for place, asked in questions.items()]
    await longest_prefix_first(requests)
    return readings
