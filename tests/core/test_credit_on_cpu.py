"""From segments to rewards and advantages: return equivalence, GRPO as the special case, golden values, odd rows."""

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, get_adv_estimator_fn
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

from rredcot_verl.core.credit import FORMS, CreditRule
from rredcot_verl.core.redistribution import SegmentBatch, expand_to_tokens, redistribute, return_error
from rredcot_verl.sources.queue import final_rows
from rredcot_verl.trainer import estimator
from rredcot_verl.trainer.estimator import Segmented, compute_credit, compute_rredcot_advantage, with_segments


def algorithm(std: bool = True):
    return OmegaConf.create({"norm_adv_by_std_in_grpo": std})


def random_batch(seed: int, max_segments: int = 6, bs: int = 12, width: int = 40, holes: bool = True, levels: int = 3):
    """Ragged rows in three groups, with holes, an empty response, an all-masked one and unscored rows."""
    rng = np.random.default_rng(seed)
    lengths = [0, 1, *rng.integers(2, width + 1, bs - 2).tolist()]
    mask = torch.zeros(bs, width, dtype=torch.int64)
    boundaries, values = [], []
    for row, length in enumerate(lengths):
        mask[row, :length] = torch.from_numpy((rng.random(length) > (0.3 if holes else -1)).astype(np.int64))
        count = int(rng.integers(1, max(2, min(max_segments, length))))
        inner = np.sort(rng.choice(np.arange(1, length), count - 1, replace=False)) if count > 1 else []
        scored = length > 0 and rng.random() > 0.2
        boundaries.append([0, *map(int, inner), length] if scored else [])
        values.append(rng.random(count).tolist() if scored else [])
    mask[3] = 0
    outcomes = torch.from_numpy(rng.integers(0, levels, bs) / (levels - 1)).float()
    index = np.array([f"uid{row % 3}" for row in range(bs)], dtype=object)
    return SegmentBatch.from_rows(boundaries, values, outcomes, lengths), mask, index, outcomes


def outcome_rewards(outcomes: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The outcome on one token, as verl's reward managers give it."""
    rewards = torch.zeros(mask.shape)
    rewards[:, 0] = outcomes
    return rewards


def segmented(segments, finals=None, **rule) -> Segmented:
    return Segmented(segments, torch.arange(len(segments.outcomes)) if finals is None else finals, CreditRule(**rule))


def through_the_estimator(segments, mask, index, finals=None, **rule):
    """Advantages as verl gets them: redistribution, then the registered estimator, which is handed the segments."""
    with with_segments(segmented(segments, finals, **rule)):
        return get_adv_estimator_fn("rredcot")(
            token_level_rewards=redistribute(segments, mask), response_mask=mask, index=index, config=algorithm()
        )


@pytest.mark.parametrize("seed", range(8))
def test_redistributed_rewards_sum_to_the_outcome_and_are_zero_on_masked_tokens(seed):
    segments, mask, _, outcomes = random_batch(seed, max_segments=[2, 8, 64][seed % 3], width=200)
    rewards = redistribute(segments, mask)
    torch.testing.assert_close(rewards.double().sum(1), outcomes.double(), atol=1e-6, rtol=0)
    assert return_error(rewards, outcomes).max() < 1e-6
    has_tokens = mask.any(dim=1)
    assert bool((rewards[has_tokens] * (1 - mask[has_tokens]) == 0).all())
    # A response without a token of its own keeps the outcome where verl puts it.
    assert torch.equal(rewards[~has_tokens][:, 0], outcomes[~has_tokens])
    assert rewards.dtype == torch.float32 and rewards.shape == mask.shape


def test_rewards_sum_to_the_outcome_with_64_segments_of_wild_values():
    torch.manual_seed(0)
    values = torch.rand(16, 64).double()
    outcomes = torch.rand(16)
    segments = SegmentBatch.from_rows([list(range(65))] * 16, values.tolist(), outcomes, [64] * 16)
    rewards = redistribute(segments, torch.ones(16, 64, dtype=torch.int64))
    assert return_error(rewards, outcomes).max() < 1e-6
    # A second way to the same number: each reward is its own difference, v_0 joins the first.
    expected = torch.cat([values, outcomes.double().unsqueeze(1)], 1).diff(dim=1)
    expected[:, 0] += values[:, 0]
    torch.testing.assert_close(rewards.double(), expected, atol=1e-7, rtol=0)


def test_redistribute_golden():
    segments = SegmentBatch.from_rows([[0, 2, 5, 6], []], [[0.25, 0.5, 0.125], []], torch.tensor([1.0, 0.5]), [6, 3])
    mask = torch.tensor([[0, 1, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0, 0]])
    # d = (0.25, -0.375, 0.875). Segment 0..2 ends on token 1, which is also the first written one and gets v_0;
    # segment 2..5 ends on token 3, as token 4 is an observation.
    assert redistribute(segments, mask).tolist() == [
        [0, 0.5, 0, -0.375, 0, 0.875, 0],
        # An unscored row: all on its last written token.
        [0, 0.5, 0, 0, 0, 0, 0],
    ]
    assert segments.segment_rewards.tolist() == [[0.25, -0.375, 0.875], [0.5, 0, 0]]
    assert segments.num_segments.tolist() == [3, 1]
    assert segments.num_tokens(mask).tolist() == [[1, 2, 1], [2, 0, 0]]
    assert segments.scored.tolist() == [True, False]


@pytest.mark.parametrize("seed", range(4))
def test_segment_rewards_sum_to_outcome_minus_start_value(seed):
    segments, _, _, outcomes = random_batch(seed)
    torch.testing.assert_close(segments.segment_rewards.sum(1), outcomes.double() - segments.self_values[:, 0])


@pytest.mark.parametrize(
    "boundaries, values, length",
    [
        ([0, 2, 2, 4], [0.1, 0.2, 0.3], 4),
        ([0, 3, 2, 4], [0.1, 0.2, 0.3], 4),
        ([1, 4], [0.1], 4),
        ([0, 3], [0.1], 4),
        ([0, 5], [0.1], 4),
        ([0, 2, 4], [0.1], 4),
        ([0, 4], [0.1, 0.2], 4),
    ],
)
def test_rows_that_do_not_fit_are_refused(boundaries, values, length):
    with pytest.raises(ValueError, match=r"row 1: segment_boundaries .* response length 4"):
        SegmentBatch.from_rows([[], boundaries], [[], values], torch.zeros(2), [4, length])


@pytest.mark.parametrize("value, outcome", [(float("nan"), 1.0), (0.5, float("nan")), (float("inf"), 1.0)])
def test_values_that_are_not_finite_are_refused(value, outcome):
    with pytest.raises(ValueError, match="finite"):
        SegmentBatch.from_rows([[0, 4]], [[value]], torch.tensor([outcome]), [4])


def test_expand_to_tokens_golden_and_by_a_loop():
    boundaries = torch.tensor([[0, 2, 5], [0, 3, 3]])
    quantity = torch.tensor([[1.5, -2.0], [4.0, 9.0]])
    written = torch.tensor([[1, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    expected = [[1.5, 0, -2, -2, -2, 0], [4, 4, 4, 0, 0, 0]]
    assert expand_to_tokens(quantity, boundaries, written).tolist() == expected
    segments, mask, _, _ = random_batch(3)
    quantity = torch.randn(segments.segment_rewards.shape)
    by_loop = torch.zeros(mask.shape)
    for row, cuts in enumerate(segments.segment_boundaries.tolist()):
        for k, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
            by_loop[row, a:b] = quantity[row, k] * mask[row, a:b]
    assert torch.equal(expand_to_tokens(quantity, segments.segment_boundaries, mask), by_loop)


# --- GRPO is the special case -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [True, False])
def test_without_segments_the_registered_estimator_is_verls_grpo_to_the_bit(std):
    torch.manual_seed(1)
    for seed in range(5):
        _, mask, index, outcomes = random_batch(seed, levels=5)
        rewards = torch.where(mask.bool(), torch.randn(mask.shape), 0.0)
        for given in (rewards, outcome_rewards(outcomes, mask)):
            expected, _ = compute_grpo_outcome_advantage(given.clone(), mask, index, norm_adv_by_std_in_grpo=std)
            found, returns = get_adv_estimator_fn("rredcot")(
                token_level_rewards=given, response_mask=mask, index=index, config=algorithm(std)
            )
            assert torch.equal(found, expected) and torch.equal(returns, expected)
            assert found.data_ptr() != returns.data_ptr()
    default, _ = compute_rredcot_advantage(given, mask, index)
    assert torch.equal(default, compute_grpo_outcome_advantage(given.clone(), mask, index)[0])


def without_inner_boundaries(segments, lengths, outcomes):
    scored = segments.scored.tolist()
    return SegmentBatch.from_rows(
        [[0, length] if s else [] for s, length in zip(scored, lengths, strict=True)],
        [[value] if s else [] for s, value in zip(scored, segments.self_values[:, 0].tolist(), strict=True)],
        outcomes,
        lengths,
    )


def values_equal_to_the_outcome(segments, outcomes):
    flat = outcomes.double().unsqueeze(1).expand_as(segments.self_values).clone()
    return dataclasses.replace(segments, self_values=flat)


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("case", ["one_segment", "beta_zero", "flat_values", "nothing_scored"])
@pytest.mark.parametrize("seed", range(4))
def test_reweight_reduces_to_verls_grpo_to_the_bit(case, std, seed):
    segments, mask, index, outcomes = random_batch(seed, levels=4)
    lengths = segments.segment_boundaries[:, -1].tolist()
    beta = 0.0 if case == "beta_zero" else 2.0
    if case == "one_segment":
        segments = without_inner_boundaries(segments, lengths, outcomes)
    if case == "flat_values":
        segments = values_equal_to_the_outcome(segments, outcomes)
    if case == "nothing_scored":
        segments = SegmentBatch.from_rows([[]] * len(lengths), [[]] * len(lengths), outcomes, lengths)
    found, returns = through_the_estimator(segments, mask, index, norm_by_std=std, beta=beta)
    rewards = outcome_rewards(outcomes, mask)
    expected, _ = compute_grpo_outcome_advantage(rewards, mask, index, norm_adv_by_std_in_grpo=std)
    # Tokens after the response's end are masked anyway; -0.0 equals 0.0.
    assert torch.equal(found, expected)
    assert torch.equal(returns, found) and returns.data_ptr() != found.data_ptr()


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_td_without_inner_boundaries_is_verls_grpo(std, seed):
    """To 1e-6: deltas are taken in float64; unscored rows agree to the bit."""
    segments, mask, index, outcomes = random_batch(seed, levels=4)
    lengths = segments.segment_boundaries[:, -1].tolist()
    segments = without_inner_boundaries(segments, lengths, outcomes)
    found, _ = through_the_estimator(segments, mask, index, norm_by_std=std, form="td")
    expected, _ = compute_grpo_outcome_advantage(
        outcome_rewards(outcomes, mask), mask, index, norm_adv_by_std_in_grpo=std
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(found[~segments.scored], expected[~segments.scored])


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_the_first_segment_of_td_with_lambda_one_is_grpos_advantage(lam):
    """With gamma = lam = 1 the deltas telescope: A_1 = (R - mean) / std whatever the values."""
    segments, mask, index, outcomes = random_batch(5)
    credit = compute_credit(segmented(segments, lam=lam, form="td"), index, mask)
    first, rows = credit.segment_advantages[:, 0], credit.row_advantages
    inner = segments.num_segments > 1
    if lam == 1.0:
        torch.testing.assert_close(first, rows, atol=1e-5, rtol=1e-5)
    else:
        assert not torch.allclose(first[inner], rows[inner], atol=1e-3)


# --- td ---------------------------------------------------------------------------------------------------------------


def test_td_golden_with_discount_lambda_ragged_rows_and_a_penalty():
    outcomes, scores = torch.tensor([1.0, 0.0, 0.5, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    segments = SegmentBatch.from_rows(
        [[0, 1, 2, 3], [0, 4], [0, 2, 4], []],
        [[0.9, 0.5, 0.25], [0.125], [0.3, 0.8], []],
        outcomes,
        [3, 4, 4, 4],
        scores,
    )
    index, mask = np.array(["a"] * 4, dtype=object), torch.ones(4, 4, dtype=torch.int64)
    found = compute_credit(segmented(segments, form="td", gamma=0.5, lam=0.8, norm_by_std=False), index, mask)
    # Scores 1, 0, 1, 1 have mean 0.75, penalties 0, 0, -0.5, 0 have mean -0.125, n - 1 over n is 0.75.
    # Row 0: the others' mean score is 2/3; u = 0, -0.125, -0.3125, and GRPO's advantage of the score, 0.25.
    # Deltas -0.0625, -0.15625 + 0.125, 0.25 + 0.3125; gamma * lam = 0.4; its penalty is 0.125 above the mean.
    last = 0.5625
    middle = -0.03125 + 0.4 * last
    expected = [-0.0625 + 0.4 * middle + 0.125, middle + 0.125, last + 0.125]
    assert found.segment_advantages[0].tolist() == pytest.approx(expected, abs=1e-6)
    # Row 2: b = 2/3, u = 0, 0.1 and 0.25; the penalty is -0.375 from the mean on both segments.
    expected = [0.05 + 0.4 * 0.15 - 0.375, 0.15 - 0.375]
    assert found.segment_advantages[2, :2].tolist() == pytest.approx(expected, abs=1e-6)
    # One segment, and no values: GRPO's own.
    assert found.segment_advantages[1, 0].item() == pytest.approx(-0.625, abs=1e-6)
    assert found.segment_advantages[3].tolist() == [0.375] * 3


def test_critic_golden_with_discount_lambda_a_penalty_and_a_group_of_one_reward():
    outcomes, scores = torch.tensor([-1.0, -1.0, -1.5, -1.0]), torch.full((4,), -1.0)
    segments = SegmentBatch.from_rows(
        [[0, 1, 2, 3], [0, 4], [0, 2, 4], []],
        [[-0.6, 0.0, -0.8], [-1.0], [-0.6, -0.2], []],
        outcomes,
        [3, 4, 4, 4],
        scores,
    )
    rule = {"form": "critic", "gamma": 0.5, "lam": 0.8, "reward_low": -1.0, "reward_spread": 2.0}
    found = credit(segments, **rule).segment_advantages
    # Row 0: v = 0.2, 0.5, 0.1 of the range, which then ends in 0; s = 0.4; gamma * lam = 0.4. The others' penalties,
    # 0, -0.5 and 0, have mean -1 / 6, so -1 / 12 of the range.
    last = -0.1 / 0.4
    middle = (0.05 - 0.5) / 0.4 + 0.4 * last
    penalty = 1 / 12 / 0.4
    expected = [(0.25 - 0.2) / 0.4 + 0.4 * middle + penalty, middle + penalty, last + penalty]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)
    # Row 1: v_0 = 0 counts as 1 / (2 n) in s.
    assert found[1, 0].item() == pytest.approx(1 / 12 / math.sqrt(0.125 * 0.875), abs=1e-6)
    # Row 2: v = 0.2, 0.4.
    expected = [(0.2 - 0.2) / 0.4 + 0.4 * (-0.4 / 0.4) - 0.25 / 0.4, -0.4 / 0.4 - 0.25 / 0.4]
    assert found[2, :2].tolist() == pytest.approx(expected, abs=1e-6)
    # No values: v_0 is the others' mean score, the lowest.
    assert found[3, 0].item() == pytest.approx(1 / 12 / math.sqrt(0.125 * 0.875), abs=1e-6)
    plain = credit(segments, norm_by_std=False, **rule).segment_advantages
    assert plain[0].tolist() == pytest.approx((found[0] * 0.8).tolist(), abs=1e-6)


@pytest.mark.parametrize("std", [True, False])
def test_a_row_whose_others_agree_has_grpos_advantage_whatever_the_values(std):
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.04])
    segments = SegmentBatch.from_rows([[0, 2, 4]] * 5, [[0.2, 0.1 * n] for n in range(5)], rewards, [4] * 5)
    found = compute_credit(segmented(segments, form="td", norm_by_std=std), ["a"] * 5, torch.ones(5, 4))
    # The others of the first differ by less than a tenth of the range.
    assert found.segment_advantages[0].tolist() == [found.row_advantages[0].item()] * 2
    assert bool((found.segment_advantages[1:, 1] != found.row_advantages[1:]).all())
    wider = segmented(segments, form="td", norm_by_std=std, reward_spread=0.1)
    found = compute_credit(wider, ["a"] * 5, torch.ones(5, 4)).segment_advantages
    assert found[0, 0] != found[0, 1]


# --- right in expectation, by enumeration -----------------------------------------------------------------------------

CHOICES = list(itertools.product((0, 1), (0, 1)))
POLICY = {(): 0.3, (0,): 0.6, (1,): 0.45}
"""Probability of choice 1 after each prefix of choices."""


def chance(choices) -> float:
    steps = [POLICY[choices[:k]] if choice else 1 - POLICY[choices[:k]] for k, choice in enumerate(choices)]
    return math.prod(steps)


def expected_gradient(
    score_of, value_of, num_rollouts, uniform_too=False, penalty_of=None, filtered=False, unmeasured=(), **rule
):
    """Of the logit of each choice, summed over a group: exact, over all groups of rollouts of two choices each.

    With `filtered` groups of one score are left out as a whole; the choices in `unmeasured` never have values.
    """
    outcome_of = {choices: score + (penalty_of or {}).get(choices, 0) for choices, score in score_of.items()}
    groups = list(itertools.combinations_with_replacement(range(len(CHOICES)), num_rollouts))
    if filtered:
        groups = [group for group in groups if len({score_of[CHOICES[which]] for which in group}) > 1]
    rows = [(number, CHOICES[which]) for number, group in enumerate(groups) for which in group]
    outcomes, scores = (torch.tensor([float(of[choices]) for _, choices in rows]) for of in (outcome_of, score_of))
    # The agent side measures nothing in uniform groups, unless the form needs it.
    outcomes_in = [{outcome_of[CHOICES[which]] for which in group} for group in groups]
    measured = {n for n, known in enumerate(outcomes_in) if uniform_too or len(known) > 1}
    values = [
        [value_of[()], value_of[choices[:1]]] if n in measured and choices not in unmeasured else []
        for n, choices in rows
    ]
    cuts = [[0, 1, 2] if own else [] for own in values]
    segments = SegmentBatch.from_rows(cuts, values, outcomes, [2] * len(rows), scores)
    index = np.array([n for n, _ in rows], dtype=object)
    made = compute_credit(segmented(segments, **rule), index, torch.ones(len(rows), 2, dtype=torch.int64))
    advantages = made.segment_advantages.double()
    gradient = dict.fromkeys(POLICY, 0.0)
    for number, group in enumerate(groups):
        counts = Counter(group)
        orders = math.factorial(num_rollouts) / math.prod(math.factorial(count) for count in counts.values())
        weight = orders * math.prod(chance(CHOICES[which]) for which in group)
        for place, which in enumerate(group):
            choices = CHOICES[which]
            for k in (0, 1):
                prefix = choices[:k]
                own = advantages[number * num_rollouts + place]
                gradient[prefix] += (
                    weight
                    * own[k if values[number * num_rollouts + place] else 0].item()
                    * (choices[k] - POLICY[prefix])
                )
    return gradient


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("num_rollouts", range(2, 9))
@pytest.mark.parametrize("outcome_of", [(1, 0, 0, 1), (1, 0, 0.5, 0), (0, 0, 1, 0.25)])
def test_td_with_lambda_one_has_grpos_expected_gradient_whatever_the_values_are(outcome_of, num_rollouts, std):
    """Fails without the rule for rows whose others agree, with the own outcome in the baseline or in its scale."""
    outcome_of = dict(zip(CHOICES, outcome_of, strict=True))
    wild = {(): 0.1, (0,): 0.9, (1,): 0.2}
    grpo = expected_gradient(outcome_of, wild, num_rollouts, beta=0.0, norm_by_std=std)
    found = expected_gradient(outcome_of, wild, num_rollouts, form="td", lam=1.0, norm_by_std=std)
    assert found == pytest.approx(grpo, abs=1e-6)
    assert max(map(abs, grpo.values())) > 1e-2
    # lambda below 1 inherits the errors of values, so this test can fail.
    if num_rollouts > 2:
        assert expected_gradient(outcome_of, wild, num_rollouts, form="td", lam=0.0) != pytest.approx(grpo, abs=1e-2)


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("num_rollouts", [3, 4, 7])
def test_td_has_grpos_expected_gradient_where_groups_are_filtered_by_the_score_and_rewards_are_shaped(
    num_rollouts, std
):
    """DAPO's recipe: where the others are all right, one of them too long, values would be used by the own score."""
    score_of = dict(zip(CHOICES, (1, 0, 1, 1), strict=True))
    rule = {"penalty_of": {(1, 1): -1.0}, "filtered": True, "norm_by_std": std}
    wild = {(): 0.1, (0,): 0.9, (1,): 0.2}
    grpo = expected_gradient(score_of, wild, num_rollouts, beta=0.0, **rule)
    assert expected_gradient(score_of, wild, num_rollouts, form="td", lam=1.0, **rule) == pytest.approx(grpo, abs=1e-6)
    assert max(map(abs, grpo.values())) > 1e-2


@pytest.mark.parametrize("num_rollouts", [1, 2, 5])
def test_critic_counts_a_penalty_in_full(num_rollouts):
    score_of, penalty_of = dict(zip(CHOICES, (1, 0, 0, 1), strict=True)), {(1, 1): -1.0, (0, 0): -0.5}
    wild = {(): 0.3, (0,): 0.9, (1,): 0.2}
    rule = {"penalty_of": penalty_of, "form": "critic", "norm_by_std": False, "uniform_too": True}
    expected = dict.fromkeys(POLICY, 0.0)
    for choices, prefix in itertools.product(CHOICES, POLICY):
        if choices[: len(prefix)] == prefix:
            raised = chance(choices) * (choices[len(prefix)] - POLICY[prefix])
            expected[prefix] += num_rollouts * raised * (score_of[choices] + penalty_of.get(choices, 0.0))
    assert expected_gradient(score_of, wild, num_rollouts, **rule) == pytest.approx(expected, abs=1e-6)
    if num_rollouts > 1:
        # A row without values has the others' mean in their place.
        found = expected_gradient(score_of, wild, num_rollouts, unmeasured=CHOICES, **rule)
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("num_rollouts", [2, 4, 7])
@pytest.mark.parametrize("outcome_of", [(1, 0, 0, 1), (1, 0, 0.5, 0), (0, 0, 1, 0.25)])
def test_critic_with_lambda_one_has_the_gradient_of_the_mean_reward_whatever_the_values_are(
    outcome_of, num_rollouts, std
):
    """By enumeration, in the limit GRPO's without std; each prompt weighted by its own deviation, known beforehand."""
    outcome_of = dict(zip(CHOICES, outcome_of, strict=True))
    wild = {(): 0.3, (0,): 0.9, (1,): 0.2}
    grpo = expected_gradient(outcome_of, wild, num_rollouts, beta=0.0, norm_by_std=False)
    scale = num_rollouts / (num_rollouts - 1) / (math.sqrt(0.3 * 0.7) if std else 1.0)
    expected = {prefix: scale * value for prefix, value in grpo.items()}
    rule = {"form": "critic", "norm_by_std": std}
    found = expected_gradient(outcome_of, wild, num_rollouts, uniform_too=True, lam=1.0, **rule)
    assert found == pytest.approx(expected, abs=1e-6)
    # Rows that are chosen by their outcome, and a lambda below 1, are both wrong.
    assert expected_gradient(outcome_of, wild, num_rollouts, lam=1.0, **rule) != pytest.approx(expected, abs=1e-2)
    wrong = expected_gradient(outcome_of, wild, num_rollouts, uniform_too=True, lam=0.0, **rule)
    assert wrong != pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("lam", [1.0, 0.5, 0.0])
def test_critic_with_true_values_has_the_gradient_of_the_mean_reward_with_every_lambda(lam):
    outcome_of = dict(zip(CHOICES, (1, 0, 0, 1), strict=True))
    true = {prefix: sum(chance(c) * outcome_of[c] for c in CHOICES if c[: len(prefix)] == prefix) for prefix in POLICY}
    true = {(): true[()], (0,): true[(0,)] / 0.7, (1,): true[(1,)] / 0.3}
    grpo = expected_gradient(outcome_of, true, 4, beta=0.0, norm_by_std=False)
    found = expected_gradient(outcome_of, true, 4, uniform_too=True, form="critic", lam=lam, norm_by_std=False)
    assert found == pytest.approx({prefix: 4 / 3 * value for prefix, value in grpo.items()}, abs=1e-6)


@pytest.mark.parametrize("lam", [1.0, 0.5, 0.0])
def test_td_with_true_values_points_where_grpo_points_and_favours_no_choice_of_equal_success(lam):
    """Two first choices, both solved with probability 0.45, after one of which the forced answer is likely early."""
    outcome_of = {(0, 0): 0, (0, 1): 1, (1, 0): 0, (1, 1): 1}
    policy = dict(POLICY)
    try:
        POLICY.update({(0,): 0.45, (1,): 0.45})
        forced = {(): 0.3, (0,): 0.1, (1,): 0.6}
        true = {(): 0.45, (0,): 0.45, (1,): 0.45}
        assert expected_gradient(outcome_of, true, 6, form="td", lam=lam)[()] == pytest.approx(0.0, abs=1e-6)
        found = expected_gradient(outcome_of, forced, 6, form="td", lam=lam)[()]
        assert found == pytest.approx(0.0, abs=1e-6) if lam == 1.0 else found > 0.05
        # The paper's form pays for a likely forced answer, whatever comes of it.
        assert expected_gradient(outcome_of, forced, 6, form="reweight", beta=1.0)[()] > 0.05
    finally:
        POLICY.update(policy)


@pytest.mark.parametrize("form", ["critic", "td"])
@pytest.mark.parametrize("lam", [1.0, 0.5, 0.0])
def test_with_true_values_a_choice_is_not_paid_for_responses_that_end_before_their_value_changes(form, lam):
    """Two choices of equal success. Right responses end at once after the first, wrong ones after the second."""
    ends = {0: [([0.5, 0.5], 1.0), ([0.5, 0.5, 0.0], 0.0)], 1: [([0.5, 0.5], 0.0), ([0.5, 0.5, 1.0], 1.0)]}
    traces = [(choice, *end) for choice, found in ends.items() for end in found]
    rows = [(number, *trace) for number, group in enumerate(itertools.product(traces, repeat=3)) for trace in group]
    index, choices, values, outcomes = (list(column) for column in zip(*rows, strict=True))
    lengths = [len(own) for own in values]
    cuts = [list(range(length + 1)) for length in lengths]
    segments = SegmentBatch.from_rows(cuts, values, torch.tensor(outcomes), lengths)
    mask = (torch.arange(3) < torch.tensor(lengths).unsqueeze(1)).long()
    found = compute_credit(segmented(segments, form=form, lam=lam), np.array(index, dtype=object), mask)
    gradient = (found.segment_advantages[:, 0].double() * (torch.tensor(choices) - 0.5)).mean()
    # `td` is off by a little of its own: u_k has the deviation of the others, GRPO's advantage that of the group.
    assert gradient.item() == pytest.approx(0.0, abs=1e-6 if form == "critic" else 5e-3)


# --- the other forms --------------------------------------------------------------------------------------------------


def test_no_form_depends_on_an_affine_change_of_the_reward():
    values = [[0.2, 0.7, 0.6], [0.2, 0.5, 0.1], [0.2, 0.2, 0.2], [0.2, 0.1, 0.9]]
    for form in FORMS:
        made = []
        for low, spread in ((0.0, 1.0), (-1.0, 2.0), (-5.0, 10.0)):
            segments = SegmentBatch.from_rows(
                [[0, 2, 4, 6]] * 4,
                [[low + spread * value for value in own] for own in values],
                low + spread * torch.tensor([1.0, 0.0, 0.0, 1.0]),
                [6] * 4,
            )
            made.append(credit(segments, form=form, reward_low=low, reward_spread=spread).segment_advantages)
        torch.testing.assert_close(made[1], made[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(made[2], made[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_answer_of_a_right_but_overlong_response_is_not_blamed_for_its_length(form):
    """R = 1 - 1: the values saw a right answer come, so the last segment is not singled out."""
    outcomes, scores = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    values = [[0.5, 0.9, 0.95], [0.5, 0.8, 0.95], [0.5, 0.3, 0.1], [0.5, 0.7, 0.9]]
    segments = SegmentBatch.from_rows([[0, 4, 8, 10]] * 4, values, outcomes, [10] * 4, scores)
    index, mask = np.array(["a"] * 4, dtype=object), torch.ones(4, 10, dtype=torch.int64)
    weights = compute_credit(segmented(segments, form=form, lam=0.5), index, mask).segment_weights[0]
    assert bool((weights[-1] <= 1.25 * weights[:-1].max()).all())
    rewards = redistribute(segments, mask)
    assert return_error(rewards, outcomes).max() < 1e-6
    assert rewards[0, -1].item() == pytest.approx(0.05 - 1.0)


@pytest.mark.parametrize("control", ["shuffled", "inverted", "position"])
@pytest.mark.parametrize("form", FORMS)
def test_a_control_arm_keeps_mean_and_spread_of_a_responses_advantages(form, control):
    segments, mask, index, _ = random_batch(11, holes=False, max_segments=5)
    torch.manual_seed(0)
    num_tokens = segments.num_tokens(mask).double()
    moments = []
    for arm in ("none", control):
        made = compute_credit(segmented(segments, form=form, lam=0.5, control=arm), index, mask).segment_advantages
        mean = (made * num_tokens).sum(1) / num_tokens.sum(1).clamp(min=1)
        moments.append((made, mean, ((made**2) * num_tokens).sum(1)))
    torch.testing.assert_close(moments[0][1], moments[1][1], atol=1e-5, rtol=1e-5)
    credited = segments.scored & (segments.num_segments > 1)
    torch.testing.assert_close(moments[0][2][credited], moments[1][2][credited], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(moments[0][0][credited], moments[1][0][credited], atol=1e-2)


# --- reweight ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 1.0, 20.0])
@pytest.mark.parametrize("seed", range(4))
def test_weights_have_mean_one_over_written_tokens_and_follow_the_sign(beta, seed):
    segments, mask, index, _ = random_batch(seed)
    num_tokens = segments.num_tokens(mask)
    made = compute_credit(segmented(segments, beta=beta), index, mask)
    advantages, weights = made.row_advantages, made.segment_weights
    assert weights.dtype == torch.float32 and bool((weights >= 0).all())
    rows = (num_tokens.sum(1) > 0) & (advantages != 0)
    mean = (weights * num_tokens).sum(1) / num_tokens.sum(1).clamp(min=1)
    torch.testing.assert_close(mean[rows], torch.ones(int(rows.sum())), atol=1e-5, rtol=0)
    # So the mean of a response's advantage over its tokens is GRPO's.
    tokens = expand_to_tokens(advantages.unsqueeze(1) * weights, segments.segment_boundaries, mask)
    torch.testing.assert_close((tokens.sum(1) / mask.sum(1).clamp(min=1))[rows], advantages[rows], atol=1e-5, rtol=1e-5)
    drive = advantages.sign().unsqueeze(1) * segments.segment_rewards
    for row in torch.nonzero(rows & segments.scored).flatten().tolist():
        used = num_tokens[row] > 0
        order = drive[row][used].argsort()
        assert bool((weights[row][used][order].diff() >= 0).all())


def test_weights_golden():
    outcomes = torch.tensor([1.0, 0.0, 1.0])
    segments = SegmentBatch.from_rows([[0, 1, 4], [0, 1, 4], []], [[0.0, 0.5], [0.0, 0.5], []], outcomes, [4, 4, 4])
    found = compute_credit(segmented(segments, beta=1.0), ["a"] * 3, torch.ones(3, 4)).segment_weights
    # Row 0: d = 0.5, 0.5, equal. Row 1: sign(A) d = -0.5, +0.5: e^-0.5 and e^0.5 over (e^-0.5 + 3 e^0.5) / 4.
    low, high = np.exp(-0.5), np.exp(0.5)
    mean = (low + 3 * high) / 4
    expected = torch.tensor([[1.0, 1.0], [low / mean, high / mean], [1.0, 1.0]])
    torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=0)


def test_a_segment_without_written_tokens_sets_no_level():
    # The middle segment is an observation with an enormous reward.
    outcomes = torch.tensor([900.2, 0.0])
    segments = SegmentBatch.from_rows([[0, 2, 4, 6], []], [[0.0, 0.1, 900.0], []], outcomes, [6, 6])
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]] * 2)
    weights = compute_credit(segmented(segments, beta=1.0), ["a"] * 2, mask).segment_weights
    high, low = np.exp(0.2), np.exp(0.1)
    found = weights[0, [0, 2]].tolist()
    assert found == pytest.approx([2 * low / (low + high), 2 * high / (low + high)], abs=1e-3)


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["reweight", "td"])
@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_all_right_and_all_wrong_groups_have_no_advantage(form, outcome):
    outcomes = torch.full((4,), outcome)
    # As the agent loop leaves them: unscored.
    segments = SegmentBatch.from_rows([[]] * 4, [[]] * 4, outcomes, [5] * 4)
    index, mask = np.array(["a"] * 4, dtype=object), torch.ones(4, 5, dtype=torch.int64)
    found, _ = through_the_estimator(segments, mask, index, form=form)
    assert bool((found == 0).all())


@pytest.mark.parametrize("form", ["reweight", "td"])
def test_a_group_of_one_keeps_its_reward_as_verl_does(form):
    segments = SegmentBatch.from_rows([[0, 2, 4]], [[0.5, 0.75]], torch.tensor([1.0]), [4])
    mask, index = torch.ones(1, 4, dtype=torch.int64), np.array(["a"], dtype=object)
    found, _ = through_the_estimator(segments, mask, index, norm_by_std=False, form=form)
    # Equal segment rewards, and no others to compare with.
    assert found.tolist() == [pytest.approx([1.0] * 4, abs=1e-6)]


# --- nothing that should not matter does ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["reweight", "td"])
def test_permuted_rows(form):
    segments, mask, index, _ = random_batch(4)
    rule = {"lam": 0.9, "form": form}
    expected, _ = through_the_estimator(segments, mask, index, **rule)
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
    shuffled = SegmentBatch(*(getattr(segments, field.name)[order] for field in dataclasses.fields(segments)))
    found, _ = through_the_estimator(shuffled, mask[order], index[order.numpy()], **rule)
    torch.testing.assert_close(found, expected[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["reweight", "td"])
def test_right_padding_and_padding_rows(form):
    segments, mask, index, outcomes = random_batch(6)
    rule = {"lam": 0.9, "form": form}
    expected, _ = through_the_estimator(segments, mask, index, **rule)
    wider = torch.cat([mask, torch.zeros(len(index), 9, dtype=mask.dtype)], dim=1)
    found, _ = through_the_estimator(segments, wider, index, **rule)
    assert torch.equal(found[:, : mask.size(1)], expected) and bool((found[:, mask.size(1) :] == 0).all())
    # verl's synthetic row: one token, mask 0, reward 0, a uid of its own.
    scored, widths = segments.scored.tolist(), (segments.num_segments + 1).tolist()
    padded = SegmentBatch.from_rows(
        [cuts[:w] if s else [] for cuts, w, s in zip(segments.segment_boundaries.tolist(), widths, scored, strict=True)]
        + [[]],
        [v[: w - 1] if s else [] for v, w, s in zip(segments.self_values.tolist(), widths, scored, strict=True)] + [[]],
        torch.cat([outcomes, torch.zeros(1)]),
        [*segments.segment_boundaries[:, -1].tolist(), 1],
    )
    more = torch.cat([mask, torch.zeros(1, mask.size(1), dtype=mask.dtype)])
    found, _ = through_the_estimator(padded, more, np.array([*index, "pad0"], dtype=object), **rule)
    torch.testing.assert_close(found[:-1], expected, atol=1e-6, rtol=1e-6)
    assert bool((found[-1] == 0).all())


@pytest.mark.parametrize("form", ["reweight", "td"])
def test_garbage_behind_a_rows_last_boundary_changes_nothing(form):
    """Padding of the segment axis: repeated boundaries with any value make empty segments."""
    segments, mask, index, outcomes = random_batch(7)
    rule = {"lam": 0.9, "form": form}
    expected, _ = through_the_estimator(segments, mask, index, **rule)
    last = segments.segment_boundaries[:, -1:]
    wider = SegmentBatch(
        torch.cat([segments.segment_boundaries, last, last], 1),
        torch.cat([segments.self_values, segments.self_values[:, -1:].expand(-1, 2)], 1),
        segments.outcomes,
        segments.scores,
        segments.scored,
    )
    found, _ = through_the_estimator(wider, mask, index, **rule)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    advantages = compute_credit(segmented(segments, **rule), index, mask).segment_advantages
    spoilt = advantages.masked_fill(torch.arange(advantages.size(1)) >= segments.num_segments.unsqueeze(1), 1e9)
    kept = segments.segment_boundaries[:, -1] > 0
    tokens = [expand_to_tokens(each, segments.segment_boundaries, mask)[kept] for each in (advantages, spoilt)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("form", ["reweight", "td"])
def test_inputs_are_left_alone(form):
    segments, mask, index, _ = random_batch(8)
    tensors = [segments.segment_boundaries, segments.self_values, segments.outcomes, segments.scored, mask]
    before = [tensor.clone() for tensor in tensors]
    rewards = redistribute(segments, mask)
    kept = rewards.clone()
    with with_segments(segmented(segments, form=form)):
        compute_rredcot_advantage(rewards, mask, index)
    compute_rredcot_advantage(rewards, mask, index)
    assert torch.equal(rewards, kept)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


# --- the estimator's contract -----------------------------------------------------------------------------------------


def test_rewards_that_changed_after_redistribution_are_refused():
    segments, mask, index, outcomes = random_batch(9)
    rewards = redistribute(segments, mask)
    rewards[5, 0] += 0.01
    with (
        with_segments(segmented(segments)),
        pytest.raises(ValueError, match=f"row 5 .*uid2.* its outcome is {outcomes[5]}"),
    ):
        compute_rredcot_advantage(rewards, mask, index)
    # The context ends with its block, also after an error.
    compute_rredcot_advantage(rewards, mask, index)


def test_large_rewards_pass_the_return_check():
    """float32 rounding at 1e5 is more than 1e-4: the tolerance is relative."""
    values = [33333.3, 77777.7, 12345.6, 99999.9]
    segments = SegmentBatch.from_rows([[0, 1, 2, 3, 4]], [values], torch.tensor([1e5 / 3]), [4])
    mask, index = torch.ones(1, 4, dtype=torch.int64), np.array(["a"], dtype=object)
    rewards = redistribute(segments, mask)
    assert return_error(rewards, segments.outcomes).max() > 1e-4
    found, _ = through_the_estimator(segments, mask, index)
    assert bool(found.isfinite().all())
    # 1e-4 of the outcome is the limit.
    changed = rewards.clone()
    changed[0, 0] += 2e-4 * 1e5 / 3
    with with_segments(segmented(segments)), pytest.raises(ValueError, match="something changed the rewards"):
        compute_rredcot_advantage(changed, mask, index)


def test_it_is_registered_with_verl_and_called_by_verls_own_compute_advantage():
    assert get_adv_estimator_fn("rredcot") is compute_rredcot_advantage
    from verl.trainer.ppo.ray_trainer import compute_advantage

    _, mask, index, outcomes = random_batch(1)
    data = DataProto.from_dict(
        {"token_level_rewards": outcome_rewards(outcomes, mask), "response_mask": mask}, {"uid": index}
    )
    found = compute_advantage(data, "rredcot", config=algorithm(std=False)).batch["advantages"]
    expected, _ = core_algos.compute_grpo_outcome_advantage(
        outcome_rewards(outcomes, mask), mask, index, norm_adv_by_std_in_grpo=False
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("form", ["reweight", "td"])
def test_sessions_of_several_outputs_share_their_final_outputs_advantage_as_in_verl(std, form):
    # Session a_0 has three outputs, in any order; only final outputs enter the statistics.
    keys = ["a_0_2", "a_1_0", "a_0_0", "b_0_1", "b_1_0", "a_0_1", "b_0_0", "a_2_0"]
    outcomes = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0, 1.0, 0.5, 0.0])
    index = np.array([key[0] for key in keys], dtype=object)
    mask = torch.ones(len(keys), 6, dtype=torch.int64)
    mask[1, 4:] = 0
    data = DataProto.from_dict(
        {"token_level_rewards": outcome_rewards(outcomes, mask), "response_mask": mask}, {"uid": index}
    )
    expected = compute_advantage_for_multi_trajectories(
        data, keys, "grpo", norm_adv_by_std_in_grpo=std, config=algorithm(std)
    ).batch["advantages"]
    segments = SegmentBatch.from_rows([[]] * 8, [[]] * 8, outcomes, mask.sum(1).tolist())
    found, _ = through_the_estimator(segments, mask, index, final_rows(keys), norm_by_std=std, form=form)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    # Plain GRPO over all rows would give something else here.
    plain, _ = compute_grpo_outcome_advantage(outcome_rewards(outcomes, mask), mask, index, norm_adv_by_std_in_grpo=std)
    assert not torch.allclose(found, plain, atol=1e-2)


# --- what sets sources apart ------------------------------------------------------------------------------------------

OUTCOMES = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
ONE_GROUP = np.array(["a"] * 4, dtype=object)
THREE_SEGMENTS = SegmentBatch.from_rows(
    [[0, 2, 4, 6]] * 4, [[0.2, 0.7, 0.6], [0.2, 0.5, 0.1], [0.2, 0.2, 0.2], [0.2, 0.1, 0.9]], OUTCOMES, [6] * 4
)


def credit(segments=THREE_SEGMENTS, index=ONE_GROUP, **rule):
    return compute_credit(segmented(segments, **rule), index, torch.ones(len(index), 6))


def test_without_the_pinned_end_the_last_segment_makes_no_progress():
    found = credit(pinned=False)
    progress = torch.tensor([[0.5, -0.1, 0.0], [0.3, -0.4, 0.0], [0.0, 0.0, 0.0], [-0.1, 0.8, 0.0]])
    expected = (found.row_advantages.sign().unsqueeze(1) * progress).exp()
    expected /= expected.mean(dim=1, keepdim=True)
    assert torch.allclose(found.segment_weights, expected, atol=1e-6)
    assert torch.equal(found.segment_weights[2], torch.ones(3))
    # With it, that segment is blamed for what the values did not foresee.
    assert credit().segment_advantages[2].argmin() == 2


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("outcomes", [[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
def test_values_that_know_nothing_are_grpo_with_every_lambda(lam, outcomes):
    """A readout that kept the other rollouts' mean says nothing of where: no segment is kept from the outcome."""
    rewards = torch.tensor(outcomes, dtype=torch.float64)
    count = len(outcomes)
    others = ((rewards.sum() - rewards) / (count - 1)).tolist()
    segments = SegmentBatch.from_rows([[0, 2, 4, 6]] * count, [[mean] * 3 for mean in others], rewards, [6] * count)
    index = np.array(["a"] * count, dtype=object)
    found = credit(segments, index, form="td", lam=lam)
    assert torch.allclose(found.segment_advantages, found.row_advantages.unsqueeze(1), atol=1e-5)
    found = credit(segments, index, form="critic", lam=lam, norm_by_std=False)
    expected = found.row_advantages * count / (count - 1)
    assert torch.allclose(found.segment_advantages, expected.float().unsqueeze(1), atol=1e-5)


def test_td_on_a_single_segment_is_grpo():
    segments = SegmentBatch.from_rows([[0, 6]] * 4, [[0.3]] * 4, OUTCOMES, [6] * 4)
    found = credit(segments, np.array(["a", "a", "a", "b"], dtype=object), form="td")
    assert torch.allclose(found.segment_advantages[:, 0], found.row_advantages, atol=1e-6)


def test_an_estimator_without_a_group_baseline_is_not_paid_the_first_value():
    """v_0 depends on the prompt alone: left out, it is the first token's baseline, as v_{k-1} is that of the others."""
    segments, mask, _, outcomes = random_batch(5)
    rewards = redistribute(segments, mask, pay_start=False)
    sums = outcomes.double() - segments.self_values[:, 0]
    torch.testing.assert_close(rewards.double().sum(1), sums, atol=1e-6, rtol=0)


def test_what_the_estimator_made_is_left_for_the_trainer():
    handed, mask = segmented(THREE_SEGMENTS), torch.ones(4, 6)
    with with_segments(handed):
        advantages, _ = compute_rredcot_advantage(redistribute(THREE_SEGMENTS, mask), mask, ONE_GROUP)
    assert torch.equal(handed.credit.segment_advantages, credit().segment_advantages)
    assert torch.equal(advantages, handed.credit.segment_advantages.repeat_interleave(2, dim=1))


def test_a_call_without_segments_is_said_once(caplog):
    estimator._warn_without_segments.cache_clear()
    for _ in range(2):
        compute_rredcot_advantage(torch.rand(4, 6), torch.ones(4, 6), ONE_GROUP)
    (said,) = caplog.records
    assert "trainer.use_v1=True" in said.getMessage()


def test_a_form_that_is_none_is_named():
    segments, mask, index, _ = random_batch(0)
    rule = CreditRule(form="uniform")
    with pytest.raises(ValueError, match="credit form 'uniform' is not one of reweight, td, critic"):
        compute_credit(Segmented(segments, torch.arange(len(index)), rule), index, mask)
