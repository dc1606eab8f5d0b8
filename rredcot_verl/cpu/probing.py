"""Log-probabilities of given text under the rollout server's model, without generating."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from rredcot_verl.cpu.generation import temperature_scaled_log_probs
from rredcot_verl.servers.probe_requests import Probe

_PREFILL_CHUNK_TOKENS = 512


@dataclass(frozen=True)
class _Row:
    """A probe, the last token of its prefix, the row of the cache that holds the others, and where the result goes."""

    probe: Probe
    last_id: int
    cache_row: int
    result: dict[str, Any]

    @property
    def num_new(self) -> int:
        """Tokens to run after those in the cache."""
        return len(self.probe.token_ids) + 1


@torch.inference_mode()
def read_probes(
    model: PreTrainedModel,
    traces: Sequence[Sequence[int]],
    probes: Sequence[Sequence[Probe]],
    temperature: float,
    max_batch_tokens: int,
) -> list[list[dict[str, Any]]]:
    """Reads many probes of some traces, computing each trace once.

    The traces are run in batches with a key-value cache. A batch of probes continues from a copy of its traces' rows
    of the cache, cut at the batch's largest position; rows with a smaller position mask the rest of it out and count
    positions from their own. The last prefix token is fed again with each probe, so that one forward pass gives every
    distribution needed.

    Args:
        model: A causal language model whose layers all attend to the whole sequence.
        traces: Whole traces (prompt and response).
        probes: For each trace its probes, in any order. Every token is read, `scored_from` is not used.
        temperature: Divides the logits; positive.
        max_batch_tokens: Bound on rows times (cached and new) tokens in one batch; one row is always run.

    Returns:
        For each trace and probe, in the order given, `token_log_probs` (one for each token, nats) and
        `closing_log_prob` (log of the summed probability of the closing tokens after the probe; `None` without any).

    Raises:
        ValueError: The model has other layers than full attention.
    """
    _require_full_attention(model)
    results: list[list[dict[str, Any]]] = [[{} for _ in own] for own in probes]
    prefixes = [
        list(trace[: max((probe.position for probe in own), default=1) - 1])
        for trace, own in zip(traces, probes, strict=True)
    ]
    for group in _trace_batches([len(prefix) for prefix in prefixes], max_batch_tokens):
        cache = _prefill(model, [prefixes[trace] for trace in group])
        rows = [
            _Row(probe, traces[trace][probe.position - 1], cache_row, result)
            for cache_row, trace in enumerate(group)
            for probe, result in zip(probes[trace], results[trace], strict=True)
        ]
        rows.sort(key=lambda row: row.probe.position)
        for batch in _row_batches(rows, max_batch_tokens):
            _read_batch(model, cache, batch, temperature)
    return results


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


def _row_batches(rows: Sequence[_Row], max_batch_tokens: int) -> list[list[_Row]]:
    """Splits rows, sorted by position, into batches within the bound."""
    batches: list[list[_Row]] = []
    width = 0
    for row in rows:
        # The batch's cache is as long as its last (largest) position.
        width = max(width, row.num_new)
        if not batches or (len(batches[-1]) + 1) * (row.probe.position - 1 + width) > max_batch_tokens:
            batches.append([])
            width = row.num_new
        batches[-1].append(row)
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


def _cut_cache(cache: DynamicCache, rows: list[int], num_tokens: int) -> DynamicCache | None:
    """A copy of the first `num_tokens` of the chosen rows."""
    if num_tokens == 0:
        return None
    return DynamicCache(
        [(layer.keys[rows, :, :num_tokens], layer.values[rows, :, :num_tokens]) for layer in cache.layers]
    )


def _read_batch(model: PreTrainedModel, cache: DynamicCache, rows: Sequence[_Row], temperature: float) -> None:
    """Fills in the results of one batch."""
    num_cached = max(row.probe.position for row in rows) - 1
    width = max(row.num_new for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), num_cached + width, dtype=torch.long)
    for number, row in enumerate(rows):
        input_ids[number, : row.num_new] = torch.tensor([row.last_id, *row.probe.token_ids])
        attention_mask[number, : row.probe.position - 1] = 1
        attention_mask[number, num_cached : num_cached + row.num_new] = 1
    first_positions = torch.tensor([[row.probe.position - 1] for row in rows])
    logits = model(
        input_ids,
        attention_mask=attention_mask,
        position_ids=first_positions + torch.arange(width),
        past_key_values=_cut_cache(cache, [row.cache_row for row in rows], num_cached),
        use_cache=num_cached > 0,
    ).logits
    log_probs = temperature_scaled_log_probs(logits, temperature)
    for row, own in zip(rows, log_probs, strict=True):
        # Row i of `own` is the distribution of the probe's token i.
        token_ids, closing_ids = row.probe.token_ids, sorted(row.probe.closing_token_ids)
        targets = torch.tensor(token_ids, dtype=torch.long)
        row.result["token_log_probs"] = own[torch.arange(len(token_ids)), targets].tolist()
        row.result["closing_log_prob"] = own[len(token_ids), closing_ids].logsumexp(-1).item() if closing_ids else None
