"""What a rollout server is asked: probes of a trace. Imports neither a server nor verl."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

_FIELDS = {"position", "token_ids"}
_OPTIONAL_FIELDS = {"closing_token_ids", "scored_from"}

Place = tuple[int, tuple[int, ...]]
"""Where something is read: length of the prefix, and the tokens forced after it."""


@dataclass(frozen=True)
class Probe:
    """A continuation of a trace's first `position` tokens: what a server needs of `probes.probe.Probe`.

    Attributes:
        position: Number of the trace's tokens that the probe follows, at least 1.
        token_ids: The probe's tokens, possibly none.
        closing_token_ids: Alternatives for the token after the probe, each once, the likeliest first; possibly none.
        scored_from: Index in `token_ids` from which log-probabilities are read.
    """

    position: int
    token_ids: tuple[int, ...]
    closing_token_ids: tuple[int, ...]
    scored_from: int

    @property
    def scored(self) -> list[tuple[Place, int]]:
        """The place before each token that is read, and the token."""
        indices = range(self.scored_from, len(self.token_ids))
        return [((self.position, self.token_ids[:index]), self.token_ids[index]) for index in indices]

    @property
    def end(self) -> Place:
        """The place after the last token."""
        return self.position, self.token_ids

    @property
    def num_tokens(self) -> int:
        """Length of prefix and probe, tokens."""
        return self.position + len(self.token_ids)


def parse_probes(sampling_params: Mapping[str, Any], num_prompt_tokens: int) -> tuple[list[Probe], float]:
    """Reads sampling parameters that hold `read_probes`.

    Args:
        sampling_params: `read_probes` (a list of dicts `position`, `token_ids` and, if wanted, `closing_token_ids`
            and `scored_from`), and `temperature`, `max_tokens` and `timeout_s` if given. Nothing is generated.
        num_prompt_tokens: Length of the trace, tokens.

    Returns:
        The probes, and the temperature, which divides the logits.

    Raises:
        ValueError: A field is unknown, missing or out of range.
    """
    unknown = sorted(sampling_params.keys() - {"read_probes", "temperature", "max_tokens", "timeout_s"})
    if unknown:
        raise ValueError(f"read_probes takes temperature, max_tokens and timeout_s beside it, got {', '.join(unknown)}")
    temperature = float(sampling_params.get("temperature", 1.0))
    if temperature <= 0:
        raise ValueError(f"read_probes needs a positive temperature, got {temperature}")
    given = enumerate(sampling_params["read_probes"])
    return [_parse_probe(f"read_probes[{index}]", probe, num_prompt_tokens) for index, probe in given], temperature


def timeout_of(sampling_params: Mapping[str, Any]) -> float:
    """Seconds after which a server that finishes nothing has failed; without end where not given."""
    return float(sampling_params.get("timeout_s", math.inf))


def _parse_probe(name: str, probe: Mapping[str, Any], num_prompt_tokens: int) -> Probe:
    if not _FIELDS <= probe.keys() <= _FIELDS | _OPTIONAL_FIELDS:
        raise ValueError(
            f"{name} must have position, token_ids and, if wanted, closing_token_ids and scored_from; "
            f"got {sorted(probe)}"
        )
    position, scored_from = int(probe["position"]), int(probe.get("scored_from", 0))
    token_ids = tuple(int(token) for token in probe["token_ids"])
    if not 1 <= position <= num_prompt_tokens:
        raise ValueError(f"{name}.position must be in [1, {num_prompt_tokens}], got {position}")
    if not 0 <= scored_from <= len(token_ids):
        raise ValueError(f"{name}.scored_from must be in [0, {len(token_ids)}], got {scored_from}")
    # A token listed twice is still one outcome.
    closing_ids = dict.fromkeys(int(token) for token in probe.get("closing_token_ids") or ())
    return Probe(position, token_ids, tuple(closing_ids), scored_from)


def refuse_media(taker: str, inputs: Mapping[str, Any]) -> None:
    """Refuses inputs that are no text.

    Args:
        taker: What takes text only, for the message.
        inputs: By name; what is nothing is let through.

    Raises:
        ValueError: Some input is given that is not nothing.
    """
    refused = sorted(name for name, value in inputs.items() if value)
    if refused:
        raise ValueError(f"{taker} takes text only, got {', '.join(refused)}")


def log_sum_exp(values: Sequence[float]) -> float:
    """Log of a sum of probabilities, nats."""
    largest = max(values, default=-math.inf)
    if largest == -math.inf:
        return largest
    return largest + math.log(math.fsum(math.exp(value - largest) for value in values))


_T = TypeVar("_T")


async def longest_prefix_first(requests: Sequence[tuple[int, Callable[[], Awaitable[_T]]]]) -> list[_T]:
    """Runs `(position, request)`s: the longest prefix alone, then all others.

    What the cache has lost of the trace is thereby computed once, for all.
    """
    if not requests:
        return []
    first = max(range(len(requests)), key=lambda index: requests[index][0])
    done = await requests[first][1]()
    others = await asyncio.gather(*[run() for index, (_, run) in enumerate(requests) if index != first])
    return [*others[:first], done, *others[first:]]
