"""The TransferQueue as a dict of rows, for tests of what is stored beside verl's own fields."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from transfer_queue import KVBatchMeta


class FakeQueue:
    """Rows by key, each a dict of fields.

    Attributes:
        rows: What is stored.
        reads: The fields asked for, one tuple a call.
    """

    def __init__(self, rows: dict[str, dict[str, Any]]) -> None:
        self.rows = rows
        self.reads: list[tuple[str, ...]] = []

    def stand_in(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> "FakeQueue":
        """Take the queue's place in modules that import it as `tq`, for one test."""
        for module in modules:
            monkeypatch.setattr(module, "tq", self)
        return self

    def kv_batch_get(self, keys: Sequence[str], partition_id: str, select_fields: Sequence[str]) -> TensorDict:
        """Fields that some row has."""
        assert partition_id == "train"
        self.reads.append(tuple(select_fields))
        known = [name for name in select_fields if any(name in self.rows[key] for key in keys)]
        columns = {name: _column([self.rows[key][name] for key in keys]) for name in known}
        return TensorDict(columns, batch_size=len(keys))

    def kv_batch_put(self, keys: Sequence[str], partition_id: str, fields: TensorDict) -> KVBatchMeta:
        """Fields of some rows; returns these rows, with the names of all that they hold."""
        assert partition_id == "train" and len(fields) == len(keys)
        for name, column in fields.items():
            for key, value in zip(keys, column.unbind(), strict=True):
                self.rows[key][name] = value.clone()
        names = sorted({name for key in keys for name in self.rows[key]})
        return KVBatchMeta(keys=list(keys), tags=[{} for _ in keys], partition_id=partition_id, fields=names)


def _column(values: list[Any]) -> Any:
    if isinstance(values[0], torch.Tensor):
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)
    return NonTensorStack(*values)
