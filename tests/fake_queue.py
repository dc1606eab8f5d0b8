"""The TransferQueue as a dict of rows, for tests of what is stored beside verl's own fields."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict


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

    def kv_batch_get(self, keys: Sequence[str], partition_id: str, select_fields: Sequence[str]) -> dict[str, Any]:
        """Fields that some row has: tensors as a nested tensor, anything else as an array of objects."""
        assert partition_id == "train"
        self.reads.append(tuple(select_fields))
        known = [name for name in select_fields if any(name in self.rows[key] for key in keys)]
        return {name: _column([self.rows[key][name] for key in keys]) for name in known}

    def kv_batch_put(self, keys: Sequence[str], partition_id: str, fields: TensorDict) -> None:
        """Fields of some rows."""
        assert partition_id == "train" and len(fields) == len(keys)
        for name, column in fields.items():
            for key, value in zip(keys, column.unbind(), strict=True):
                self.rows[key][name] = value.clone()


def _column(values: list[Any]) -> Any:
    if isinstance(values[0], torch.Tensor):
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column
