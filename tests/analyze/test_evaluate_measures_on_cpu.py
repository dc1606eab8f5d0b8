"""The measures on measurements whose truth is known (`synthetic`)."""

import dataclasses

import numpy as np
import pytest

from rredcot_verl.analyze import wrong_lines
from rredcot_verl.analyze.comparison import Comparison
from rredcot_verl.analyze.estimators import PROBES, methods_from, weighed
from rredcot_verl.analyze.measures import FLUENCY, agreement, calibration_curve
from rredcot_verl.analyze.method_values import Evidence, Method
from rredcot_verl.analyze.records import CuttingRecord, Measurements, RolloutRecord, TraceRecord
from rredcot_verl.analyze.regressions import fit
from rredcot_verl.analyze.statistics import Resamples
from rredcot_verl.analyze.trace_table import MonteCarloValues, make_table, num_first_rollouts
from tests.analyze.synthetic import CUTTING, write

ONE = Resamples.draw(1, 0, seed=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    # Few continuations: the noise of the gold is as large as what is measured.
    return write(tmp_path_factory.mktemp("world") / "m", num_groups=80, num_rollouts=12)


@pytest.fixture(scope="module")
def table(world):
    return make_table(world.load(), CUTTING, Resamples.draw(80, 300, seed=0))


@pytest.fixture(scope="module")
def truth(world, table):
    values = np.full(table.is_state.shape, np.nan)
    for row, own in enumerate(world.values):
        values[row, : len(own)] = own
    return values


def _everyone(table):
    return np.ones(len(table.traces), dtype=bool)


def _inside(measured, value):
    found = measured.interval()
    return found["low"] <= value <= found["high"]


def test_squared_error_is_that_to_the_truth(table, truth):
    off = 0.15 * np.sin(np.arange(truth.size)).reshape(truth.shape) + 0.1
    measured = agreement(table, truth + off, table.monte_carlo, _everyone(table), names=("mse", "bias"))
    states = table.is_state
    assert _inside(measured["mse"], (off[states] ** 2).mean()) and _inside(measured["bias"], off[states].mean())
    raw = ((truth + off - table.monte_carlo.values)[states] ** 2).mean()
    assert raw > measured["mse"].interval()["high"], "the gold's own variance would have been counted"


def test_true_values_reach_the_ceiling_and_are_calibrated(world, table, truth):
    everyone = _everyone(table)
    measured = agreement(table, truth, table.monte_carlo, everyone)
    assert abs(measured["mse"].samples[0]) < 0.003
    states = table.is_state
    # The outcome of a trace is drawn once for all its states, so only a state's own expectation is known.
    assert _inside(measured["brier"], (truth * (1 - truth))[states].mean())
    assert measured["ece"].samples[0] < 0.08
    gold = Comparison(Evidence(world.load(), table)).gold()
    for name in ("spearman_v",):
        ceiling = gold["ceiling"][name]
        assert ceiling["estimate"] == pytest.approx(measured[name].samples[0], abs=0.05)
        assert gold["split_half"][name]["estimate"] < ceiling["estimate"]
    assert gold["noise"] == pytest.approx((truth * (1 - truth))[states].mean() / 12, rel=0.15)
    assert gold["num_rollouts"] == {"min": 12, "mean": 12.0, "max": 12}


def test_calibration_curve_counts_every_state(table, truth):
    curve = calibration_curve(table, truth, _everyone(table))
    assert sum(row["num_states"] for row in curve) == table.is_state.sum()
    for row in curve:
        assert row["low"] <= row["mean_value"] <= row["high"]
    full = [row for row in curve if row["num_states"] > 30]
    assert all(row["outcome"]["low"] - 0.1 < row["mean_value"] < row["outcome"]["high"] + 0.1 for row in full)


def test_monte_carlo_is_not_compared_with_its_own_continuations():
    trace = TraceRecord(0, "p", "", "ab", [1], [1, 2], [], 1.0)
    cut = CuttingRecord(0, "c", [0, 1, 2], [0, 1, 2])
    rollouts = [RolloutRecord(0, offset, [1.0] * 9 + [0.0] * 11, 2.0, 40) for offset in (0, 1)]
    measurements = Measurements(None, {}, [trace], [cut], rollouts)
    table = make_table(measurements, "c", ONE)
    (method,) = methods_from(Evidence(measurements, table))
    assert method.values.tolist() == [[1.0, 1.0]] and method.against == "rest"
    assert table.other_rollouts.values.tolist() == [[0.0, 0.0]] and table.other_rollouts.num_rollouts.tolist() == [
        [11, 11]
    ]
    assert table.monte_carlo.values.tolist() == [[0.45, 0.45]]
    # Nine of twenty continuations, at two states.
    assert method.seconds.tolist() == pytest.approx([2 * 2.0 * 9 / 20])
    assert [num_first_rollouts(n) for n in (0, 1, 2, 12, 18, 64)] == [0, 0, 1, 6, 9, 9]


def test_monte_carlo_error_is_that_of_a_mean(world, table, truth):
    (method,) = methods_from(Evidence(world.load(), table))
    measured = agreement(table, method.values, table.other_rollouts, _everyone(table), names=("mse", "bias"))
    expected = (truth * (1 - truth))[table.is_state].mean() / 6
    assert _inside(measured["mse"], expected) and _inside(measured["bias"], 0.0)


def test_the_outcome_does_not_enter_the_correlation_of_d(table):
    rng = np.random.default_rng(2)
    noise = np.where(table.is_state, rng.random(table.is_state.shape), np.nan)
    # A good last value: d_K = R - v_{K-1} is then that of the gold, while the others are noise.
    rows = np.arange(len(table.traces))
    noise[rows, table.num_segments - 1] = table.monte_carlo.values[rows, table.num_segments - 1]
    measured = agreement(table, noise, table.monte_carlo, _everyone(table))
    assert measured["spearman_d"].samples[0] < 0.35
    assert measured["spearman_d_last"].samples[0] > measured["spearman_d"].samples[0] + 0.05
    assert measured["spearman_d_last"].num == table.num_segments.sum()
    assert measured["spearman_d"].num == (table.num_segments - 1).sum()


def test_thirds_share_the_states(table, truth):
    measured = agreement(table, truth, table.monte_carlo, _everyone(table))
    for what, whole in (("v", "spearman_v"), ("d", "spearman_d")):
        parts = [measured[f"spearman_{what}_{third}"].num for third in ("early", "middle", "late")]
        assert sum(parts) == measured[whole].num and all(parts)


def test_what_knows_the_outcome_is_no_forecast(world, table):
    comparison = Comparison(Evidence(world.load(), table))
    entry = comparison.entry(weighed(Evidence(world.load(), table))[0])
    assert entry["calibration"] is None
    assert entry["measures"]["brier"]["estimate"] is None and "outcome" in entry["measures"]["brier"]["reason"]
    assert entry["measures"]["spearman_v"]["estimate"] is not None


def test_credit_that_echoes_fluency_is_told(world):
    """The log-probabilities of a segment say what one method credits, and nothing of another."""
    measurements, rng = world.load(), np.random.default_rng(3)
    measurements.traces[:] = [
        dataclasses.replace(trace, log_probs=rng.normal(size=len(trace.response_ids)).tolist())
        for trace in measurements.traces
    ]
    table = make_table(measurements, CUTTING, Resamples.draw(80, 50, seed=0))
    mean = np.array([np.mean(trace.log_probs[5:10]) for trace in table.traces])
    assert table.fluency[:, 1] == pytest.approx(mean)
    echo = np.cumsum(np.where(table.is_state, np.nan_to_num(table.fluency), 0.0), axis=1)
    echo = np.where(table.is_state, np.concatenate([np.zeros((len(echo), 1)), echo[:, :-1]], axis=1), np.nan)
    for values, expected in ((echo, 1.0), (np.where(table.is_state, rng.random(echo.shape), np.nan), 0.0)):
        found = agreement(table, values, table.gold, _everyone(table), names=FLUENCY)
        for name in FLUENCY:
            assert found[name].samples[0] == pytest.approx(expected, abs=0.1), name
    assert found["fluency"].num == table.is_inner.sum()


def test_methods_from_records(world, table):
    methods = {method.name: method for method in methods_from(Evidence(world.load(), table), PROBES)}
    assert set(methods) == {
        *(f"{form}:{which}" for form in ("joint", "geometric") for which in ("reference", "group", "union")),
        "normalized:group", "normalized:union", "vps", "mig",
    }  # fmt: skip
    joint, vps, mig = (methods[name].segment_rewards(table) for name in ("joint:reference", "vps", "mig"))
    pinned = joint.sum(axis=1) + methods["joint:reference"].values[:, 0]
    assert pinned == pytest.approx(table.rewards), "v_0 + sum of d = R"
    inner = table.is_inner
    assert (mig[inner] >= 0).all() and (vps[inner] < 0).any()
    assert (methods["joint:group"].values[table.is_state] == 0).all(), "the group's answer is useless here"
    # The null at the first state is a probability of 0: the other answer has all the mass.
    assert (methods["normalized:union"].values[:, 0] == 1).all()
    attribution = weighed(Evidence(world.load(), table))[0]
    mean = np.bincount(table.groups, table.rewards)[table.groups] / 4
    assert attribution.values[:, 0] == pytest.approx(mean)


def test_a_trace_whose_weights_are_nothing_has_no_values(world):
    measurements = world.load()
    measurements.weights[0] = dataclasses.replace(
        measurements.weights[0], weights=[0.0] * len(measurements.weights[0].weights)
    )
    table = make_table(measurements, CUTTING, Resamples.draw(80, 1, seed=0))
    method = next(m for m in weighed(Evidence(measurements, table)) if m.name == measurements.weights[0].method)
    assert method.covers(table).tolist() == [False] + [True] * (len(table.traces) - 1)


def test_regressions_know_what_their_features_know(world, table, truth):
    everyone = _everyone(table)
    hidden = Evidence(world.load(), table).hidden
    probe = next(m for m in methods_from(Evidence(world.load(), table), PROBES) if m.name == "joint:reference")
    values = {
        "joint": probe.values,
        "calibrated": fit(table, probe=probe.values)[0],
        "poor layer": fit(table, hidden=hidden[-2])[0],
        "good layer": fit(table, hidden=hidden[-1])[0],
    }
    error = {
        name: agreement(table, given, table.monte_carlo, everyone, names=("mse",))["mse"]
        for name, given in values.items()
    }
    for better, worse in (("calibrated", "joint"), ("good layer", "poor layer")):
        assert error[better].minus(error[worse]).interval()["high"] < 0, (better, worse)


def test_states_without_gold_are_left_out(table, truth):
    values = table.monte_carlo.values.copy()
    values[::2, 1] = np.nan
    gold = MonteCarloValues(values, table.monte_carlo.noise, table.monte_carlo.num_rollouts)
    measured = agreement(table, truth, gold, _everyone(table), names=("spearman_v", "spearman_d", "mse"))
    num_missing = len(values[::2])
    assert measured["spearman_v"].num == table.is_state.sum() - num_missing
    # A difference needs both of its ends.
    assert measured["spearman_d"].num == table.is_inner.sum() - 2 * num_missing
    assert measured["mse"].num == measured["spearman_v"].num


class TestBlame:
    @pytest.fixture(scope="class")
    def wrong(self, table):
        """Rows with a wrong segment, and which."""
        rows = np.nonzero(table.wrong_segments >= 0)[0]
        return rows, table.wrong_segments[rows]

    def test_finds_the_segments(self, world, table, wrong):
        known = {row: k for row, k in enumerate(world.wrong) if k is not None and table.failed[row]}
        assert dict(zip(*(each.tolist() for each in wrong), strict=True)) == known
        assert (table.failed & table.lines_checked).sum() == table.failed.sum()

    def test_a_line_belongs_to_the_segment_it_ends_in(self):
        trace = TraceRecord(0, "p", "", "one two\nrest", [1], [1, 2, 3], [], 0.0, None, None, 0, 8, True)
        measurements = Measurements(None, {}, [trace], [CuttingRecord(0, "c", [0, 1, 2, 3], [0, 4, 8, 12])])
        found = make_table(measurements, "c", ONE).wrong_segments
        assert found.tolist() == [1], "the line break and what follows it do not count"

    def test_exact_blame_is_perfect(self, table, wrong):
        credit = np.zeros(table.is_state.shape)
        credit[wrong] = -1.0
        found = wrong_lines.blame(table, credit, _everyone(table))
        assert [found[name].samples[0] for name in ("top1", "rank", "auc")] == [1.0, 1.0, 1.0]
        worst = wrong_lines.blame(table, -credit, _everyone(table))
        mean_segments = table.num_segments[wrong[0]].mean()
        assert [worst[name].samples[0] for name in ("top1", "rank", "auc")] == pytest.approx([0.0, mean_segments, 0.0])

    def test_equal_credit_is_chance(self, table, wrong):
        rules = wrong_lines.chance(table)
        num = table.num_segments[wrong[0]]
        assert rules["chance"]["top1"].samples[0] == pytest.approx((1 / num).mean())
        assert rules["chance"]["rank"].samples[0] == pytest.approx(((num + 1) / 2).mean())
        assert rules["chance"]["auc"].samples[0] == 0.5
        assert rules["first_segment"]["top1"].samples[0] == pytest.approx((wrong[1] == 0).mean())
        assert rules["last_segment"]["top1"].samples[0] == pytest.approx((wrong[1] == num - 1).mean())

    def test_rounding_does_not_decide(self, table, wrong):
        noise = 1e-12 * np.random.default_rng(0).normal(size=table.is_state.shape)
        found = wrong_lines.blame(table, noise, _everyone(table))
        assert found["auc"].samples[0] == 0.5

    def test_true_values_find_the_wrong_line(self, table, wrong, truth):
        method = Method("truth", "probe", "", truth)
        found = wrong_lines.blame(table, method.segment_rewards(table), method.covers(table))
        assert found["top1"].samples[0] > 0.99

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"always_solved": True}, "no failed trace"),
            ({"lines": False}, "the task cannot check lines"),
        ],
    )
    def test_says_why_there_is_none(self, tmp_path, options, reason):
        measurements = write(tmp_path / "m", num_groups=3, **options).load()
        rules = wrong_lines.chance(make_table(measurements, CUTTING, Resamples.draw(3, 10, seed=0)))
        assert rules["chance"]["top1"].interval()["reason"] == reason
