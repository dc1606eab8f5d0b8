"""Scoring probes with SGLang: what is asked of it, and how its answers are read. Imports neither sglang nor verl.

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

import asyncio
import functools
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from rredcot_verl.servers.branches import Branch, log_sum_exp, longest_prefix_first, parse_branches

Send = Callable[[dict[str, Any]], Awaitable[Mapping[str, Any]]]
"""Sends the fields of a `GenerateReqInput` and gives SGLang's answer."""

# What SGLang shows for ids that it does not decode: the last of the vocabulary, images.
_CLIPPED_ID = 0


def parse_score_request(sampling_params: Mapping[str, Any], num_prompt_tokens: int) -> list[Branch]:
    """Reads sampling parameters that hold `score_branches`.

    Args:
        sampling_params: See `branches.parse_branches`.
        num_prompt_tokens: Length of the trace, tokens.

    Raises:
        ValueError: A field is unknown, missing or out of range, or the temperature is not 1.
    """
    temperature = float(sampling_params.get("temperature", 1.0))
    if temperature != 1.0:
        raise ValueError(
            f"SGLang reads log-probabilities of given tokens at temperature 1, score_branches got {temperature}"
        )
    return parse_branches(sampling_params, num_prompt_tokens)


def branch_request(trace_ids: Sequence[int], branch: Branch) -> dict[str, Any]:
    """The fields of the `GenerateReqInput` that scores a branch."""
    return {
        "input_ids": [*trace_ids[: branch.position], *branch.token_ids],
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        # The position before the first scored token, the first that is not taken from the cache.
        "logprob_start_len": branch.position + branch.scored_from - 1,
        # Any token will do where none is asked for: the list must not be empty.
        "token_ids_logprob": list(branch.closing_token_ids) or [0],
    }


def read_answer(branch: Branch, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Reads SGLang's answer to `branch_request`.

    Args:
        branch: What was asked.
        answer: With `meta_info`.

    Returns:
        token_log_probs: One for each of the branch's tokens, nats; 0 before `scored_from`.
        closing_log_prob: Log of the summed probability of the closing tokens, nats; `None` without any.
        num_forward_tokens: Computed tokens of the branch itself.
        num_recomputed_tokens: Computed tokens of the trace's prefix. At least 1 with `scored_from` 0: the last prefix
            token's output is what predicts the first of the branch.

    Raises:
        RuntimeError: The request was aborted, or the answer is not laid out as SGLang 0.5.12 does it.
        ValueError: A log-probability is NaN.
    """
    meta_info = answer["meta_info"]
    finish_reason = meta_info.get("finish_reason") or {}
    if finish_reason.get("type") == "abort":
        raise RuntimeError(f"SGLang aborted the scoring of a probe: {finish_reason.get('message')}")
    num_cached = meta_info.get("cached_tokens")
    if num_cached is None:
        raise RuntimeError(f"SGLang's answer to a probe has no cached_tokens, only {sorted(meta_info)}")
    num_recomputed = max(branch.position - num_cached, 0)
    return {
        "token_log_probs": [0.0] * branch.scored_from + _token_log_probs(branch, meta_info),
        "closing_log_prob": _closing_log_prob(branch, meta_info),
        "num_forward_tokens": branch.num_tokens - num_cached - num_recomputed,
        "num_recomputed_tokens": num_recomputed,
    }


def _token_log_probs(branch: Branch, meta_info: Mapping[str, Any]) -> list[float]:
    # The entry before the first scored token has no value.
    scored = branch.token_ids[branch.scored_from :]
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


def _closing_log_prob(branch: Branch, meta_info: Mapping[str, Any]) -> float | None:
    if not branch.closing_token_ids:
        return None
    positions = meta_info.get("output_token_ids_logprobs") or []
    entries = (positions[0] if positions else None) or []
    if sorted(token for _, token, *_ in entries) != sorted(branch.closing_token_ids):
        raise RuntimeError(
            f"SGLang gave log-probabilities of {len(entries)} tokens after a probe, not of the "
            f"{len(branch.closing_token_ids)} closing tokens asked for"
        )
    return log_sum_exp(_numbers(entries))


def _numbers(entries: Sequence[Sequence[Any]]) -> list[float]:
    values = [math.nan if value is None else float(value) for value, *_ in entries]
    if any(math.isnan(value) for value in values):
        raise ValueError(f"SGLang gave log-probabilities that are not numbers: {values}")
    return values


async def score_branches(
    send: Send, trace_ids: Sequence[int], branches: Sequence[Branch], slots: asyncio.Semaphore
) -> list[dict[str, Any]]:
    """Scores the branches of a trace, one request each.

    The branch with the longest prefix goes first, alone: what the cache has lost of the trace is computed once, for
    all others.

    Args:
        send: Sends a request.
        trace_ids: Prompt and response, tokens.
        branches: In any order.
        slots: Bounds the requests under way, over all traces.

    Returns:
        One `read_answer` a branch, in the order given.

    Raises:
        RuntimeError: See `read_answer`.
        ValueError: See `read_answer`; or SGLang refused a request (a branch longer than its context, say).
    """

    async def score(branch: Branch) -> dict[str, Any]:
        async with slots:
            answer = await send(branch_request(trace_ids, branch))
        return read_answer(branch, answer)

    return await longest_prefix_first([(branch.position, functools.partial(score, branch)) for branch in branches])
