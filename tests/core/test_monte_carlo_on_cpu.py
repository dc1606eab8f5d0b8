"""Means of sampled outcomes."""

import math
import random
import statistics

import pytest

from rredcot_verl.core.monte_carlo import monte_carlo_value


@pytest.mark.parametrize(
    "outcomes, mean, error",
    [
        ([1.0, 0.0, 0.0, 1.0], 0.5, math.sqrt(1 / 3) / 2),
        ([0.25], 0.25, 0.0),
        ([1.0] * 9, 1.0, 0.0),
        ([-1, 1], 0.0, 1.0),
    ],
)
def test_golden_values(outcomes, mean, error):
    assert monte_carlo_value(outcomes) == pytest.approx((mean, error), abs=1e-12)


def test_it_is_the_textbook_estimate_whatever_the_order():
    random.seed(0)
    outcomes = [random.random() for _ in range(50)]
    value, error = monte_carlo_value(outcomes)
    assert value == pytest.approx(statistics.fmean(outcomes), abs=1e-12)
    assert error == pytest.approx(statistics.stdev(outcomes) / math.sqrt(50), abs=1e-12)
    assert monte_carlo_value(random.sample(outcomes, 50)) == (value, error)


@pytest.mark.parametrize("outcomes", [[], [1.0, float("nan")], [float("inf")]])
def test_what_is_no_outcome_is_refused(outcomes):
    with pytest.raises(ValueError, match="outcome"):
        monte_carlo_value(outcomes)
