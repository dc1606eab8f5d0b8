"""One request for each answer at a boundary: its tokens are forced, and read while they are generated.

The forcing is `vllm_forcing.ForcedAnswers`, a logits processor. It reads the logits before anything changes them, so
every temperature and any number of closing tokens are exact, and hands its numbers over as log-probabilities of tokens
that are not otherwise used (`channels`), in vLLM's ordinary answer.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rredcot_verl.servers.probes import Key, Probe, longest_prefix_first
from rredcot_verl.servers.vllm_requests import PlaceScore, Send, completion_of, log_probs_of, num_recomputed

PROCESSOR = "rredcot_verl.servers.vllm_forcing:ForcedAnswers"
"""As it stands in `engine_kwargs.vllm.logits_processors`."""

EXTRA_ARG = "rredcot_forced"
"""Name of the request's `extra_args` that the processor reads."""

SHIFT = 32.0
"""Taken from every number handed over, nats: exp(-32) is nothing beside the forced token's probability of 1."""

NUM_CLOSINGS = 2
"""Most lists of closing tokens that a path sums at one place; more need another path."""

NUM_CHANNELS = 2 + NUM_CLOSINGS
"""The step's number, so that an answer read at the wrong step is noticed; the forced token's log-probability; sums."""


@dataclass
class Path:
    """Tokens to force after a prefix, and what to read on the way.

    Attributes:
        position: Length of the prefix, tokens.
        start: Index in `token_ids` of the first token that is forced; what comes before is part of the prompt.
        token_ids: The longest of the probes that this path serves.
        closings: By place, the lists of closing tokens to sum there.
    """

    position: int
    start: int
    token_ids: tuple[int, ...]
    closings: dict[Key, list[tuple[int, ...]]] = field(default_factory=dict)

    @property
    def places(self) -> list[Key]:
        """The place before each forced token, and the one after the last."""
        return [(self.position, self.token_ids[:end]) for end in range(self.start, len(self.token_ids) + 1)]

    def takes(self, probe: Probe) -> bool:
        """Whether a probe that is no longer than the path can ride along."""
        lists = self.closings.get(probe.end, [])
        return (
            self.position == probe.position
            and self.token_ids[: len(probe.token_ids)] == probe.token_ids
            and (len(lists) < NUM_CLOSINGS or probe.closing_token_ids in lists)
        )


def paths_of(probes: Sequence[Probe]) -> list[Path]:
    """The fewest paths that pass every place of the probes."""
    paths: list[Path] = []
    # Longest first: a probe that another continues rides along.
    for probe in sorted(probes, key=lambda each: -len(each.token_ids)):
        path = next((path for path in paths if path.takes(probe)), None)
        if path is None:
            path = Path(probe.position, probe.scored_from, probe.token_ids)
            paths.append(path)
        path.start = min(path.start, probe.scored_from)
        if probe.closing_token_ids:
            lists = path.closings.setdefault(probe.end, [])
            lists += [probe.closing_token_ids] * (probe.closing_token_ids not in lists)
    return paths


def sampling_fields(path: Path, temperature: float) -> dict[str, Any]:
    """Fields of the `SamplingParams` that force a path."""
    forced = path.token_ids[path.start :]
    unused = [token for token in range(len(forced) + NUM_CHANNELS + 1) if token not in forced]
    channels = unused[:NUM_CHANNELS]
    closings = [[list(ids) for ids in path.closings.get(place, [])] for place in path.places]
    return {
        "max_tokens": len(forced) + 1,
        # Greedy: the one possible token.
        "temperature": 0.0,
        "ignore_eos": True,
        "logprob_token_ids": channels,
        "detokenize": False,
        "extra_args": {
            EXTRA_ARG: {
                # Any token ends the request.
                "forced": [*forced, unused[NUM_CHANNELS]],
                "closings": closings,
                "channels": channels,
                "temperature": temperature,
            }
        },
    }


async def score_places(
    send: Send, trace_ids: Sequence[int], probes: Sequence[Probe], temperature: float, block_size: int
) -> dict[Key, PlaceScore]:
    """See `vllm_requests.ScorePlaces`."""

    async def score(path: Path) -> dict[Key, PlaceScore]:
        prompt = [*trace_ids[: path.position], *path.token_ids[: path.start]]
        fields = sampling_fields(path, temperature)
        output = await send(prompt, fields)
        completion = completion_of(output, fields["max_tokens"])
        values = [log_probs_of(entries, fields["logprob_token_ids"]) for entries in completion.logprobs]
        _check_path(path, list(completion.token_ids), values)
        recomputed = num_recomputed(len(prompt), path.position, output, block_size)
        return _read_path(path, values, recomputed)

    paths = paths_of(probes)
    found = await longest_prefix_first([(path.position, functools.partial(score, path)) for path in paths])
    return _merged(found)


def _check_path(path: Path, token_ids: list[int], values: Sequence[Sequence[float]]) -> None:
    forced, steps = list(path.token_ids[path.start :]), [-SHIFT - step[0] for step in values]
    if token_ids[:-1] != forced or any(abs(step - index) > 0.5 for index, step in enumerate(steps)):
        raise RuntimeError(f"vLLM generated {token_ids} where {forced} was forced, at the steps {steps}")


def _read_path(path: Path, values: Sequence[Sequence[float]], recomputed: int) -> dict[Key, PlaceScore]:
    scores = {}
    for index, (place, (_, token_log_prob, *sums)) in enumerate(zip(path.places, values, strict=True)):
        next_ids = path.token_ids[len(place[1]) : len(place[1]) + 1]
        closings = zip(path.closings.get(place, []), sums, strict=False)
        scores[place] = PlaceScore(
            log_probs=dict.fromkeys(next_ids, token_log_prob + SHIFT),
            closings={ids: value + SHIFT for ids, value in closings},
            # The request is counted at its first place.
            num_forward_tokens=0 if index else len(path.token_ids),
            num_recomputed_tokens=0 if index else recomputed,
        )
    return scores


def _merged(found: Sequence[Mapping[Key, PlaceScore]]) -> dict[Key, PlaceScore]:
    """Paths that begin alike share places."""
    merged: dict[Key, PlaceScore] = {}
    for scores in found:
        for place, score in scores.items():
            known = merged.get(place, PlaceScore({}, {}, 0, 0))
            merged[place] = PlaceScore(
                {**known.log_probs, **score.log_probs},
                {**known.closings, **score.closings},
                known.num_forward_tokens + score.num_forward_tokens,
                known.num_recomputed_tokens + score.num_recomputed_tokens,
            )
    return merged
