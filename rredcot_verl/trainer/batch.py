"""The rows of a training batch, as RREDCoT needs them: read from and written to verl's TransferQueue."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.workers.utils.padding import response_to_nested

from rredcot_verl.config.schema import PREFIX, RREDCoTConfig
from rredcot_verl.config.sources import ATTRIBUTIONS
from rredcot_verl.core.advantage import group_statistics
from rredcot_verl.core.redistribution import SegmentBatch
from rredcot_verl.core.values import UNPINNED, attribution_values, mig_values, smooth
from rredcot_verl.sources.record import FAILED, KEY, SCORED, CreditRecord


@dataclass(frozen=True)
class Rows:
    """One training batch.

    Attributes:
        keys: verl's row keys, `{uid}_{session}_{output}`.
        index: `(bs,)` object array of uids.
        nested_mask: `response_mask` as stored, jagged `(bs, response_length)`.
        response_mask: `(bs, response_length)`, padded with 0.
        lengths: Number of response tokens of each row.
        outcomes: `(bs,)` float64, R.
        final_rows: `(bs,)` int64, see `SegmentContext`.
        records: The agent loop's record of each row; None for padding and for outputs before a session's last.
        is_padding: `(bs,)` bool, verl's synthetic rows.
    """

    keys: list[str]
    index: np.ndarray
    nested_mask: Tensor
    response_mask: Tensor
    lengths: list[int]
    outcomes: Tensor
    final_rows: Tensor
    records: list[CreditRecord | None]
    is_padding: Tensor

    def segments(self, source: str = "rredcot", smoothing: float = 0.0) -> SegmentBatch:
        """The rows' segments; a row without a scored record is one segment.

        Args:
            source: Where the values come from, one of `config.sources.SOURCES`.
            smoothing: See `core.values.smooth`.
        """
        baselines = self._baselines().tolist() if source in ATTRIBUTIONS else [0.0] * len(self.keys)
        values = [
            _values(record, source, outcome, baseline, smoothing)
            if record is not None and record.status == SCORED
            else []
            for record, outcome, baseline in zip(self.records, self.outcomes.tolist(), baselines, strict=True)
        ]
        boundaries = [record.segment_boundaries if record else [] for record in self.records]
        return SegmentBatch.from_rows(boundaries, values, self.outcomes, self.lengths)

    def _baselines(self) -> Tensor:
        """`(bs,)` mean outcome of each row's group, over its final rows."""
        finals, position = self.final_rows.unique(return_inverse=True)
        mean, _ = group_statistics(self.outcomes[finals], self.index[finals.numpy()].tolist())
        return mean[position]


def _values(record: CreditRecord, source: str, outcome: float, baseline: float, smoothing: float) -> list[float]:
    if source in ATTRIBUTIONS:
        return smooth(attribution_values(record.weights, outcome, baseline), outcome, smoothing)
    values = mig_values(record.self_values) if source == "mig" else record.self_values
    # Where the outcome is no end of the values, it must not reach into them.
    return smooth(values, values[-1] if source in UNPINNED else outcome, smoothing)


def read_records(batch: KVBatchMeta) -> list[CreditRecord | None]:
    """What the agent loop knows of each row; None for padding and for outputs before a session's last.

    Raises:
        RuntimeError: The probes of some response could not be scored, or it was never asked for: training on would mean
            wrong credit.
    """
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"])
    is_padding = [bool(tag.get("is_padding", False)) for tag in batch.tags]
    final_rows = _final_rows(list(batch.keys)).tolist()
    records: list[CreditRecord | None] = []
    for row, extra_fields in enumerate(as_list(data["extra_fields"])):
        needed = not is_padding[row] and final_rows[row] == row
        records.append(_record(batch.keys[row], extra_fields) if needed else None)
    failed = [f"{key}: {record.error}" for key, record in zip(batch.keys, records, strict=True) if _failed(record)]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(records)} responses could not be verified or scored, and without that their credit "
            f"would be wrong; training stops. First failures: {failed[:3]}"
        )
    return records


def read_rows(batch: KVBatchMeta, records: list[CreditRecord | None]) -> Rows:
    """Read a batch from the TransferQueue.

    Args:
        batch: The batch.
        records: Its records, none of them waiting for probes any more.
    """
    fields = ["uid", "response_mask", "rm_scores"]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
    nested_mask = data["response_mask"]
    return Rows(
        keys=list(batch.keys),
        index=np.array(as_list(data["uid"]), dtype=object),
        nested_mask=nested_mask,
        response_mask=nested_mask.to_padded_tensor(0),
        lengths=nested_mask.offsets().diff().tolist(),
        outcomes=data["rm_scores"].to_padded_tensor(0.0).double().sum(dim=1),
        final_rows=_final_rows(list(batch.keys)),
        records=records,
        is_padding=torch.tensor([bool(tag.get("is_padding", False)) for tag in batch.tags]),
    )


def write_token_level_rewards(batch: KVBatchMeta, rows: Rows, token_level_rewards: Tensor) -> None:
    """Store redistributed rewards where verl reads rewards from."""
    nested = response_to_nested(token_level_rewards, rows.nested_mask)
    tq.kv_batch_put(
        keys=batch.keys,
        partition_id=batch.partition_id,
        fields=TensorDict({"rm_scores": nested}, batch_size=len(batch)),
    )


def put_rows(batch: KVBatchMeta, field: str, rows: list[Tensor]) -> None:
    """Store a tensor a row in a field of the batch, to be fetched by its next readers."""
    nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    fields = TensorDict({field: nested}, batch_size=len(batch))
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
    if batch.fields is not None and field not in batch.fields:
        batch.fields = [*batch.fields, field]


def check_outcomes(rows: Rows, settings: RREDCoTConfig, penalty: float = 0.0) -> None:
    """Refuse rewards outside the range that self-values are measured against.

    Args:
        rows: The batch.
        settings: The `algorithm.rredcot` block.
        penalty: How far below the range verl's own reward shaping may go.

    Raises:
        ValueError: Names the reward, the row and the setting.
    """
    low, high = settings.self_value.reward_range
    slack = 1e-6 * max(abs(low), abs(high))
    outside = ~rows.is_padding & ~((rows.outcomes >= low - penalty - slack) & (rows.outcomes <= high + slack))
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"reward {rows.outcomes[row].item()} of response {rows.keys[row]} lies outside "
            f"{PREFIX}.self_value.reward_range=[{low}, {high}]; set the range that your verifier gives, e.g. [-1,1]"
        )


def as_list(field: Any) -> list[Any]:
    """Values of a non-tensor field: the TransferQueue gives a NonTensorStack, an array or a list subclass."""
    return list(field.tolist() if hasattr(field, "tolist") else field)


def _record(key: str, extra_fields: Any) -> CreditRecord:
    if not isinstance(extra_fields, dict) or KEY not in extra_fields:
        raise RuntimeError(
            f"response {key} carries no RREDCoT record: its agent loop worker does not derive from "
            "rredcot_verl.agent.worker.RREDCoTAgentLoopWorker, or it comes from an asynchronous checkpoint "
            "of a run without RREDCoT (move the checkpoint's folder transfer_queue away)"
        )
    return CreditRecord(**extra_fields[KEY])


def _failed(record: CreditRecord | None) -> bool:
    return record is not None and record.status == FAILED


def _final_rows(keys: list[str]) -> Tensor:
    """For each row the row of its session's last output; keys are `{uid}_{session}_{output}`."""
    last: dict[str, tuple[int, int]] = {}
    sessions = []
    for row, key in enumerate(keys):
        session, _, output = key.rpartition("_")
        sessions.append(session)
        last[session] = max(last.get(session, (-1, -1)), (int(output), row))
    return torch.tensor([last[session][1] for session in sessions], dtype=torch.int64)
