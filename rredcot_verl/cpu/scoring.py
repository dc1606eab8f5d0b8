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

    A branch's `scored_from` is taken and not used: every token is scored in the same pass.

    Raises:
        ValueError: A branch lacks a field or has an unknown one, or its position is outside `[1, num_prompt_tokens]`.
    """
    parsed = []
    for index, branch in enumerate(branches):
        unknown = sorted(branch.keys() - {"position", "token_ids", "closing_token_ids", "scored_from"})
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
    traces: Sequence[Sequence[int]],
    branches: Sequence[Sequence[Branch]],
    temperature: float,
    max_batch_tokens: int,
) -> list[list[BranchLogProbs]]:
    """Scores many branches of some traces, computing each trace once.

    The traces are run in batches with a key-value cache. A batch of branches continues from a copy of its traces' rows
    of the cache, cut at the batch's largest position; rows with a smaller position mask the rest of it out and count
    positions from their own. The last prefix token is fed again with each branch, so that one forward pass gives every
    distribution needed.

    Args:
        model: A causal language model whose layers all attend to the whole sequence.
        traces: Whole traces (prompt and response).
        branches: For each trace its branches, in any order.
        temperature: Divides the logits; positive.
        max_batch_tokens: Bound on rows times (cached and new) tokens in one batch; one row is always run.

    Returns:
        For each trace one entry for each branch, in the order given.

    Raises:
        ValueError: The temperature is not positive, or the model has other layers than full attention.
    """
    if temperature <= 0:
        raise ValueError(f"score_branches needs a positive temperature, got {temperature}")
    _require_full_attention(model)
    prefixes = [
        list(trace[: max((branch.position for branch in own), default=1) - 1])
        for trace, own in zip(traces, branches, strict=True)
    ]
    results: list[list[BranchLogProbs | None]] = [[None] * len(own) for own in branches]
    for group in _trace_batches([len(prefix) for prefix in prefixes], max_batch_tokens):
        cache = _prefill(model, [prefixes[trace] for trace in group])
        rows = [
            _Row(cache_row, trace, index, branch)
            for cache_row, trace in enumerate(group)
            for index, branch in enumerate(branches[trace])
        ]
        rows.sort(key=lambda row: row.branch.position)
        for batch in _batches(rows, max_batch_tokens):
            scores = _score_batch(model, [traces[row.trace] for row in batch], cache, batch, temperature)
            for row, score in zip(batch, scores, strict=True):
                results[row.trace][row.index] = score
    return [[score for score in own if score is not None] for own in results]


@dataclass(frozen=True)
class _Row:
    """A branch, the `index`-th of its trace, and the row of the cache that holds the trace."""

    cache_row: int
    trace: int
    index: int
    branch: Branch


def _require_full_attention(model: PreTrainedModel) -> None:
    layer_types = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise ValueError(
            f"score_branches needs a model with full attention in every layer, this one has {sorted(layer_types)}"
        )


def _trace_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Splits traces, shortest first, into batches of at most `max_batch_tokens` padded tokens."""
    batches: list[list[int]] = []
    for trace in sorted(range(len(lengths)), key=lambda trace: lengths[trace]):
        if not batches or (len(batches[-1]) + 1) * lengths[trace] > max_batch_tokens:
            batches.append([])
        batches[-1].append(trace)
    return batches


def _prefill(model: PreTrainedModel, traces: Sequence[Sequence[int]]) -> DynamicCache:
    """Runs the traces, padded on the right: what stands after a trace's end cannot reach the tokens before it."""
    cache = DynamicCache(config=model.config)
    length = max(len(trace) for trace in traces)
    tokens = torch.zeros(len(traces), length, dtype=torch.long)
    for row, trace in enumerate(traces):
        tokens[row, : len(trace)] = torch.tensor(trace, dtype=torch.long)
    for start in range(0, length, _PREFILL_CHUNK_TOKENS):
        model(tokens[:, start : start + _PREFILL_CHUNK_TOKENS], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _batches(rows: Sequence[_Row], max_batch_tokens: int) -> list[list[_Row]]:
    """Splits rows, sorted by position, into batches within the bound."""
    batches: list[list[_Row]] = []
    width = 0
    for row in rows:
        # The batch's cache is as long as its last (largest) position.
        new_width = max(width, len(row.branch.token_ids) + 1)
        if not batches or (len(batches[-1]) + 1) * (row.branch.position - 1 + new_width) > max_batch_tokens:
            batches.append([])
            new_width = len(row.branch.token_ids) + 1
        batches[-1].append(row)
        width = new_width
    return batches


def _select_cache(cache: DynamicCache, cache_rows: torch.Tensor, num_tokens: int) -> DynamicCache | None:
    """Returns a cache that holds the first `num_tokens` of the chosen rows."""
    if num_tokens == 0:
        return None
    return DynamicCache(
        [(layer.keys[cache_rows, :, :num_tokens], layer.values[cache_rows, :, :num_tokens]) for layer in cache.layers]
    )


def _score_batch(
    model: PreTrainedModel,
    traces: Sequence[Sequence[int]],
    cache: DynamicCache,
    rows: Sequence[_Row],
    temperature: float,
) -> list[BranchLogProbs]:
    """Scores one batch; `traces` holds the trace of each row."""
    branches = [row.branch for row in rows]
    num_cached = max(branch.position for branch in branches) - 1
    width = max(len(branch.token_ids) for branch in branches) + 1
    input_ids = torch.zeros(len(branches), width, dtype=torch.long)
    attention_mask = torch.zeros(len(branches), num_cached + width, dtype=torch.long)
    for row, (trace, branch) in enumerate(zip(traces, branches, strict=True)):
        num_new = len(branch.token_ids) + 1
        input_ids[row, :num_new] = torch.tensor([trace[branch.position - 1], *branch.token_ids])
        attention_mask[row, : branch.position - 1] = 1
        attention_mask[row, num_cached : num_cached + num_new] = 1
    first_positions = torch.tensor([[branch.position - 1] for branch in branches])
    logits = model(
        input_ids,
        attention_mask=attention_mask,
        position_ids=first_positions + torch.arange(width),
        past_key_values=_select_cache(cache, torch.tensor([row.cache_row for row in rows]), num_cached),
        use_cache=num_cached > 0,
    ).logits
    log_probs = temperature_scaled_log_probs(logits, temperature)
    return [_read_branch(log_probs[row], branch) for row, branch in enumerate(branches)]


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
