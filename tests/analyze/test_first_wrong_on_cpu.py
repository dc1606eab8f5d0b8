"""The prediction of the first wrong step, the choice of its threshold, and its scores."""

import numpy as np
import pytest

from rredcot_verl.analyze.first_wrong import Windows, choose_threshold, first_above, harmonic, largest_above

NOT = -np.inf


def predict_first(scores, threshold):
    """Told step by step, as a second way."""
    return next((k for k, score in enumerate(scores) if score > threshold), -1)


def predict_largest(scores, threshold):
    k = int(np.argmax(scores))
    return k if scores[k] > threshold else -1


@pytest.mark.parametrize(("windows_of", "predict"), [(first_above, predict_first), (largest_above, predict_largest)])
def test_a_window_holds_the_thresholds_at_which_the_prediction_is_right(windows_of, predict):
    rng = np.random.default_rng(0)
    num_steps = rng.integers(1, 6, size=200)
    # Few distinct numbers, so that ties occur.
    scores = np.where(np.arange(5) < num_steps[:, None], rng.integers(-2, 3, size=(200, 5)) / 4, NOT)
    labels = np.array([rng.integers(-1, num) for num in num_steps])
    windows = windows_of(scores, labels)
    for threshold in (-1.0, -0.5, -0.3, 0.0, 0.1, 0.25, 0.5, 0.7):
        expected = [predict(row[:num], threshold) for row, num in zip(scores, num_steps, strict=True)]
        assert windows.holds(np.full(200, threshold)).tolist() == (np.array(expected) == labels).tolist()


SCORES = np.array(
    [
        [0.1, 0.4, 0.6],  # Wrong from step 1: 0.1 <= t < 0.4.
        [0.3, 0.2, NOT],  # Wrong from step 0: t < 0.3.
        [0.5, 0.9, NOT],  # Wrong from step 1: 0.5 <= t < 0.9.
        [0.0, 0.2, 0.1],  # Right: 0.2 <= t.
        [0.6, NOT, NOT],  # Right: 0.6 <= t.
    ]
)
FIRST_WRONG = np.array([1, 0, 1, -1, -1])


def test_windows_by_hand():
    windows = first_above(SCORES, FIRST_WRONG)
    assert windows.low.tolist() == [0.1, NOT, 0.5, 0.2, 0.6]
    assert windows.high.tolist() == [0.4, 0.3, 0.9, np.inf, np.inf]
    largest = largest_above(SCORES, FIRST_WRONG)
    # The largest score of the first trace is not at its wrong step: no threshold is right.
    assert (largest.low.tolist(), largest.high.tolist()) == (
        [NOT, NOT, NOT, 0.2, 0.6],
        [NOT, 0.3, 0.9, np.inf, np.inf],
    )


def test_the_threshold_is_chosen_for_f1_by_hand():
    """From 0.2 to 0.3 two of three wrong and one of two right ones: 2 * 2/3 * 1/2 / (7/6) = 4/7. From 0.6 to 0.9 one
    and two of two: 2 * 1/3 / (4/3) = 1/2; elsewhere less."""
    windows = first_above(SCORES, FIRST_WRONG)
    assert choose_threshold(windows, FIRST_WRONG >= 0) == pytest.approx(0.25)
    correct = windows.holds(np.full(5, 0.25))
    assert correct.tolist() == [True, True, False, True, False]
    f1 = harmonic(np.array([correct[:3].mean()]), np.array([correct[3:].mean()]))
    assert f1.item() == pytest.approx(4 / 7)


def test_the_threshold_is_the_best_of_all():
    """Against trying many."""
    rng = np.random.default_rng(1)
    scores, labels = rng.normal(size=(60, 4)), rng.integers(-1, 4, size=60)
    windows, is_wrong = first_above(scores, labels), labels >= 0

    def f1(threshold):
        correct = windows.holds(np.full(60, threshold))
        return harmonic(correct[is_wrong].mean(keepdims=True), correct[~is_wrong].mean(keepdims=True)).item()

    chosen = choose_threshold(windows, is_wrong)
    assert f1(chosen) == max(f1(threshold) for threshold in np.linspace(-4, 4, 4001)) > 0


def test_a_flat_method_predicts_what_is_right_more_often():
    """No threshold has an F1 above 0: of the two predictions, the first step or none, the one that is right more."""
    flat = np.zeros((5, 3))
    for labels, expected in (([0, 0, 0, -1, -1], -0.5), ([0, 1, -1, -1, -1], 0.0)):
        labels = np.array(labels)
        assert choose_threshold(first_above(flat, labels), labels >= 0) == expected


def test_f1_is_processbenchs():
    wrong, right = np.array([0.5, 0.0, 0.0, 1.0, np.nan]), np.array([0.25, 0.0, 1.0, 1.0, 0.5])
    assert harmonic(wrong, right)[:4].tolist() == pytest.approx([1 / 3, 0.0, 0.0, 1.0])
    assert np.isnan(harmonic(wrong, right)[4])


def test_nothing_to_choose_from():
    nothing = np.zeros(0)
    assert choose_threshold(Windows(nothing, nothing), np.zeros(0, dtype=bool)) == 0.0
