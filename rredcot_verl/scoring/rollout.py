"""Reading a probe's log-probabilities from the rollout server, through verl's own client.

Two servers, two requests: the CPU server takes a whole trace with all its branches at once; vLLM takes one ordinary
`prompt_logprobs` request a branch and finds the prefix in its cache.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rredcot_verl.config.schema import SelfValueConfig
from rredcot_verl.core.self_value import geometric_value, joint_value, normalized_value
from rredcot_verl.scoring.probes import Branch, Proposal

Generate = Callable[..., Awaitable[Any]]
"""`LLMServerClient.generate(request_id, *, prompt_ids, sampling_params) -> TokenOutput`."""


@dataclass(frozen=True)
class BranchScore:
    """What the policy thinks of one probe.

    Attributes:
        token_log_probs: Log-probability of each forced token, nats.
        closing_log_prob: Log-probability that the answer ends there, nats, summed over the closing tokens.
        num_forward_tokens: Tokens computed for it that the trace itself had not computed.
    """

    token_log_probs: Sequence[float]
    closing_log_prob: float
    num_forward_tokens: int


class Scorer(Protocol):
    """Scores the probes of one trace."""

    async def score(self, request_id: str, trace_ids: list[int], branches: Sequence[Branch]) -> list[BranchScore]:
        """Score branches of a trace; `request_id` routes to the server that holds its prefix."""
        ...


class BranchScorer:
    """One request a trace, for servers that take `score_branches` (the embedded CPU server).

    Exact: every closing token is summed, and logits are divided by the rollout temperature.
    """

    def __init__(self, generate: Generate, temperature: float) -> None:
        self._generate = generate
        self._temperature = temperature

    async def score(self, request_id: str, trace_ids: list[int], branches: Sequence[Branch]) -> list[BranchScore]:
        output = await self._generate(
            request_id=request_id,
            prompt_ids=trace_ids,
            sampling_params={
                "temperature": self._temperature,
                "score_branches": [
                    {
                        "position": branch.position,
                        "token_ids": list(branch.token_ids),
                        "closing_token_ids": list(branch.closing_token_ids),
                    }
                    for branch in branches
                ],
            },
        )
        results = output.extra_fields["branch_log_probs"]
        if len(results) != len(branches):
            raise RuntimeError(f"the rollout server scored {len(results)} of {len(branches)} probes")
        for branch, result in zip(branches, results, strict=True):
            _check_length(len(result["token_log_probs"]), len(branch.token_ids))
        return [
            BranchScore(result["token_log_probs"], result["closing_log_prob"], len(branch.token_ids))
            for branch, result in zip(branches, results, strict=True)
        ]


class PromptLogprobScorer:
    """One `prompt_logprobs` request for each branch and closing token, for vLLM behind verl's stock server.

    `skip_reading_prefix_cache=False` lets the prefix come from the cache it was just generated into. vLLM gives
    log-probabilities only for what it computed: the entries of what it found in the cache are not meaningful, and the
    cache may reach into a probe (a trace that wrote the very answer, two probes that differ in their last token).
    Such a probe is asked for again without the cache.

    vLLM reads prompt log-probabilities at temperature 1. Only the `max_closing_tokens` likeliest ends are summed: a
    lower bound of the probability that the answer ends.
    """

    def __init__(self, generate: Generate, max_closing_tokens: int) -> None:
        self._generate = generate
        self._max_closing_tokens = max_closing_tokens

    async def score(self, request_id: str, trace_ids: list[int], branches: Sequence[Branch]) -> list[BranchScore]:
        return list(await asyncio.gather(*[self._score_branch(request_id, trace_ids, branch) for branch in branches]))

    async def _score_branch(self, request_id: str, trace_ids: list[int], branch: Branch) -> BranchScore:
        prefix = trace_ids[: branch.position] + list(branch.token_ids)
        # The first request is read from the first scored token on; the others differ in their last token alone.
        starts = [branch.position + branch.scored_from] + [len(prefix)] * (len(branch.closing_token_ids) - 1)
        closings = branch.closing_token_ids[: self._max_closing_tokens]
        answers = await asyncio.gather(
            *[self._log_probs(request_id, [*prefix, end], start) for end, start in zip(closings, starts, strict=False)]
        )
        rows = [log_probs for log_probs, _ in answers]
        closing = torch.tensor([row[-1] for row in rows], dtype=torch.float64).logsumexp(0).item()
        # What comes before the first scored token is given, and not read.
        token_log_probs = [0.0] * branch.scored_from + rows[0][:-1]
        return BranchScore(token_log_probs, closing, sum(num_computed for _, num_computed in answers))

    async def _log_probs(self, request_id: str, token_ids: list[int], start: int) -> tuple[list[float], int]:
        """Log-probabilities of `token_ids[start:]`, and how many tokens were computed for them."""
        num_computed = 0
        for skip_cache in (False, True):
            output = await self._generate(
                request_id=request_id,
                prompt_ids=token_ids,
                sampling_params={
                    "max_tokens": 1,
                    "temperature": 1.0,
                    "prompt_logprobs": 0,
                    "skip_reading_prefix_cache": skip_cache,
                    # The ids of cached entries are as meaningless as their values, and not to be decoded.
                    "detokenize": False,
                },
            )
            num_cached = 0 if skip_cache else output.extra_fields.get("num_cached_tokens")
            num_computed += len(token_ids) - (num_cached or 0)
            if num_cached is not None and num_cached < start:
                break
        # verl shifts the list by one: entry i is the log-probability of token i + 1, the last entry a dummy.
        entries = output.extra_fields["prompt_logprobs"]
        _check_length(len(entries), len(token_ids))
        return [entry[0] for entry in entries[start - 1 : -1]], num_computed


def _check_length(found: int, expected: int) -> None:
    if found != expected:
        raise RuntimeError(f"the rollout server gave {found} log-probabilities of a probe, expected {expected}")


SCORING_BACKENDS = ("rredcot_cpu", "vllm")
"""Rollout backends that can score; the CPU server's name is `rredcot_cpu`."""


def make_scorer(rollout_name: str, generate: Generate, config: SelfValueConfig, temperature: float) -> Scorer:
    """The scorer for a rollout backend.

    Raises:
        ValueError: The backend cannot score.
    """
    limited = _limit(generate, config.max_concurrency, config.timeout_s)
    if rollout_name == "rredcot_cpu":
        return BranchScorer(limited, temperature)
    if rollout_name == "vllm":
        return PromptLogprobScorer(limited, config.max_closing_tokens)
    raise ValueError(
        f"actor_rollout_ref.rollout.name={rollout_name!r} cannot score probes; self_value.engine=rollout works with "
        f"{list(SCORING_BACKENDS)}"
    )


def _limit(generate: Generate, max_concurrency: int, timeout_s: float) -> Generate:
    """At most so many requests under way; the time a request waits for its turn does not count as its own."""
    slots = asyncio.Semaphore(max_concurrency)

    async def limited(**request: Any) -> Any:
        async with slots:
            return await asyncio.wait_for(generate(**request), timeout_s)

    return limited


def self_values(
    form: str, branches: Sequence[Branch], scores: Sequence[BranchScore], proposals: Sequence[Proposal]
) -> Tensor:
    """Self-values in [0, 1] from the scores of all branches.

    Args:
        form: `joint`, `normalized` or `geometric`.
        branches: One or two branches for every state and proposal.
        scores: One a branch.
        proposals: The answers.

    Returns:
        `(num_states,)` float32.

    Raises:
        ValueError: A log-probability is NaN or positive: the server's numbers cannot be trusted.
    """
    shape = (branches[-1].state + 1, len(proposals))
    log_probs = torch.full(shape, float("-inf"), dtype=torch.float64)
    lengths = torch.ones(shape, dtype=torch.int64)
    for branch, score in zip(branches, scores, strict=True):
        counted = [*score.token_log_probs[branch.scored_from :], score.closing_log_prob]
        # A sum over closing tokens may exceed log 1 by rounding only.
        if any(value != value or value > 1e-3 for value in counted):
            raise ValueError(f"the rollout server returned log-probabilities {counted} for probe {branch.token_ids}")
        place = branch.state, branch.proposal
        log_probs[place] = torch.logaddexp(log_probs[place], torch.tensor(sum(counted), dtype=torch.float64))
        lengths[place] = max(int(lengths[place]), len(counted))
    utilities = torch.tensor([proposal.utility for proposal in proposals], dtype=torch.float64)
    if form == "joint":
        return joint_value(log_probs, utilities)
    if form == "normalized":
        return normalized_value(log_probs, utilities)
    return geometric_value(log_probs, utilities, lengths)
