"""Reading probes with vLLM: the request, the two ways to ask vLLM, and the result. Imports neither vllm nor verl.

Every probe needs log-probabilities at some places: after its opening, after each token of its answer, at its end. A
place is the trace's first `position` tokens and what is forced after them. Probes that begin alike share places.

- `vllm_tree`: one request for each place. Needs nothing of the engine.
- `vllm_forced`: one request for each answer, whose tokens a logits processor of ours forces one by one. Fewer requests,
  each of which costs vLLM a walk over the whole prefix; but an engine with a logits processor falls back to vLLM's
  older model runner for all generation.

Not `prompt_logprobs`, one request a probe: vLLM builds a Python object for every token of the prefix, and sums no
closing tokens.
"""

import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rredcot_verl.servers.probe_requests import Place, Probe, parse_probes


@dataclass
class Readings:
    """What vLLM said.

    Attributes:
        log_probs: By place and token that a probe has next there, its log-probability, nats.
        closings: By place and list of closing tokens, the log of their summed probability, nats.
        num_forward_tokens: By place, tokens computed after the prefix for the requests that are counted there.
        num_recomputed_tokens: By place, tokens of the prefix's whole blocks that the cache had lost, likewise.
        lost_closing_mass: By place at which it was measured, the probability of closing tokens that elsewhere are not
            asked for.
    """

    log_probs: dict[tuple[Place, int], float] = field(default_factory=dict)
    closings: dict[tuple[Place, tuple[int, ...]], float] = field(default_factory=dict)
    num_forward_tokens: Counter[Place] = field(default_factory=Counter)
    num_recomputed_tokens: Counter[Place] = field(default_factory=Counter)
    lost_closing_mass: dict[Place, float] = field(default_factory=dict)


Send = Callable[[list[int], dict[str, Any]], Awaitable[Any]]
"""Sends a prompt with fields of `SamplingParams`, and gives the last `RequestOutput`."""

ReadPlaces = Callable[[Send, Sequence[int], Sequence[Probe], float, int], Awaitable[Readings]]
"""A way to read all places of probes: `(send, trace_ids, probes, temperature, block_size)`, see `read_probes`."""


def parse_request(
    sampling_params: Mapping[str, Any], num_prompt_tokens: int, max_model_len: int, vocab_size: int
) -> tuple[list[Probe], float]:
    """`parse_probes`, and what vLLM could not do.

    Args:
        sampling_params: See `parse_probes`.
        num_prompt_tokens: Length of the trace, tokens.
        max_model_len: Longest sequence of the engine, tokens. It generates one after each probe.
        vocab_size: Tokens must be below it. A logits processor that indexes beyond would end the engine.

    Raises:
        ValueError: A field is unknown, missing or out of range.
    """
    probes, temperature = parse_probes(sampling_params, num_prompt_tokens)
    longest = max((probe.num_tokens for probe in probes), default=0)
    if longest >= max_model_len:
        raise ValueError(f"a probe has {longest} tokens with its prefix, max_model_len={max_model_len} leaves no room")
    used = {token for probe in probes for ids in (probe.token_ids, probe.closing_token_ids) for token in ids}
    if used and not 0 <= min(used) <= max(used) < vocab_size:
        raise ValueError(f"read_probes has tokens from {min(used)} to {max(used)}, the model has {vocab_size}")
    return probes, temperature


async def read_probes(
    read_places: ReadPlaces,
    send: Send,
    trace_ids: Sequence[int],
    probes: Sequence[Probe],
    temperature: float,
    block_size: int,
) -> list[dict[str, Any]]:
    """Reads the probes of a trace.

    Args:
        read_places: The way to ask.
        send: Sends one request.
        trace_ids: Prompt and response, tokens.
        probes: In any order.
        temperature: Divides the logits.
        block_size: Tokens of a block of the prefix cache, which holds whole blocks only.

    Returns:
        See `ProbingServerMixin.generate`.

    Raises:
        RuntimeError: See `completion_of`.
        ValueError: A log-probability is NaN, or vLLM refused a request.
    """
    readings = await read_places(send, trace_ids, probes, temperature, block_size)
    return [_result(probe, readings) for probe in probes]


def _result(probe: Probe, readings: Readings) -> dict[str, Any]:
    closing_ids = probe.closing_token_ids
    places = [place for place, _ in probe.scored] + ([probe.end] if closing_ids else [])
    return {
        "token_log_probs": [0.0] * probe.scored_from + [readings.log_probs[read] for read in probe.scored],
        "closing_log_prob": readings.closings[probe.end, closing_ids] if closing_ids else None,
        # A place counts for the first probe that has it.
        "num_forward_tokens": sum(readings.num_forward_tokens.pop(place, 0) for place in places),
        "num_recomputed_tokens": sum(readings.num_recomputed_tokens.pop(place, 0) for place in places),
        "lost_closing_mass": readings.lost_closing_mass.get(probe.end, 0.0),
    }


def completion_of(output: Any, num_tokens: int) -> Any:
    """The completion in vLLM's `RequestOutput`.

    Raises:
        RuntimeError: The request was aborted, or has not the tokens it was to have.
    """
    completion = output.outputs[0] if output is not None and output.outputs else None
    if completion is None or completion.finish_reason == "abort" or len(completion.logprobs or ()) != num_tokens:
        reason = completion.finish_reason if completion is not None else "no output"
        raise RuntimeError(f"vLLM gave no log-probabilities of a probe ({reason}): the request was aborted")
    return completion


def log_probs_of(entries: Mapping[int, Any], token_ids: Sequence[int]) -> list[float]:
    """Log-probabilities of tokens at one place, nats.

    Raises:
        RuntimeError: One is missing.
        ValueError: One is NaN.
    """
    missing = [token for token in token_ids if token not in entries]
    if missing:
        raise RuntimeError(f"vLLM gave no log-probability of the tokens {missing} that a probe asked for")
    values = [float(entries[token].logprob) for token in token_ids]
    if any(math.isnan(value) for value in values):
        raise ValueError(f"vLLM gave log-probabilities of a probe that are not numbers: {values}")
    return values


def num_recomputed(prompt_length: int, position: int, output: Any, block_size: int) -> int:
    """Tokens of the prefix's whole blocks that a request computed. vLLM computes at least a prompt's last token."""
    reachable = min(position, prompt_length - 1) // block_size * block_size
    return max(0, reachable - int(output.num_cached_tokens or 0))
