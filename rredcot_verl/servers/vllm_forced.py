"""One request for each answer at a boundary: its tokens are forced, and read while they are generated.

The forcing is `vllm_forcing.ForcedAnswers`, a logits processor. It reads the logits before anything changes them, so
every temperature and any number of closing tokens are exact, and hands its numbers over as log-probabilities of tokens
that are not otherwise used (`channels`), in vLLM's ordinary answer. Both sides of that are here: `read_places` in the
server, `replace_rows` in vLLM's workers. Imports nothing of vLLM.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rredcot_verl.servers.probe_requests import Place, Probe, longest_prefix_first
from rredcot_verl.servers.vllm_requests import Readings, Send, completion_of, log_probs_of, num_recomputed

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
    closings: dict[Place, list[tuple[int, ...]]] = field(default_factory=dict)

    @property
    def places(self) -> list[Place]:
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
    return {
        "max_tokens": len(forced) + 1,
        # Greedy: the one possible token.
        "temperature": 0.0,
        "ignore_eos": True,
        "logprob_token_ids": channels,
        "detokenize": False,
        "extra_args": {
            # Fields of `ForcedRequest`, as JSON has them.
            EXTRA_ARG: {
                # Any token ends the request.
                "forced": [*forced, unused[NUM_CHANNELS]],
                "closings": [[list(ids) for ids in path.closings.get(place, [])] for place in path.places],
                "channels": channels,
                "temperature": temperature,
            }
        },
    }


async def read_places(
    send: Send, trace_ids: Sequence[int], probes: Sequence[Probe], temperature: float, block_size: int
) -> Readings:
    """See `vllm_requests.ReadPlaces`.

    Raises:
        RuntimeError: The engine did not force; see also `completion_of`.
        ValueError: A log-probability is NaN, or vLLM refused a request.
    """

    async def read(path: Path) -> tuple[list[list[float]], int]:
        prompt = [*trace_ids[: path.position], *path.token_ids[: path.start]]
        fields = sampling_fields(path, temperature)
        output = await send(prompt, fields)
        completion = completion_of(output, fields["max_tokens"])
        numbers = [log_probs_of(entries, fields["logprob_token_ids"]) for entries in completion.logprobs]
        _check_path(path, list(completion.token_ids), numbers)
        return numbers, num_recomputed(len(prompt), path.position, output, block_size)

    paths = paths_of(probes)
    found = await longest_prefix_first([(path.position, functools.partial(read, path)) for path in paths])
    readings = Readings()
    for path, (numbers, recomputed) in zip(paths, found, strict=True):
        # The request is counted at its first place.
        readings.num_forward_tokens[path.places[0]] += len(path.token_ids)
        readings.num_recomputed_tokens[path.places[0]] += recomputed
        for place, (_, log_prob, *sums) in zip(path.places, numbers, strict=True):
            for token in path.token_ids[len(place[1]) : len(place[1]) + 1]:
                readings.log_probs[place, token] = log_prob + SHIFT
            for ids, log_sum in zip(path.closings.get(place, []), sums, strict=False):
                readings.closings[place, ids] = log_sum + SHIFT
    return readings


def _check_path(path: Path, token_ids: list[int], numbers: Sequence[Sequence[float]]) -> None:
    forced, steps = list(path.token_ids[path.start :]), [-SHIFT - step[0] for step in numbers]
    if token_ids[:-1] != forced or any(abs(step - index) > 0.5 for index, step in enumerate(steps)):
        raise RuntimeError(f"vLLM generated {token_ids} where {forced} was forced, at the steps {steps}")


@dataclass(frozen=True)
class ForcedRequest:
    """What one request forces.

    Attributes:
        forced: The token of each step.
        closings: For each step the lists of closing tokens to sum there, at most two.
        channels: Tokens as whose log-probabilities the numbers are handed over.
        temperature: Divides the logits.
        output_ids: vLLM's own list of what it has generated so far.
    """

    forced: Sequence[int]
    closings: Sequence[Sequence[Sequence[int]]]
    channels: Sequence[int]
    temperature: float
    output_ids: Sequence[int]

    @property
    def step(self) -> int:
        """The step at hand, from 0."""
        # vLLM may run one step more than was asked for, and drops it.
        return min(len(self.output_ids), len(self.forced) - 1)


def replace_rows(logits: torch.Tensor, requests: Sequence[ForcedRequest]) -> torch.Tensor:
    """The logits of rows that force.

    The forced token has logit 0, the channels have their numbers less `SHIFT`, all else is impossible. The numbers:
    the negative of the step, the log-probability that the forced token had, and those of the summed closing tokens.

    Args:
        logits: `(num_rows, vocab_size)` float32, as the model gave them.
        requests: One a row.

    Returns:
        `(num_rows, vocab_size)` float32.
    """
    temperatures = logits.new_tensor([[request.temperature] for request in requests])
    log_probs = (logits / temperatures).log_softmax(-1)
    forced = torch.tensor([[request.forced[request.step]] for request in requests], device=logits.device)
    steps = logits.new_tensor([[float(request.step)] for request in requests])
    sums = [_sums(log_probs, requests, index) for index in range(NUM_CLOSINGS)]
    numbers = torch.cat([-steps, log_probs.gather(1, forced), *sums], 1)
    channels = torch.tensor([list(request.channels) for request in requests], device=logits.device)
    replaced = torch.full_like(log_probs, float("-inf")).scatter_(1, channels, numbers - SHIFT)
    return replaced.scatter_(1, forced, 0.0)


def _sums(log_probs: torch.Tensor, requests: Sequence[ForcedRequest], index: int) -> torch.Tensor:
    """Log of the summed probability of each row's `index`-th list of closing tokens; -inf where it has none.

    Returns:
        `(num_rows, 1)`.
    """
    lists = [request.closings[request.step][index : index + 1] for request in requests]
    ids = [list(found[0]) if found else [] for found in lists]
    width = max(1, *map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=log_probs.device)
    lengths = torch.tensor([[len(row)] for row in ids], device=log_probs.device)
    absent = torch.arange(width, device=log_probs.device) >= lengths
    return log_probs.gather(1, padded).masked_fill(absent, float("-inf")).logsumexp(-1, keepdim=True)
