"""Log-probabilities of given text under the rollout server's model, without generating."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from rredcot_verl.cpu.generation import temperature_scaled_log_probs

_PREFILL_CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Probe:
    """A continuation of a trace's first `position` tokens.

    Attributes:
        position: Number of the trace's tokens that the probe follows, at least 1.
        token_ids: The probe's tokens, possibly none.
        closing_token_ids: Alternatives for the token after the probe; none to leave that position out.
    """

    position: int
    token_ids: tuple[int, ...]
    closing_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class ProbeLogProbs:
    """Log-probabilities of one probe, in nats.

    Attributes:
        token_log_probs: One for each of the probe's tokens, given the trace's prefix and the tokens before it.
        closing_log_prob: Log of the summed probability of the closing tokens after the probe; `None` without any.
    """

    token_log_probs: list[float]
    closing_log_prob: float | None


def parse_probes(probes: Sequence[Mapping[str, Any]], num_prompt_tokens: int) -> list[Probe]:
    """Reads the `read_probes` sampling parameter.

    A probe's `scored_from` is taken and not used: every token is scored in the same pass.

    Raises:
        ValueError: A probe lacks a field or has an unknown one, or its position is outside `[1, num_prompt_tokens]`.
    """
    parsed = []
    for index, probe in enumerate(probes):
        unknown = sorted(probe.keys() - {"position", "token_ids", "closing_token_ids", "scored_from"})
        if unknown or "position" not in probe or "token_ids" not in probe:
            raise ValueError(
                f"read_probes[{index}] must have position, token_ids and, if wanted, closing_token_ids; "
                f"got {sorted(probe)}"
            )
        position = int(probe["position"])
        if not 1 <= position <= num_prompt_tokens:
            raise ValueError(f"read_probes[{index}].position must be in [1, {num_prompt_tokens}], got {position}")
        parsed.append(Probe(position, tuple(probe["token_ids"]), tuple(probe.get("closing_token_ids") or ())))
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
def read_probes(
    model: PreTrainedModel,
    traces: Sequence[Sequence[int]],
    probes: Sequence[Sequence[Probe]],
    temperature: float,
    max_batch_tokens: int,
) -> list[list[ProbeLogProbs]]:
    """Scores many probes of some traces, computing each trace once.

    The traces are run in batches with a key-value cache. A batch of probes continues from a copy of its traces' rows
    of the cache, cut at the batch's largest position; rows with a smaller position mask the rest of it out and count
    positions from their own. The last prefix token is fed again with each probe, so that one forward pass gives every
    distribution needed.

    Args:
        model: A causal language model whose layers all attend to the whole sequence.
        traces: Whole traces (prompt and response).
        probes: For each trace its probes, in any order.
        temperature: Divides the logits; positive.
        max_batch_tokens: Bound on rows times (cached and new) tokens in one batch; one row is always run.

    Returns:
        For each trace one entry for each probe, in the order given.

    Raises:
        ValueError: The temperature is not positive, or the model has other layers than full attention.
    """
    if temperature <= 0:
        raise ValueError(f"read_probes needs a positive temperature, got {temperature}")
    _require_full_attention(model)
    prefixes = [
        list(trace[: max((probe.position for probe in own), default=1) - 1])
        for trace, own in zip(traces, probes, strict=True)
    ]
    results: list[list[ProbeLogProbs | None]] = [[None] * len(own) for own in probes]
    for group in _trace_batches([len(prefix) for prefix in prefixes], max_batch_tokens):
        cache = _prefill(model, [prefixes[trace] for trace in group])
        rows = [
            _Row(cache_row, trace, index, probe)
            for cache_row, trace in enumerate(group)
            for index, probe in enumerate(probes[trace])
        ]
        rows.sort(key=lambda row: row.probe.position)
        for batch in _batches(rows, max_batch_tokens):
            scores = _score_batch(model, [traces[row.trace] for row in batch], cache, batch, temperature)
            for row, score in zip(batch, scores, strict=True):
                results[row.trace][row.index] = score
    return [[score for score in own if score is not None] for own in results]


@dataclass(frozen=True)
class _Row:
    """A probe, the `index`-th of its trace, and the row of the cache that holds the trace."""

    cache_row: int
    trace: int
    index: int
    probe: Probe


def _require_full_attention(model: PreTrainedModel) -> None:
    layer_types = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise ValueError(
            f"read_probes needs a model with full attention in every layer, this one has {sorted(layer_types)}"
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
        new_width = max(width, len(row.probe.token_ids) + 1)
        if not batches or (len(batches[-1]) + 1) * (row.probe.position - 1 + new_width) > max_batch_tokens:
            batches.append([])
            new_width = len(row.probe.token_ids) + 1
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
) -> list[ProbeLogProbs]:
    """Scores one batch; `traces` holds the trace of each row."""
    probes = [row.probe for row in rows]
    num_cached = max(probe.position for probe in probes) - 1
    width = max(len(probe.token_ids) for probe in probes) + 1
    input_ids = torch.zeros(len(probes), width, dtype=torch.long)
    attention_mask = torch.zeros(len(probes), num_cached + width, dtype=torch.long)
    for row, (trace, probe) in enumerate(zip(traces, probes, strict=True)):
        num_new = len(probe.token_ids) + 1
        input_ids[row, :num_new] = torch.tensor([trace[probe.position - 1], *probe.token_ids])
        attention_mask[row, : probe.position - 1] = 1
        attention_mask[row, num_cached : num_cached + num_new] = 1
    first_positions = torch.tensor([[probe.position - 1] for probe in probes])
    logits = model(
        input_ids,
        attention_mask=attention_mask,
        position_ids=first_positions + torch.arange(width),
        past_key_values=_select_cache(cache, torch.tensor([row.cache_row for row in rows]), num_cached),
        use_cache=num_cached > 0,
    ).logits
    log_probs = temperature_scaled_log_probs(logits, temperature)
    return [_read_probe(log_probs[row], probe) for row, probe in enumerate(probes)]


def _read_probe(log_probs: torch.Tensor, probe: Probe) -> ProbeLogProbs:
    """Reads one probe from `log_probs`, shape (width, vocab_size), row i being the distribution of token i."""
    num_tokens = len(probe.token_ids)
    targets = torch.tensor(probe.token_ids, dtype=torch.long)
    token_log_probs = log_probs[torch.arange(num_tokens), targets].tolist()
    closing_log_prob = None
    if probe.closing_token_ids:
        # A token listed twice is still one outcome.
        closing = torch.tensor(sorted(set(probe.closing_token_ids)))
        closing_log_prob = torch.logsumexp(log_probs[num_tokens, closing], dim=-1).item()
    return ProbeLogProbs(token_log_probs, closing_log_prob)
