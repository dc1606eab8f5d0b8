"""Rows of a batch: which record belongs to which row, what is stored beside them, and what stops the training."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transfer_queue import KVBatchMeta

from rredcot_verl.core.redistribution import redistribute
from rredcot_verl.passes.protocol import NOTHING
from rredcot_verl.sources.queue import (
    as_list,
    clear_copies,
    fetching,
    final_rows,
    not_fetching,
    put_rows,
    read_rewards,
    write_token_level_rewards,
)
from rredcot_verl.sources.record import COUNTED, KEY, Record, Status
from tests.sources.world import World

# Two outputs of one session, another session, a synthetic row.
KEYS = ["a_b_0_0", "a_b_0_1", "a_b_1_0", "pad-x_0_0"]
SCORED = Record(Status.SCORED, segment_boundaries=[0, 2, 4], payload={"values": [0.25, 0.5]})
RECORDS = [None, SCORED, Record(Status.NO_PROPOSAL), None]


@pytest.fixture
def world(monkeypatch):
    made = World(monkeypatch, RECORDS, KEYS, rewards=[1.0, 1.0, 0.5, 0.0], lengths=[3, 4, 2, 1])
    made.queue.rows["a_b_0_1"]["response_mask"][1] = 0
    made.queue.rows["pad-x_0_0"]["response_mask"][0] = 0
    return made


def test_rows_are_read_with_their_records(world):
    # The synthetic row is made from the first real one: its record is a copy that must not be used.
    rows = world.rows()
    assert rows.records == RECORDS and rows.keys == KEYS and rows.scored == [1]
    assert rows.final_rows.tolist() == [1, 1, 2, 3] and rows.index.tolist() == ["a_b"] * 3 + ["pad-x"]
    assert rows.lengths == [3, 4, 2, 1] and rows.outcomes.tolist() == [1.0, 1.0, 0.5, 0.0]
    assert rows.outcomes.dtype == rows.groups.mean.dtype == torch.float64
    assert rows.groups.mean.tolist() == [0.75, 0.75, 0.75, 0.0]
    assert rows.response_mask.tolist() == [[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert rows.is_padding.tolist() == [False, False, False, True]
    segments = rows.segments([[], [0.25, 0.5], [], []])
    assert segments.scored.tolist() == [False, True, False, False]
    assert segments.segment_boundaries.tolist() == [[0, 3, 3], [0, 2, 4], [0, 2, 2], [0, 1, 1]]
    rewards = redistribute(segments, rows.response_mask)
    assert rewards.tolist() == [[0, 0, 1, 0], [0.5, 0, 0, 0.5], [0, 0.5, 0, 0], [0, 0, 0, 0]]
    write_token_level_rewards(rows, rewards)
    assert world.column("rm_scores") == [[0, 0, 1], [0.5, 0, 0, 0.5], [0, 0.5], [0]]


def test_a_failed_record_stops_the_training(world):
    failed = Record(Status.FAILED, error="TimeoutError: no answer")
    world.queue.rows["a_b_1_0"]["extra_fields"] = {KEY: failed.to_dict()}
    with pytest.raises(
        RuntimeError,
        match="1 of 4 responses could not be verified or scored.*training stops.*a_b_1_0: TimeoutError: no answer",
    ):
        world.recorded()


@pytest.mark.parametrize("missing", [{}, {"other": 1}, None, {KEY: {"status": "planned", "probes": [1]}}])
def test_a_record_that_is_missing_or_of_another_release_names_the_response(world, missing):
    world.queue.rows["a_b_1_0"]["extra_fields"] = missing
    with pytest.raises(RuntimeError, match="response a_b_1_0 carries no RREDCoT record.*another release"):
        world.recorded()


def test_boundaries_that_do_not_fit_the_response_are_refused(world):
    with pytest.raises(ValueError, match="row 1.*response length 4"):
        world.rows().segments([[], [0.25, 0.5, 0.5], [], []])


def test_a_record_survives_the_way_through_plain_containers():
    for status in Status:
        record = Record(status, [0, 2], {"values": [0.5]}, truncated=True, num_probes=3, ready_time=1.0, error="no")
        plain = record.to_dict()
        assert type(plain["status"]) is str and Record.from_dict(plain) == record
    assert set(COUNTED) == set(Status) - {Status.FAILED}


def test_the_records_are_held_for_a_batch_in_another_order(world):
    recorded = world.recorded()
    assert recorded.on(world.batch).records == RECORDS
    order = [2, 3, 1, 0]
    shuffled = KVBatchMeta(
        keys=[KEYS[row] for row in order], tags=[world.batch.tags[row] for row in order], partition_id="train"
    )
    rows = read_rewards(recorded.on(shuffled))
    assert rows.records == [RECORDS[row] for row in order] and rows.final_rows.tolist() == [0, 1, 2, 2]
    assert rows.outcomes.tolist() == [0.5, 0.0, 1.0, 1.0]
    for keys in (KEYS[:3], [*KEYS[:3], "c_0_0"]):
        other = KVBatchMeta(keys=keys, tags=[{}] * len(keys), partition_id="train")
        with pytest.raises(RuntimeError, match="rows of a step changed between its old log-prob"):
            recorded.on(other)


def test_copies_of_a_payload_are_emptied(world):
    fields = ("rredcot_probes", "rredcot_hidden_positions")
    world.put(rredcot_probes=[[5, 6, 7]] * 4, rredcot_hidden_positions=[[1, 2]] * 4)
    clear_copies(world.recorded(), fields)
    nothing = list(NOTHING)
    assert world.column(fields[0]) == [nothing, [5, 6, 7], [5, 6, 7], nothing]
    assert world.column(fields[1]) == [nothing, [1, 2], [1, 2], nothing]
    assert world.queue.rows[KEYS[0]]["rredcot_probes"].dtype == torch.int32
    # Without payloads, or copies, nothing is written.
    before = dict(world.queue.rows[KEYS[0]])
    clear_copies(world.recorded(), ())
    assert world.queue.rows[KEYS[0]] == before


def test_a_tensor_a_row_is_stored_for_its_next_readers(world):
    put_rows(world.batch, "ours", [torch.tensor([float(row)] * (row + 1)) for row in range(4)])
    assert world.column("ours") == [[0], [1, 1], [2, 2, 2], [3] * 4]
    assert [row.tolist() for row in world.rows().read("ours")] == world.column("ours")
    # A batch without names is read whole; one that names its fields names ours, once, until it is read.
    assert fetching(world.batch, ["ours"]).fields is None and not_fetching(world.batch, ["ours"]).fields is None
    world.batch.fields = ["input_ids"]
    assert fetching(fetching(world.batch, ["ours", "more"]), ["ours"]).fields == ["input_ids", "ours", "more"]
    assert not_fetching(world.batch, ["ours", "more", "other"]).fields == ["input_ids"]


def test_final_rows():
    # uid with underscores, outputs in any order, ten or more of them, one session without its first outputs.
    keys = ["u_1_0_2", "u_1_0_10", "u_1_1_0", "u_1_0_9", "v_0_3", "pad_0_0"]
    assert final_rows(keys).tolist() == [1, 1, 2, 1, 4, 5]


def test_as_list():
    assert as_list(np.array(["a", None], dtype=object)) == ["a", None]
    assert as_list([{"a": 1}]) == [{"a": 1}]
    assert as_list(SimpleNamespace(tolist=lambda: ["a"])) == ["a"]
