"""Metrics of credit: golden numbers, and batches that have none."""

import pytest
import torch

from rredcot_verl.core.metrics import credit_metrics
from rredcot_verl.core.redistribution import SegmentBatch

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
