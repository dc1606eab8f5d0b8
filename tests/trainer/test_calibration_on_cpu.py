"""The readout on a training batch: who is fitted to, who is valued, in which units, and what a checkpoint holds."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rredcot_verl.config.schema import parse
from rredcot_verl.sources.record import EMPTY, READOUT, SCORED, UNIFORM_GROUP, CreditRecord
from rredcot_verl.trainer import calibration
from rredcot_verl.trainer.batch import Rows
from rredcot_verl.trainer.calibration import Calibrator, checkpoint_folder, name_prompts

NUM_PROMPTS, GROUP, LENGTH = 40, 8, 12
BOUNDARIES = [0, 4, 8, LENGTH]


def world(seed: int = 0):
    """Outcomes decided by a skill per response that a state reveals more and more of."""
    random = torch.Generator().manual_seed(seed)
    skill = torch.randn(NUM_PROMPTS, GROUP, generator=random, dtype=torch.float64)
    difficulty = torch.randn(NUM_PROMPTS, 1, generator=random, dtype=torch.float64)
    outcomes = torch.bernoulli((2 * skill - difficulty).sigmoid(), generator=random).flatten()
    seen = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    return outcomes, (2 * skill.reshape(-1, 1) * seen - difficulty.repeat(1, GROUP).reshape(-1, 1)).sigmoid()


def rows_of(outcomes, records) -> Rows:
    count = len(outcomes)
    mask = torch.ones(count, LENGTH)
    return Rows(
        keys=[f"{row // GROUP}_{row % GROUP}_0" for row in range(count)],
        index=np.array([f"uid{row // GROUP}" for row in range(count)], dtype=object),
        nested_mask=torch.nested.as_nested_tensor(list(mask), layout=torch.jagged),
        response_mask=mask,
        lengths=[LENGTH] * count,
        outcomes=outcomes,
        final_rows=torch.arange(count),
        records=records,
        is_padding=torch.zeros(count, dtype=torch.bool),
    )


PROMPTS = [f"prompt {row // GROUP}" for row in range(NUM_PROMPTS * GROUP)]
LOGISTIC = {"self_value": {"calibration": "logistic"}}


def values_of(rows: Rows) -> torch.Tensor:
    return torch.tensor([record.self_values for record in rows.records], dtype=torch.float64)


def probed(values) -> list[CreditRecord]:
    return [CreditRecord(SCORED, segment_boundaries=BOUNDARIES, self_values=own.tolist()) for own in values]


def test_biased_values_become_honest_ones():
    outcomes, truth = world()
    # A forced answer: a lower bound.
    rows = rows_of(outcomes, probed(0.1 * truth))
    fitted = values_of(Calibrator(parse(LOGISTIC)).calibrate(rows, PROMPTS, [], step=1))
    before, after = (values_of(rows) - truth).square().mean(), (fitted - truth).square().mean()
    assert after < 0.03 < before / 3
    assert (fitted.mean(dim=0) - outcomes.mean()).abs().max() < 0.03


@pytest.mark.parametrize("form", ["joint", "hidden"])
def test_rewards_from_minus_one_to_one_are_valued_in_their_own_units(form):
    outcomes, truth = world()
    value = {"form": form, "calibration": "logistic"}
    if form == "joint":
        plain, scaled = probed(truth), probed(2 * truth - 1)
        hidden = []
    else:
        plain = scaled = [CreditRecord(READOUT, segment_boundaries=BOUNDARIES)] * len(outcomes)
        hidden = list(truth.logit().unsqueeze(2).float())
    expected = Calibrator(parse({"self_value": value})).calibrate(rows_of(outcomes, plain), PROMPTS, hidden, step=1)
    settings = parse({"self_value": {**value, "reward_range": [-1, 1]}})
    found = Calibrator(settings).calibrate(rows_of(2 * outcomes - 1, scaled), PROMPTS, hidden, step=1)
    assert torch.allclose(values_of(found), 2 * values_of(expected) - 1, atol=1e-9)
    assert {record.status for record in found.records} == {SCORED}


def test_a_group_without_advantage_teaches_and_is_not_credited():
    outcomes, truth = world()
    outcomes[:GROUP] = 1.0
    records = [CreditRecord(READOUT, segment_boundaries=BOUNDARIES)] * len(outcomes)
    records[:GROUP] = [CreditRecord(UNIFORM_GROUP, segment_boundaries=BOUNDARIES)] * GROUP
    records[-1] = CreditRecord(EMPTY)
    hidden = list(truth.logit().unsqueeze(2).float())
    hidden[-1] = torch.zeros(0, 1)
    calibrator = Calibrator(parse({"self_value": {"form": "hidden"}}))
    found = calibrator.calibrate(rows_of(outcomes, records), PROMPTS, hidden, step=1)
    assert found.records[:GROUP] == records[:GROUP] and found.records[-1] == records[-1]
    assert all(record.status == SCORED and len(record.self_values) == 3 for record in found.records[GROUP:-1])
    assert calibrator.readout.report["readout_rows/mean"] == 3 * (len(outcomes) - 1)
    # With probes such a group has no values to be fitted to.
    calibrator = Calibrator(parse(LOGISTIC))
    calibrator.calibrate(rows_of(outcomes, records[:GROUP] + probed(truth[GROUP:])), PROMPTS, [], step=1)
    assert calibrator.readout.report["readout_rows/mean"] == 3 * (len(outcomes) - GROUP)


def test_a_prompt_is_not_valued_by_its_own_outcomes():
    outcomes, truth = world()
    other = outcomes.clone()
    # Others' outcomes reach a row by the group's mean alone, so what is swapped keeps every mean but these two rows'.
    group = outcomes[:GROUP]
    solved, failed = int(group.argmax()), int(group.argmin())
    other[solved], other[failed] = outcomes[failed], outcomes[solved]
    first, second = (
        values_of(Calibrator(parse(LOGISTIC)).calibrate(rows_of(each, probed(truth)), PROMPTS, [], step=1))
        for each in (outcomes, other)
    )
    same = [row for row in range(GROUP) if row not in (solved, failed)]
    assert torch.equal(first[same], second[same])
    assert not torch.equal(first[GROUP:], second[GROUP:])


def test_nothing_to_fit_to_leaves_the_rows():
    outcomes, _ = world()
    rows = rows_of(outcomes, [CreditRecord(UNIFORM_GROUP)] * len(outcomes))
    assert Calibrator(parse(LOGISTIC)).calibrate(rows, PROMPTS, [], step=1) is rows


def test_a_checkpoint_goes_on_as_if_nothing_had_happened(tmp_path, caplog):
    (first, before), (second, after) = world(0), world(1)
    calibrator = Calibrator(parse(LOGISTIC))
    calibrator.calibrate(rows_of(first, probed(before)), PROMPTS, [], step=1)
    calibrator.save(str(tmp_path / "global_step_1"))
    expected = values_of(calibrator.calibrate(rows_of(second, probed(after)), PROMPTS, [], step=2))
    resumed = Calibrator(parse(LOGISTIC))
    resumed.load(str(tmp_path / "global_step_1"))
    assert torch.equal(values_of(resumed.calibrate(rows_of(second, probed(after)), PROMPTS, [], step=2)), expected)
    fresh = Calibrator(parse(LOGISTIC))
    assert not torch.equal(values_of(fresh.calibrate(rows_of(second, probed(after)), PROMPTS, [], step=2)), expected)
    assert not caplog.records
    fresh.load(str(tmp_path / "nowhere"))
    other = Calibrator(parse({"self_value": {"calibration": "logistic", "form": "geometric"}}))
    other.load(str(tmp_path / "global_step_1"))
    assert ["no such file" in record.getMessage() for record in caplog.records] == [True, False]
    assert "other features" in caplog.records[1].getMessage()


def test_a_prompt_has_one_name_in_every_epoch_and_for_every_output_of_its_sessions(monkeypatch):
    prompt, other, longer = [5, 6, 7], [5, 6, 8], [5, 6, 7, 1, 2, 3]

    def names(uids, prompts):
        data = {"prompts": torch.nested.as_nested_tensor([torch.tensor(p) for p in prompts], layout=torch.jagged)}
        monkeypatch.setattr(calibration, "tq", SimpleNamespace(kv_batch_get=lambda **kwargs: data))
        return name_prompts(SimpleNamespace(keys=uids, partition_id="train"), uids)

    # The second output of a session starts from a prompt that holds the first one.
    first = names(["u", "u", "v"], [prompt, longer, other])
    again = names(["x", "y", "y"], [other, longer, prompt])
    assert first[0] == first[1] == again[1] == again[2]
    assert first[2] == again[0] != first[0]


@dataclasses.dataclass
class TrainerConfig:
    resume_mode: str
    resume_from_path: str | None = None
    default_local_dir: str = "checkpoints/run"


def test_the_checkpoint_of_another_run_is_found():
    assert checkpoint_folder(TrainerConfig("auto"), 7) == "checkpoints/run/global_step_7"
    assert checkpoint_folder(TrainerConfig("auto"), 7, resumes=True) == "checkpoints/run/global_step_7"
    other = TrainerConfig("resume_path", "elsewhere/global_step_7")
    assert checkpoint_folder(other, 7, resumes=True) == "elsewhere/global_step_7"
    assert checkpoint_folder(other, 7) == "checkpoints/run/global_step_7"
