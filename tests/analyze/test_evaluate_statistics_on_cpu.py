"""The statistics: each against a direct computation on the resampled items, and the intervals against the truth."""

import numpy as np
import pytest

from rredcot_verl.analyze.statistics import Measured, Resamples, row_correlation, within_ranks

RNG = np.random.default_rng(5)
GROUPS = RNG.integers(0, 12, 90)
X = RNG.normal(size=90)
# Rounded, so that there are many ties.
Y = np.round(X + RNG.normal(size=90))
RESAMPLES = Resamples.draw(12, 40, seed=3)


def _mean_ranks(numbers):
    return np.array([(numbers < x).sum() + ((numbers == x).sum() + 1) / 2 for x in numbers])


def _drawn(row):
    """The items of one resample, each as often as its group was drawn."""
    return np.repeat(np.arange(len(X)), RESAMPLES.counts[row].astype(int)[GROUPS])


def _spearman(x, y):
    return np.corrcoef(_mean_ranks(x), _mean_ranks(y))[0, 1]


def _auc(score, positive):
    pairs = score[positive][:, None] - score[~positive][None, :]
    return ((pairs > 0) + 0.5 * (pairs == 0)).mean()


@pytest.mark.parametrize(
    ("ours", "direct"),
    [
        (RESAMPLES.mean(X, GROUPS), lambda drawn: X[drawn].mean()),
        (RESAMPLES.spearman(X, Y, GROUPS), lambda drawn: _spearman(X[drawn], Y[drawn])),
        (RESAMPLES.auc(Y, X > 0.3, GROUPS), lambda drawn: _auc(Y[drawn], (X > 0.3)[drawn])),
    ],
    ids=["mean", "spearman", "auc"],
)
def test_statistic_is_that_of_the_items_drawn(ours, direct):
    assert ours == pytest.approx([direct(_drawn(row)) for row in range(len(RESAMPLES.counts))], abs=1e-10)


def test_first_is_the_estimate_and_seeds_decide_the_rest():
    assert (RESAMPLES.counts[0] == 1).all() and (RESAMPLES.counts.sum(axis=1) == 12).all()
    assert (Resamples.draw(12, 40, seed=3).counts == RESAMPLES.counts).all()
    assert (Resamples.draw(12, 40, seed=4).counts != RESAMPLES.counts).any()


def test_correlations_without_spread_are_not_numbers():
    flat = np.full(90, 0.1) + 1e-17
    assert np.isnan(RESAMPLES.spearman(flat, X, GROUPS)).all()
    assert np.isnan(RESAMPLES.spearman(X, flat, GROUPS)).all()
    empty = np.zeros(0)
    assert np.isnan(RESAMPLES.spearman(empty, empty, empty.astype(int))).all()


def test_blocks_do_not_change_a_statistic(monkeypatch):
    whole = RESAMPLES.spearman(X, Y, GROUPS)
    monkeypatch.setattr("rredcot_verl.analyze.statistics.BLOCK", 200)
    assert RESAMPLES.spearman(X, Y, GROUPS) == pytest.approx(whole, abs=1e-14)


def test_intervals_cover_the_truth_where_items_of_a_prompt_agree():
    rng = np.random.default_rng(0)
    num_groups, each, repeats = 40, 10, 300
    groups = np.repeat(np.arange(num_groups), each)
    covered = {"prompts": 0, "items": 0}
    for repeat in range(repeats):
        numbers = rng.normal(size=num_groups)[groups] + 0.3 * rng.normal(size=len(groups))
        for what, labels, count in (("prompts", groups, num_groups), ("items", np.arange(len(groups)), len(groups))):
            drawn = Measured.of(Resamples.draw(count, 200, seed=repeat).mean(numbers, labels), labels).interval()
            covered[what] += drawn["low"] <= 0.0 <= drawn["high"]
    assert 0.89 < covered["prompts"] / repeats < 0.985
    # Drawing items instead of prompts is far too sure of itself.
    assert covered["items"] / repeats < 0.6


def test_differences_are_paired():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(30), 4)
    easy = rng.normal(size=30)[groups]
    one, two = easy + 0.1 * rng.normal(size=120), easy + 0.2 + 0.1 * rng.normal(size=120)
    resamples = Resamples.draw(30, 500, seed=0)
    first, second = (Measured.of(resamples.mean(numbers, groups), groups) for numbers in (one, two))
    alone, difference = first.interval(), second.minus(first).interval()
    assert difference["low"] > 0.1 and difference["high"] < 0.3
    assert difference["high"] - difference["low"] < 0.25 * (alone["high"] - alone["low"])


def test_correlation_within_rows():
    gold = np.array([[1, 2, 3, 4], [1, 2, 3, 9], [5, 5, 5, 9], [1, 2, 9, 9], [2, 1, 3, 0.0]])
    values = np.array([[1, 2, 3, 9], [7, 7, 7, 9], [1, 2, 3, 9], [1, 2, 9, 9], [1, 2, 3, 0.0]])
    valid = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=bool)
    found = row_correlation(within_ranks(values, valid), within_ranks(gold, valid), valid)
    assert found[0] == pytest.approx(1.0)
    assert found[1] == 0.0, "a method that orders nothing scores 0"
    assert np.isnan(found[2]) and np.isnan(found[3]), "a flat gold and two states say nothing"
    assert found[4] == pytest.approx(0.5)
    ranks = within_ranks(np.array([[3.0, 1.0, 3.0, -7.0]]), np.array([[True, True, True, False]]))
    assert ranks.tolist() == [[2.5, 1.0, 2.5, 0.0]]


@pytest.mark.parametrize(
    ("samples", "num", "num_groups", "reason"),
    [
        (np.full(11, np.nan), 5, 3, "nothing varies"),
        (np.full(11, np.nan), 0, 0, "nothing to measure it on"),
        (np.ones(11), 5, 1, "no interval: a single prompt"),
        (np.r_[1.0, np.full(10, np.nan)], 5, 3, "no interval: not defined on too many resamples"),
    ],
)
def test_what_cannot_be_said_is_null_with_its_reason(samples, num, num_groups, reason):
    found = Measured(samples, num, num_groups).interval()
    assert found["low"] is None and found["high"] is None and found["reason"] == reason
    assert (found["estimate"] is None) == bool(np.isnan(samples[0]))
