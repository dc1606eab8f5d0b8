"""Values regressed on outcomes: who is fitted to, who is valued, in which units, and what a checkpoint holds."""

import pytest
import torch

from rredcot_verl.passes.protocol import FIELDS
from rredcot_verl.sources.record import Record, Status
from rredcot_verl.sources.regression import name_prompts
from tests.sources.world import World, source_of

NUM_PROMPTS, GROUP, LENGTH = 40, 8, 12
NUM_ROWS = NUM_PROMPTS * GROUP
BOUNDARIES = [0, 4, 8, LENGTH]
KEYS = [f"uid{row // GROUP}_{row % GROUP}_0" for row in range(NUM_ROWS)]
LOGISTIC = {"self_value": {"calibration": "logistic"}}
HIDDEN = {"self_value": {"form": "hidden"}}
WAITING = Record(Status.SCORED, BOUNDARIES)
STATES = FIELDS["hidden"].result


def skills(seed: int = 0):
    """Outcomes decided by a skill per response that a state reveals more and more of."""
    random = torch.Generator().manual_seed(seed)
    skill = torch.randn(NUM_PROMPTS, GROUP, generator=random, dtype=torch.float64)
    difficulty = torch.randn(NUM_PROMPTS, 1, generator=random, dtype=torch.float64)
    outcomes = torch.bernoulli((2 * skill - difficulty).sigmoid(), generator=random).flatten()
    seen = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    return outcomes, (2 * skill.reshape(-1, 1) * seen - difficulty.repeat(1, GROUP).reshape(-1, 1)).sigmoid()


def probed(values) -> list[Record]:
    return [Record(Status.SCORED, BOUNDARIES, {"values": own.tolist()}) for own in values]


@pytest.fixture
def rows_of(monkeypatch):
    """Rows of a batch with these outcomes and records; one float a state where states are given."""

    def make(outcomes, records, states=None, step=1):
        world = World(
            monkeypatch,
            records,
            KEYS,
            outcomes.tolist(),
            [LENGTH] * NUM_ROWS,
            prompts=[[row // GROUP] for row in range(NUM_ROWS)],
        )
        if states is not None:
            world.put(**{STATES: [own.float() for own in states]})
        return world.rows(step)

    return make


def fitted(source, rows) -> torch.Tensor:
    return torch.tensor(source.values(rows), dtype=torch.float64)


def test_biased_values_become_honest_ones(rows_of):
    outcomes, truth = skills()
    # A forced answer: a lower bound.
    source, biased = source_of("rredcot", **LOGISTIC), 0.1 * truth
    found = fitted(source, rows_of(outcomes, probed(biased)))
    before, after = (biased - truth).square().mean(), (found - truth).square().mean()
    assert after < 0.03 < before / 3
    assert (found.mean(dim=0) - outcomes.mean()).abs().max() < 0.03
    assert source.without_own and source.metrics([])["rredcot/readout_rows/mean"] == 3 * NUM_ROWS


@pytest.mark.parametrize("form", ["joint", "hidden"])
def test_rewards_from_minus_one_to_one_are_valued_in_their_own_units(rows_of, form):
    outcomes, truth = skills()
    value = {"form": form, "calibration": "logistic"}
    scaled = value | {"reward_range": [-1, 1]}
    if form == "joint":
        rows = rows_of(outcomes, probed(truth)), rows_of(2 * outcomes - 1, probed(2 * truth - 1))
    else:
        rows = tuple(rows_of(each, [WAITING] * NUM_ROWS, truth.logit()) for each in (outcomes, 2 * outcomes - 1))
    # The first rows are read anew: the queue holds the second batch now, with the same prompts and states.
    expected = fitted(source_of("rredcot", self_value=value), rows[0])
    found = fitted(source_of("rredcot", self_value=scaled), rows[1])
    assert torch.allclose(found, 2 * expected - 1, atol=1e-9)


def test_a_group_without_advantage_teaches_and_is_not_credited(rows_of):
    outcomes, truth = skills()
    outcomes[:GROUP] = 1.0
    uniform = [Record(Status.UNIFORM_GROUP, BOUNDARIES)] * GROUP
    states = [*truth.logit()[:-1], torch.zeros(1)]
    records = [*uniform, *[WAITING] * (NUM_ROWS - GROUP - 1), Record(Status.EMPTY)]
    source = source_of("rredcot", **HIDDEN)
    values = source.values(rows_of(outcomes, records, states))
    assert values[:GROUP] == [[]] * GROUP and values[-1] == []
    assert all(len(own) == 3 for own in values[GROUP:-1])
    assert source.metrics([])["rredcot/readout_rows/mean"] == 3 * (NUM_ROWS - 1)
    # With probes such a group has no values to be fitted to.
    source = source_of("rredcot", **LOGISTIC)
    assert source.values(rows_of(outcomes, uniform + probed(truth[GROUP:])))[:GROUP] == [[]] * GROUP
    assert source.metrics([])["rredcot/readout_rows/mean"] == 3 * (NUM_ROWS - GROUP)


def test_a_prompt_is_not_valued_by_its_own_outcomes(rows_of):
    outcomes, truth = skills()
    other = outcomes.clone()
    # Others' outcomes reach a row by the group's mean alone, so what is swapped keeps every mean but these two rows'.
    group = outcomes[:GROUP]
    solved, failed = int(group.argmax()), int(group.argmin())
    other[solved], other[failed] = outcomes[failed], outcomes[solved]
    first, second = (
        fitted(source_of("rredcot", **LOGISTIC), rows_of(each, probed(truth))) for each in (outcomes, other)
    )
    same = [row for row in range(GROUP) if row not in (solved, failed)]
    assert torch.equal(first[same], second[same])
    assert not torch.equal(first[GROUP:], second[GROUP:])


@pytest.mark.parametrize("block", [LOGISTIC, HIDDEN])
def test_nothing_to_fit_to_leaves_the_rows(rows_of, block):
    outcomes, _ = skills()
    source = source_of("rredcot", **block)
    assert source.values(rows_of(outcomes, [Record(Status.UNIFORM_GROUP)] * NUM_ROWS)) == [[]] * NUM_ROWS
    assert source.metrics([]) == {}


def test_the_hidden_state_beside_the_probe(rows_of):
    """The probe knows nothing, the state all: it reaches the values."""
    outcomes, truth = skills()
    block = {"self_value": {"calibration": "logistic"}, "readout": {"use_hidden": True, "dim": 1}}
    blind = probed(torch.full_like(truth, 0.5))
    with_state = fitted(source_of("rredcot", **block), rows_of(outcomes, blind, truth.logit()))
    without = fitted(source_of("rredcot", **LOGISTIC), rows_of(outcomes, blind))
    assert (with_state - truth).square().mean() < 0.03 < (without - truth).square().mean()


def test_a_checkpoint_goes_on_as_if_nothing_had_happened(rows_of, tmp_path, caplog):
    (first, before), (second, after) = skills(0), skills(1)

    def second_step(source):
        return fitted(source, rows_of(second, probed(after), step=2))

    source = source_of("rredcot", **LOGISTIC)
    fitted(source, rows_of(first, probed(before)))
    source.save(str(tmp_path / "global_step_1"))
    expected = second_step(source)
    resumed, fresh = source_of("rredcot", **LOGISTIC), source_of("rredcot", **LOGISTIC)
    resumed.load(str(tmp_path / "global_step_1"))
    assert torch.equal(second_step(resumed), expected)
    assert not torch.equal(second_step(fresh), expected)
    assert not caplog.records
    fresh.load(str(tmp_path / "nowhere"))
    other = source_of("rredcot", self_value={"calibration": "logistic", "form": "geometric"})
    other.load(str(tmp_path / "global_step_1"))
    assert ["no such file" in record.getMessage() for record in caplog.records] == [True, False]
    assert "other features" in caplog.records[1].getMessage()


@pytest.mark.parametrize("name", ["rredcot", "vps", "leave_one_out"])
def test_what_regresses_nothing_saves_nothing(tmp_path, caplog, name):
    source = source_of(name)
    source.save(str(tmp_path / "step"))
    source.load(str(tmp_path / "step"))
    assert not list(tmp_path.iterdir()) and not caplog.records and not source.without_own


def test_a_prompt_has_one_name_in_every_epoch_and_for_every_output_of_its_sessions(monkeypatch):
    prompt, other, longer = [5, 6, 7], [5, 6, 8], [5, 6, 7, 1, 2, 3]

    def names(keys, prompts):
        return name_prompts(World(monkeypatch, [Record(Status.EMPTY)] * 3, keys, prompts=prompts).rows())

    # The second output of a session starts from a prompt that holds the first one.
    first = names(["u_0_0", "u_0_1", "v_0_0"], [prompt, longer, other])
    again = names(["x_0_0", "y_0_1", "y_0_0"], [other, longer, prompt])
    assert first[0] == first[1] == again[1] == again[2]
    assert first[2] == again[0] != first[0]
