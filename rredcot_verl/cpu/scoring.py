"""Log-probabilities of given text under the rollout server's model, without generating."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from rredcot_verl.cpu.generation import temperature_scaled_log_probs

_PREFILL_CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Branch:
    """A continuation of a trace's first `position` tokens.

    Attributes:
        position: Number of the trace's tokens that the branch follows, at least 1.
        token_ids: The branch's tokens, possibly none.
        closing_token_ids: Alternatives for the token after the branch; none to leave that position out.
    """

    position: int
    token_ids: tuple[int, ...]
    closing_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class BranchLogProbs:
    """Log-probabilities of one branch, in nats.

    Attributes:
        token_log_probs: One for each of the branch's tokens, given the trace's prefix and the tokens before it.
        closing_log_prob: Log of the summed probability of the closing tokens after the branch; `None` without any.
    """

    token_log_probs: list[float]
    closing_log_prob: float | None


def parse_branches(branches: Sequence[Mapping[str, Any]], num_prompt_tokens: int) -> list[Branch]:
    """Reads the `score_branches` sampling parameter.

    Raises:
        ValueError: A branch lacks a field or has an unknown one, or its position is outside `[1, num_prompt_tokens]`.
    """
    parsed = []
    for index, branch in enumerate(branches):
        unknown = sorted(branch.keys() - {"position", "token_ids", "closing_token_ids"})
        if unknown or "position" not in branch or "token_ids" not in branch:
            raise ValueError(
                f"score_branches[{index}] must have position, token_ids and, if wanted, closing_token_ids; "
                f"got {sorted(branch)}"
            )
        position = int(branch["position"])
        if not 1 <= position <= num_prompt_tokens:
            raise ValueError(f"score_branches[{index}].position must be in [1, {num_prompt_tokens}], got {position}")
        parsed.append(Branch(position, tuple(branch["token_ids"]), tuple(branch.get("closing_token_ids") or ())))
    return parsed


@torch.inference_mode()
def score_prompt(model: PreTrainedModel, prompt_ids: Sequence[int]) -> tuple[list[float], torch.Tensor]:
    """Scores a sequence at temperature 1.

    Args:
        model: A causal language model.
        prompt_ids: At least one token.

    Returns:
        The log-probabilities in nats of tokens 1, 2, ... given those before them (one fewer than tokens), and the
        logits after the last token, shape (1, vocab_size).
    """
    tokens = torch.tensor([list(prompt_ids)])
    cache = DynamicCache(config=model.config)
    log_probs: list[float] = []
    logits = torch.empty(0)
    # In chunks, so that the logits of a long trace over a large vocabulary are never all in memory.
    for start in range(0, tokens.shape[1], _PREFILL_CHUNK_TOKENS):
        chunk = tokens[:, start : start + _PREFILL_CHUNK_TOKENS]
        logits = model(chunk, past_key_values=cache, use_cache=True).logits[0]
        targets = tokens[0, start + 1 : start + 1 + chunk.shape[1]]
        chunk_log_probs = temperature_scaled_log_probs(logits[: len(targets)], 1.0)
        log_probs += chunk_log_probs.gather(-1, targets[:, None]).squeeze(-1).tolist()
    return log_probs, logits[-1:]


@torch.inference_mode()
def score_branches(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    branches: Sequence[Branch],
    temperature: float,
    max_batch_tokens: int,
) -> list[BranchLogProbs]:
    """Scores many branches of one trace, computing the trace once.

    The trace is run once with a key-value cache. A batch of branches continues from a copy of the cache cut at the
    batch's largest position; rows with a smaller position mask the rest of it out and count positions from their own.
    The last prefix token is fed again with each branch, so that one forward pass gives every distribution needed.

    Args:
        model: A causal language model whose layers all attend to the whole sequence.
        prompt_ids: The whole trace (prompt and response).
        branches: The branches, in any order.
        temperature: Divides the logits; positive.
        max_batch_tokens: Bound on rows times (cached and new) tokens in one batch; one branch is always run.

    Returns:
        One entry for each branch, in the order given.

    Raises:
        ValueError: The temperature is not positive, or the model has other layers than full attention.
    """
    if temperature <= 0:
        raise ValueError(f"score_branches needs a positive temperature, got {temperature}")
    if not branches:
        return []
    _require_full_attention(model)
    num_prefix_tokens = max(branch.position for branch in branches) - 1
    cache = _prefill(model, prompt_ids[:num_prefix_tokens])
    order = sorted(range(len(branches)), key=lambda index: branches[index].position)
    results: list[BranchLogProbs | None] = [None] * len(branches)
    for batch in _batches(order, branches, max_batch_tokens):
        rows = [branches[index] for index in batch]
        for index, scores in zip(batch, _score_batch(model, prompt_ids, cache, rows, temperature), strict=True):
            results[index] = scores
    return [scores for scores in results if scores is not None]


def _require_full_attention(model: PreTrainedModel) -> None:
    layer_types = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise ValueError(
            f"score_branches needs a model with full attention in every layer, this one has {sorted(layer_types)}"
        )


def _prefill(model: PreTrainedModel, token_ids: Sequence[int]) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for start in range(0, len(token_ids), _PREFILL_CHUNK_TOKENS):
        chunk = torch.tensor([list(token_ids[start : start + _PREFILL_CHUNK_TOKENS])])
        model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _batches(order: Sequence[int], branches: Sequence[Branch], max_batch_tokens: int) -> list[list[int]]:
    """Splits branch indices, sorted by position, into batches within the bound."""
    batches: list[list[int]] = []
    width = 0
    for index in order:
        branch = branches[index]
        # The batch's cache is as long as its last (largest) position.
        new_width = max(width, len(branch.token_ids) + 1)
        if not batches or (len(batches[-1]) + 1) * (branch.position - 1 + new_width) > max_batch_tokens:
            batches.append([])
            new_width = len(branch.token_ids) + 1
        batches[-1].append(index)
        width = new_width
    return batches


def _expand_cache(cache: DynamicCache, num_rows: int, num_tokens: int) -> DynamicCache | None:
    """Returns a cache of the first `num_tokens` for `num_rows` rows; views, copied when the forward pass extends it."""
    if num_tokens == 0:
        return None
    return DynamicCache(
        [
            (
                layer.keys[:, :, :num_tokens].expand(num_rows, -1, -1, -1),
                layer.values[:, :, :num_tokens].expand(num_rows, -1, -1, -1),
            )
            for layer in cache.layers
        ]
    )


def _score_batch(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    cache: DynamicCache,
    branches: Sequence[Branch],
    temperature: float,
) -> list[BranchLogProbs]:
    num_cached = max(branch.position for branch in branches) - 1
    width = max(len(branch.token_ids) for branch in branches) + 1
    input_ids = torch.zeros(len(branches), width, dtype=torch.long)
    attention_mask = torch.zeros(len(branches), num_cached + width, dtype=torch.long)
    for row, branch in enumerate(branches):
        num_new = len(branch.token_ids) + 1
        input_ids[row, :num_new] = torch.tensor([prompt_ids[branch.position - 1], *branch.token_ids])
        attention_mask[row, : branch.position - 1] = 1
        attention_mask[row, num_cached : num_cached + num_new] = 1
    first_positions = torch.tensor([[branch.position - 1] for branch in branches])
    logits = model(
        input_ids,
        attention_mask=attention_mask,
        position_ids=first_positions + torch.arange(width),
        past_key_values=_expand_cache(cache, len(branches), num_cached),
        use_cache=num_cached > 0,
    ).logits
    return [
        _read_branch(temperature_scaled_log_probs(logits[row], temperature), branch)
        for row, branch in enumerate(branches)
    ]


def _read_branch(log_probs: torch.Tensor, branch: Branch) -> BranchLogProbs:
    """Reads one branch from `log_probs`, shape (width, vocab_size), row i being the distribution of token i."""
    num_tokens = len(branch.token_ids)
    targets = torch.tensor(branch.token_ids, dtype=torch.long)
    token_log_probs = log_probs[torch.arange(num_tokens), targets].tolist()
    closing_log_prob = None
    if branch.closing_token_ids:
        # A token listed twice is still one outcome.
        closing = torch.tensor(sorted(set(branch.closing_token_ids)))
        closing_log_prob = torch.logsumexp(log_probs[num_tokens, closing], dim=-1).item()
    return BranchLogProbs(token_log_probs, closing_log_prob)
