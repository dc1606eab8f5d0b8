"""The estimators beside `rredcot`: in verl's registry, GRPO without segments, and what sets them apart with them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, compute_grpo_outcome_advantage

from rredcot_verl.config.schema import parse
from rredcot_verl.config.sources import SOURCES
from rredcot_verl.core.redistribution import SegmentBatch
from rredcot_verl.trainer.estimator import compute_credit

ALGORITHM = SimpleNamespace(get=lambda name, default=None: default, gamma=1.0, lam=1.0)
OUTCOMES = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
INDEX = np.array(["a", "a", "a", "a"], dtype=object)
VALUES = [[0.2, 0.7, 0.6], [0.2, 0.5, 0.1], [0.2, 0.2, 0.2], [0.2, 0.1, 0.9]]


def credit(source: str, **settings):
    segments = SegmentBatch.from_rows([[0, 2, 4, 6]] * 4, VALUES, OUTCOMES, [6] * 4)
    mask = torch.ones(4, 6)
    return compute_credit(segments, torch.arange(4), INDEX, mask, ALGORITHM, parse({"credit": settings}), source)


@pytest.mark.parametrize("name", SOURCES)
def test_without_segments_it_is_grpo(name):
    rewards, mask = torch.rand(4, 6), torch.ones(4, 6)
    expected, _ = compute_grpo_outcome_advantage(rewards, mask, INDEX)
    advantages, returns = ADV_ESTIMATOR_REGISTRY[name](token_level_rewards=rewards, response_mask=mask, index=INDEX)
    assert torch.equal(advantages, expected) and returns is not advantages


@pytest.mark.parametrize("name", SOURCES)
def test_every_peer_says_where_it_comes_from(name):
    documentation = ADV_ESTIMATOR_REGISTRY[name].__doc__
    assert name == "rredcot" or ("arXiv" in documentation or "paper" in documentation) and "Ours:" in documentation


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("form", ["reweight", "td"])
def test_beta_zero_and_a_single_segment_are_grpo_whatever_the_source(source, form):
    segments = SegmentBatch.from_rows([[0, 6]] * 4, [[0.3]] * 4, OUTCOMES, [6] * 4)
    settings = parse({"credit": {"form": form, "beta": 3.0}})
    found = compute_credit(segments, torch.arange(4), INDEX, torch.ones(4, 6), ALGORITHM, settings, source)
    assert torch.allclose(found.segment_advantages[:, 0], found.row_advantages, atol=1e-6)
    assert torch.equal(
        credit(source, beta=0.0).segment_advantages, credit(source).row_advantages.unsqueeze(1).expand(4, 3)
    )


@pytest.mark.parametrize("source", ["vps", "mig"])
def test_the_last_segment_of_vps_and_mig_makes_no_progress(source):
    found = credit(source, beta=1.0)
    weights = found.segment_advantages / found.row_advantages.unsqueeze(1)
    progress = torch.tensor([[0.5, -0.1, 0.0], [0.3, -0.4, 0.0], [0.0, 0.0, 0.0], [-0.1, 0.8, 0.0]])
    expected = (found.row_advantages.sign().unsqueeze(1) * progress).exp()
    assert torch.allclose(weights, expected / expected.mean(dim=1, keepdim=True), atol=1e-6)
    assert torch.equal(weights[2], torch.ones(3))


def test_rredcot_blames_the_last_segment_for_what_the_values_did_not_foresee():
    found = credit("rredcot", beta=1.0)
    assert found.segment_advantages[2].argmin() == 2


@pytest.mark.parametrize("form", ["reweight", "td"])
def test_the_error_penalty_scales_failed_responses_only(form):
    plain, scaled = credit("rredcot", form=form), credit("rredcot", form=form, error_penalty=0.25)
    failed = plain.row_advantages < 0
    assert torch.allclose(scaled.segment_advantages[failed], 0.25 * plain.segment_advantages[failed])
    assert torch.equal(scaled.segment_advantages[~failed], plain.segment_advantages[~failed])
    assert torch.equal(scaled.row_advantages, plain.row_advantages)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("outcomes", [[1.0, 0.0], [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
def test_values_that_know_nothing_pay_nothing_back_of_the_own_outcome(lam, outcomes):
    """A readout that kept the other rollouts' mean: every segment but the last gets nothing, whatever lambda is."""
    rewards = torch.tensor(outcomes, dtype=torch.float64)
    count = len(outcomes)
    others = ((rewards.sum() - rewards) / (count - 1)).tolist()
    segments = SegmentBatch.from_rows([[0, 2, 4, 6]] * count, [[mean] * 3 for mean in others], rewards, [6] * count)
    algorithm = SimpleNamespace(get=lambda name, default=None: default, gamma=1.0, lam=lam)
    settings = parse({"credit": {"form": "td"}, "self_value": {"calibration": "logistic"}})
    index = np.array(["a"] * count, dtype=object)
    found = compute_credit(segments, torch.arange(count), index, torch.ones(count, 6), algorithm, settings)
    assert torch.allclose(found.segment_advantages[:, 2], found.row_advantages, atol=1e-5)
    expected = found.row_advantages.unsqueeze(1) * torch.tensor([lam**2, lam])
    assert torch.allclose(found.segment_advantages[:, :2], expected, atol=1e-5)


@pytest.mark.parametrize("calibration", ["none", "logistic"])
def test_td_on_a_single_segment_is_grpo_with_regressed_values_too(calibration):
    index = np.array(["a", "a", "a", "b"], dtype=object)
    segments = SegmentBatch.from_rows([[0, 6]] * 4, [[0.3]] * 4, OUTCOMES, [6] * 4)
    settings = parse({"credit": {"form": "td"}, "self_value": {"calibration": calibration}})
    found = compute_credit(segments, torch.arange(4), index, torch.ones(4, 6), ALGORITHM, settings)
    assert torch.allclose(found.segment_advantages[:, 0], found.row_advantages, atol=1e-6)


def test_the_weights_are_those_before_the_error_penalty():
    for penalty in (0.0, 0.5, 3.0):
        found = credit("rredcot", error_penalty=penalty)
        assert torch.allclose(found.segment_weights, credit("rredcot").segment_weights)
        assert torch.allclose(found.segment_weights.mean(dim=1), torch.ones(4))
