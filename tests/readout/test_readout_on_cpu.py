"""The readout's promises: honest, blind to a prompt's own outcomes, reproducible, and never out of its depth."""

import io
import logging
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from verl.trainer.ppo.v1.utils import MetricsAggregator

from rredcot_verl.config.blocks import ReadoutConfig
from rredcot_verl.core.groups import leave_one_out_means
from rredcot_verl.readout.features import (
    HIDDEN_BLOCK,
    PROBE_BLOCK,
    build_features,
    others_differ,
)
from rredcot_verl.readout.readout import Readout, States

GROUP, NUM_STATES, DIM = 8, 4, 12
ROWS = GROUP * NUM_STATES
NAN = float("nan")


def world(seed: int, prompts: int = 30, signal: float = 1.0, prefix: str = "p", shift: float = 0.0):
    """Responses that are right if a sum of normal steps ends above 0; the true value of each state is known.

    Returns:
        The states, with one column that knows the sum up to noise and `DIM - 1` that know nothing; and the truth.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (prompts, GROUP, NUM_STATES)
    moves = torch.randn(*shape, generator=generator, dtype=torch.float64)
    ability = torch.randn(prompts, 1, 1, generator=generator, dtype=torch.float64) + shift
    total = ability + torch.cat([torch.zeros(*shape[:2], 1), moves.cumsum(2)], dim=2)
    left = torch.arange(NUM_STATES, 0, -1).double().sqrt()
    truth = torch.special.ndtr(total[..., :-1] / left).flatten()
    outcomes = (total[..., -1] > 0).double().flatten()
    hidden = torch.randn(*shape, DIM, generator=generator, dtype=torch.float64)
    hidden[..., 0] = signal * total[..., :-1] / left + 0.3 * hidden[..., 0]
    labels = [f"{prefix}{prompt}" for prompt in range(prompts) for _ in range(GROUP)]
    return states_of(hidden.reshape(-1, DIM), outcomes, labels), truth


def states_of(hidden: torch.Tensor, outcomes: torch.Tensor, labels: list[str]) -> States:
    features, blocks = build_features(hidden=hidden)
    finals = torch.arange(len(labels))
    means, others = leave_one_out_means(outcomes, labels, finals)
    counts = others_differ(outcomes, labels, finals) | (others == 0)
    rows = finals.repeat_interleave(len(hidden) // len(labels))
    groups = [labels[row] for row in rows.tolist()]
    return States(features, means[rows], outcomes[rows], groups, rows, counts[rows], blocks, others[rows])


def select(states: States, keep: torch.Tensor) -> States:
    names = ("features", "group_means", "outcomes", "rows", "counts", "num_others")
    chosen = {name: getattr(states, name)[keep] for name in names if getattr(states, name) is not None}
    return replace(states, groups=[states.groups[place] for place in keep.tolist()], **chosen)


def with_columns(states: States, features: torch.Tensor) -> States:
    return replace(states, features=features, blocks=None)


def readout(**settings) -> Readout:
    return Readout(ReadoutConfig(**settings))


def fit(states: States, **settings) -> torch.Tensor:
    """A fifth of the prompts is valued after a step with the others, five times."""
    numbers = {label: number % 5 for number, label in enumerate(sorted(set(states.groups)))}
    fold, values = torch.tensor([numbers[label] for label in states.groups]), torch.zeros(len(states.groups)).double()
    for number in fold.unique():
        found = readout(**settings)
        found.fit_predict(select(states, (fold != number).nonzero().flatten()), 0)
        values[fold == number] = found.fit_predict(select(states, (fold == number).nonzero().flatten()), 1)
    return values


def error(values, truth) -> float:
    return float((values - truth).square().mean())


def test_values_are_nearer_to_the_truth_than_the_group_mean():
    states, truth = world(0)
    found = readout()
    # Nothing is known in the first step.
    assert torch.equal(found.fit_predict(states, 0), states.group_means) and found.report["readout_gain/mean"] == 0
    states, truth = world(1)
    values = found.fit_predict(states, step=1)
    assert bool(((values >= 0) & (values <= 1)).all()) and values.dtype == torch.float64
    assert error(values, truth) < 0.4 * error(states.group_means, truth)
    assert found.report["readout_gain/mean"] > 0.05 and found.report["readout_group_mean_kept/mean"] == 0
    aggregator = MetricsAggregator()
    names = ("rows", "prompts", "gain", "group_mean_kept", "seconds", "log10_ridge")
    assert set(found.report) == {f"readout_{name}/mean" for name in names}
    assert {aggregator._get_aggregation_type(f"rredcot/{name}") for name in found.report} == {"weighted_avg"}


def test_noise_gives_the_leave_one_out_mean():
    """Exactly where no fold takes noise for knowledge; one in ten folds does, by a little."""
    batches = [world(seed, signal=0.0)[0] for seed in range(6)]
    values = torch.stack([fit(states) for states in batches])
    means = torch.stack([states.group_means for states in batches])
    assert (values == means).double().mean() > 0.7 and (values - means).abs().mean() < 0.01
    assert torch.equal(fit(with_columns(batches[0], torch.zeros(len(means[0]), 0))), means[0])


def test_without_others_noise_gives_the_mean_of_the_other_prompts():
    states, _ = world(2, signal=0.0)
    # All of the first prompt but its first response are left out: it has no others.
    states = select(states, torch.cat([torch.arange(NUM_STATES), torch.arange(ROWS, len(states.groups))]))
    lonely = torch.arange(len(states.groups)) < NUM_STATES
    values = fit(replace(states, group_means=states.group_means.masked_fill(lonely, NAN)))
    assert (values[lonely] - states.outcomes[~lonely].mean()).abs().max() < 0.1


def test_reliability_within_bins():
    batches = [world(seed, prompts=80) for seed in range(3)]
    values = torch.cat([fit(states) for states, _ in batches])
    truth, outcomes = torch.cat([truth for _, truth in batches]), torch.cat([states.outcomes for states, _ in batches])
    bins = (values * 8).long().clamp(max=7)
    for number in range(8):
        inside = bins == number
        assert inside.sum() > 200
        assert abs(float((values - truth)[inside].mean())) < 0.04
        assert abs(float((values - outcomes)[inside].mean())) < 0.07


def test_a_known_linear_value_function_is_recovered():
    """Log-odds linear in the features and no group to start from: the values are the true ones."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6000, 3, generator=generator, dtype=torch.float64)
    truth = (hidden @ torch.tensor([1.0, -0.5, 0.0]).double() + 0.4).sigmoid()
    states = states_of(hidden, torch.bernoulli(truth, generator=generator), [f"p{row}" for row in range(6000)])
    assert bool(states.group_means.isnan().all())
    values = fit(states)
    assert (values - truth).abs().max() < 0.07 and error(values, truth) < 5e-4
    slopes = torch.linalg.lstsq(torch.cat([hidden, torch.ones(6000, 1)], 1), values.logit()).solution
    torch.testing.assert_close(slopes, torch.tensor([1.0, -0.5, 0.0, 0.4]).double(), atol=0.1, rtol=0)


def test_a_value_depends_on_its_own_state_and_its_prompts_others_alone():
    """On no outcome of its step and on nothing else in it: not by coefficients, scales or the choice of a prior."""
    found = readout()
    found.fit_predict(world(5)[0], 0)
    states, saved = world(6)[0], found.state_dict()
    values = found.fit_predict(states, 1)
    one = torch.arange(len(values)) == 100
    other = replace(
        states,
        features=torch.where(one[:, None], states.features, 5 * states.features + 1),
        group_means=torch.where(one, states.group_means, 1 - states.group_means),
        outcomes=1 - states.outcomes,
        counts=~states.counts,
    )
    assert values[100] != states.group_means[100]
    for changed, place in ((other, 100), (select(other, torch.tensor([100])), 0)):
        found.load_state_dict(saved)
        assert found.fit_predict(changed, 1)[place] == values[100]


def test_features_that_know_nothing_gain_nothing_in_expectation():
    gains = []
    for seed in range(20):
        found = readout(window=1)
        for step in range(5):
            found.fit_predict(world(100 * step + seed, prompts=16, signal=0.0, prefix=f"{step}/")[0], step)
            gains.append(found.report["readout_gain/mean"])
    assert sum(gains) < 0 and sum(gain != 0 for gain in gains) > 3


def test_columns_that_are_the_same_in_a_group_do_not_harm():
    """A free coefficient would find that the others' mean is the lower, the better the own outcome."""
    states, truth = world(7, signal=0.0)
    values = fit(with_columns(states, torch.eye(30).repeat_interleave(ROWS, dim=0)))
    assert error(values, truth) < 1.05 * error(states.group_means, truth)
    assert (values - states.group_means).abs().mean() < 0.05
    states, truth = world(8, prompts=60, signal=0.0)
    difficulty = truth.reshape(60, -1)[:, :1].logit()
    for column in (difficulty, torch.randn(60, 1, generator=torch.Generator().manual_seed(0))):
        values = fit(with_columns(states, column.repeat_interleave(ROWS, dim=0)))
        assert error(values, truth) < 1.01 * error(states.group_means, truth)


def test_leaving_out_uniform_groups_does_not_bias_the_values():
    """Of hard prompts, those with a success are measured: a response whose others all failed is then always right."""
    errors = {"others differ": [], "every row": []}
    for seed in range(10):
        found = {name: readout() for name in errors}
        for step in range(3):
            states, truth = world(10 * seed + step, prompts=60, shift=-1.5, prefix=f"{step}/")
            right = states.outcomes.reshape(60, -1).mean(1)
            mixed = ((right > 0) & (right < 1)).repeat_interleave(ROWS).nonzero().flatten()
            chosen = select(states, mixed)
            given = {"others differ": chosen, "every row": replace(chosen, counts=torch.ones_like(chosen.counts))}
            for name, batch in given.items():
                values = found[name].fit_predict(batch, step)
                if step:
                    errors[name].append((values - truth[mixed])[chosen.counts].mean())
    bias = {name: float(torch.stack(each).mean()) for name, each in errors.items()}
    assert abs(bias["others differ"]) < 0.01 and bias["every row"] > 0.03


@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_others_that_differ_are_a_group_that_is_mixed_whatever_the_own_reward(penalty):
    rewards = torch.tensor([1, 0, 0, 0, 1, 1 - penalty, 1, 0, 0.5, 0])
    groups = ["a"] * 4 + ["b"] * 3 + ["c"] * 2 + ["d"]
    differ = others_differ(rewards, groups, torch.arange(10)).tolist()
    for row, label in enumerate(groups):
        others = {float(reward) for place, reward in enumerate(rewards) if groups[place] == label and place != row}
        assert differ[row] == (len(others) > 1)
    assert differ == [False, True, True, True, penalty > 0, False, penalty > 0, False, False, False]
    # Rows 0 and 1 are one session that ends in row 1; row 0's reward is not its own.
    assert others_differ(rewards[:4], ["a"] * 4, torch.tensor([1, 1, 2, 3])).tolist() == [False] * 4


def test_order_and_names_of_rows_change_nothing_but_rounding():
    states, _ = world(9)
    order = torch.randperm(len(states.groups), generator=torch.Generator().manual_seed(0))
    one, other = readout(max_rows=1000), readout(max_rows=1000)
    for step in range(2):
        straight, mixed = one.fit_predict(states, step), other.fit_predict(select(states, order), step)
        torch.testing.assert_close(mixed, straight[order], atol=1e-9, rtol=0)
    assert torch.equal(fit(states), fit(replace(states, rows=1000 - 3 * states.rows)))
    # Without counts of the others they are counted: the same, as every response has states here.
    assert torch.equal(fit(states), fit(replace(states, num_others=None)))


def test_values_do_not_depend_on_pythons_hash_seed():
    code = """
import torch
from rredcot_verl.config.blocks import ReadoutConfig
from rredcot_verl.readout.readout import Readout, States
column, rows = torch.arange(120.0).sin(), torch.arange(120)
found = Readout(ReadoutConfig(max_rows=100))
outcomes = (column + rows.cos() > 0).float()
groups = [f"p{row % 15}" for row in range(120)]
states = States(column[:, None], torch.full((120,), 0.5), outcomes, groups, rows, rows >= 0)
found.fit_predict(states, 0)
print(found.fit_predict(states, 1).tolist(), found.state_dict()["rows"]["prompts"].tolist())
"""
    printed = [
        subprocess.check_output([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, text=True)
        for seed in ("1", "12")
    ]
    assert printed[0] == printed[1] and "0.5" not in printed[0].split(", ")


def test_prompts_of_noise_other_seeds_and_other_folds_change_little():
    states, truth = world(10, prompts=40)
    noise, _ = world(11, prompts=8, signal=0.0, prefix="noise")
    names = ("features", "group_means", "outcomes", "counts", "num_others")
    together = {name: torch.cat([getattr(states, name), getattr(noise, name)]) for name in names}
    rows = torch.cat([states.rows, noise.rows + 10**6])
    joined = replace(states, groups=[*states.groups, *noise.groups], rows=rows, **together)
    alone = fit(states)
    for other in (fit(joined)[: len(alone)], fit(states, seed=1)):
        assert not torch.equal(other, alone)
        assert (other - alone).abs().mean() < 0.07
        assert error(other, truth) < 1.3 * error(alone, truth)


def test_how_far_a_response_goes_on_does_not_tell_its_first_values():
    """Wrong responses are five times as long as right ones, and cut as often; both begin alike."""
    generator = torch.Generator().manual_seed(12)
    outcomes = torch.rand(40 * GROUP, generator=generator).round().double()
    num_states = torch.where(outcomes > 0, 2, 10)
    labels, finals = [f"p{row // GROUP}" for row in range(len(outcomes))], torch.arange(len(outcomes))
    rows = finals.repeat_interleave(num_states)
    places = torch.cat([torch.arange(int(count)) for count in num_states])
    features, blocks = build_features(positions=places / 10)
    means, others = leave_one_out_means(outcomes, labels, finals)
    groups = [labels[row] for row in rows.tolist()]
    every = torch.ones(len(rows), dtype=torch.bool)
    values = fit(States(features, means[rows], outcomes[rows], groups, rows, every, blocks, others[rows]))
    # Shared out over the states of each response it would be far higher; what is left is that three hats are few.
    assert abs(float((values - outcomes[rows])[places == 0].mean())) < 0.1
    # Of those that have gone on for two places all are wrong.
    assert float(values[places >= 4].mean()) < 0.1


def test_a_resumed_run_is_the_uninterrupted_one():
    settings = {"window": 3, "max_rows": 2000, "half_life": 2.0}
    batches = [world(seed, prefix=f"{seed}/")[0] for seed in range(4)]
    straight, first, second = readout(**settings), readout(**settings), readout(**settings)
    expected = [straight.fit_predict(batch, step) for step, batch in enumerate(batches)]
    for step in range(2):
        first.fit_predict(batches[step], step)
    stored = io.BytesIO()
    torch.save(first.state_dict(), stored)
    stored.seek(0)
    second.load_state_dict(torch.load(stored, weights_only=True))
    for step in (2, 3):
        assert torch.equal(second.fit_predict(batches[step], step), expected[step])


def test_the_state_is_bounded_and_of_the_newest_steps():
    found = readout(window=3, max_rows=2500)
    for step in range(5):
        batch, _ = world(step, prefix=f"{step}/")
        found.fit_predict(batch, step)
        rows = found.state_dict()["rows"]
        assert len(rows["steps"]) <= 2500 and set(rows["steps"].tolist()) <= {step, step - 1, step - 2}
        assert int((rows["steps"] == step).sum()) == batch.counts.sum() and bool((rows["weights"] > 0).all())
    # Of the step that did not fit whole, whole prompts: all of their rows that count.
    cut = {prompt for prompt in rows["prompts"][rows["steps"] == step - 2].tolist()}
    batch, _ = world(step - 2, prefix=f"{step - 2}/")
    sizes = Counter(group for group, count in zip(batch.groups, batch.counts.tolist(), strict=True) if count)
    kept = torch.unique(rows["prompts"][rows["steps"] == step - 2], return_counts=True)[1]
    assert 0 < len(cut) < len(sizes) and not Counter(kept.tolist()) - Counter(sizes.values())
    small = readout(max_rows=100)
    small.fit_predict(batch, 0)
    assert 0 < len(small.state_dict()["rows"]["steps"]) <= 100
    tiny = readout(max_rows=1)
    tiny.fit_predict(batch, 0)
    assert len(torch.unique(tiny.state_dict()["rows"]["prompts"])) == 1


@pytest.mark.parametrize("tag, seed", [("layer 4", 0), ("layer 3", 1)])
def test_a_state_of_other_features_is_left(tag, seed, caplog):
    old, new = Readout(ReadoutConfig(), tag="layer 3"), Readout(ReadoutConfig(seed=seed), tag=tag)
    old.fit_predict(world(0)[0], 0)
    with caplog.at_level(logging.WARNING):
        new.load_state_dict(old.state_dict())
    assert "layer 3, seed 0" in caplog.text and new.state_dict()["rows"] == {}


def test_earlier_steps_help_and_are_left_when_the_columns_change(caplog):
    states, truth = world(20, prompts=6)
    helped = readout()
    for step in range(4):
        helped.fit_predict(world(30 + step, prefix=f"{step}/")[0], step)
    # Six prompts are too few to fit to.
    assert torch.equal(fit(states), states.group_means)
    assert error(helped.fit_predict(states, 4), truth) < 0.4 * error(states.group_means, truth)
    before = helped.state_dict()["rows"]["features"]
    nothing = States(
        torch.zeros(0, 0), torch.zeros(0), torch.zeros(0), [], torch.zeros(0).long(), torch.zeros(0).bool()
    )
    assert helped.fit_predict(nothing, 5).shape == (0,) and helped.report == {}
    assert torch.equal(helped.state_dict()["rows"]["features"], before)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(helped.fit_predict(with_columns(states, states.features[:, :3]), 5), states.group_means)
    assert "3 columns" in caplog.text


@pytest.mark.parametrize("settings", [{"window": 1}, {"half_life": 0.3}])
def test_window_and_half_life_forget(settings):
    """The meaning of the column turns around: what was learnt before is wrong now."""
    forgets, keeps = readout(**settings), readout()
    for step in range(5):
        states, truth = world(40 + step, prompts=16, prefix=f"{step}/", signal=1.0 if step < 3 else -1.0)
        errors = [error(found.fit_predict(states, step), truth) for found in (forgets, keeps)]
    assert errors[0] < 0.7 * errors[1]


def test_rows_of_an_earlier_update_of_the_same_step_count_once():
    """Asynchronous modes update several times a step: what is of now is not newer than new."""
    found = []
    for half_life in (None, 0.5):
        fitted = readout(half_life=half_life)
        fitted.fit_predict(world(7, prefix="first/")[0], 3)
        found.append(fitted.fit_predict(world(8, prefix="second/")[0], 3))
    assert torch.equal(*found) and len(found[0].unique()) > 100


STATES = world(0)[0]
ONES = torch.ones_like(STATES.outcomes)
FEW = select(world(0, prompts=12)[0], torch.arange(0, 12 * ROWS, NUM_STATES))
ODD = {
    "one group": world(0, prompts=1)[0],
    "groups of one": replace(
        STATES, group_means=NAN * ONES, groups=[f"g{row}" for row in STATES.rows.tolist()], num_others=None
    ),
    "all right": replace(STATES, outcomes=ONES, group_means=ONES),
    "constant columns": replace(STATES, features=torch.full_like(STATES.features, 3.0)),
    "more columns than rows": with_columns(FEW, torch.randn(96, 150, generator=torch.Generator().manual_seed(0))),
    "huge columns": replace(STATES, features=STATES.features * torch.logspace(-30, 60, DIM, dtype=torch.float64)),
    "fractions": replace(STATES, outcomes=0.25 + STATES.outcomes / 2, group_means=0.25 + STATES.group_means / 2),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_batches_have_values_in_range(name):
    states, found = ODD[name], readout()
    for step in range(2):
        values = found.fit_predict(states, step)
        assert values.shape == (len(states.groups),) and bool(((values >= 0) & (values <= 1)).all())
        assert all(value == value and abs(value) < 1e9 for value in found.report.values())
    kept = found.report["readout_group_mean_kept/mean"] == 1
    if kept:
        assert torch.equal(values, torch.where(states.group_means.isnan(), values, states.group_means))
    assert kept or name not in ("one group", "all right", "constant columns")


@pytest.mark.parametrize(
    "change, word",
    [
        ({"features": torch.full((960, DIM), NAN)}, "NaN"),
        ({"features": torch.zeros(3, DIM)}, "features"),
        ({"outcomes": torch.full((960,), 1.5)}, "outcomes"),
        ({"outcomes": torch.full((960,), NAN)}, "outcomes"),
        ({"group_means": torch.full((960,), -0.5)}, "group_means"),
        ({"rows": torch.zeros(2)}, "rows"),
        ({"blocks": torch.zeros(2)}, "blocks"),
    ],
)
def test_states_that_make_no_sense_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        replace(STATES, **change)


def test_columns_of_the_probe_by_position():
    values = torch.tensor([0.5, 0.0, 1.0, 1e-12])
    features, blocks = build_features(probe_values=values, positions=torch.tensor([0.0, 0.25, 0.5, 1.0]))
    level, vanished, place = features[:, :3], features[:, 3], features[:, 4:]
    # The logit stands in the columns of start, middle and end by weights that add up to 1, and is cut off at +-7.
    torch.testing.assert_close(level.sum(1), torch.tensor([0.0, -7.0, 7.0, -7.0]).double())
    torch.testing.assert_close(level[1], torch.tensor([-3.5, -3.5, 0.0]).double())
    torch.testing.assert_close(place, torch.tensor([[0, 0], [0.5, 0], [1, 0], [0, 1]]).double())
    # What was cut off is told apart: a vanishing value is not one of 0.001.
    assert vanished[0] == vanished[2] == 0 and 0 < vanished[3] < vanished[1] < 5
    assert blocks.tolist() == [PROBE_BLOCK] * 6


def test_each_feature_can_be_left_out():
    values, hidden = torch.rand(5), torch.randn(5, 3)
    assert build_features(probe_values=values)[0].shape == (5, 2) and build_features()[0].shape == (0, 0)
    only_hidden, blocks = build_features(hidden=hidden)
    assert torch.equal(only_hidden, hidden.double()) and blocks.tolist() == [HIDDEN_BLOCK] * 3
    both, blocks = build_features(probe_values=values, positions=values, hidden=hidden)
    assert both.shape == (5, 9) and blocks.tolist() == [PROBE_BLOCK] * 6 + [HIDDEN_BLOCK] * 3


@pytest.mark.parametrize(
    "features, word",
    [
        ({"probe_values": torch.tensor([NAN])}, "probe_values"),
        ({"probe_values": torch.tensor([1.5])}, "probe_values"),
        ({"positions": torch.tensor([[0.5]])}, "positions"),
        ({"hidden": torch.tensor([[float("inf")]])}, "hidden"),
        ({"positions": torch.rand(2), "hidden": torch.rand(3, 1)}, r"\[2, 3\]"),
    ],
)
def test_features_that_are_no_numbers_are_refused(features, word):
    with pytest.raises(ValueError, match=word):
        build_features(**features)


def test_leave_one_out_means_count_final_outputs_only():
    outcomes = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0])
    means, others = leave_one_out_means(outcomes, ["a", "a", "a", "b", "a"], torch.arange(5))
    assert means[[0, 1, 2, 4]].tolist() == pytest.approx([0.5 / 3, 0.5, 1 / 3, 0.5]) and means[3].isnan()
    assert others.tolist() == [3, 3, 3, 0, 3]
    # Rows 0 and 1 are one session that ends in row 1; row 0's outcome is not its own.
    outcomes = torch.tensor([9.0, 1.0, 0.0, 0.5])
    means, others = leave_one_out_means(outcomes, ["a"] * 4, torch.tensor([1, 1, 2, 3]))
    assert means.tolist() == pytest.approx([0.25, 0.25, 0.75, 0.5]) and others.tolist() == [2, 2, 2, 2]
