"""When the training engine measures what values are made of: together with `old_log_prob`, under the same weights."""

import time
from typing import Any

from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.config.sources import ATTRIBUTIONS
from rredcot_verl.passes.protocol import FUSED, PASS
from rredcot_verl.run.capabilities import bypasses_old_log_prob
from rredcot_verl.run.engine_choice import EngineChoice
from rredcot_verl.sources.attribution import AttributionPass, without_attribution
from rredcot_verl.sources.record import CreditRecord
from rredcot_verl.trainer.actor_probes import (
    SeparateSequences,
    any_planned,
    attach_probes,
    read_probes_only,
    without_probes,
)
from rredcot_verl.trainer.batch import read_records
from rredcot_verl.trainer.hidden_pass import attach_positions, read_hidden_only, without_hidden


class ProbePassMixin(PPOTrainer):
    """Reads probes, attributions and hidden states where verl's base trainer computes `old_log_prob`.

    It stands between verl's trainer of a mode and verl's base trainer. `separate_async` brings the weights of the last
    synchronisation back around its call of the base (decoupled PPO), so every way to read probes sees those, and not
    the weights of the local update that is due. With `bypass_mode` verl has no such pass and restores nothing: the
    probes are read under the current weights.
    """

    rredcot: RREDCoTConfig | None
    _engine: EngineChoice
    _source: str = "rredcot"
    _probe_seconds: float

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        self._probe_seconds = 0.0
        if self.rredcot is None or self._engine.engine != "actor":
            return super()._compute_old_log_prob(batch, metrics)
        started = time.perf_counter()
        records = read_records(batch)
        if self.rredcot.reads_hidden_states():
            attach_positions(batch, records, self.rredcot.readout)
        if not any_planned(records):
            return self._without_probes(batch, metrics, started)
        if self._source in ATTRIBUTIONS:
            self._attribution().run(batch, records)
        elif not self._engine.share_prefix:
            self._separate_sequences().read(batch, records)
        else:
            attach_probes(batch, records)
            if not bypasses_old_log_prob(self.config):
                # One pass cannot be timed in two parts: the probes' share of its seconds is their share of its tokens.
                share, before_pass = _share_of_probes(batch, records), time.perf_counter()
                batch.extra_info[PASS] = FUSED
                batch = super()._compute_old_log_prob(batch, metrics)
                batch.extra_info.pop(PASS, None)
                self._probe_seconds = before_pass - started + share * (time.perf_counter() - before_pass)
                return _without_ours(batch)
            # verl takes the rollout's log-probabilities and makes no pass that the probes could join.
            read_probes_only(self.actor_rollout_wg, batch, self.config.actor_rollout_ref.rollout.temperature)
        self._probe_seconds = time.perf_counter() - started
        return super()._compute_old_log_prob(_without_ours(batch), metrics)

    def _without_probes(self, batch: KVBatchMeta, metrics: dict[str, Any], started: float) -> KVBatchMeta:
        """A batch that has at most hidden states to be read."""
        assert self.rredcot is not None
        if not self.rredcot.reads_hidden_states():
            return super()._compute_old_log_prob(batch, metrics)
        if bypasses_old_log_prob(self.config):
            read_hidden_only(self.actor_rollout_wg, batch, self.config.actor_rollout_ref.rollout.temperature)
            batch = without_hidden(batch)
        self._probe_seconds = time.perf_counter() - started
        return without_hidden(super()._compute_old_log_prob(batch, metrics))

    def _attribution(self) -> AttributionPass:
        assert self.rredcot is not None
        rollout = self.config.actor_rollout_ref.rollout
        return AttributionPass(
            worker_group=self.actor_rollout_wg,
            source=self._source,
            settings=self.rredcot.attribution,
            num_ranks=self._num_ranks(),
            temperature=rollout.temperature,
            max_tokens=rollout.log_prob_max_token_len_per_gpu,
        )

    def _separate_sequences(self) -> SeparateSequences:
        assert self.rredcot is not None
        rollout = self.config.actor_rollout_ref.rollout
        return SeparateSequences(
            worker_group=self.actor_rollout_wg,
            num_ranks=self._num_ranks(),
            temperature=rollout.temperature,
            max_closing_tokens=self.rredcot.self_value.max_closing_tokens,
            max_tokens=rollout.log_prob_max_token_len_per_gpu,
        )

    def _num_ranks(self) -> int:
        """Data-parallel ranks of the actor."""
        return int(max(self.actor_rollout_wg._dispatch_info["actor"])) + 1


def _without_ours(batch: KVBatchMeta) -> KVBatchMeta:
    """The same batch, with nothing of ours for its next passes to do or to fetch."""
    return without_hidden(without_attribution(without_probes(batch)))


def _share_of_probes(batch: KVBatchMeta, records: list[CreditRecord | None]) -> float:
    num_probe_tokens = sum(record.num_probe_tokens for record in records if record is not None)
    return num_probe_tokens / (num_probe_tokens + sum(tag["seq_len"] for tag in batch.tags))
