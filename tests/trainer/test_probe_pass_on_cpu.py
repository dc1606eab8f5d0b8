"""Under which weights probes are read: those of `old_log_prob`, in every mode and by every road."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import PPOTrainer, PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.passes.protocol import FUSED, PASS, PROBES_ONLY
from rredcot_verl.run.engine_choice import EngineChoice
from rredcot_verl.sources.record import NO_PROPOSAL, PLANNED, CreditRecord
from rredcot_verl.trainer import probe_pass
from rredcot_verl.trainer.actor_probes import SeparateSequences
from rredcot_verl.trainer.probe_pass import ProbePassMixin
from rredcot_verl.trainer.trainer import RREDCoTTrainerMixin

MODES = {
    "sync": PPOTrainerSync,
    "colocate_async": PPOTrainerColocateAsync,
    "separate_async": PPOTrainerSeparateAsync,
}
SHARED, SEPARATE = EngineChoice("actor", True, ""), EngineChoice("actor", False, "")
READ_BY_SERVER = EngineChoice("rollout", False, "")


class Workers:
    """verl's actor workers: weights have a name, and every pass is noted with the weights it saw."""

    def __init__(self, weights: str) -> None:
        self.weights = weights
        self.kept: dict[int, str] = {}
        self.passes: list[tuple[str, str]] = []
        self._dispatch_info = {"actor": [0]}

    def save_model_to_cpu(self, n):
        self.kept[n] = self.weights

    def restore_model_from_cpu(self, n):
        self.weights = self.kept[n]

    def clear_cpu_model(self, n):
        del self.kept[n]

    def compute_log_prob(self, batch):
        self.passes.append((batch.extra_info.get(PASS, "verl's own"), self.weights))
        return batch


@pytest.fixture
def record(monkeypatch):
    """One response, which waits for its probes; passes are noted, nothing is stored."""
    records = [CreditRecord(PLANNED, num_probe_tokens=5)]

    def verls_own(self, batch, metrics):
        if not self.config.algorithm.rollout_correction.bypass_mode:
            self.actor_rollout_wg.compute_log_prob(batch)
        return batch

    def read(self, batch, records):
        self.worker_group.passes.append(("separate", self.worker_group.weights))

    monkeypatch.setattr(probe_pass, "read_records", lambda batch: records)
    monkeypatch.setattr(probe_pass, "attach_probes", lambda batch, records: None)
    monkeypatch.setattr(SeparateSequences, "read", read)
    monkeypatch.setattr(PPOTrainer, "_compute_old_log_prob", verls_own)
    return records


def make_trainer(mode, engine, bypass=False, weights="now"):
    """A trainer without Ray: what its constructor makes is put in by hand."""
    trainer = object.__new__(TRAINER_REGISTRY[mode])
    rollout = {"temperature": 1.0, "log_prob_max_token_len_per_gpu": 100}
    trainer.config = OmegaConf.create(
        {"algorithm": {"rollout_correction": {"bypass_mode": bypass}}, "actor_rollout_ref": {"rollout": rollout}}
    )
    trainer.rredcot, trainer._engine, trainer._probe_seconds = RREDCoTConfig(), engine, 0.0
    trainer.local_trigger_step = 0
    trainer.actor_rollout_wg = Workers(weights)
    return trainer


def passes_of(trainer):
    batch = KVBatchMeta(keys=["a_0_0"], tags=[{"seq_len": 20}], partition_id="train", extra_info={})
    result = trainer._compute_old_log_prob(batch, {})
    # Later passes over the batch are not asked for probes.
    assert PASS not in result.extra_info
    return trainer.actor_rollout_wg.passes


@pytest.mark.parametrize("mode", MODES)
def test_the_pass_stands_inside_verls_trainer(mode):
    order = TRAINER_REGISTRY[mode].__mro__
    places = [order.index(each) for each in (RREDCoTTrainerMixin, MODES[mode], ProbePassMixin, PPOTrainer)]
    assert places == sorted(places)


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
@pytest.mark.parametrize("engine, expected", [(SHARED, [FUSED]), (SEPARATE, ["separate", "verl's own"])])
def test_modes_with_one_update_a_step_read_under_the_current_weights(record, mode, engine, expected):
    assert passes_of(make_trainer(mode, engine)) == [(name, "now") for name in expected]


@pytest.mark.parametrize("engine, expected", [(SHARED, [FUSED]), (SEPARATE, ["separate", "verl's own"])])
def test_all_local_updates_of_separate_async_read_under_the_weights_of_the_last_synchronisation(
    record, engine, expected
):
    trainer = make_trainer("separate_async", engine, weights="synchronised")
    for trainer.local_trigger_step in range(3):
        trainer.actor_rollout_wg.passes.clear()
        assert passes_of(trainer) == [(name, "synchronised") for name in expected]
        # And the local updates go on from where they were.
        assert trainer.actor_rollout_wg.weights == ("synchronised" if trainer.local_trigger_step == 0 else "updated")
        assert list(trainer.actor_rollout_wg.kept) == [0]
        trainer.actor_rollout_wg.weights = "updated"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine, expected", [(SHARED, [PROBES_ONLY]), (SEPARATE, ["separate"])])
def test_in_bypass_mode_they_are_the_current_ones(record, mode, engine, expected):
    """verl computes no `old_log_prob`, so there are no others to bring back."""
    trainer = make_trainer(mode, engine, bypass=True)
    trainer.local_trigger_step = 1
    assert passes_of(trainer) == [(name, "now") for name in expected]
    assert trainer.actor_rollout_wg.kept == {}


@pytest.mark.parametrize("engine, settings", [(READ_BY_SERVER, RREDCoTConfig()), (SHARED, None)])
def test_a_run_whose_training_engine_is_not_asked_is_verls_own(record, engine, settings):
    trainer = make_trainer("sync", engine)
    trainer.rredcot = settings
    assert passes_of(trainer) == [("verl's own", "now")]


def test_a_batch_without_probes_is_verls_own(record):
    record[:] = [CreditRecord(NO_PROPOSAL), None]
    trainer = make_trainer("separate_async", SHARED)
    assert passes_of(trainer) == [("verl's own", "now")] and trainer._probe_seconds == 0.0


def test_the_probes_share_of_a_fused_pass_is_their_share_of_its_tokens(record, monkeypatch):
    clock = iter([0.0, 1.0, 11.0])
    monkeypatch.setattr(probe_pass, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    trainer = make_trainer("sync", SHARED)
    passes_of(trainer)
    # One second of preparation, and 5 of the pass's 25 tokens.
    assert trainer._probe_seconds == pytest.approx(1.0 + 10.0 * 5 / 25)
