"""What holds for every source, and a source of one's own."""

import sys
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, compute_grpo_outcome_advantage

from rredcot_verl.config.blocks import Block
from rredcot_verl.config.schema import parse
from rredcot_verl.core.redistribution import SegmentBatch
from rredcot_verl.sources.base import Source
from rredcot_verl.sources.group import Group
from rredcot_verl.sources.hidden import HiddenStates
from rredcot_verl.sources.queue import Rows
from rredcot_verl.sources.record import Plan, Record, Status
from rredcot_verl.sources.registry import SOURCES, SPECIFIC, make_source
from rredcot_verl.sources.response import Response
from rredcot_verl.trainer.estimator import Segmented, compute_credit, compute_rredcot_advantage, credit_rule
from tests.sources.world import Agent, World, source_of

OUTCOMES = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
INDEX = np.array(["a"] * 4, dtype=object)
VALUES = [[0.2, 0.7, 0.6], [0.2, 0.5, 0.1], [0.2, 0.2, 0.2], [0.2, 0.1, 0.9]]
ALGORITHM = OmegaConf.create({"norm_adv_by_std_in_grpo": True, "gamma": 1.0, "lam": 1.0})
PROBED = ("rredcot", "vps", "mig")
ATTRIBUTIONS = ("attention_attribution", "gradient_attribution", "leave_one_out")


def credit(values=VALUES, cuts=(0, 2, 4, 6), **settings):
    block = parse({"credit": settings})
    segments = SegmentBatch.from_rows([list(cuts)] * 4, values, OUTCOMES, [6] * 4)
    rule = credit_rule(ALGORITHM, block)
    return compute_credit(Segmented(segments, torch.arange(4), rule), INDEX, torch.ones(4, 6))


@pytest.mark.parametrize("name", SOURCES)
def test_it_is_an_estimator_of_verls_and_grpo_without_segments(name):
    assert ADV_ESTIMATOR_REGISTRY[name] is compute_rredcot_advantage
    rewards, mask = torch.rand(4, 6), torch.ones(4, 6)
    expected, _ = compute_grpo_outcome_advantage(rewards, mask, INDEX)
    advantages, returns = ADV_ESTIMATOR_REGISTRY[name](token_level_rewards=rewards, response_mask=mask, index=INDEX)
    assert torch.equal(advantages, expected) and returns is not advantages


@pytest.mark.parametrize("name", SOURCES)
def test_it_says_where_it_comes_from_and_what_is_ours(name):
    kind = type(source_of(name))
    words = f"{sys.modules[kind.__module__].__doc__} {kind.__doc__}"
    assert ("arXiv" in words or "paper" in words) and "ours" in words.lower()
    assert source_of(name).name == name and source_of(name).describe() and source_of(name).way_out()


@pytest.mark.parametrize("form", ["reweight", "td"])
def test_beta_zero_and_a_single_segment_are_grpo(form):
    found = credit([[0.3]] * 4, (0, 6), form=form)
    assert torch.allclose(found.segment_advantages[:, 0], found.row_advantages, atol=1e-6)
    plain = credit(form="reweight", beta=0.0)
    assert torch.equal(plain.segment_advantages, plain.row_advantages.unsqueeze(1).expand(4, 3))


def test_what_sets_them_apart():
    made = {name: source_of(name) for name in SOURCES}
    assert {name for name, source in made.items() if source.weighs} == set(ATTRIBUTIONS)
    assert {name for name, source in made.items() if not source.forecasts} == {*ATTRIBUTIONS, "vps", "mig"}
    assert not any(source.needs_all for source in made.values())
    assert {name for name, source in made.items() if source.payload_fields} == {*PROBED, *ATTRIBUTIONS}
    forms = {name: made[name].form for name in PROBED}
    assert forms == {"rredcot": "joint", "vps": "geometric", "mig": "geometric"}
    assert source_of("vps", self_value={"form": "joint"}).form == "joint"
    assert source_of("rredcot", self_value={"form": "hidden"}).name == "rredcot"
    assert source_of("rredcot", self_value={"proposals": "union"}).needs_all


@pytest.mark.parametrize("name", SOURCES)
def test_which_settings_it_reads(name):
    source = source_of(name)
    assert source.reads() <= set(SPECIFIC)
    reads = {"source_options"}
    if name in PROBED:
        reads |= {key for key in SPECIFIC if key.startswith("self_value.")}
    reads |= {"monte_carlo"} if name == "vineppo" else set()
    assert source.reads() == reads


@pytest.mark.parametrize(
    "name, block, reads, needs",
    [
        ("rredcot", {}, True, True),
        ("vps", {"self_value": {"proposals": "union"}}, True, False),
        ("mig", {"self_value": {"proposals": "group"}}, False, False),
        ("rredcot", {"self_value": {"form": "hidden"}}, False, False),
        ("vineppo", {}, False, False),
        ("leave_one_out", {}, False, False),
    ],
)
def test_whether_rows_need_reference_answers(name, block, reads, needs):
    source = source_of(name, **block)
    assert (source.reads_references(), source.needs_references()) == (reads, needs)


def test_values_by_source(monkeypatch):
    payload = {"values": [0.25, 0.75, 0.5], "num_weights": 3}

    def found(name, weights=(1.0, 0.0, 3.0), shaping=0.0):
        source = source_of(name)
        own = Record(Status.SCORED, [0, 1, 2, 4], payload, shaping=shaping)
        world = World(monkeypatch, [own, Record(Status.NO_PROPOSAL), None], rewards=[1.0 + shaping, 0.5, 0.0])
        if source.weighs:
            world.put(**{source.result_fields[0]: [list(weights), [0.0], [0.0]]})
        own, *others = source.values(world.rows())
        assert others == [[], []]
        return own

    for name in ("rredcot", "vps", "vineppo"):
        assert found(name) == [0.25, 0.75, 0.5]
    assert found("mig") == [0.25, 0.75, 0.75]
    # The group's rewards are 1 and 0.5: b = 0.75, and the outcome 1 is 0.25 above it.
    for name in ATTRIBUTIONS:
        assert found(name) == pytest.approx([0.75, 0.8125, 0.8125])
        assert found(name, weights=[0.0] * 3) == []
        # A penalty for length is no part of what the segments share.
        assert found(name, shaping=-0.75) == pytest.approx(found(name))


# --- a source of one's own --------------------------------------------------------------------------------------------


class Lengths(Source):
    """v_k is the share of the response written so far."""

    class Options(Block):
        scale: float = 1.0
        order: Literal["rising", "falling"] = "rising"

    async def plan(self, response: Response, group: Group, boundaries: list[int]) -> Plan:
        return Plan(Record(Status.SCORED, boundaries, {"length": len(response.response_ids)}))

    def values(self, rows: Rows) -> list[list[float]]:
        return [self._of(record) if row in rows.scored else [] for row, record in enumerate(rows.records)]

    def _of(self, record: Record) -> list[float]:
        return [self.options.scale * cut / record.payload["length"] for cut in record.segment_boundaries[:-1]]


OURS = f"{__name__}:Lengths"


def test_a_source_of_ones_own_from_the_response_to_its_values(monkeypatch):
    agent = Agent(block={"source": OURS, "source_options": {"scale": 0.5}})
    assert isinstance(agent.source, Lengths) and agent.source.name == OURS
    record = agent.record().record
    assert record.measuring_seconds > 0
    cuts = record.segment_boundaries
    values = agent.source.values(World(monkeypatch, [record, None]).rows())
    assert values == [[0.5 * cut / cuts[-1] for cut in cuts[:-1]], []]
    # Everything else has a default.
    choice = agent.source.choose_engine(OmegaConf.create({}))
    assert choice.label == f"source, {OURS}" and agent.source.check(OmegaConf.create({})) is None
    recorded = World(monkeypatch, [record]).recorded()
    agent.source.measure(recorded, None)
    assert agent.source.passes(recorded) == () and agent.source.metrics([record]) == {}
    assert agent.source.reads() == {"source_options"} and not agent.source.needs_references()
    assert OURS in agent.source.way_out() and agent.source.describe() == OURS


def test_a_foreign_estimator_gets_rredcots_own_source():
    assert source_of("gae").name == "rredcot" and type(source_of("gae")) is type(source_of("rredcot"))
    assert isinstance(source_of("gae", source=OURS), Lengths)


class WithoutModel(HiddenStates):
    """A source whose options are no model."""

    Options = dict


@pytest.mark.parametrize(
    "block, estimator, words",
    [
        (
            {"source": OURS},
            "vineppo",
            [f"source='{OURS}'", "adv_estimator=vineppo", "use algorithm.adv_estimator=rredcot"],
        ),
        ({"source": "tests.sources.world"}, "rredcot", ["names no class", "package.module:Class"]),
        (
            {"source": "tests.nowhere:Lengths"},
            "rredcot",
            ["cannot be imported", "tests.nowhere", "package.module:Class"],
        ),
        ({"source": f"{__name__}:Length"}, "rredcot", ["cannot be imported", "Length"]),
        ({"source": f"{__name__}:credit"}, "rredcot", ["is no subclass of rredcot_verl.sources.base.Source"]),
        ({"source": "builtins:int"}, "rredcot", ["is no subclass of", "int"]),
        ({"source": "rredcot_verl.sources.base:Source"}, "rredcot", ["has no plan and no values"]),
        ({"source": f"{__name__}:WithoutModel"}, "rredcot", ["has Options that are no config.blocks.Block"]),
        (
            {"source": OURS, "source_options": {"scales": 2}},
            "rredcot",
            ["source_options.scales=2", "known keys: scale"],
        ),
        ({"source": OURS, "source_options": {"order": "up"}}, "rredcot", ["source_options.order='up'", "'rising'"]),
        ({"source": OURS, "source_options": {"scale": "2"}}, "rredcot", ["source_options.scale='2'", "number"]),
        ({"source_options": {"scale": 2}}, "rredcot", ["algorithm.rredcot.source_options.scale=2: unknown key"]),
        ({"source_options": {"scale": 2}}, "leave_one_out", ["algorithm.rredcot.source_options.scale=2: unknown key"]),
    ],
)
def test_a_faulty_source_is_told_what_is_wrong(block, estimator, words):
    with pytest.raises(ValueError) as caught:
        make_source(parse(block), estimator)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


REGRESSED: Sequence[tuple[dict, str]] = [
    ({"self_value": {"calibration": "logistic"}}, "self_value.calibration=logistic"),
    ({"self_value": {"form": "hidden"}}, "self_value.form=hidden"),
]


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "rredcot"])
@pytest.mark.parametrize("block, asked", REGRESSED)
def test_only_rredcots_values_are_regressed(name, block, asked):
    reward_model = {"reward": {"reward_model": {"enable": False}}}
    found = source_of(name, **block).check(OmegaConf.create(reward_model))
    assert found is not None and found.startswith(f"algorithm.rredcot.{asked} with algorithm.adv_estimator={name}: ")
