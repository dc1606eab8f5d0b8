"""Statistics of a prompt's rollouts: verl's own, and rewards on the scale from 0 to 1."""

import numpy as np
import pytest
import torch
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from rredcot_verl.core.credit import EPSILON
from rredcot_verl.core.groups import from_unit, group_statistics, to_unit


def verls_statistics(outcomes, index):
    """verl's own mean, and its advantages with and without the deviation."""
    mask, rewards = torch.ones(len(index), 1), outcomes.unsqueeze(1)
    centred, _ = compute_grpo_outcome_advantage(rewards, mask, index, norm_adv_by_std_in_grpo=False)
    scaled, _ = compute_grpo_outcome_advantage(rewards, mask, index)
    return outcomes - centred[:, 0], scaled[:, 0], centred[:, 0]


@pytest.mark.parametrize("seed", range(5))
def test_group_statistics_are_verls(seed):
    rng = np.random.default_rng(seed)
    outcomes = torch.from_numpy(rng.random(20)).float()
    index = np.array([f"g{g}" for g in [*rng.integers(0, 4, 19), 99]], dtype=object)
    found = group_statistics(outcomes, index.tolist())
    mean, scaled, centred = verls_statistics(outcomes, index)
    torch.testing.assert_close(found.mean, mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(centred / (found.deviation + EPSILON), scaled, atol=1e-5, rtol=1e-5)
    assert found.count.tolist() == [index.tolist().count(label) for label in index]
    # verl's convention for a group of one.
    assert (found.mean[-1].item(), found.deviation[-1].item(), found.mean_of_others()[-1].item()) == (0.0, 1.0, 0.0)


def test_the_mean_of_the_others():
    found = group_statistics(torch.tensor([1.0, 0.0, 0.5, 1.0]), ["a", "a", "a", "b"])
    assert found.mean_of_others().tolist() == pytest.approx([0.25, 0.75, 0.5, 0.0])


def test_only_final_outputs_enter_and_the_others_share_what_they_get():
    """Sessions of several outputs: rows 0 and 2 belong to the session of row 3."""
    outcomes, finals = torch.tensor([9.0, 0.0, 9.0, 1.0]), torch.tensor([3, 1, 3, 3])
    found = group_statistics(outcomes, ["a"] * 4, finals)
    assert found.outcomes.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert found.mean.tolist() == [0.5] * 4 and found.count.tolist() == [2.0] * 4
    assert found.mean_of_others().tolist() == [0.0, 1.0, 0.0, 0.0]


def test_dtype_is_kept():
    for dtype in (torch.float32, torch.float64):
        found = group_statistics(torch.tensor([1.0, 0.0], dtype=dtype), ["a", "a"])
        assert {found.mean.dtype, found.deviation.dtype, found.count.dtype} == {dtype}


@pytest.mark.parametrize("reward, unit", [(-1.0, 0.0), (0.0, 0.5), (1.0, 1.0), (3.0, 1.0), (-2.0, 0.0)])
def test_rewards_in_their_range(reward, unit):
    assert to_unit(reward, (-1.0, 1.0)) == unit and to_unit(torch.tensor([reward]), (-1.0, 1.0)).tolist() == [unit]
    assert from_unit(unit, (-1.0, 1.0)) == min(max(reward, -1.0), 1.0)
