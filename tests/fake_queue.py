"""The TransferQueue as a dict of fields, for tests of what the trainer stores beside its rows."""

from collections.abc import Sequence
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tensordict import TensorDict


def stand_in(
    monkeypatch: pytest.MonkeyPatch, modules: Sequence[ModuleType], keys: Sequence[str], traces: Sequence[list[int]]
) -> dict:
    """Give the modules a queue that holds the rows' `input_ids`; returns its fields, which they write to.

    Args:
        monkeypatch: Takes it back after the test.
        modules: Those that import the queue as `tq`.
        keys: The only rows there are.
        traces: Tokens of each row.
    """
    stored = {"input_ids": torch.nested.as_nested_tensor([torch.tensor(t) for t in traces], layout=torch.jagged)}

    def put(keys: Sequence[str], partition_id: str, fields: TensorDict) -> None:
        assert list(keys) == rows and partition_id == "train" and len(fields) == len(rows)
        stored.update(fields.items())

    def get(keys: Sequence[str], partition_id: str, select_fields: Sequence[str]) -> dict:
        assert list(keys) == rows and partition_id == "train"
        return {name: stored[name] for name in select_fields}

    rows = list(keys)
    for module in modules:
        monkeypatch.setattr(module, "tq", SimpleNamespace(kv_batch_put=put, kv_batch_get=get))
    return stored
