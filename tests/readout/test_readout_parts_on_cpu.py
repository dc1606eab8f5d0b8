"""The readout's parts: columns, leave-one-out means, the logistic fit, the folds."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import softplus

from rredcot_verl.readout.crossfit import cross_fit, held_out_likelihoods
from rredcot_verl.readout.features import HIDDEN_BLOCK, PROBE_BLOCK, build_features, leave_one_out_means
from rredcot_verl.readout.fit import LogisticFit, log_likelihood
from rredcot_verl.readout.folds import assign_folds, digest
from rredcot_verl.readout.sample import AUTOMATIC, INFINITE, Choice, Sample, standardised


def problem(seed: int, num_rows: int, num_columns: int, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    design = torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)
    offsets = torch.randn(num_rows, generator=generator, dtype=torch.float64)
    truth = scale * torch.randn(num_columns, generator=generator, dtype=torch.float64)
    means = (offsets + design @ truth).sigmoid()
    outcomes = torch.bernoulli(means, generator=generator)
    weights = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    return design, offsets, outcomes, weights, truth


def penalised(coefficients, design, offsets, outcomes, weights, ridge):
    eta = offsets + design @ coefficients
    return (weights * (softplus(eta) - outcomes * eta)).sum() + 0.5 * (ridge * coefficients**2).sum()


@pytest.mark.parametrize(
    "num_rows, num_columns, scale", [(200, 5, 1.0), (20, 60, 1.0), (300, 3, 30.0), (1, 2, 1.0)], ids=str
)
@pytest.mark.parametrize("fractional", [False, True])
def test_the_fit_is_the_minimum(num_rows, num_columns, scale, fractional):
    design, offsets, outcomes, weights, _ = problem(0, num_rows, num_columns, scale)
    if fractional:
        outcomes = (outcomes + weights.flip(0)) / 2
    ridge = torch.linspace(0.1, 5.0, num_columns, dtype=torch.float64)
    found = LogisticFit(design, offsets, outcomes, weights).fit(ridge).clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(penalised(found, design, offsets, outcomes, weights, ridge), found)
    # The objective is strictly convex, so a vanishing gradient is the minimum.
    assert gradient.abs().max() < 1e-5


def test_the_fit_recovers_known_coefficients():
    design, offsets, outcomes, weights, truth = problem(1, 40000, 6)
    found = LogisticFit(design, offsets, outcomes, torch.ones_like(weights)).fit(torch.full((6,), 1e-3).double())
    # Standard errors are near 0.02.
    torch.testing.assert_close(found, truth, atol=0.08, rtol=0)


def test_a_kept_curvature_does_not_change_the_minimum():
    design, offsets, outcomes, weights, _ = problem(2, 300, 10)
    ridges = [torch.full((10,), strength, dtype=torch.float64) for strength in (300.0, 3.0, 0.1)]
    fit = LogisticFit(design, offsets, outcomes, weights)
    one_after_another = [fit.fit(ridge) for ridge in ridges]
    each = [LogisticFit(design, offsets, outcomes, weights).fit(ridge) for ridge in ridges]
    torch.testing.assert_close(one_after_another, each, atol=1e-6, rtol=0)


def test_the_path_is_close_to_the_fits():
    design, offsets, outcomes, weights, _ = problem(3, 400, 20, scale=0.3)
    ridges = torch.tensor([60.0, 15.0, 4.0]).double().unsqueeze(1).expand(-1, 20)
    path = LogisticFit(design, offsets, outcomes, weights).path(ridges)
    exact = torch.stack([LogisticFit(design, offsets, outcomes, weights).fit(ridge) for ridge in ridges])
    error, between = (path - exact).norm(dim=1), exact.diff(dim=0).norm(dim=1).min()
    assert error[1] < 0.05 * between and error.max() < 0.3 * between


def test_log_likelihood_of_fractions():
    log_odds, outcomes = torch.tensor([0.3, -2.0, 4.0]), torch.tensor([0.0, 0.25, 1.0])
    p = log_odds.sigmoid()
    expected = outcomes * p.log() + (1 - outcomes) * (1 - p).log()
    torch.testing.assert_close(log_likelihood(log_odds, outcomes), expected)


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
    plain, _ = build_features(probe_values=values)
    assert plain.shape == (5, 2)
    only_hidden, blocks = build_features(hidden=hidden)
    assert torch.equal(only_hidden, hidden.double()) and blocks.tolist() == [HIDDEN_BLOCK] * 3
    both, blocks = build_features(probe_values=values, positions=values, hidden=hidden)
    assert both.shape == (5, 9) and blocks.tolist() == [PROBE_BLOCK] * 6 + [HIDDEN_BLOCK] * 3
    assert build_features()[0].shape == (0, 0)


@pytest.mark.parametrize(
    "features, word",
    [
        ({"probe_values": torch.tensor([float("nan")])}, "probe_values"),
        ({"probe_values": torch.tensor([1.5])}, "probe_values"),
        ({"positions": torch.tensor([[0.5]])}, "positions"),
        ({"hidden": torch.tensor([[float("inf")]])}, "hidden"),
        ({"positions": torch.rand(2), "hidden": torch.rand(3, 1)}, r"\[2, 3\]"),
    ],
)
def test_features_that_are_no_numbers_are_refused(features, word):
    with pytest.raises(ValueError, match=word):
        build_features(**features)


def test_leave_one_out_means():
    outcomes = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0])
    means, others = leave_one_out_means(outcomes, ["a", "a", "a", "b", "a"], torch.arange(5))
    assert means[[0, 1, 2, 4]].tolist() == pytest.approx([0.5 / 3, 0.5, 1 / 3, 0.5]) and means[3].isnan()
    assert others.tolist() == [3, 3, 3, 0, 3]


def test_leave_one_out_means_count_final_outputs_only():
    # Rows 0 and 1 are one session that ends in row 1; row 0's outcome is not its own.
    outcomes = torch.tensor([9.0, 1.0, 0.0, 0.5])
    means, others = leave_one_out_means(outcomes, ["a"] * 4, torch.tensor([1, 1, 2, 3]))
    assert means.tolist() == pytest.approx([0.25, 0.25, 0.75, 0.5]) and others.tolist() == [2, 2, 2, 2]


def test_standardised_columns():
    features = torch.tensor([[1.0, 5.0, 0.0]] * 99 + [[3.0, 5.0, 1e6]])
    design = standardised(features)
    assert design.abs().max() <= 6.0 and bool((design[:, 1] == 0).all()) and bool((design[:, 3] == 1).all())


def test_folds_follow_the_prompt_not_the_row():
    prompts = digest([f"p{number // 3}" for number in range(60)])
    folds = assign_folds(prompts, 5, seed=0)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(assign_folds(prompts[order], 5, seed=0), folds[order])
    assert all(len(set(folds[prompts == prompt].tolist())) == 1 for prompt in prompts)
    assert (folds.bincount() == 12).all()
    assert not torch.equal(assign_folds(prompts, 5, seed=1), folds)


def test_folds_do_not_depend_on_pythons_hash_seed():
    labels = ["a", "b", 7, ("c", 1.5), "e", "f"]
    code = (
        "from rredcot_verl.readout.folds import assign_folds, digest\n"
        f"print(assign_folds(digest({labels!r}), 3, seed=4).tolist())"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "12"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert elsewhere.stdout.strip() == str(assign_folds(digest(labels), 3, seed=4).tolist())


def small_sample(signal: float = 1.0) -> Sample:
    """24 prompts of 4 responses with one state each, two blocks of columns."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(96, 5, generator=generator)
    outcomes = torch.bernoulli((signal * features[:, 0].double()).sigmoid(), generator=generator)
    prompts = torch.arange(24).repeat_interleave(4)
    means, others = leave_one_out_means(outcomes, prompts.tolist(), torch.arange(96))
    return Sample(
        design=standardised(features),
        blocks=torch.tensor([0, 0, 1, 1, 1]),
        group_means=means,
        num_others=others.double(),
        outcomes=outcomes,
        weights=torch.ones(96, dtype=torch.float64),
        prompts=prompts,
        folds=prompts % 4,
    )


def test_what_a_fold_is_chosen_by_does_not_depend_on_its_outcomes():
    sample = small_sample()
    candidates = {
        Choice((INFINITE, INFINITE), AUTOMATIC),
        Choice((1.0, INFINITE), AUTOMATIC),
        Choice((1.0, 8.0), AUTOMATIC),
        Choice((1.0, 8.0), 16.0),
        Choice((8.0, 8.0), 16.0),
    }
    folds = list(range(4))
    scores = held_out_likelihoods(sample, folds, dict.fromkeys(folds, candidates))
    for fold in folds:
        own = sample.folds == fold
        flipped = replace(sample, outcomes=torch.where(own, 1 - sample.outcomes, sample.outcomes))
        # What is compared for another fold may change with this fold's outcomes, so it changes here too.
        wanted = dict.fromkeys(folds, {Choice((0.3, 40.0), 4.0)}) | {fold: candidates}
        again = held_out_likelihoods(flipped, folds, wanted)
        assert all(torch.equal(again[fold][choice], scores[fold][choice]) for choice in candidates)
        other = (fold + 1) % 4
        assert not torch.equal(
            held_out_likelihoods(flipped, folds, dict.fromkeys(folds, candidates))[other][Choice((1.0, 8.0), 16.0)],
            scores[other][Choice((1.0, 8.0), 16.0)],
        )


def test_a_block_that_knows_much_is_used():
    found = cross_fit(small_sample(signal=3.0))
    assert all(choice.used[0] for choice in found.choices) and found.gain > 0.1
