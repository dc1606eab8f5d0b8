"""What a form of credit is worth: gradients against verl's own loss, estimates against worlds whose truth is known."""

import json
import math

import numpy as np
import pytest
import torch
from verl.trainer.ppo.core_algos import agg_loss, compute_grpo_outcome_advantage

from rredcot_verl.analyze.credit_forms import FORMS, GRPO, advantages
from rredcot_verl.analyze.efficiency import NO_DIRECTION, TOO_FEW, GradientComparison, UnitGradients
from rredcot_verl.analyze.measured_gradients import SKETCH_DIM, GradientReader, compare_forms
from rredcot_verl.analyze.method_values import Method
from rredcot_verl.analyze.policy import Policy
from rredcot_verl.analyze.records import CuttingRecord, Measurements, TraceRecord
from rredcot_verl.analyze.statistics import Resamples
from rredcot_verl.analyze.trace_table import make_table
from tests.analyze.synthetic import CUTTING, write
from tests.tiny_model import build_tiny_model, make_tokenizer

RNG = np.random.default_rng(0)
TD, LOCAL, REWEIGHT = FORMS["td, lambda 1"], FORMS["td, lambda 0"], FORMS["reweight, beta 1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write(tmp_path_factory.mktemp("world") / "m", num_groups=64, num_rollouts=4, hidden=False)


@pytest.fixture(scope="module")
def measurements(world):
    return world.load()


@pytest.fixture(scope="module")
def table(measurements):
    return make_table(measurements, CUTTING, Resamples.draw(64, 5, seed=0))


@pytest.fixture(scope="module")
def grpo(table):
    return advantages(table, None, GRPO)


class TestAdvantages:
    def test_of_grpo_are_verls(self, table, grpo):
        outcomes = torch.tensor([trace.reward for trace in table.traces]).unsqueeze(1)
        index = np.array([trace.group for trace in table.traces], dtype=object)
        for form, norm in ((GRPO, True), (FORMS["GRPO without std"], False)):
            expected, _ = compute_grpo_outcome_advantage(
                outcomes, torch.ones_like(outcomes), index, norm_adv_by_std_in_grpo=norm
            )
            found = advantages(table, None, form)
            assert np.abs(np.where(table.is_state, found - expected.numpy(), 0.0)).max() == 0.0

    def test_td_with_the_others_mean_is_grpo(self, table, grpo):
        method = Method("mean", "baseline", "", np.where(table.is_state, table.others[:, None], np.nan))
        credit = advantages(table, method, TD)
        assert np.where(table.is_state, credit, 0.0) == pytest.approx(np.where(table.is_state, grpo, 0.0), abs=1e-5)

    @pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.reads_values])
    def test_traces_without_values_are_one_segment(self, table, grpo, name):
        """GRPO's, or with `critic` the outcome against the mean of the others."""
        values = np.where(table.is_state, RNG.random(table.is_state.shape), np.nan)
        values[::3] = np.nan
        credit = advantages(table, Method("some", "probe", "", values), FORMS[name])
        expected = grpo
        if name.startswith("critic"):
            others = table.others[:, None]
            count = np.array([(table.groups == group).sum() for group in table.groups])[:, None]
            start = others.clip(0.5 / count, 1 - 0.5 / count)
            expected = (table.rewards[:, None] - others) / np.sqrt(start * (1 - start)) + np.zeros_like(grpo)
        same = np.where(table.is_state, np.isclose(credit, expected, atol=1e-6), True)
        assert same[::3].all() and not same[1::3].all()


TOKENIZER, MODEL = make_tokenizer(), build_tiny_model()
POLICY = Policy(MODEL, TOKENIZER, (TOKENIZER.eos_token_id,), 512)
TEXTS = ("1+1=2\nso 2+3=5\nAnswer: 5", "I guess it is\n7", "no answer at all, but three\nlines\n", "x")


def _traces():
    prompts = [TOKENIZER.encode(prompt) for prompt in ("2+3=", "10+20+3=", "2+3=", "4-1=")]
    ids = [TOKENIZER.encode(text) for text in TEXTS]
    return [TraceRecord(n, str(n), "", TEXTS[n], prompts[n], ids[n], [], 0.0) for n in range(4)]


class TestReader:
    @pytest.mark.parametrize("max_tokens", [1, 60, 4096])
    def test_gradient_is_that_of_verls_token_mean_loss(self, max_tokens):
        traces, temperature = _traces(), 0.8
        weights = [RNG.normal(size=len(trace.response_ids)).astype(np.float32) for trace in traces]
        width = max(len(trace.response_ids) for trace in traces)
        log_probs, credit, mask = torch.zeros(4, width), torch.zeros(4, width), torch.zeros(4, width)
        for row, trace in enumerate(traces):
            size = len(trace.response_ids)
            logits = MODEL(torch.tensor([trace.token_ids])).logits[0, -size - 1 : -1] / temperature
            own = logits.log_softmax(-1).gather(1, torch.tensor(trace.response_ids).unsqueeze(1)).squeeze(1)
            log_probs = log_probs.index_put((torch.tensor(row), torch.arange(size)), own)
            credit[row, :size], mask[row, :size] = torch.from_numpy(weights[row]), 1.0
        ratio = (log_probs - log_probs.detach()).exp()
        loss = agg_loss(-credit * ratio, mask, "token-mean", batch_num_tokens=mask.sum(), dp_size=1)
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(MODEL.parameters()))])

        reader = GradientReader(POLICY, temperature, max_tokens, seed=0)
        none = [np.zeros_like(own) for own in weights]
        found, nothing = reader.read(traces, [weights, none], [[0, 2], [1, 3]])
        assert not nothing.coordinates.any()
        assert found.coordinates.shape == (2, reader.num_parameters) and found.sketch is None
        batch = -found.coordinates.sum(0) / mask.sum()
        assert torch.allclose(batch, expected, atol=1e-6 * float(expected.abs().max()) + 1e-7)

    def test_of_a_large_model_inner_products_and_some_coordinates_are_kept(self):
        traces = _traces()
        # Segments of unlike advantages; under another form a trace has none, or one.
        weights = [
            np.repeat([1.0, -2.0, 0.5], [2, 1, len(trace.response_ids)])[: len(trace.response_ids)] for trace in traces
        ]
        weights = [own.astype(np.float32) for own in weights]
        other = [own * 0 if place == 1 else np.ones_like(own) for place, own in enumerate(weights)]
        units = [[0, 3], [1], [2]]
        whole, whole_other = GradientReader(POLICY, 1.0, 4096, seed=0).read(traces, [weights, other], units)
        reader = GradientReader(POLICY, 1.0, 4096, seed=0, full=10)
        found, found_other = reader.read(traces, [weights, other], units)
        assert not found_other.whole[1].any() and not found_other.coordinates[1].any()
        for exact_rows, kept_rows in ((whole, found), (whole_other, found_other)):
            expected = exact_rows.coordinates[:, reader._places]
            assert torch.allclose(kept_rows.coordinates, expected, atol=1e-5 * float(expected.abs().max()))
        exact, kept = whole.whole @ whole.whole.T, found.whole @ found.whole.T
        scale = exact.diagonal().sqrt()
        assert found.whole.shape == (3, SKETCH_DIM)
        assert ((kept - exact).abs() < 5 / math.sqrt(SKETCH_DIM) * scale * scale.unsqueeze(1)).all()
        share = reader.num_parameters / found.coordinates.shape[1]
        assert float((found.coordinates**2).sum() * share) == pytest.approx(float(exact.diagonal().sum()), rel=0.1)


class World:
    """Independent Gaussian units: every expectation is known, and so is what Adam makes of it."""

    def __init__(self, num=600, batch=16, signal=0.3):
        generator = torch.Generator().manual_seed(0)
        self.batch = batch
        self.mean = torch.randn(num, generator=generator) * torch.rand(num, generator=generator) ** 3
        self.noise = 0.2 + 3 * torch.rand(num, generator=generator)
        self.mean *= (signal / batch * (self.noise**2).sum() / (self.mean**2).sum()).sqrt()
        self.less = self.noise * (0.4 + 0.5 * torch.rand(num, generator=generator))

    def adam(self, scale, noise, size):
        mean = scale * self.mean
        return float((self.mean * mean / (mean**2 + noise**2 / (size * self.batch)).sqrt()).sum())

    def truth(self, scale):
        """Of a form whose mean is GRPO's times `scale`, with `less` noise."""
        low, high, wanted = 0.05, 5.0, self.adam(1.0, self.noise, 1.0)
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.adam(scale, self.less, middle) < wanted else (low, middle)
        return {
            "efficiency": float(scale**2 * (self.noise**2).sum() / (self.less**2).sum()),
            "adam": self.adam(scale, self.less, 1.0) / wanted,
            "samples": low,
        }

    def draw(self, seed, scale, num_units=64):
        """Direction and GRPO, and the form, on the same units of different numbers of tokens; half the noise shared."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(60, 140, (num_units,), generator=generator)
        shape = (num_units, len(self.mean))
        common, first, second = (torch.randn(shape, generator=generator) for _ in range(3))
        given = tokens.unsqueeze(1) * self.mean + 100 * self.noise * (common + first) / math.sqrt(2)
        form = tokens.unsqueeze(1) * scale * self.mean + 100 * self.less * (common + second) / math.sqrt(2)
        return UnitGradients(given), UnitGradients(form), tokens


class TestEfficiency:
    @pytest.mark.parametrize("scale", [1.0, 1.7])
    def test_estimates_are_those_of_the_world(self, scale):
        world = World()
        truth = world.truth(scale)
        found = []
        for seed in range(30):
            grpo, form, tokens = world.draw(seed, scale)
            found.append(GradientComparison(grpo, grpo, tokens, world.batch, seed).compare(form))
        for name, value in truth.items():
            known = [each[name] for each in found if each[name]["low"] is not None]
            inside = [each["low"] <= value <= each["high"] for each in known]
            assert len(known) >= 25 and np.mean(inside) > 0.8, (name, value)
            assert np.median([each["estimate"] for each in known]) == pytest.approx(value, rel=0.03, abs=0.04), name

    def test_units_of_any_size_say_the_same(self):
        """Two prompts in a unit, and half as many units in a batch."""
        world = World(signal=1.0)
        grpo, form, tokens = world.draw(0, 1.0, num_units=256)
        pairs = [UnitGradients(each.coordinates.view(128, 2, -1).sum(1)) for each in (grpo, form)]
        one = GradientComparison(grpo, grpo, tokens, 16).compare(form)
        two = GradientComparison(pairs[0], pairs[0], tokens.view(128, 2).sum(1), 8).compare(pairs[1])
        for name in ("efficiency", "adam"):
            assert one[name]["estimate"] == pytest.approx(two[name]["estimate"], rel=0.1), name

    def test_size_does_not_count_and_grpo_is_worth_itself(self):
        world = World()
        grpo, form, tokens = world.draw(0, 1.0)
        comparison = GradientComparison(grpo, grpo, tokens, world.batch)
        for name, found in comparison.compare(grpo).items():
            assert [found[key] for key in ("estimate", "low", "high")] == pytest.approx([1.0] * 3, abs=1e-4), name
        own, double = comparison.compare(form), comparison.compare(UnitGradients(1e-4 * form.coordinates))
        for name in own:
            assert own[name]["estimate"] == pytest.approx(double[name]["estimate"], rel=1e-3), name
        signal = comparison.signal_to_noise()
        assert signal["low"] <= 0.3 <= signal["high"]

    def test_noise_is_worth_nothing(self):
        world = World(signal=1.0)
        grpo, form, tokens = world.draw(0, 0.0)
        found = GradientComparison(grpo, grpo, tokens, world.batch).compare(form)
        assert found["efficiency"]["estimate"] < 0.1 and abs(found["adam"]["estimate"]) < 0.3
        assert found["samples"]["estimate"] is None and "not reached" in found["samples"]["reason"]

    def test_each_view_speaks_for_itself(self):
        """Coordinates of much noise, as of irrelevant words, hide GRPO's direction from Euclid first."""
        world = World(signal=1.0)
        world.mean[:5], world.noise[:5], world.less[:5] = 0.0, 80.0, 80.0
        grpo, form, tokens = world.draw(1, 1.0)
        comparison = GradientComparison(grpo, grpo, tokens, world.batch)
        found, truth = comparison.compare(form), world.truth(1.0)
        assert comparison.obstacle is None and found["efficiency"]["reason"] == NO_DIRECTION
        assert found["adam"]["low"] <= truth["adam"] <= found["adam"]["high"]

    def test_says_where_nothing_can_be_told(self):
        world = World(signal=0.0)
        grpo, _, tokens = world.draw(1, 0.0)
        assert GradientComparison(grpo, grpo, tokens, world.batch).obstacle == NO_DIRECTION
        few = torch.arange(64) < 5
        assert GradientComparison(grpo.rows(few), grpo.rows(few), tokens[few], world.batch).obstacle == TOO_FEW


class TestForms:
    def test_right_credit_is_worth_more(self, world, table, grpo):
        """Only wrong segments have a direction to learn from here: the true values put the blame there."""
        # Of its own, so that tests before this one do not change what it draws.
        rng = np.random.default_rng(0)
        truth = np.full(table.is_state.shape, np.nan)
        for row, own in enumerate(world.values):
            truth[row, : len(own)] = own
        shuffled = truth.copy()
        for row, num in enumerate(table.num_segments):
            shuffled[row, 1:num] = rng.permutation(truth[row, 1:num])
        vectors = rng.normal(size=(*table.is_state.shape, 32))
        for row, wrong in enumerate(world.wrong):
            if wrong is not None:
                vectors[row, wrong, 0] += 6.0
        tokens = torch.from_numpy(np.bincount(table.groups, table.lengths))

        def units(credit):
            per_trace = np.einsum("tk,tkd->td", np.where(table.is_state, credit, 0.0), vectors)
            sums = np.zeros((64, 32))
            np.add.at(sums, table.groups, per_trace)
            return UnitGradients(torch.from_numpy(sums).float())

        comparison = GradientComparison(units(grpo), units(grpo), tokens, 16)
        right, wrong = (
            comparison.compare(units(advantages(table, Method("v", "probe", "", values), LOCAL)))
            for values in (truth, shuffled)
        )
        assert right["efficiency"]["low"] > 1.5
        assert wrong["efficiency"]["estimate"] < 0.7 * right["efficiency"]["estimate"]

    def test_every_form_and_method_has_a_row_and_a_method_is_compared_where_it_has_values(self):
        """Prompts of a right and a wrong trace; the second method knows all but the last."""
        traces, cuts = [], []
        for number in range(48):
            reward = float(number % 2 == 0)
            text = TEXTS[0] if reward else TEXTS[1 + number // 2 % 2]
            prompt, ids = TOKENIZER.encode("2+3="), TOKENIZER.encode(text)
            traces.append(TraceRecord(number, str(number // 2), "", text, prompt, ids, [], reward))
            cuts.append(CuttingRecord(number, "c", [0, 4, len(ids)], [0, 4, len(ids)]))
        table = make_table(Measurements(None, {}, traces, cuts), "c", Resamples.draw(24, 0, seed=0))
        values = RNG.random((48, 2))
        partial = np.where(np.arange(48)[:, None] < 46, values, np.nan)
        methods = [Method("all", "probe", "", values), Method("some", "probe", "", partial)]
        reader = GradientReader(POLICY, 1.0, 4096, seed=0)
        found = compare_forms(reader, table, methods, batch_prompts=2, num_prompts=100, seed=0)
        json.dumps(found, allow_nan=False)
        pairs = [(row["form"], row["method"]) for row in found["rows"]]
        controls = sum("control" in form.credit for form in FORMS.values())
        assert len(pairs) == len(set(pairs)) == 2 * len(FORMS) - 1 - controls and pairs[0] == ("GRPO without std", "")
        assert (found["num_units"], found["num_traces"], found["num_prompts"]) == (24, 48, 24)
        numbers = {row["method"]: row["measures"]["efficiency"]["num"] for row in found["rows"]}
        few = ["critic, lambda 0", "td, lambda 1"]
        alone = compare_forms(reader, table, methods, forms=few, batch_prompts=2, num_prompts=100, seed=0)["rows"]
        assert alone == [row for name in few for row in found["rows"] if row["form"] == name]
        # In groups of one success and one failure GRPO with and without its deviation differ by a factor.
        plain = found["rows"][0]["measures"]
        assert numbers == {"": 24, "all": 24, "some": 23}
        assert plain["efficiency"]["estimate"] == pytest.approx(1.0, abs=1e-3)
