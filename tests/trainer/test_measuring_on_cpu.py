"""What the training engine is asked for, and under which weights: those of `old_log_prob`, in every mode."""

from types import SimpleNamespace

import pytest
from verl.trainer.ppo.v1 import PPOTrainer, PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

from rredcot_verl.passes.protocol import ALONE, FIELDS, NOTHING, PASSES
from rredcot_verl.trainer import measuring
from rredcot_verl.trainer.measuring import MeasuringMixin
from rredcot_verl.trainer.trainer import RREDCoTTrainerMixin
from tests.sources.world import TEXT
from tests.trainer.steps import OWN, SEQUENCES, NotingWorkers, make_step, make_trainer, verls_old_log_prob

MODES = {
    "sync": PPOTrainerSync,
    "colocate_async": PPOTrainerColocateAsync,
    "separate_async": PPOTrainerSeparateAsync,
}
ACTOR = {"engine": "actor", "fuse": True}
PROBES, HIDDEN = ("probes", ()), ("hidden", (-2, 64, 0))
ATTENTION, GRADIENT = ("attention", ()), ("gradient", ())
SHARED = ("rredcot", {"self_value": ACTOR})
APART = ("rredcot", {"self_value": ACTOR | {"fuse": False}})
SEPARATE = ("rredcot", {"self_value": ACTOR | {"share_prefix": False}})
BOTH = ("rredcot", {"self_value": ACTOR | {"calibration": "logistic"}, "readout": {"use_hidden": True}})
BOTH_APART = ("rredcot", BOTH[1] | {"self_value": BOTH[1]["self_value"] | {"fuse": False}})
# A run's source, what is asked for in verl's pass or before it, and what is where there is none.
RUNS = [
    (SHARED, [((PROBES,), False)], [((PROBES,), True)]),
    (APART, [((PROBES,), True), OWN], [((PROBES,), True)]),
    (SEPARATE, [SEQUENCES, OWN], [SEQUENCES]),
    (("rredcot", {"self_value": {"form": "hidden"}}), [((HIDDEN,), False)], [((HIDDEN,), True)]),
    (BOTH, [((PROBES, HIDDEN), False)], [((PROBES, HIDDEN), True)]),
    (BOTH_APART, [((PROBES, HIDDEN), True), OWN], [((PROBES, HIDDEN), True)]),
    (("attention_attribution", {}), [((ATTENTION,), True), OWN], [((ATTENTION,), True)]),
    (("gradient_attribution", {}), [((GRADIENT,), True), OWN], [((GRADIENT,), True)]),
    (("leave_one_out", {}), [SEQUENCES, OWN], [SEQUENCES]),
    (("mig", {"self_value": {"engine": "rollout"}}), [OWN], []),
]


@pytest.fixture(autouse=True)
def base(monkeypatch):
    verls_old_log_prob(monkeypatch)


def passes_of(trainer, world):
    trainer.actor_rollout_wg.passes.clear()
    result = trainer._compute_old_log_prob(world.batch, {})
    # Later passes over the batch are asked for nothing of ours.
    assert PASSES not in result.extra_info and ALONE not in result.extra_info
    return trainer.actor_rollout_wg.passes


@pytest.mark.parametrize("mode", MODES)
def test_it_stands_inside_verls_trainer(mode):
    order = TRAINER_REGISTRY[mode].__mro__
    places = [order.index(each) for each in (RREDCoTTrainerMixin, MODES[mode], MeasuringMixin, PPOTrainer)]
    assert places == sorted(places)


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
@pytest.mark.parametrize("run, expected, _", RUNS)
def test_modes_with_one_update_a_step_measure_under_the_current_weights(monkeypatch, mode, run, expected, _):
    world, _ = make_step(monkeypatch, run[0], **run[1])
    assert passes_of(make_trainer(mode, run[0], **run[1]), world) == [(name, "now") for name in expected]


@pytest.mark.parametrize("run, expected, _", RUNS)
def test_all_local_updates_of_separate_async_measure_under_the_weights_of_the_last_synchronisation(
    monkeypatch, run, expected, _
):
    world, _ = make_step(monkeypatch, run[0], **run[1])
    trainer = make_trainer("separate_async", run[0], workers=NotingWorkers("synchronised"), **run[1])
    for trainer.local_trigger_step in range(3):
        assert passes_of(trainer, world) == [(name, "synchronised") for name in expected]
        # And the local updates go on from where they were.
        assert trainer.actor_rollout_wg.weights == ("synchronised" if trainer.local_trigger_step == 0 else "updated")
        assert list(trainer.actor_rollout_wg.kept) == [0]
        trainer.actor_rollout_wg.weights = "updated"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("run, _, expected", RUNS)
def test_in_bypass_mode_they_are_the_current_ones(monkeypatch, mode, run, _, expected):
    """verl computes no `old_log_prob`, so there are no others to bring back."""
    world, _ = make_step(monkeypatch, run[0], **run[1])
    trainer = make_trainer(mode, run[0], bypass=True, **run[1])
    trainer.local_trigger_step = 1
    assert passes_of(trainer, world) == [(name, "now") for name in expected]
    assert trainer.actor_rollout_wg.kept == {}


@pytest.mark.parametrize("bypass", [False, True])
def test_megatron_reads_probes_in_a_pass_of_their_own(monkeypatch, bypass):
    world, _ = make_step(monkeypatch, SHARED[0], **SHARED[1])
    trainer = make_trainer("sync", SHARED[0], bypass=bypass, strategy="megatron", **SHARED[1])
    expected = [((PROBES,), True)] if bypass else [((PROBES,), True), OWN]
    assert passes_of(trainer, world) == [(name, "now") for name in expected]


def test_a_run_without_redistribution_is_verls_own(monkeypatch):
    world, _ = make_step(monkeypatch)
    trainer = make_trainer()
    trainer._source = None
    assert passes_of(trainer, world) == [(OWN, "now")] and world.queue.reads == []


@pytest.mark.parametrize("estimator", ["rredcot", "attention_attribution", "leave_one_out"])
def test_a_batch_in_which_nothing_waits_is_verls_own(monkeypatch, estimator):
    world, _ = make_step(monkeypatch, estimator, rewards=(1.0, 1.0), self_value=ACTOR)
    assert passes_of(make_trainer("separate_async", estimator, self_value=ACTOR), world) == [(OWN, "now")]


@pytest.mark.parametrize("run", [SHARED, BOTH])
def test_payloads_are_fetched_for_the_pass_that_reads_them_only(monkeypatch, run):
    world, source = make_step(monkeypatch, fields=["input_ids"], **run[1])
    # As verl leaves it, the batch names whatever its rows hold.
    world.batch.fields = ["input_ids", *source.payload_fields]
    trainer = make_trainer(**run[1])
    assert trainer._compute_old_log_prob(world.batch, {}).fields == ["input_ids"]
    ((_, fetched),) = trainer.actor_rollout_wg.asked
    assert fetched == ["input_ids", *source.payload_fields]


def test_a_pass_alone_leaves_the_batch_as_it_was(monkeypatch):
    world, source = make_step(monkeypatch, "attention_attribution", fields=["input_ids"])
    trainer = make_trainer(estimator="attention_attribution")
    batch = trainer._compute_old_log_prob(world.batch, {})
    (alone, fetched), (own, left) = trainer.actor_rollout_wg.asked
    asked = {PASSES: (ATTENTION,), ALONE: True, "calculate_entropy": False, "compute_loss": False, "temperature": 0.7}
    assert alone == asked and own == {"temperature": 0.1}
    assert fetched == ["input_ids", *source.payload_fields] and left == batch.fields == ["input_ids"]


def test_copies_of_payloads_are_emptied_before_anything_is_measured(monkeypatch):
    """The padding row is a copy of the first one, whose probes nobody wants twice."""
    world, source = make_step(monkeypatch, **BOTH[1])
    for name in source.payload_fields:
        assert world.column(name)[2] == world.column(name)[0] != list(NOTHING)
    before = {name: world.column(name)[:2] for name in source.payload_fields}
    passes_of(make_trainer(**BOTH[1]), world)
    for name in source.payload_fields:
        assert world.column(name) == [*before[name], list(NOTHING)]


def test_the_probes_share_of_a_fused_pass_is_their_share_of_its_tokens(monkeypatch):
    world, _ = make_step(monkeypatch, **SHARED[1])
    clock = iter([0.0, 1.0, 1.0, 11.0])
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    trainer = make_trainer(**SHARED[1])
    passes_of(trainer, world)
    ours = sum(record.num_probe_tokens for record in world.recorded().records if record)
    # One second of preparation; every row's trace has 20 tokens.
    assert trainer._measuring_seconds == pytest.approx(1.0 + 10.0 * ours / (ours + 3 * 20))


def test_separate_sequences_give_what_a_pass_would(monkeypatch):
    world, source = make_step(monkeypatch, texts=(TEXT, TEXT), **SEPARATE[1])
    passes_of(make_trainer(**SEPARATE[1]), world)
    first, second, padding = world.column(FIELDS["probes"].result)
    places = world.recorded().records[0].payload["places"]
    assert len(first) == len(second) == sum(places[2::3]) and padding == [0.0]
    assert all(len(own) > 1 for own in source.values(world.rows())[:2])
