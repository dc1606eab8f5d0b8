"""Scoring probes with vLLM: the request, the two ways to ask vLLM, and the result. Imports neither vllm nor verl.

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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rredcot_verl.servers.probes import Key, Probe, parse_probes


@dataclass(frozen=True)
class PlaceScore:
    """What vLLM said at a place.

    Attributes:
        log_probs: Log-probability of each token that a probe has next, nats.
        closings: For each list of closing tokens the log of their summed probability, nats.
        num_forward_tokens: Tokens computed after the prefix for the request that read this place; 0 where the request
            has been counted at another.
        num_recomputed_tokens: Tokens of the prefix's whole blocks that the cache had lost, likewise.
    """

    log_probs: Mapping[int, float]
    closings: Mapping[tuple[int, ...], float]
    num_forward_tokens: int
    num_recomputed_tokens: int


Send = Callable[[list[int], dict[str, Any]], Awaitable[Any]]
"""Sends a prompt with fields of `SamplingParams`, and gives the last `RequestOutput`."""

ScorePlaces = Callable[[Send, Sequence[int], Sequence[Probe], float, int], Awaitable[dict[Key, PlaceScore]]]
"""A way to score: `(send, trace_ids, probes, temperature, block_size)`."""


def parse_score_request(
    sampling_params: Mapping[str, Any], num_prompt_tokens: int, max_model_len: int, vocab_size: int
) -> list[Probe]:
    """Reads sampling parameters that hold `read_probes`.

    Args:
        sampling_params: See `probes.parse_probes`.
        num_prompt_tokens: Length of the trace, tokens.
        max_model_len: Longest sequence of the engine, tokens. It generates one after each probe.
        vocab_size: Tokens must be below it. A logits processor that indexes beyond would end the engine.

    Raises:
        ValueError: A field is unknown, missing or out of range.
    """
    probes = parse_probes(sampling_params, num_prompt_tokens)
    longest = max((probe.num_tokens for probe in probes), default=0)
    if longest >= max_model_len:
        raise ValueError(f"a probe has {longest} tokens with its prefix, max_model_len={max_model_len} leaves no room")
    used = {token for probe in probes for ids in (probe.token_ids, probe.closing_token_ids) for token in ids}
    if used and not 0 <= min(used) <= max(used) < vocab_size:
        raise ValueError(f"read_probes has tokens from {min(used)} to {max(used)}, the model has {vocab_size}")
    return probes


async def read_probes(
    score_places: ScorePlaces,
    send: Send,
    trace_ids: Sequence[int],
    probes: Sequence[Probe],
    temperature: float,
    block_size: int,
) -> list[dict[str, Any]]:
    """Scores the probes of a trace.

    Args:
        score_places: The way to ask.
        send: Sends one request.
        trace_ids: Prompt and response, tokens.
        probes: In any order.
        temperature: Divides the logits.
        block_size: Tokens of a block of the prefix cache, which holds whole blocks only.

    Returns:
        For each probe, in the order given,
        token_log_probs: One for each of its tokens, nats; 0 before `scored_from`.
        closing_log_prob: Log of the summed probability of the closing tokens, nats; `None` without any.
        num_forward_tokens: Tokens computed after the prefix. What several probes share counts for the first.
        num_recomputed_tokens: Tokens of the prefix's whole blocks that the cache had lost.

    Raises:
        RuntimeError: See `completion_of`.
        ValueError: A log-probability is NaN, or vLLM refused a request.
    """
    scores = await score_places(send, trace_ids, probes, temperature, block_size)
    counted: set[Key] = set()
    return [_read_probe(probe, scores, counted) for probe in probes]


def _read_probe(probe: Probe, scores: Mapping[Key, PlaceScore], counted: set[Key]) -> dict[str, Any]:
    places = [key for key, _ in probe.scored] + ([probe.end] if probe.closing_token_ids else [])
    new = [scores[key] for key in places if key not in counted]
    counted.update(places)
    return {
        "token_log_probs": [0.0] * probe.scored_from + [scores[key].log_probs[token] for key, token in probe.scored],
        "closing_log_prob": (scores[probe.end].closings[probe.closing_token_ids] if probe.closing_token_ids else None),
        "num_forward_tokens": sum(score.num_forward_tokens for score in new),
        "num_recomputed_tokens": sum(score.num_recomputed_tokens for score in new),
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
