"""Rows of a batch: which record belongs to which row, and what stops the training."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rredcot_verl.config.schema import parse
from rredcot_verl.core.redistribution import redistribute
from rredcot_verl.sources.record import FAILED, KEY, NO_PROPOSAL, SCORED, CreditRecord
from rredcot_verl.trainer import batch as batch_module
from rredcot_verl.trainer.batch import Rows, _final_rows, as_list, check_outcomes, read_records, read_rows

KEYS = ["a_b_0_0", "a_b_0_1", "a_b_1_0", "pad-x_0_0"]


def jagged(rows, dtype):
    return torch.nested.nested_tensor([torch.tensor(row, dtype=dtype) for row in rows], layout=torch.jagged)


def stored(monkeypatch, *, records, tags=None):
    """A batch as the TransferQueue gives it back: two outputs of one session, another session, a synthetic row."""
    data = {
        "uid": np.array(["a_b", "a_b", "a_b", "pad-x"], dtype=object),
        "response_mask": jagged([[1, 1, 1], [1, 0, 1, 1], [1, 1], [0]], torch.int64),
        "rm_scores": jagged([[0, 0, 1], [0, 0, 0, 1], [0, 0.5], [0]], torch.float32),
        "extra_fields": records,
    }
    monkeypatch.setattr(batch_module.tq, "kv_batch_get", lambda **kwargs: data)
    tags = tags or [{}, {}, {}, {"is_padding": True}]
    return SimpleNamespace(keys=KEYS, partition_id="train", tags=tags)


def record(**fields) -> dict:
    return {KEY: CreditRecord(**fields).to_dict(), "other": 1}


SCORED_RECORD = record(status=SCORED, segment_boundaries=[0, 2, 4], self_values=[0.25, 0.5])
OTHER_RECORD = record(status=NO_PROPOSAL)


def test_rows_are_read_with_their_records(monkeypatch):
    # The synthetic row is made from the first real one: its record is a copy that must not be used.
    batch = stored(monkeypatch, records=[{}, SCORED_RECORD, OTHER_RECORD, SCORED_RECORD])
    rows = read_rows(batch, read_records(batch))
    assert [r and r.status for r in rows.records] == [None, SCORED, NO_PROPOSAL, None]
    assert rows.final_rows.tolist() == [1, 1, 2, 3]
    assert rows.lengths == [3, 4, 2, 1] and rows.outcomes.tolist() == [1.0, 1.0, 0.5, 0.0]
    assert rows.response_mask.tolist() == [[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert rows.is_padding.tolist() == [False, False, False, True]
    segments = rows.segments()
    assert segments.scored.tolist() == [False, True, False, False]
    assert segments.segment_boundaries.tolist() == [[0, 3, 3], [0, 2, 4], [0, 2, 2], [0, 1, 1]]
    rewards = redistribute(segments, rows.response_mask)
    assert rewards.tolist() == [[0, 0, 1, 0], [0.5, 0, 0, 0.5], [0, 0.5, 0, 0], [0, 0, 0, 0]]


def test_a_failed_record_stops_the_training(monkeypatch):
    failed = record(status=FAILED, error="TimeoutError: no answer")
    with pytest.raises(
        RuntimeError,
        match="1 of 4 responses could not be verified or scored.*training stops.*a_b_1_0: TimeoutError: no answer",
    ):
        read_records(stored(monkeypatch, records=[{}, SCORED_RECORD, failed, {}]))


@pytest.mark.parametrize("missing", [{}, {"other": 1}, None])
def test_a_missing_record_names_the_response(monkeypatch, missing):
    with pytest.raises(RuntimeError, match="response a_b_1_0 carries no RREDCoT record"):
        read_records(stored(monkeypatch, records=[{}, SCORED_RECORD, missing, {}]))


def test_boundaries_that_do_not_fit_the_response_are_refused(monkeypatch):
    wrong = record(status=SCORED, segment_boundaries=[0, 2, 5], self_values=[0.25, 0.5])
    batch = stored(monkeypatch, records=[{}, wrong, OTHER_RECORD, {}])
    rows = read_rows(batch, read_records(batch))
    with pytest.raises(ValueError, match="row 1.*response length 4"):
        rows.segments()


def test_a_record_survives_the_way_through_plain_containers():
    before = CreditRecord(SCORED, [0, 2], [0.5], truncated=True, num_probes=3, ready_time=1.0, error=None)
    assert CreditRecord(**before.to_dict()) == before


def test_final_rows():
    # uid with underscores, outputs in any order, ten or more of them, one session without its first outputs.
    keys = ["u_1_0_2", "u_1_0_10", "u_1_1_0", "u_1_0_9", "v_0_3", "pad_0_0"]
    assert _final_rows(keys).tolist() == [1, 1, 2, 1, 4, 5]


def rows_with(outcomes, padding=None) -> Rows:
    number = len(outcomes)
    return Rows(
        keys=[f"u_{n}_0" for n in range(number)],
        index=np.array(["u"] * number, dtype=object),
        nested_mask=torch.empty(0),
        response_mask=torch.ones(number, 2),
        lengths=[2] * number,
        outcomes=torch.tensor(outcomes, dtype=torch.float64),
        final_rows=torch.arange(number),
        records=[None] * number,
        is_padding=torch.tensor(padding or [False] * number),
    )


def test_outcomes_outside_the_range_are_named():
    settings = parse({})
    check_outcomes(rows_with([0.0, 1.0, 0.5, 1.0 + 1e-7]), settings)
    for bad in (-1.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"reward {bad} of response u_1_0 .*reward_range=\[0.0, 1.0\]"):
            check_outcomes(rows_with([0.0, bad]), settings)
    check_outcomes(rows_with([-1.0, 1.0]), parse({"self_value": {"reward_range": [-1, 1]}}))
    # verl's synthetic rows have reward 0, whatever the verifier's range.
    check_outcomes(rows_with([1.0, 0.0], [False, True]), parse({"self_value": {"reward_range": [0.5, 1]}}))


def test_as_list():
    assert as_list(np.array(["a", None], dtype=object)) == ["a", None]
    assert as_list([{"a": 1}]) == [{"a": 1}]


def values_of(monkeypatch, source: str, smoothing: float = 0.0, **fields) -> list[float]:
    mine = record(status=SCORED, segment_boundaries=[0, 1, 2, 4], **fields)
    batch = stored(monkeypatch, records=[{}, mine, OTHER_RECORD, mine])
    return read_rows(batch, read_records(batch)).segments(source, smoothing).self_values[1].tolist()


def test_values_by_source(monkeypatch):
    probabilities = {"self_values": [0.25, 0.75, 0.5]}
    assert values_of(monkeypatch, "rredcot", **probabilities) == [0.25, 0.75, 0.5, 1.0]
    assert values_of(monkeypatch, "vps", **probabilities) == [0.25, 0.75, 0.5, 1.0]
    assert values_of(monkeypatch, "mig", **probabilities) == [0.25, 0.75, 0.75, 1.0]
    # The session's final rewards are 1 and 0.5: b = 0.75, and the outcome 1 is 0.25 above it.
    shares = values_of(monkeypatch, "leave_one_out", weights=[1.0, 0.0, 3.0])
    assert shares == pytest.approx([0.75, 0.8125, 0.8125, 1.0])
    assert values_of(monkeypatch, "leave_one_out", weights=[0.0, 0.0, 0.0]) == [0.0, 1.0]


def test_smoothing_lets_the_outcome_in_only_where_it_is_the_end_of_the_values(monkeypatch):
    probabilities = {"self_values": [0.25, 0.75, 0.5]}
    assert values_of(monkeypatch, "rredcot", 0.5, **probabilities) == [0.25, 0.5625, 0.6875, 1.0]
    assert values_of(monkeypatch, "vps", 0.5, **probabilities) == [0.25, 0.5625, 0.5625, 1.0]
