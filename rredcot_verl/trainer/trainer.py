"""The trainer side: redistribute, hand the segments to the estimator, report.

A pass-through subclass of each of verl's trainers stands under verl's own mode name (verl compares the name with the
literal "sync" in several places); without RREDCoT in the config it is verl's trainer.
"""

import logging
import time
from typing import Any

from omegaconf import DictConfig
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY, PPOTrainer

from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.config.sources import ATTRIBUTIONS, PROBED, SOURCES
from rredcot_verl.core.metrics import credit_metrics
from rredcot_verl.core.redistribution import redistribute, return_error
from rredcot_verl.preflight.at_start import check_data
from rredcot_verl.probes.elicitation import Elicitation
from rredcot_verl.probes.vocabulary import Vocabulary
from rredcot_verl.run.engine_choice import EngineChoice, apply_choice, choose_engine
from rredcot_verl.run.settings import (
    active_settings,
    reward_penalty,
    run_source,
    switch_on,
    warn_of_unread,
)
from rredcot_verl.sources.attribution import weighed
from rredcot_verl.sources.monte_carlo import monte_carlo_metrics
from rredcot_verl.sources.record import NO_PROPOSAL, STATUSES
from rredcot_verl.trainer.actor_probes import scored, without_probes
from rredcot_verl.trainer.batch import Rows, check_outcomes, read_records, read_rows, write_token_level_rewards
from rredcot_verl.trainer.calibration import Calibrator, checkpoint_folder, name_prompts
from rredcot_verl.trainer.estimator import SegmentContext, compute_credit, segment_context
from rredcot_verl.trainer.hidden_pass import read_hidden
from rredcot_verl.trainer.probe_pass import ProbePassMixin
from rredcot_verl.trainer.samples import log_samples
from rredcot_verl.trainer.traces import CreditedRows, informative_rows, trace_lines, write_traces

logger = logging.getLogger(__name__)


class RREDCoTTrainerMixin(PPOTrainer):
    """Adds redistribution to a verl V1 trainer, between reward and advantage."""

    _engine: EngineChoice

    def __init__(self, config: DictConfig) -> None:
        self.rredcot: RREDCoTConfig | None = active_settings(config)
        self._probe_seconds = 0.0
        self._calibrator: Calibrator | None = None
        if self.rredcot is not None:
            switch_on(config)
            warn_of_unread(config, self.rredcot)
            self._source = run_source(config)
            if self.rredcot.regresses():
                self._calibrator = Calibrator(self.rredcot)
        super().__init__(config)

    def _init_tokenizer(self) -> None:
        super()._init_tokenizer()
        if self.rredcot is not None:
            # Only its checks are wanted here: before any worker or model is started.
            Elicitation(Vocabulary(self.tokenizer, self.rredcot.segmentation.keywords), self.rredcot)
            self._engine = choose_engine(self.config, self.rredcot)
            apply_choice(self.config, self._engine)
            if self.rredcot.check_data:
                check_data(self.config, self.tokenizer)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        if self.rredcot is None:
            return super()._compute_advantage(batch, metrics)
        started = time.perf_counter()
        rows = self._valued_rows(batch, metrics)
        segments = rows.segments(self._source, self.rredcot.self_value.smoothing)
        token_level_rewards = redistribute(segments, rows.response_mask)
        write_token_level_rewards(batch, rows, token_level_rewards)
        credit = compute_credit(
            segments,
            rows.final_rows,
            rows.index,
            rows.response_mask,
            self.config.algorithm,
            self.rredcot,
            self._source,
        )
        errors = return_error(token_level_rewards, rows.outcomes)
        metrics["rredcot/return_error/max"] = errors.max().item()
        own_seconds = self._probe_seconds + time.perf_counter() - started
        if self.config.algorithm.adv_estimator in SOURCES:
            with segment_context(SegmentContext(segments, credit.segment_advantages)):
                batch = super()._compute_advantage(batch, metrics)
        else:
            batch = super()._compute_advantage(batch, metrics)
        num_tokens = segments.num_tokens(rows.response_mask)
        for name, value in credit_metrics(segments, num_tokens, credit.segment_weights).items():
            metrics[f"rredcot/{name}"] = value
        metrics.update(self._cost_metrics(rows, own_seconds))
        self._show(batch, CreditedRows(rows, segments, credit, errors, self._engine.label, self._source))
        return without_probes(batch)

    def _show(self, batch: KVBatchMeta, credited: CreditedRows) -> None:
        """Write credited traces, and send some to the trackers, where this step is due."""
        assert self.rredcot is not None
        settings, step = self.rredcot.traces, self.global_steps
        # Once a step: of several local updates, the first.
        if self.local_trigger_step != 0:
            return
        if settings.dir is not None and step % settings.freq == 0:
            write_traces(settings, step, self.tokenizer, batch, credited)
        if settings.samples_freq is not None and step % settings.samples_freq == 0:
            chosen = informative_rows(credited, settings.num_samples)
            lines = trace_lines(step, self.tokenizer, batch, credited, chosen)
            log_samples(self.config.trainer.logger, self.logger, step, lines, num_samples=settings.num_samples)

    def _valued_rows(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> Rows:
        """The batch's rows, with what their values are made of."""
        assert self.rredcot is not None
        records = read_records(batch)
        if self._source in ATTRIBUTIONS:
            records = weighed(batch, records)
        else:
            records = scored(batch, records, self.rredcot.self_value)
        rows = read_rows(batch, records)
        check_outcomes(rows, self.rredcot, reward_penalty(self.config))
        if self._calibrator is not None:
            hidden = read_hidden(batch) if self.rredcot.reads_hidden_states() else []
            rows = self._calibrator.calibrate(rows, name_prompts(batch, rows.index.tolist()), hidden, self.global_steps)
            metrics.update({f"rredcot/{name}": value for name, value in self._calibrator.readout.report.items()})
        return rows

    def _save_checkpoint(self) -> None:
        if self._calibrator is not None:
            self._calibrator.save(checkpoint_folder(self.config.trainer, self.global_steps))
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self._calibrator is not None and self.global_steps > 0:
            self._calibrator.load(checkpoint_folder(self.config.trainer, self.global_steps, resumes=True))

    def _cost_metrics(self, rows: Rows, own_seconds: float) -> dict[str, float]:
        """What was probed, what it cost, and what was left out and why."""
        records = [record for record in rows.records if record is not None]
        if not records:
            return {}
        if not getattr(self, "_warned_no_proposal", False) and all(r.status == NO_PROPOSAL for r in records):
            way_out = "check algorithm.rredcot.elicitation.format"
            if self.rredcot.reads_references(self._source):
                way_out = f"check algorithm.rredcot.self_value.reference_key={self.rredcot.self_value.reference_key}"
            logger.warning(
                "rredcot: no response of this step had an answer to measure segments by, so its credit is GRPO's; %s",
                way_out + (", or set algorithm.rredcot.self_value.proposals=union" if self._source in PROBED else ""),
            )
            self._warned_no_proposal = True
        num_probe_tokens = sum(record.num_probe_tokens for record in records)
        # Scoring is hidden behind generation as long as some response is still being generated or verified.
        exposed = max(record.scored_time for record in records) - max(record.ready_time for record in records)
        shares = {f"rredcot/rows_{s}/mean": sum(r.status == s for r in records) / len(records) for s in STATUSES}
        return {
            **shares,
            **monte_carlo_metrics(records),
            "rredcot/rows_truncated/mean": sum(record.truncated for record in records) / len(records),
            "rredcot/probes/sum": float(sum(record.num_probes for record in records)),
            "rredcot/probe_tokens/sum": float(num_probe_tokens),
            "rredcot/probe_tokens_per_response_token/mean": num_probe_tokens / max(1, int(rows.response_mask.sum())),
            "rredcot/recomputed_tokens/sum": float(sum(record.num_recomputed_tokens for record in records)),
            "rredcot/dropped_answers/sum": float(sum(record.num_dropped_answers for record in records)),
            "rredcot/dropped_boundaries/sum": float(sum(record.num_dropped_boundaries for record in records)),
            "rredcot/scored_by_actor/mean": float(self._engine.engine == "actor"),
            "rredcot/scoring_seconds/sum": sum(record.scoring_seconds for record in records),
            "timing_s/self_value": max(0.0, exposed) + own_seconds,
        }


def _stand_in(registry: dict[str, type[PPOTrainer]]) -> None:
    """Stand in for each of verl's trainers under its own mode name."""
    for mode, trainer in list(registry.items()):
        if not issubclass(trainer, RREDCoTTrainerMixin):
            # The probes' pass stands behind verl's trainer, inside what it does around `old_log_prob`.
            bases = (RREDCoTTrainerMixin, trainer, ProbePassMixin)
            registry[mode] = type(f"RREDCoT{trainer.__name__}", bases, {"__doc__": trainer.__doc__})


_stand_in(TRAINER_REGISTRY)
