"""The rows of a training batch in verl's TransferQueue: read, written, and held between the trainer's two hooks."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.workers.utils.padding import response_to_nested

from rredcot_verl.config.schema import PREFIX
from rredcot_verl.core.groups import GroupStatistics, group_statistics
from rredcot_verl.core.redistribution import SegmentBatch
from rredcot_verl.passes.protocol import NOTHING
from rredcot_verl.sources.record import KEY, Record, Status


@dataclass(frozen=True)
class RecordedBatch:
    """A batch and what the agent side recorded of its rows.

    Attributes:
        batch: verl's.
        records: None for padding and for outputs before a session's last.
        final_rows: `(bs,)` int64: for each row the row that holds its session's final output (itself, for ordinary
            agent loops).
    """

    batch: KVBatchMeta
    records: list[Record | None]
    final_rows: Tensor

    def on(self, batch: KVBatchMeta) -> "RecordedBatch":
        """The same records for the batch as verl's steps have left it.

        Raises:
            RuntimeError: It holds other rows.
        """
        if list(batch.keys) == list(self.batch.keys):
            return RecordedBatch(batch, self.records, self.final_rows)
        known = dict(zip(self.batch.keys, self.records, strict=True))
        if known.keys() != set(batch.keys):
            raise RuntimeError("the rows of a step changed between its old log-probabilities and its advantages")
        return RecordedBatch(batch, [known[key] for key in batch.keys], final_rows(list(batch.keys)))


@dataclass(frozen=True)
class Rows:
    """One training batch with its rewards.

    Attributes:
        recorded: The batch and its records.
        index: `(bs,)` object array of uids.
        nested_mask: `response_mask` as stored, jagged `(bs, response_length)`.
        response_mask: `(bs, response_length)`, padded with 0.
        outcomes: `(bs,)` float64, R.
        is_padding: `(bs,)` bool, verl's synthetic rows.
        step: The trainer's step.
    """

    recorded: RecordedBatch
    index: np.ndarray
    nested_mask: Tensor
    response_mask: Tensor
    outcomes: Tensor
    is_padding: Tensor
    step: int = 0

    @property
    def keys(self) -> list[str]:
        """verl's row keys, `{uid}_{session}_{output}`."""
        return list(self.recorded.batch.keys)

    @property
    def records(self) -> list[Record | None]:
        """See `RecordedBatch`."""
        return self.recorded.records

    @property
    def final_rows(self) -> Tensor:
        """See `RecordedBatch`."""
        return self.recorded.final_rows

    @property
    def lengths(self) -> list[int]:
        """Number of response tokens of each row."""
        lengths: list[int] = self.nested_mask.offsets().diff().tolist()  # type: ignore[attr-defined]
        return lengths

    @property
    def scored(self) -> list[int]:
        """Numbers of the rows that were, or can be, given values."""
        return [row for row, record in enumerate(self.records) if record and record.status is Status.SCORED]

    @cached_property
    def scores(self) -> Tensor:
        """`(bs,)` float64, what the verifier alone gave: R less its shaping."""
        finals = [self.records[row] for row in self.final_rows.tolist()]
        return self.outcomes - torch.tensor([record.shaping if record else 0.0 for record in finals]).double()

    @cached_property
    def groups(self) -> GroupStatistics:
        """Outcomes of each row's group, float64."""
        return group_statistics(self.outcomes, self.index.tolist(), self.final_rows)

    @cached_property
    def score_groups(self) -> GroupStatistics:
        """The same of the verifier's scores."""
        return group_statistics(self.scores, self.index.tolist(), self.final_rows)

    def check_outcomes(self, reward_range: tuple[float, float], penalty: float = 0.0) -> None:
        """Refuse rewards outside the range that values are measured against.

        Args:
            reward_range: `self_value.reward_range`.
            penalty: How far below the range verl's own reward shaping may go.

        Raises:
            ValueError: Names the reward, the row and the setting.
        """
        low, high = reward_range
        slack = 1e-6 * max(abs(low), abs(high))
        # What was added to a score is told apart, so that a penalty does not hide a wrong range.
        lowest, highest = torch.minimum(self.scores, self.outcomes + penalty), torch.maximum(self.scores, self.outcomes)
        outside = ~self.is_padding & ~((lowest >= low - slack) & (highest <= high + slack))
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"reward {self.outcomes[row].item()} of response {self.keys[row]} lies outside "
                f"{PREFIX}.self_value.reward_range=[{low}, {high}]; set the range that your verifier gives, e.g. [-1,1]"
            )

    def segments(self, values: Sequence[Sequence[float]]) -> SegmentBatch:
        """The rows' segments with these values; a row without values is one segment."""
        boundaries = [record.segment_boundaries if record else [] for record in self.records]
        return SegmentBatch.from_rows(boundaries, values, self.outcomes, self.lengths, self.scores)

    def read(self, field: str) -> Sequence[Tensor]:
        """A field of all rows, one tensor each."""
        return read_rows(self.recorded.batch, field)


def read_recorded(batch: KVBatchMeta) -> RecordedBatch:
    """What the agent side knows of each row.

    Raises:
        RuntimeError: Some response could not be verified or measured, or it was never asked for: training on would mean
            wrong credit.
    """
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"])
    finals = final_rows(list(batch.keys))
    records: list[Record | None] = []
    for row, (tag, extra_fields) in enumerate(zip(batch.tags, as_list(data["extra_fields"]), strict=True)):
        needed = not tag.get("is_padding", False) and int(finals[row]) == row
        records.append(_record(batch.keys[row], extra_fields) if needed else None)
    failed = [
        f"{key}: {record.error}"
        for key, record in zip(batch.keys, records, strict=True)
        if record is not None and record.status is Status.FAILED
    ]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(records)} responses could not be verified or scored, and without that their credit "
            f"would be wrong; training stops. First failures: {failed[:3]}"
        )
    return RecordedBatch(batch, records, finals)


def read_rewards(recorded: RecordedBatch, step: int = 0) -> Rows:
    """Read what credit needs of a batch besides its records."""
    batch = recorded.batch
    fields = ["uid", "response_mask", "rm_scores"]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
    return Rows(
        recorded=recorded,
        index=np.array(as_list(data["uid"]), dtype=object),
        nested_mask=data["response_mask"],
        response_mask=data["response_mask"].to_padded_tensor(0),
        outcomes=data["rm_scores"].to_padded_tensor(0.0).sum(dim=1).double(),
        is_padding=torch.tensor([bool(tag.get("is_padding", False)) for tag in batch.tags]),
        step=step,
    )


def write_token_level_rewards(rows: Rows, token_level_rewards: Tensor) -> None:
    """Store redistributed rewards where verl reads rewards from."""
    nested = response_to_nested(token_level_rewards, rows.nested_mask)
    batch = rows.recorded.batch
    fields = TensorDict({"rm_scores": nested}, batch_size=len(batch))
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)


def read_rows(batch: KVBatchMeta, field: str) -> Sequence[Tensor]:
    """A field of a batch, one tensor a row."""
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=[field])
    return list(data[field].unbind())


def put_rows(batch: KVBatchMeta, field: str, rows: Sequence[Tensor]) -> None:
    """Store a tensor a row in a field of the batch."""
    nested = torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)
    fields = TensorDict({field: nested}, batch_size=len(batch))
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)


def clear_copies(recorded: RecordedBatch, fields: Collection[str]) -> None:
    """Empty the payload of rows that have a copy of another row's: padding, and outputs before a session's last."""
    batch = recorded.batch
    copies = [key for key, record in zip(batch.keys, recorded.records, strict=True) if record is None]
    if not copies or not fields:
        return
    nothing = torch.tensor(NOTHING, dtype=torch.int32).expand(len(copies), -1)
    rows = TensorDict({name: nothing.clone() for name in fields}, batch_size=len(copies))
    tq.kv_batch_put(keys=copies, partition_id=batch.partition_id, fields=rows)


def fetching(batch: KVBatchMeta, fields: Collection[str]) -> KVBatchMeta:
    """The batch, whose next readers also fetch these fields."""
    if batch.fields is not None:
        batch.fields = [*batch.fields, *(field for field in fields if field not in batch.fields)]
    return batch


def not_fetching(batch: KVBatchMeta, fields: Collection[str]) -> KVBatchMeta:
    """The batch, whose next readers leave these fields in the queue."""
    if batch.fields is not None:
        batch.fields = [field for field in batch.fields if field not in fields]
    return batch


def as_list(field: Any) -> list[Any]:
    """Values of a non-tensor field: the TransferQueue gives a NonTensorStack, an array or a list subclass."""
    return list(field.tolist() if hasattr(field, "tolist") else field)


def final_rows(keys: list[str]) -> Tensor:
    """For each row the row of its session's last output; keys are `{uid}_{session}_{output}`."""
    last: dict[str, tuple[int, int]] = {}
    sessions = []
    for row, key in enumerate(keys):
        session, _, output = key.rpartition("_")
        sessions.append(session)
        last[session] = max(last.get(session, (-1, -1)), (int(output), row))
    return torch.tensor([last[session][1] for session in sessions], dtype=torch.int64)


def _record(key: str, extra_fields: Any) -> Record:
    try:
        return Record.from_dict(extra_fields[KEY])
    except (KeyError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"response {key} carries no RREDCoT record: its agent loop worker does not derive from "
            "rredcot_verl.agent.worker.RREDCoTAgentLoopWorker, or it comes from an asynchronous checkpoint "
            "of a run without RREDCoT or with another release of it (move the checkpoint's folder transfer_queue away)"
        ) from error
