"""Means of sampled outcomes, and which states are sampled where not all can be."""

import math
import random
import statistics

import pytest

from rredcot_verl.core.monte_carlo import monte_carlo_value, sampling_order


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


@pytest.mark.parametrize(
    "boundaries, order",
    [
        ([0], []),
        ([0, 7], [0]),
        ([0, 10, 20, 30, 40], [0, 2, 1, 3]),
        # The farthest from all that is taken, and from the end: 50 before 10, whatever their numbers.
        ([0, 10, 12, 14, 50, 100], [0, 4, 3, 1, 2]),
    ],
)
def test_states_are_taken_from_the_middle_out(boundaries, order):
    assert sampling_order(boundaries) == order


@pytest.mark.parametrize("seed", range(5))
def test_what_is_kept_is_spread(seed):
    """Whatever is kept, no boundary that was left out lies farther from it than the kept ones from each other."""
    boundaries = [0, *sorted(random.Random(seed).sample(range(1, 300), 20)), 300]
    order = sampling_order(boundaries)
    assert sorted(order) == list(range(21)) and order[0] == 0
    for count in range(2, 21):
        kept = [boundaries[state] for state in order[:count]] + [300]
        left_out = [boundaries[state] for state in order[count:]]
        apart = min(abs(a - b) for a in kept for b in kept if a != b)
        assert max(min(abs(offset - other) for other in kept) for offset in left_out) <= apart
