"""Reading probes with SGLang: what is asked of it, and how its answers are read. Imports neither sglang nor verl.

Written against the source of SGLang 0.5.12, the version that verl 0.9.1's `sglang` extra installs; not run with it.

A probe is one request without generation. With s = `logprob_start_len` and n input tokens SGLang

- takes at most s tokens from its prefix cache, so everything read here was computed for this request;
- answers with n - s `input_token_logprobs`: entry 0 has no value, entry j is token s + j. To read from token t on,
  s is t - 1;
- reads `token_ids_logprob` after the last input token into `output_token_ids_logprobs[0]`, as its own scoring endpoint
  does, also for `max_new_tokens=0`. The list must not be empty: it is taken for none then, and SGLang 0.5.12 fails on
  a batch in which some requests for input log-probabilities have a list and others have none;
- reads input log-probabilities at temperature 1, whatever the request's temperature.
"""

import functools
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from rredcot_verl.servers.probe_requests import Probe, log_sum_exp, longest_prefix_first, parse_probes

Send = Callable[[dict[str, Any]], Awaitable[Mapping[str, Any]]]
"""Sends the fields of a `GenerateReqInput` and gives SGLang's answer."""

# What SGLang shows for ids that it does not decode: the last of the vocabulary, images.
_CLIPPED_ID = 0


def parse_request(sampling_params: Mapping[str, Any], num_prompt_tokens: int) -> list[Probe]:
    """`parse_probes`, and what SGLang cannot do.

    Raises:
        ValueError: A field is unknown, missing or out of range, or the temperature is not 1.
    """
    probes, temperature = parse_probes(sampling_params, num_prompt_tokens)
    if temperature != 1.0:
        raise ValueError(
            f"SGLang reads log-probabilities of given tokens at temperature 1, read_probes got {temperature}"
        )
    return probes


def probe_request(trace_ids: Sequence[int], probe: Probe) -> dict[str, Any]:
    """The fields of the `GenerateReqInput` that reads a probe."""
    return {
        "input_ids": [*trace_ids[: probe.position], *probe.token_ids],
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        # The position before the first token that is read, the first that is not taken from the cache.
        "logprob_start_len": probe.position + probe.scored_from - 1,
        # Any token will do where none is asked for: the list must not be empty.
        "token_ids_logprob": list(probe.closing_token_ids) or [0],
    }


def read_answer(probe: Probe, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Reads SGLang's answer to `probe_request`.

    Args:
        probe: What was asked.
        answer: With `meta_info`.

    Returns:
        See `ProbingServerMixin.generate`. At least one token of the prefix is computed again with `scored_from` 0: its
        output is what predicts the first of the probe.

    Raises:
        RuntimeError: The request was aborted, or the answer is not laid out as SGLang 0.5.12 does it.
        ValueError: A log-probability is NaN.
    """
    meta_info = answer["meta_info"]
    finish_reason = meta_info.get("finish_reason") or {}
    if finish_reason.get("type") == "abort":
        raise RuntimeError(f"SGLang aborted the reading of a probe: {finish_reason.get('message')}")
    num_cached = meta_info.get("cached_tokens")
    if num_cached is None:
        raise RuntimeError(f"SGLang's answer to a probe has no cached_tokens, only {sorted(meta_info)}")
    num_recomputed = max(probe.position - num_cached, 0)
    return {
        "token_log_probs": [0.0] * probe.scored_from + _token_log_probs(probe, meta_info),
        "closing_log_prob": _closing_log_prob(probe, meta_info),
        "num_forward_tokens": probe.num_tokens - num_cached - num_recomputed,
        "num_recomputed_tokens": num_recomputed,
    }


def _token_log_probs(probe: Probe, meta_info: Mapping[str, Any]) -> list[float]:
    # The entry before the first token that is read has no value.
    scored = probe.token_ids[probe.scored_from :]
    entries = meta_info.get("input_token_logprobs") or []
    found = [token for _, token, *_ in entries[1:]]
    if len(entries) != len(scored) + 1 or any(
        token not in (expected, _CLIPPED_ID) for token, expected in zip(found, scored, strict=True)
    ):
        raise RuntimeError(
            f"SGLang gave {len(entries)} input_token_logprobs of a probe, the last ones for the tokens {found}; "
            f"expected {len(scored) + 1}, for {list(scored)}"
        )
    return _numbers(entries[1:])


def _closing_log_prob(probe: Probe, meta_info: Mapping[str, Any]) -> float | None:
    if not probe.closing_token_ids:
        return None
    positions = meta_info.get("output_token_ids_logprobs") or []
    entries = (positions[0] if positions else None) or []
    if sorted(token for _, token, *_ in entries) != sorted(probe.closing_token_ids):
        raise RuntimeError(
            f"SGLang gave log-probabilities of {len(entries)} tokens after a probe, not of the "
            f"{len(probe.closing_token_ids)} closing tokens asked for"
        )
    return log_sum_exp(_numbers(entries))


def _numbers(entries: Sequence[Sequence[Any]]) -> list[float]:
    values = [math.nan if value is None else float(value) for value, *_ in entries]
    if any(math.isnan(value) for value in values):
        raise ValueError(f"SGLang gave log-probabilities that are not numbers: {values}")
    return values


async def read_probes(send: Send, trace_ids: Sequence[int], probes: Sequence[Probe]) -> list[dict[str, Any]]:
    """Reads the probes of a trace, one request each.

    The probe with the longest prefix goes first, alone: what the cache has lost of the trace is computed once, for
    all others.

    Args:
        send: Sends a request.
        trace_ids: Prompt and response, tokens.
        probes: In any order.

    Returns:
        One `read_answer` a probe, in the order given.

    Raises:
        RuntimeError: See `read_answer`.
        ValueError: See `read_answer`; or SGLang refused a request (a probe longer than its context, say).
    """

    async def read(probe: Probe) -> dict[str, Any]:
        return read_answer(probe, await send(probe_request(trace_ids, probe)))

    return await longest_prefix_first([(probe.position, functools.partial(read, probe)) for probe in probes])
