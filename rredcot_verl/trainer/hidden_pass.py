"""Hidden states of the training engine, from the trainer's side: asked for with the rows, read back as features."""

from collections.abc import Sequence
from typing import Any

import torch
import transfer_queue as tq
from torch import Tensor
from transfer_queue import KVBatchMeta

from rredcot_verl.config.blocks import ReadoutConfig
from rredcot_verl.passes.protocol import (
    HIDDEN_ONLY,
    HIDDEN_POSITIONS,
    HIDDEN_STATES,
    PASS,
    READOUT,
)
from rredcot_verl.sources.record import CreditRecord
from rredcot_verl.trainer.batch import put_rows

_NOWHERE = [-1]
"""Row of a response whose states nobody wants."""


def attach_positions(batch: KVBatchMeta, records: Sequence[CreditRecord | None], readout: ReadoutConfig) -> None:
    """Store where each row's states end beside it, and ask the next log-probability pass for them.

    Whatever else that pass is for; `without_hidden` takes it back afterwards.

    Args:
        batch: The batch; its tags say how long the prompts are.
        records: Its records. Every one that has segments gets states, also of groups that are not probed.
        readout: Which layer, how many features, which seed.
    """
    positions = [
        state_positions(record, tag) if record is not None else []
        for record, tag in zip(records, batch.tags, strict=True)
    ]
    put_rows(batch, HIDDEN_POSITIONS, [torch.tensor(own or _NOWHERE, dtype=torch.int64) for own in positions])
    batch.extra_info[READOUT] = (readout.layer, readout.dim, readout.seed)


def state_positions(record: CreditRecord, tag: dict[str, Any]) -> list[int]:
    """Where the states s_0 .. s_{K-1} of a response end: the last token before each boundary but the last.

    Args:
        record: The response's record; without segments there are no states.
        tag: The row's tag, whose `prompt_len` is the number of its prompt's tokens.

    Returns:
        Indices in the row's `input_ids`, which are its prompt and its response.
    """
    if len(record.segment_boundaries) < 2:
        return []
    return [int(tag["prompt_len"]) + boundary - 1 for boundary in record.segment_boundaries[:-1]]


def without_hidden(batch: KVBatchMeta) -> KVBatchMeta:
    """The same batch, with nothing of ours for its next passes to do or to fetch."""
    batch.extra_info.pop(READOUT, None)
    if batch.fields is not None:
        batch.fields = [field for field in batch.fields if field not in (HIDDEN_POSITIONS, HIDDEN_STATES)]
    return batch


def read_hidden_only(worker_group: Any, batch: KVBatchMeta, temperature: float) -> None:
    """A pass for nothing but the states the batch asks for; the rows' own fields stay as they are.

    Where verl makes no pass for `old_log_prob` (`algorithm.rollout_correction.bypass_mode`) and no probes are read.

    Args:
        worker_group: verl's actor workers.
        batch: The batch, after `attach_positions`.
        temperature: Of the rollout; states do not depend on it, but verl's engine asks for one.
    """
    before = dict(batch.extra_info)
    batch.extra_info.update(
        {PASS: HIDDEN_ONLY, "calculate_entropy": False, "compute_loss": False, "temperature": temperature}
    )
    worker_group.compute_log_prob(batch)
    batch.extra_info.clear()
    batch.extra_info.update(before)


def read_hidden(batch: KVBatchMeta) -> list[Tensor]:
    """The states that a pass has read.

    Args:
        batch: The batch, after the pass.

    Returns:
        For each row `(num_states, dim)` float32; no states for a row without segments.

    Raises:
        RuntimeError: A row has another number of floats than its states make, or one of them is not finite.
    """
    fields = [HIDDEN_POSITIONS, HIDDEN_STATES]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
    counts = [int((row >= 0).sum()) for row in data[HIDDEN_POSITIONS].unbind()]
    rows = [row.float() for row in data[HIDDEN_STATES].unbind()]
    dim = next((len(row) // count for row, count in zip(rows, counts, strict=True) if count), 0)
    states = []
    for key, row, count in zip(batch.keys, rows, counts, strict=True):
        if len(row) != max(1, count * dim):
            raise RuntimeError(f"a pass gave {len(row)} floats for the {count} hidden states of {key}, {dim} each")
        if not bool(torch.isfinite(row).all()):
            raise RuntimeError(f"a hidden state of {key} is not finite, and without it its credit would be wrong")
        states.append(row[: count * dim].reshape(count, dim))
    return states
