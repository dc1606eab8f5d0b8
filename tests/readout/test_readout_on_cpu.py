"""The readout as a whole: honest, blind to a prompt's own outcomes, reproducible, and never out of its depth."""

import io
import logging
from dataclasses import replace

import pytest
import torch
from verl.trainer.ppo.v1.utils import MetricsAggregator

from rredcot_verl.config.blocks import ReadoutConfig
from rredcot_verl.core.advantage import group_statistics, segment_td
from rredcot_verl.core.redistribution import SegmentBatch
from rredcot_verl.readout.features import build_features, leave_one_out_means
from rredcot_verl.readout.readout import Readout, States

GROUP, NUM_STATES, DIM = 8, 4, 12
CENTS = 0.01


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
    return states_of(
        hidden.reshape(-1, DIM), outcomes, [f"{prefix}{p}" for p in range(prompts) for _ in range(GROUP)]
    ), truth


def states_of(hidden: torch.Tensor, outcomes: torch.Tensor, labels: list[str]) -> States:
    features, blocks = build_features(hidden=hidden)
    means, others = leave_one_out_means(outcomes, labels, torch.arange(len(labels)))
    rows = torch.arange(len(labels)).repeat_interleave(len(hidden) // max(1, len(labels)))
    groups = [labels[row] for row in rows.tolist()]
    return States(features, means[rows], outcomes[rows], groups, rows, blocks, others[rows])


def select(states: States, keep: torch.Tensor) -> States:
    return States(
        states.features[keep],
        states.group_means[keep],
        states.outcomes[keep],
        [states.groups[place] for place in keep.tolist()],
        states.rows[keep],
        states.blocks,
        states.num_others[keep],
    )


def readout(**settings) -> Readout:
    return Readout(ReadoutConfig(**settings))


def error(values, truth) -> float:
    return float((values - truth).square().mean())


def test_values_are_nearer_to_the_truth_than_the_group_mean():
    states, truth = world(0)
    found = readout()
    values = found.fit_predict(states, step=1)
    assert bool(((values >= 0) & (values <= 1)).all()) and values.dtype == torch.float64
    assert error(values, truth) < 0.4 * error(states.group_means, truth)
    assert found.report["readout_gain/mean"] > 0.05 and found.report["readout_group_mean_kept/mean"] == 0


def test_noise_gives_the_leave_one_out_mean():
    """Exactly where no fold takes noise for knowledge; one in ten folds does, by a little."""
    exact, moved = [], []
    for seed in range(6):
        states, _ = world(seed, signal=0.0)
        values = readout().fit_predict(states, step=1)
        exact.append((values == states.group_means).double().mean())
        moved.append((values - states.group_means).abs().mean())
    assert torch.stack(exact).mean() > 0.75
    assert torch.stack(moved).mean() < CENTS


def test_without_features_it_is_the_leave_one_out_mean():
    states, _ = world(0)
    states = replace(states, features=states.features[:, :0], blocks=None)
    assert torch.equal(readout().fit_predict(states, step=1), states.group_means)


def test_reliability_within_bins():
    found, truths, outcomes = [], [], []
    for seed in range(3):
        states, truth = world(seed, prompts=80)
        found.append(readout().fit_predict(states, step=1))
        truths.append(truth)
        outcomes.append(states.outcomes)
    values, truth, outcome = torch.cat(found), torch.cat(truths), torch.cat(outcomes)
    bins = (values * 8).long().clamp(max=7)
    for number in range(8):
        inside = bins == number
        assert inside.sum() > 200
        assert abs(float((values - truth)[inside].mean())) < 4 * CENTS
        assert abs(float((values - outcome)[inside].mean())) < 7 * CENTS


def test_a_known_linear_value_function_is_recovered():
    """Log-odds linear in the features and no group to start from: the values are the true ones."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6000, 3, generator=generator, dtype=torch.float64)
    truth = (hidden @ torch.tensor([1.0, -0.5, 0.0]).double() + 0.4).sigmoid()
    outcomes = torch.bernoulli(truth, generator=generator)
    states = states_of(hidden, outcomes, [f"p{row}" for row in range(6000)])
    assert bool(states.group_means.isnan().all())
    values = readout().fit_predict(states, step=1)
    assert (values - truth).abs().max() < 0.07 and error(values, truth) < 5e-4
    slopes = torch.linalg.lstsq(torch.cat([hidden, torch.ones(6000, 1)], 1), values.logit()).solution
    torch.testing.assert_close(slopes, torch.tensor([1.0, -0.5, 0.0, 0.4]).double(), atol=0.1, rtol=0)


def test_redistribution_is_grpos_own_advantage():
    states, _ = world(3, prompts=12)
    values = readout().fit_predict(states, step=1).reshape(-1, NUM_STATES)
    outcomes, bs = states.outcomes[::NUM_STATES], 12 * GROUP
    segments = SegmentBatch.from_rows([list(range(NUM_STATES + 1))] * bs, values.tolist(), outcomes, [NUM_STATES] * bs)
    torch.testing.assert_close(segments.segment_rewards.sum(1), outcomes - values[:, 0])
    mean, _ = group_statistics(outcomes, states.groups[::NUM_STATES])
    # The advantage of the first segment is the sum of all temporal differences: R - mean, whatever the values.
    td = segment_td(segments, mean, torch.ones(bs), gamma=1.0, lam=1.0)
    torch.testing.assert_close(td[:, 0].double(), outcomes - mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("with_earlier_steps", [False, True])
def test_a_prompts_outcomes_do_not_reach_its_own_values(with_earlier_steps):
    """Not through coefficients, ridge strengths or anything else; the leave-one-out means are held fixed."""
    states, _ = world(5, prompts=20)
    earlier, _ = world(6, prompts=20)
    for prompt in ("p0", "p13"):
        own = torch.tensor([group == prompt for group in states.groups])

        def values(flip: bool, own=own) -> torch.Tensor:
            found = readout()
            batches = [earlier, states] if with_earlier_steps else [states]
            for step, batch in enumerate(batches):
                # The earlier step holds the same prompt: it has the same label.
                outcomes = torch.where(own & flip, 1 - batch.outcomes, batch.outcomes)
                result = found.fit_predict(replace(batch, outcomes=outcomes), step)
            return result

        kept, flipped = values(False), values(True)
        assert torch.equal(kept[own], flipped[own])
        assert not torch.equal(kept[~own], flipped[~own])


def test_columns_that_name_the_prompt_are_not_exploited():
    """A free coefficient would find that the others' mean is the lower, the better the own outcome."""
    states, truth = world(7, signal=0.0)
    names = torch.eye(30).repeat_interleave(GROUP * NUM_STATES, dim=0).double()
    values = readout().fit_predict(replace(states, features=names, blocks=None), step=1)
    assert error(values, truth) < 1.05 * error(states.group_means, truth)
    assert (values - states.group_means).abs().mean() < 5 * CENTS


def test_a_column_that_is_the_same_in_a_group_may_help_but_does_not_harm():
    states, truth = world(8, prompts=60, signal=0.0)
    difficulty = truth.reshape(60, -1)[:, :1].logit().expand(-1, GROUP * NUM_STATES).reshape(-1, 1)
    noise = torch.randn(60, 1, generator=torch.Generator().manual_seed(0)).repeat_interleave(GROUP * NUM_STATES, dim=0)
    for column in (difficulty, noise.double()):
        values = readout().fit_predict(replace(states, features=column, blocks=None), step=1)
        assert error(values, truth) < 1.01 * error(states.group_means, truth)


def test_leaving_out_uniform_groups_does_not_bias_the_values():
    """Of hard prompts, those with a success are measured: a response whose others all failed is then always right."""
    biases, naive = [], []
    for seed in range(4):
        states, truth = world(seed, prompts=60, shift=-1.5)
        right = states.outcomes.reshape(60, -1).mean(1)
        mixed = ((right > 0) & (right < 1)).repeat_interleave(GROUP * NUM_STATES).nonzero().flatten()
        assert len(mixed) < 0.85 * len(truth)
        chosen = select(states, mixed)
        biases.append((readout().fit_predict(chosen, 0) - truth[mixed]).mean())
        # What the selection does to the outcomes themselves.
        naive.append((chosen.outcomes - truth[mixed]).mean())
    assert torch.stack(naive).mean() > 4 * CENTS
    assert torch.stack(biases).mean().abs() < 2.5 * CENTS


def test_row_order_changes_nothing_but_rounding():
    states, _ = world(9)
    order = torch.randperm(len(states.groups), generator=torch.Generator().manual_seed(0))
    one, other = readout(max_rows=1000), readout(max_rows=1000)
    for step in range(2):
        straight, mixed = one.fit_predict(states, step), other.fit_predict(select(states, order), step)
        torch.testing.assert_close(mixed, straight[order], atol=1e-9, rtol=0)


def test_names_of_responses_and_padding_of_labels_do_not_matter():
    states, _ = world(9, prompts=12)
    renamed = replace(states, rows=1000 - 3 * states.rows)
    assert torch.equal(readout().fit_predict(states, 0), readout().fit_predict(renamed, 0))
    # Without counts of the others they are counted: the same, as every response has states here.
    assert torch.equal(readout().fit_predict(states, 0), readout().fit_predict(replace(states, num_others=None), 0))


def test_prompts_of_noise_and_other_seeds_change_little():
    states, truth = world(10, prompts=40)
    noise, _ = world(11, prompts=8, signal=0.0, prefix="noise")
    together = States(
        torch.cat([states.features, noise.features]),
        torch.cat([states.group_means, noise.group_means]),
        torch.cat([states.outcomes, noise.outcomes]),
        [*states.groups, *noise.groups],
        torch.cat([states.rows, noise.rows + 10**6]),
        states.blocks,
    )
    alone = readout().fit_predict(states, 0)
    joined = readout().fit_predict(together, 0)[: len(alone)]
    reseeded = readout(seed=1).fit_predict(states, 0)
    for other in (joined, reseeded):
        assert not torch.equal(other, alone)
        assert (other - alone).abs().mean() < 7 * CENTS
        assert error(other, truth) < 1.3 * error(alone, truth)


def test_every_response_counts_the_same():
    """Cutting a response into more segments, all alike, adds no evidence."""
    states, _ = world(12, prompts=20)
    twice = torch.arange(len(states.groups)).repeat_interleave(2)
    # Only the responses of one prompt are cut finer; the others' values must not notice.
    fine = torch.tensor([states.groups[place] == "p3" for place in twice.tolist()])
    keep = torch.cat([twice[fine], twice[~fine][::2]])
    values = readout().fit_predict(select(states, keep), 0)
    torch.testing.assert_close(values, readout().fit_predict(states, 0)[keep], atol=1e-3, rtol=0)


def test_a_resumed_run_is_the_uninterrupted_one():
    settings = {"window": 3, "max_rows": 2000, "half_life": 2.0}
    batches = [world(seed, prefix=f"{seed}/")[0] for seed in range(4)]
    straight = readout(**settings)
    expected = [straight.fit_predict(batch, step) for step, batch in enumerate(batches)]
    first = readout(**settings)
    for step in range(2):
        first.fit_predict(batches[step], step)
    stored = io.BytesIO()
    torch.save(first.state_dict(), stored)
    stored.seek(0)
    second = readout(**settings)
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
        assert sum(int((rows["steps"] == step).sum()) for step in [step]) == len(batch.groups)
    # Of the step that did not fit whole, whole prompts.
    assert all(count == GROUP * NUM_STATES for count in torch.unique(rows["prompts"], return_counts=True)[1])
    small = readout(max_rows=100)
    small.fit_predict(batch, 0)
    assert 0 < len(small.state_dict()["rows"]["steps"]) <= 100


def test_a_state_of_other_features_is_left(caplog):
    batch, _ = world(0)
    old = Readout(ReadoutConfig(), tag="layer 3")
    old.fit_predict(batch, 0)
    new = Readout(ReadoutConfig(), tag="layer 4")
    with caplog.at_level(logging.WARNING):
        new.load_state_dict(old.state_dict())
    assert "layer 3" in caplog.text and new.state_dict()["rows"] == {}


def test_earlier_steps_help_and_are_left_when_the_columns_change(caplog):
    states, truth = world(20, prompts=6)
    alone, helped = readout(), readout()
    for step in range(4):
        helped.fit_predict(world(30 + step, prefix=f"{step}/")[0], step)
    with_others = error(helped.fit_predict(states, 4), truth)
    # Six prompts are too few to fit to.
    assert torch.equal(alone.fit_predict(states, 4), states.group_means)
    assert with_others < 0.4 * error(states.group_means, truth)
    with caplog.at_level(logging.WARNING):
        narrower = replace(states, features=states.features[:, :3], blocks=None)
        assert torch.equal(helped.fit_predict(narrower, 5), states.group_means)
    assert "3 columns" in caplog.text


@pytest.mark.parametrize("settings", [{"window": 1}, {"half_life": 0.3}])
def test_window_and_half_life_forget(settings):
    """The meaning of the column turns around: what was learnt before is wrong now."""
    errors = {}
    for name, chosen in (("all", {}), ("forgets", settings)):
        found = readout(**chosen)
        for step in range(5):
            states, truth = world(40 + step, prompts=16, prefix=f"{step}/", signal=1.0 if step < 3 else -1.0)
            values = found.fit_predict(states, step)
        errors[name] = error(values, truth)
    assert errors["forgets"] < 0.7 * errors["all"]


def one_group():
    states, _ = world(0, prompts=1)
    return states


def groups_of_one():
    states, _ = world(0)
    return replace(
        states,
        group_means=torch.full_like(states.group_means, float("nan")),
        groups=[f"g{row}" for row in states.rows.tolist()],
        num_others=None,
    )


def all_right():
    states, _ = world(0)
    return replace(states, outcomes=torch.ones_like(states.outcomes), group_means=torch.ones_like(states.outcomes))


def constant_columns():
    states, _ = world(0)
    return replace(states, features=torch.full_like(states.features, 3.0))


def more_columns_than_rows():
    states, _ = world(0, prompts=12)
    states = select(states, torch.arange(0, len(states.groups), NUM_STATES))
    generator = torch.Generator().manual_seed(0)
    return replace(states, features=torch.randn(len(states.groups), 150, generator=generator), blocks=None)


def huge_columns():
    states, _ = world(0)
    return replace(states, features=states.features * torch.logspace(-30, 60, DIM, dtype=torch.float64))


def fractions():
    states, _ = world(0)
    return replace(states, outcomes=0.25 + states.outcomes / 2, group_means=0.25 + states.group_means / 2)


@pytest.mark.parametrize(
    "make", [one_group, groups_of_one, all_right, constant_columns, more_columns_than_rows, huge_columns, fractions]
)
@pytest.mark.parametrize("use_group_mean", [True, False])
def test_odd_batches_have_values_in_range(make, use_group_mean):
    states = make()
    found = readout(use_group_mean=use_group_mean)
    for step in range(2):
        values = found.fit_predict(states, step)
        assert values.shape == (len(states.groups),) and bool(((values >= 0) & (values <= 1)).all())
        assert all(value == value and abs(value) < 1e9 for value in found.report.values())
    kept = found.report["readout_group_mean_kept/mean"] == 1
    if kept and use_group_mean:
        expected = torch.where(states.group_means.isnan(), values, states.group_means)
        assert torch.equal(values, expected)
    assert kept or make not in (one_group, all_right, constant_columns)


def test_without_the_group_mean_noise_gives_the_mean_of_the_other_prompts():
    states, _ = world(2, signal=0.0)
    values = readout(use_group_mean=False).fit_predict(states, 0)
    assert (values - states.outcomes.mean()).abs().max() < 0.1 and values.unique().numel() > 1


def test_a_group_of_one_starts_from_the_other_prompts():
    states, _ = world(2, signal=0.0)
    # All of the first prompt but its first response are left out.
    keep = torch.cat([torch.arange(NUM_STATES), torch.arange(GROUP * NUM_STATES, len(states.groups))])
    states = select(states, keep)
    lonely = torch.arange(len(keep)) < NUM_STATES
    states = replace(states, group_means=states.group_means.masked_fill(lonely, float("nan")))
    values = readout().fit_predict(states, 0)
    assert (values[lonely] - states.outcomes[~lonely].mean()).abs().max() < 0.1


def test_an_empty_batch_leaves_the_buffer():
    states, _ = world(0)
    found = readout()
    found.fit_predict(states, 0)
    before = found.state_dict()["rows"]["features"]
    nothing = States(torch.zeros(0, 0), torch.zeros(0), torch.zeros(0), [], torch.zeros(0, dtype=torch.int64))
    assert found.fit_predict(nothing, 1).shape == (0,) and found.report == {}
    assert torch.equal(found.state_dict()["rows"]["features"], before)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"features": torch.full((960, DIM), float("nan"))}, "NaN"),
        ({"features": torch.zeros(3, DIM)}, "features"),
        ({"outcomes": torch.full((960,), 1.5)}, "outcomes"),
        ({"outcomes": torch.full((960,), float("nan"))}, "outcomes"),
        ({"group_means": torch.full((960,), -0.5)}, "group_means"),
        ({"rows": torch.zeros(2)}, "rows"),
        ({"blocks": torch.zeros(2)}, "blocks"),
    ],
)
def test_states_that_make_no_sense_are_refused(change, word):
    states, _ = world(0)
    with pytest.raises(ValueError, match=word):
        replace(states, **change)


def test_verl_averages_the_report():
    found = readout()
    found.fit_predict(world(0)[0], 0)
    aggregator = MetricsAggregator()
    assert len(found.report) == 6
    assert {aggregator._get_aggregation_type(f"rredcot/{name}") for name in found.report} == {"weighted_avg"}
