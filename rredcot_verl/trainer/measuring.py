"""When the training engine measures what values are made of: together with `old_log_prob`, under the same weights."""

import time
from typing import Any

from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from rredcot_verl.passes.protocol import ALONE, FIELDS, PASSES
from rredcot_verl.sources.base import PassRequest, Source, Workers
from rredcot_verl.sources.engines import reads_alone
from rredcot_verl.sources.queue import RecordedBatch, clear_copies, fetching, not_fetching, read_recorded


class MeasuringMixin(PPOTrainer):
    """Measures where verl's base trainer computes `old_log_prob`.

    It stands between verl's trainer of a mode and verl's base trainer. `separate_async` brings the weights of the last
    synchronisation back around its call of the base (decoupled PPO), so everything that is measured sees those, and not
    the weights of the local update that is due. With `bypass_mode` verl has no such pass and restores nothing: what is
    measured is measured under the current weights.
    """

    _source: Source | None = None
    _recorded: RecordedBatch
    _measuring_seconds: float

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        if self._source is None:
            return super()._compute_old_log_prob(batch, metrics)
        started = time.perf_counter()
        self._recorded = read_recorded(batch)
        clear_copies(self._recorded, self._source.payload_fields)
        workers = self._workers()
        self._source.measure(self._recorded, workers)
        requests = self._source.passes(self._recorded)
        alone = reads_alone(self.config) or not all(request.fuses for request in requests)
        if requests and alone:
            # Not to be had in verl's pass, or there is none.
            _read_alone(workers, _fetching(batch, requests), requests)
            requests = ()
        self._measuring_seconds = time.perf_counter() - started
        batch = self._ask(batch, requests)
        # One pass cannot be timed in two parts: the probes' share of its seconds is their share of its tokens.
        share, before_pass = self._share_of_probes(batch) if requests else 0.0, time.perf_counter()
        batch = super()._compute_old_log_prob(batch, metrics)
        self._measuring_seconds += share * (time.perf_counter() - before_pass)
        for entry in (PASSES, ALONE):
            batch.extra_info.pop(entry, None)
        return self._leave(batch)

    def _ask(self, batch: KVBatchMeta, requests: tuple[PassRequest, ...]) -> KVBatchMeta:
        """The batch, whose pass reads the requests and fetches nothing else of ours."""
        batch = self._leave(batch)
        if requests:
            batch.extra_info.update(_entries(requests, alone=False))
            batch = _fetching(batch, requests)
        return batch

    def _leave(self, batch: KVBatchMeta) -> KVBatchMeta:
        """The batch, with nothing of ours for its next readers to fetch."""
        assert self._source is not None
        results = [fields.result for fields in FIELDS.values()]
        return not_fetching(batch, [*self._source.payload_fields, *self._source.result_fields, *results])

    def _workers(self) -> Workers:
        rollout = self.config.actor_rollout_ref.rollout
        return Workers(
            group=self.actor_rollout_wg,
            num_ranks=int(max(self.actor_rollout_wg._dispatch_info["actor"])) + 1,
            temperature=rollout.temperature,
            max_tokens=rollout.log_prob_max_token_len_per_gpu,
        )

    def _share_of_probes(self, batch: KVBatchMeta) -> float:
        num_probe_tokens = sum(record.num_probe_tokens for record in self._recorded.records if record is not None)
        return num_probe_tokens / (num_probe_tokens + sum(tag["seq_len"] for tag in batch.tags))


def _fetching(batch: KVBatchMeta, requests: tuple[PassRequest, ...]) -> KVBatchMeta:
    return fetching(batch, [FIELDS[request.name].payload for request in requests])


def _read_alone(workers: Workers, batch: KVBatchMeta, requests: tuple[PassRequest, ...]) -> None:
    """A pass for nothing but what is asked; the rows' own fields stay as they are."""
    before = dict(batch.extra_info)
    batch.extra_info.update(
        {
            **_entries(requests, alone=True),
            "calculate_entropy": False,
            "compute_loss": False,
            "temperature": workers.temperature,
        }
    )
    workers.group.compute_log_prob(batch)
    batch.extra_info.clear()
    batch.extra_info.update(before)


def _entries(requests: tuple[PassRequest, ...], alone: bool) -> dict[str, Any]:
    return {PASSES: tuple((request.name, request.options) for request in requests), ALONE: alone}
