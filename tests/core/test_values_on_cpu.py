"""Values from what a source measured: the sums that must hold, and the known cases of each peer."""

import itertools

import pytest

from rredcot_verl.core.values import attribution_values, new_highs

PROBABILITIES = [0.1, 0.5, 0.3, 0.4]


def rewards(values: list[float], outcome: float) -> list[float]:
    return [after - before for before, after in itertools.pairwise([*values, outcome])]


def test_mig_pays_new_highs_only() -> None:
    assert rewards(new_highs(PROBABILITIES), 1.0)[:-1] == pytest.approx([0.4, 0.0, 0.0])
    assert rewards(new_highs([0.1, 0.2, 0.15, 0.6]), 0.0)[:-1] == pytest.approx([0.1, 0.0, 0.4])


def test_mig_is_vps_where_the_probability_only_rises() -> None:
    rising = [0.1, 0.2, 0.2, 0.9]
    assert new_highs(rising) == rising


@pytest.mark.parametrize(("outcome", "baseline"), [(1.0, 0.25), (0.0, 0.25), (0.5, 0.5)])
def test_attribution_gives_each_segment_its_share(outcome: float, baseline: float) -> None:
    values = attribution_values([1.0, 0.0, 3.0], outcome, baseline)
    assert values[0] == baseline
    assert rewards(values, outcome) == pytest.approx([(outcome - baseline) * share for share in (0.25, 0.0, 0.75)])


def test_weights_that_say_nothing_give_no_values() -> None:
    assert attribution_values([0.0, 0.0], 1.0, 0.5) == []


@pytest.mark.parametrize("bad", [[-0.1, 1.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_bad_weights_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        attribution_values(bad, 1.0, 0.5)
