"""The variance of the policy gradient: against verl's own loss, and against batches drawn from the prompts."""

import dataclasses

import numpy as np
import pytest
import torch
from verl.trainer.ppo.core_algos import agg_loss, compute_grpo_outcome_advantage

from rredcot_verl.analyze import policy_gradient
from rredcot_verl.analyze.comparison import Comparison
from rredcot_verl.analyze.estimators import PROBES, methods_from
from rredcot_verl.analyze.method_values import Evidence, Method
from rredcot_verl.analyze.records import CuttingRecord, Measurements, TraceRecord
from rredcot_verl.analyze.statistics import Resamples
from rredcot_verl.analyze.trace_table import make_table
from tests.analyze.synthetic import CUTTING, write

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def measurements(tmp_path_factory):
    return write(tmp_path_factory.mktemp("world") / "m", num_groups=40, num_rollouts=8, hidden=False).load()


@pytest.fixture(scope="module")
def table(measurements):
    return make_table(measurements, CUTTING, Resamples.draw(40, 50, seed=0))


@pytest.fixture(scope="module")
def sketches(measurements, table):
    return policy_gradient.load_sketches(measurements, table)


@pytest.fixture(scope="module")
def grpo(measurements, table):
    return policy_gradient.advantages(table, None, "reweight")


def _compare(table, sketches, credit, grpo):
    compared = policy_gradient.GradientComparison(table, *sketches, grpo).compare(credit)
    return {name: measured.samples for name, measured in compared.items()}


def test_advantages_of_grpo_are_verls(table, grpo):
    outcomes = torch.tensor([trace.reward for trace in table.traces]).unsqueeze(1)
    index = np.array([trace.group for trace in table.traces], dtype=object)
    expected, _ = compute_grpo_outcome_advantage(outcomes, torch.ones_like(outcomes), index)
    assert np.abs(np.where(table.is_state, grpo - expected.numpy(), 0.0)).max() == 0.0


def test_td_with_constant_values_is_grpo(measurements, table, grpo):
    means = (np.bincount(table.groups, table.rewards) / np.bincount(table.groups))[table.groups]
    method = Method("mean", "baseline", "", np.where(table.is_state, means[:, None], np.nan))
    credit = policy_gradient.advantages(table, method, "td")
    assert np.where(table.is_state, credit, 0.0) == pytest.approx(np.where(table.is_state, grpo, 0.0), abs=1e-5)


def test_traces_without_values_keep_grpo(measurements, table, grpo):
    values = np.where(table.is_state, RNG.random(table.is_state.shape), np.nan)
    values[::3] = np.nan
    method = Method("some", "probe", "", values)
    for form in ("reweight", "td"):
        credit = policy_gradient.advantages(table, method, form)
        same = np.where(table.is_state, credit == grpo, True)
        assert same[::3].all() and not same[1::3].all()


def test_mean_gradient_is_that_of_verls_token_mean_loss():
    """Exact gradients of a softmax policy in place of sketches."""
    generator = torch.Generator().manual_seed(0)
    lengths, cuts = [6, 4, 5], [[0, 2, 6], [0, 4], [0, 1, 3, 5]]
    features = torch.randn(3, 6, 4, generator=generator)
    tokens = torch.randint(0, 3, (3, 6), generator=generator)
    weight = torch.randn(4, 3, generator=generator, requires_grad=True)
    mask = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    log_probs = (features @ weight).log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
    credit = np.array([[1.0, -2.0, 0.0], [0.5, 0.0, 0.0], [3.0, -1.0, 0.25]])
    by_token = torch.zeros(3, 6)
    vectors = np.zeros((3, 3, 12))
    for row, own in enumerate(cuts):
        for k, (start, end) in enumerate(zip(own, own[1:], strict=False)):
            by_token[row, start:end] = credit[row, k]
            (found,) = torch.autograd.grad(log_probs[row, start:end].sum(), weight, retain_graph=True)
            vectors[row, k] = found.flatten()
    ratio = (log_probs - log_probs.detach()).exp()
    loss = agg_loss(-by_token * ratio, mask.float(), "token-mean", batch_num_tokens=mask.sum(), dp_size=1)
    loss.backward()

    traces = [TraceRecord(n, f"p{n}", "", "x" * length, [1], [1] * length, [], 0.0) for n, length in enumerate(lengths)]
    records = [CuttingRecord(n, "c", own, own) for n, own in enumerate(cuts)]
    table = make_table(Measurements(None, {}, traces, records), "c", Resamples.draw(3, 1, seed=0))
    sums, _ = policy_gradient.GradientComparison(table, np.ones(3, dtype=bool), vectors, credit).gradients(credit)
    assert -sums.sum(axis=0) / sum(lengths) == pytest.approx(weight.grad.flatten().numpy(), abs=1e-6)


def test_variance_is_that_of_batches_of_prompts(table, sketches, grpo):
    """The mean gradients of resampled batches scatter as the formula says."""
    sums, _ = policy_gradient.GradientComparison(table, *sketches, grpo).gradients(grpo)
    counts = Resamples.draw(40, 4000, seed=1).counts[1:]
    tokens = np.bincount(table.groups, table.lengths, minlength=40).astype(float)
    means = (counts @ sums) / (counts @ tokens)[:, None]
    scatter = means.var(axis=0).sum()
    moments = policy_gradient._moments(np.ones((1, 40)), sums, tokens)
    assert moments.variance[0] / 40 == pytest.approx(scatter, rel=0.1)


def test_scale_of_the_credit_is_told_apart_from_its_noise(table, sketches, grpo):
    same, double = _compare(table, sketches, grpo, grpo), _compare(table, sketches, 2 * grpo, grpo)
    for name, value in (
        ("variance", 1.0),
        ("variance_scaled", 1.0),
        ("cosine", 1.0),
        ("snr", 1.0),
        ("efficiency", 1.0),
    ):
        assert same[name] == pytest.approx(value), name
    assert double["variance"] == pytest.approx(4.0)
    assert double["variance_scaled"] == pytest.approx(1.0) and double["efficiency"] == pytest.approx(1.0)


def test_random_credit_has_no_direction_and_right_credit_has_more(measurements, table, sketches, grpo):
    """In this world only wrong segments have a direction to learn from."""
    noise = np.random.default_rng(0).normal(size=grpo.shape)
    found = _compare(table, sketches, noise, grpo)
    assert found["efficiency"][0] < 0.3 and not found["cosine_unbiased"].size, "the direction of noise is not given"
    right = np.zeros_like(grpo)
    for row, trace in enumerate(table.traces):
        if trace.wrong_from is not None:
            segment = int(np.searchsorted(table.cuts[row].characters, trace.wrong_from, side="right")) - 1
            right[row, segment] = min(grpo[row, 0], 0.0)
    found = _compare(table, sketches, right, grpo)
    assert found["efficiency"][0] > 2.0 and found["cosine_unbiased"][0] > 0.9


def test_too_few_prompts_are_refused(measurements, table, sketches, grpo):
    rows, vectors = sketches
    found = policy_gradient.GradientComparison(table, rows & (table.groups < 5), vectors, grpo).compare(grpo)
    assert {m.interval()["reason"] for m in found.values()} == {policy_gradient.TOO_FEW}


def test_prompts_without_sketches_do_not_count(measurements, table, sketches, grpo):
    """Leaving prompts out is the same as not having them."""
    rows, vectors = sketches
    fewer = dataclasses.replace(
        measurements,
        traces=[trace for trace in measurements.traces if trace.trace < 80],
        cuttings=[cut for cut in measurements.cuttings if cut.trace < 80],
    )
    whole, small = (
        make_table(given, CUTTING, Resamples(np.ones((1, num)))) for given, num in ((measurements, 40), (fewer, 20))
    )
    credit = np.where(np.arange(table.width) % 2 == 0, grpo, 0.5 * grpo)
    found = []
    half = (rows & (table.groups < 20), vectors)
    for place, own in ((whole, half), (small, policy_gradient.load_sketches(fewer, small))):
        num = len(place.traces)
        found.append(policy_gradient.GradientComparison(place, *own, grpo[:num]).compare(credit[:num]))
    for name in policy_gradient.NAMES:
        assert found[0][name].samples == pytest.approx(found[1][name].samples), name


def test_blame_by_advantage_leaves_uniform_groups_out(measurements, table):
    comparison = Comparison(Evidence(measurements, table, 1.0))
    method = next(m for m in methods_from(Evidence(measurements, table, 1.0), PROBES) if m.name == "joint:reference")
    entry = comparison.entry(method)
    rewards = table.rewards
    mixed = {g for g in set(table.groups.tolist()) if len(set(rewards[table.groups == g])) > 1}
    expected = sum(int(table.groups[row]) in mixed for row in np.nonzero(table.wrong_segments >= 0)[0])
    assert entry["credit"]["reweight"]["blame_top1"]["num"] == expected
    assert entry["measures"]["blame_top1"]["num"] == (table.wrong_segments >= 0).sum() > expected
    # Within a failed trace reweight orders segments as d does.
    assert entry["credit"]["reweight"]["blame_top1"]["estimate"] == pytest.approx(
        comparison.measure(method, _in(table, mixed))["blame_top1"].samples[0]
    )


def _in(table, groups):
    return np.isin(table.groups, sorted(groups))
