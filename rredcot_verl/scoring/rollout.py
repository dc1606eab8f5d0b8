"""Reading a probe's log-probabilities from the rollout server, through verl's own client.

Two servers, two requests: the CPU server takes a whole trace with all its branches at once; vLLM takes one ordinary
`prompt_logprobs` request a branch and finds the prefix in its cache.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rredcot_verl.config.schema import SelfValueConfig
from rredcot_verl.core.self_value import geometric_value, joint_value, normalized_value
from rredcot_verl.scoring.probes import Branch, Proposal

logger = logging.getLogger(__name__)

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

    `skip_reading_prefix_cache=False` lets the prefix come from the cache it was just generated into; the entries of the
    cached part are not meaningful, so only the suffix is read. vLLM reads prompt log-probabilities at temperature 1.
    Only the `max_closing_tokens` likeliest ends are summed: a lower bound of the probability that the answer ends.
    """

    def __init__(self, generate: Generate, max_closing_tokens: int, max_concurrency: int) -> None:
        self._generate = generate
        self._max_closing_tokens = max_closing_tokens
        self._slots = asyncio.Semaphore(max_concurrency)

    async def score(self, request_id: str, trace_ids: list[int], branches: Sequence[Branch]) -> list[BranchScore]:
        return list(await asyncio.gather(*[self._score_branch(request_id, trace_ids, branch) for branch in branches]))

    async def _score_branch(self, request_id: str, trace_ids: list[int], branch: Branch) -> BranchScore:
        prefix = trace_ids[: branch.position] + list(branch.token_ids)
        closings = branch.closing_token_ids[: self._max_closing_tokens]
        rows = await asyncio.gather(*[self._suffix_log_probs(request_id, prefix, branch, end) for end in closings])
        closing = torch.tensor([row[-1] for row in rows], dtype=torch.float64).logsumexp(0).item()
        return BranchScore(rows[0][:-1], closing, (len(branch.token_ids) + 1) * len(rows))

    async def _suffix_log_probs(self, request_id: str, prefix: list[int], branch: Branch, end: int) -> list[float]:
        async with self._slots:
            output = await self._generate(
                request_id=request_id,
                prompt_ids=[*prefix, end],
                sampling_params={
                    "max_tokens": 1,
                    "temperature": 1.0,
                    "prompt_logprobs": 0,
                    "skip_reading_prefix_cache": False,
                },
            )
        # verl shifts the list by one: entry i is the log-probability of token i + 1.
        entries = output.extra_fields["prompt_logprobs"][branch.position - 1 : len(prefix)]
        _check_length(len(entries), len(prefix) + 1 - branch.position)
        return [entry[0] for entry in entries]


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
    if rollout_name == "rredcot_cpu":
        return BranchScorer(generate, temperature)
    if rollout_name == "vllm":
        return PromptLogprobScorer(generate, config.max_closing_tokens, config.max_concurrency)
    raise ValueError(
        f"actor_rollout_ref.rollout.name={rollout_name!r} cannot score probes; self_value.engine=rollout works with "
        f"{list(SCORING_BACKENDS)}"
    )


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
