"""Statistics over a few seeds, against hand-computed and simulated truth."""

import itertools
import math

import numpy as np
import pytest

from rredcot_verl.report.seeds import Curves, isotonic, ratio_to_reach, samples_to_reach, t_interval, t_quantile


def curves(*rows, samples=None):
    accuracy = np.array(rows, dtype=float)
    points = np.arange(accuracy.shape[1]) * 100.0 if samples is None else np.array(samples, dtype=float)
    return Curves(tuple(range(len(rows))), points, accuracy)


# Any printed table of Student's t, two-sided 95 %.
@pytest.mark.parametrize(
    ("num_degrees", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042)]
)
def test_t_quantile(num_degrees, expected):
    assert t_quantile(num_degrees) == pytest.approx(expected, abs=5e-4)


def test_t_interval_by_hand():
    # Mean 2, standard deviation 1, 4.303 / sqrt(3) = 2.484.
    interval = t_interval([1.0, 2.0, 3.0])
    assert (interval["estimate"], interval["num"]) == (2.0, 3)
    assert interval["low"] == pytest.approx(2 - 2.4841, abs=1e-3)
    assert interval["high"] == pytest.approx(2 + 2.4841, abs=1e-3)
    assert t_interval([4.0]) == {"estimate": 4.0, "low": None, "high": None, "num": 1}
    assert t_interval([])["estimate"] is None


class TestCurves:
    def test_smoothing_leaves_no_half_window(self):
        smoothed = curves([0.0, 3.0, 6.0, 0.0]).smoothed(3)
        assert smoothed.accuracy.tolist() == [[pytest.approx(3.0), pytest.approx(3.0)]]
        assert smoothed.samples.tolist() == [pytest.approx(100.0), pytest.approx(200.0)]

    def test_area_weighs_by_samples(self):
        # 100 samples at a mean of 0.5, 300 at 1.
        assert curves([0.0, 1.0, 1.0], samples=[0, 100, 400]).area.tolist() == [pytest.approx(0.875)]
        assert curves([0.25]).area.tolist() == [0.25]

    def test_isotonic_is_the_nearest_of_all(self):
        values = np.array([0.0, 3.0, 1.0, 2.0, 1.0])
        grid = [level / 4 for level in range(13)]
        best = min(
            itertools.combinations_with_replacement(grid, 5),
            key=lambda rising: sum((a - b) ** 2 for a, b in zip(rising, values, strict=True)),
        )
        assert isotonic(values).tolist() == list(best) == [0.0, 1.75, 1.75, 1.75, 1.75]


class TestSamplesToReach:
    def test_straight_between_points(self):
        assert samples_to_reach(np.array([0.0, 100.0, 200.0]), np.array([0.2, 0.4, 0.8]), 0.5) == pytest.approx(125.0)

    def test_a_lucky_point_is_not_reached_and_an_unlucky_one_not_lost(self):
        samples = np.arange(5) * 100.0
        assert samples_to_reach(samples, np.array([0.2, 0.9, 0.3, 0.3, 0.4]), 0.6) == math.inf
        # The points 1 and 2 become one at (0.7 + 0.3) / 2, in their middle.
        assert samples_to_reach(samples, np.array([0.2, 0.7, 0.3, 0.8, 0.9]), 0.5) == pytest.approx(150.0)

    def test_not_reached(self):
        assert samples_to_reach(np.array([0.0, 100.0]), np.array([0.1, 0.2]), 0.3) == math.inf

    def test_what_a_curve_begins_above_took_no_samples(self):
        falling = curves([0.6, 0.5, 0.4, 0.3], [0.5, 0.4, 0.3, 0.2])
        assert samples_to_reach(falling.samples, falling.mean, 0.2) == 0.0
        # A baseline that fell has no gain of which a share could be reached.
        assert ratio_to_reach(falling, falling, lambda _: 0.2)["reason"] == "reached at the start"


class TestRatio:
    def test_by_hand(self):
        # At 0.5 the baseline is after 200, 300 samples, the arm after 100, 200; the mean curves after 250 and 150.
        baseline = curves([0.1, 0.3, 0.5, 0.7], [0.0, 1 / 6, 1 / 3, 0.5])
        arm = curves([0.1, 0.5, 0.9, 1.3], [0.0, 0.25, 0.5, 0.75])
        ratio = ratio_to_reach(arm, baseline, lambda _: 0.5)
        own, other = (samples_to_reach(one.samples, one.mean, 0.5) for one in (arm, baseline))
        assert ratio["estimate"] == pytest.approx(own / other)
        # Leaving one of two seeds out: log(200 / 300), log(100 / 200); pseudo-values and their t interval.
        left = np.log([200 / 300, 100 / 200])
        pseudo = 2 * math.log(own / other) - left
        half = 12.7062 * pseudo.std(ddof=1) / math.sqrt(2)
        assert math.log(ratio["high"] / ratio["estimate"]) == pytest.approx(half, rel=1e-4)
        assert math.log(ratio["estimate"] / ratio["low"]) == pytest.approx(half, rel=1e-4)

    def test_only_common_seeds_count(self):
        baseline = Curves((3, 1), np.array([0.0, 100.0]), np.array([[0.0, 1.0], [0.0, 0.5]]))
        arm = Curves((1, 2), np.array([0.0, 100.0]), np.array([[0.0, 1.0], [0.0, 0.1]]))
        ratio = ratio_to_reach(arm, baseline, lambda _: 0.5)
        assert (ratio["estimate"], ratio["num"], ratio["reason"]) == (0.5, 1, "no interval: a single seed")
        assert ratio_to_reach(arm.of_seeds([2]), baseline, lambda _: 0.5)["reason"] == "no seed in common"

    def test_what_is_not_reached_is_a_bound(self):
        low, high = curves([0.0, 0.2], [0.0, 0.2]), curves([0.0, 0.8], [0.0, 0.8])
        ratio = ratio_to_reach(low, high, lambda _: 0.4)
        assert (ratio["estimate"], ratio["at_least"], ratio["reason"]) == (None, 2.0, "not reached")
        assert ratio_to_reach(high, low, lambda _: 0.4)["reason"] == "the baseline does not reach it"

    def test_no_interval_where_one_seed_carries_the_level(self):
        arm = curves([0.0, 1.0], [0.0, 0.2], [0.0, 0.2])
        ratio = ratio_to_reach(arm, curves([0.0, 1.0], [0.0, 1.0], [0.0, 1.0]), lambda _: 0.4)
        assert ratio["estimate"] == pytest.approx(0.4 / (1.4 / 3) / 0.4)
        assert ratio["low"] is None and "when a seed is left out" in ratio["reason"]

    def test_interval_covers_the_truth(self):
        """Five seeds, problems shared by both arms, noise of sampling, seeds that learn at their own pace."""
        rng, steps = np.random.default_rng(0), np.arange(80)

        def learnt(rate):
            return 0.4 + 0.4 * (1 - np.exp(-steps * rate))

        def run(rate, shared):
            paces = rate * np.exp(rng.normal(0, 0.15, 5))
            rows = np.array([learnt(pace) for pace in paces]) + rng.normal(0, 0.04, (5, 80)) + shared
            return Curves(tuple(range(5)), steps * 128.0, rows).smoothed(11)

        def level(baseline):
            return baseline.mean[0] + 0.75 * (baseline.mean[-1] - baseline.mean[0])

        truth = [Curves((0,), steps * 128.0, learnt(rate)[None]).smoothed(11) for rate in (0.035, 0.02)]
        true = ratio_to_reach(*truth, level)["estimate"]
        assert true == pytest.approx(0.02 / 0.035, rel=0.02)
        shared = rng.normal(0, 0.06, (150, 5, 80))
        found = [ratio_to_reach(run(0.035, noise), run(0.02, noise), level) for noise in shared]
        covered = [one["low"] <= true <= one["high"] for one in found]
        # Three standard errors of 150 draws around 95 %.
        assert 0.90 <= np.mean(covered) <= 1.0
        assert np.median([one["estimate"] for one in found]) == pytest.approx(true, rel=0.05)
