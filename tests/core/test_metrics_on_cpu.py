"""Metrics: golden numbers, and names that verl reduces over a cycle as their ending says."""

from types import SimpleNamespace

import pytest
import torch
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
from verl.trainer.ppo.v1.utils import MetricsAggregator

from rredcot_verl.core.metrics import credit_metrics
from rredcot_verl.core.redistribution import SegmentBatch
from rredcot_verl.run.engine_choice import EngineChoice
from rredcot_verl.sources.record import NO_PROPOSAL, SCORED, CreditRecord
from rredcot_verl.trainer.trainer import RREDCoTTrainerMixin

SEGMENTS = SegmentBatch.from_rows(
    [[0, 2, 6], [0, 1, 2, 3], []], [[0.25, 0.5], [0.5, 0.75, 0.25], []], torch.tensor([1.0, 0.0, 1.0]), [6, 3, 4]
)
NUM_TOKENS = torch.tensor([[2, 4, 0], [1, 1, 1], [4, 0, 0]])
WEIGHTS = torch.tensor([[0.5, 1.25, 7.0], [1.5, 1.0, 0.5], [9.0, 9.0, 9.0]])


def test_golden():
    found = credit_metrics(SEGMENTS, NUM_TOKENS, WEIGHTS)
    # d = (0.25, 0.5) and (0.25, -0.5, -0.25); credit mass 1.75. Segment ends at 2/6 and 6/6, and at 1/3, 2/3, 3/3.
    assert found == {
        "segments_per_response/mean": 2.5,
        "start_value/mean": 0.375,
        "end_value/mean": 0.375,
        "end_value_bias/mean": pytest.approx(-0.125),
        "end_value_squared_error/mean": pytest.approx((0.25 + 0.0625) / 2),
        "negative_credit_share/mean": pytest.approx(0.75 / 1.75),
        # Unscored rows and segments without tokens do not count.
        "segment_weight/max": 1.5,
        "end_value_correlation/mean": pytest.approx(1.0),
        "credit_share_first_third/mean": pytest.approx(0.5 / 1.75),
        "credit_share_middle_third/mean": pytest.approx(0.5 / 1.75),
        "credit_share_last_third/mean": pytest.approx(0.75 / 1.75),
    }


def test_no_scored_row_gives_no_metric():
    segments = SegmentBatch.from_rows([[], []], [[], []], torch.tensor([1.0, 0.0]), [3, 4])
    assert credit_metrics(segments, torch.tensor([[3], [4]]), torch.ones(2, 1)) == {}


def test_rows_without_any_spread_have_no_correlation_and_no_nan():
    segments = SegmentBatch.from_rows([[0, 3]] * 2, [[1.0]] * 2, torch.ones(2), [3, 3])
    found = credit_metrics(segments, torch.tensor([[3], [3]]), torch.ones(2, 1))
    assert "end_value_correlation/mean" not in found
    assert all(value == value for value in found.values())


def all_metric_names() -> list[str]:
    records = [
        CreditRecord(SCORED, num_probes=3, num_probe_tokens=30, ready_time=1.0, scored_time=3.5, scoring_seconds=2.0),
        None,
        CreditRecord(NO_PROPOSAL, truncated=True, num_dropped_answers=2, ready_time=2.0, scored_time=2.0),
    ]
    rows = SimpleNamespace(records=records, response_mask=torch.ones(3, 10))
    # Ours stands under verl's own name; a whole trainer is not needed for this method.
    sync = TRAINER_REGISTRY["sync"]
    assert issubclass(sync, RREDCoTTrainerMixin)
    trainer = sync.__new__(sync)
    trainer._engine = EngineChoice("rollout", False, "")
    cost = trainer._cost_metrics(rows, own_seconds=0.25)
    assert cost["timing_s/self_value"] == pytest.approx(1.5 + 0.25)
    assert cost["rredcot/rows_scored/mean"] == cost["rredcot/rows_no_proposal/mean"] == 0.5
    assert cost["rredcot/rows_truncated/mean"] == 0.5
    assert cost["rredcot/probe_tokens_per_response_token/mean"] == 1.0
    assert cost["rredcot/dropped_answers/sum"] == 2.0
    credit = [f"rredcot/{name}" for name in credit_metrics(SEGMENTS, NUM_TOKENS, WEIGHTS)]
    return [*cost, *credit, "rredcot/return_error/max"]


def test_verl_reduces_every_metric_as_its_name_says():
    rules = {"mean": "weighted_avg", "max": "max", "sum": "sum", "self_value": "time_sum"}
    aggregator = MetricsAggregator()
    names = all_metric_names()
    assert len(names) == len(set(names)) > 20
    found = {name: aggregator._get_aggregation_type(name) for name in names}
    assert found == {name: rules[name.rsplit("/", 1)[1]] for name in names}
    # The rule is by substring: this is what the names must avoid.
    assert aggregator._get_aggregation_type("rredcot/terminal_value/mean") == "min"
