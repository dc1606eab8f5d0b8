"""Values regressed on outcomes: who is fitted to, who is valued, in which units, and what a checkpoint holds."""

import dataclasses

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

    def make(outcomes, records, states=None, step=1, keys=KEYS, length=LENGTH):
        world = World(
            monkeypatch,
            records,
            keys,
            outcomes.tolist(),
            [length] * NUM_ROWS,
            prompts=[[row // GROUP] for row in range(NUM_ROWS)],
        )
        if states is not None:
            world.put(**{STATES: [own.float() for own in states]})
        return world.rows(step)

    return make


def num_taught(outcomes) -> int:
    """Rows whose others' outcomes differ."""
    right = outcomes.reshape(NUM_PROMPTS, GROUP).sum(dim=1, keepdim=True) - outcomes.reshape(NUM_PROMPTS, GROUP)
    return int(((right > 0) & (right < GROUP - 1)).sum())


def fitted(source, rows) -> torch.Tensor:
    """Values of a batch after a step with the same one: nothing is known in the first."""
    source.values(rows)
    return torch.tensor(source.values(dataclasses.replace(rows, step=rows.step + 1)), dtype=torch.float64)


def test_biased_values_become_honest_ones(rows_of):
    outcomes, truth = skills()
    # A forced answer: a lower bound.
    source, biased = source_of("rredcot", **LOGISTIC), 0.1 * truth
    found = fitted(source, rows_of(outcomes, probed(biased)))
    before, after = (biased - truth).square().mean(), (found - truth).square().mean()
    assert after < 0.03 < before / 3
    assert (found.mean(dim=0) - outcomes.mean()).abs().max() < 0.04
    assert source.metrics([])["rredcot/readout_rows/mean"] == 3 * num_taught(outcomes)


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


@pytest.mark.parametrize("block", [LOGISTIC, HIDDEN])
def test_a_group_without_advantage_neither_teaches_nor_is_credited(rows_of, block):
    outcomes, truth = skills()
    outcomes[:GROUP] = 1.0
    records = [Record(Status.UNIFORM_GROUP)] * GROUP + probed(truth)[GROUP:-1] + [Record(Status.EMPTY)]
    states = [*[torch.zeros(1)] * GROUP, *truth.logit()[GROUP:-1], torch.zeros(1)]
    source, taught = source_of("rredcot", **block), num_taught(outcomes)
    rows = rows_of(outcomes, records, states)
    source.values(rows)
    values = source.values(dataclasses.replace(rows, step=2))
    assert values[:GROUP] == [[]] * GROUP and values[-1] == []
    assert all(len(own) == 3 for own in values[GROUP:-1])
    assert source.metrics([])["rredcot/readout_rows/mean"] in (3 * taught, 3 * (taught - 1))


@pytest.mark.parametrize("odd", [[0.0, 0.0, 0.0, -0.5, 0.0, 0.0, 0.0, 0.0], [1.0] * GROUP])
def test_a_row_that_was_measured_for_its_own_outcome_does_not_teach(rows_of, odd):
    """Not even where one group looks uniform: failures with an overlong penalty, or rewards that were tensors."""
    # The odd group, then groups with one success each: of a response whose others failed it is known that it is right.
    outcomes = torch.zeros(NUM_PROMPTS, GROUP, dtype=torch.float64)
    outcomes[torch.arange(NUM_PROMPTS), torch.arange(NUM_PROMPTS) % GROUP] = 1.0
    outcomes[-NUM_PROMPTS // 2 :, ::2] = 1.0
    outcomes[0] = torch.tensor(odd)
    noise = torch.rand(NUM_ROWS, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = 0.2 + 0.4 * outcomes.clamp(min=0.0).reshape(-1, 1) + 0.3 * noise
    selected = (outcomes == 1.0) & (outcomes.sum(dim=1, keepdim=True) == 1.0)
    values = []
    for seen in (truth, torch.where(selected.reshape(-1, 1), 1.0 - truth, truth)):
        source = source_of("rredcot", **LOGISTIC)
        source.values(rows_of(outcomes.flatten(), probed(seen)))
        values.append(source.values(rows_of(outcomes.flatten(), probed(truth), step=2)))
    assert selected.sum() > 10 and values[0] == values[1]
    assert source.metrics([])["rredcot/readout_group_mean_kept/mean"] == 0


def test_responses_without_others_teach_unless_such_were_left_out(rows_of):
    outcomes, truth = skills()
    keys = [f"uid{row}_0_0" for row in range(NUM_ROWS)]
    for skipped in (False, True):
        records = probed(truth)
        if skipped:
            records[0] = Record(Status.UNIFORM_GROUP)
        source = source_of("rredcot", **LOGISTIC)
        rows = rows_of(outcomes, records, keys=keys)
        source.values(rows)
        source.values(dataclasses.replace(rows, step=2))
        assert source.metrics([])["rredcot/readout_rows/mean"] == (0 if skipped else 3 * NUM_ROWS)


def test_no_outcome_of_a_step_reaches_its_values(rows_of):
    (outcomes, truth), (later, seen) = skills(0), skills(1)
    # Others' outcomes reach a row by the group's mean alone, so what is swapped keeps every mean but these two rows'.
    other, group = later.clone(), later[:GROUP]
    solved, failed = int(group.argmax()), int(group.argmin())
    other[solved], other[failed] = later[failed], later[solved]
    values = []
    for each in (later, other):
        source = source_of("rredcot", **LOGISTIC)
        source.values(rows_of(outcomes, probed(truth)))
        values.append(torch.tensor(source.values(rows_of(each, probed(seen), step=2))))
    same = [row for row in range(NUM_ROWS) if row not in (solved, failed)]
    assert torch.equal(values[0][same], values[1][same])
    assert not torch.equal(values[0][solved], values[1][solved])


def test_a_position_knows_nothing_of_the_length_of_its_response(rows_of):
    """Of the longest one neither: positions are measured against the step before's long responses."""
    outcomes, truth = skills()
    block = LOGISTIC | {"readout": {"use_position": True}}
    values = []
    for length in (LENGTH, 10 * LENGTH):
        source = source_of("rredcot", **block)
        source.values(rows_of(outcomes, probed(truth)))
        values.append(source.values(rows_of(outcomes, probed(truth), step=2, length=length)))
    assert values[0] == values[1] and source.metrics([])["rredcot/readout_group_mean_kept/mean"] == 0


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
    others = ({"form": "geometric"}, {"proposals": "union"}, {"score_opening": True}, {"reward_range": [0, 2]})
    for changed in others:
        other = source_of("rredcot", self_value={"calibration": "logistic", **changed})
        other.load(str(tmp_path / "global_step_1"))
    missing, *left = [record.getMessage() for record in caplog.records]
    assert "no such file" in missing and len(left) == len(others)
    assert all("other features" in message for message in left)


@pytest.mark.parametrize("name", ["rredcot", "vps", "leave_one_out"])
def test_what_regresses_nothing_saves_nothing(tmp_path, caplog, name):
    source = source_of(name)
    source.save(str(tmp_path / "step"))
    source.load(str(tmp_path / "step"))
    assert not list(tmp_path.iterdir()) and not caplog.records


def test_a_prompt_has_one_name_in_every_epoch_and_for_every_output_of_its_sessions(monkeypatch):
    prompt, other, longer = [5, 6, 7], [5, 6, 8], [5, 6, 7, 1, 2, 3]

    def names(keys, prompts):
        return name_prompts(World(monkeypatch, [Record(Status.EMPTY)] * 3, keys, prompts=prompts).rows())

    # The second output of a session starts from a prompt that holds the first one.
    first = names(["u_0_0", "u_0_1", "v_0_0"], [prompt, longer, other])
    again = names(["x_0_0", "y_0_1", "y_0_0"], [other, longer, prompt])
    assert first[0] == first[1] == again[1] == again[2]
    assert first[2] == again[0] != first[0]
