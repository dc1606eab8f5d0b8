"""The trainer side: redistribute, hand the segments to the estimator, report.

A pass-through subclass of each of verl's trainers stands under verl's own mode name (verl compares the name with the
literal "sync" in several places); without RREDCoT in the config it is verl's trainer.
"""

import logging
import os
import time
from typing import Any

from omegaconf import DictConfig
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY, PPOTrainer

from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.core.metrics import credit_metrics
from rredcot_verl.core.redistribution import redistribute, return_error
from rredcot_verl.live import LiveLine
from rredcot_verl.preflight.at_start import check_data
from rredcot_verl.probes.elicitation import Elicitation
from rredcot_verl.probes.vocabulary import Vocabulary
from rredcot_verl.run.settings import (
    active_settings,
    expectation_doubts,
    parse_block,
    reward_penalty,
    run_source,
    switch_on,
    tell_whose_words,
    warn_of_unread,
)
from rredcot_verl.sources.engines import EngineChoice, apply_choice
from rredcot_verl.sources.queue import Rows, read_rewards, write_token_level_rewards
from rredcot_verl.sources.record import COUNTED, Record, Status
from rredcot_verl.sources.registry import SOURCES
from rredcot_verl.trainer.estimator import Segmented, compute_credit, credit_rule, with_segments
from rredcot_verl.trainer.measuring import MeasuringMixin
from rredcot_verl.trainer.phases import PhasesMixin
from rredcot_verl.trainer.samples import log_samples
from rredcot_verl.trainer.traces import CreditedRows, informative_rows, trace_lines, write_traces

logger = logging.getLogger(__name__)


class RREDCoTTrainerMixin(PhasesMixin):
    """Adds redistribution to a verl V1 trainer, between reward and advantage."""

    _engine: EngineChoice
    _warned_nothing_measured = False

    def __init__(self, config: DictConfig) -> None:
        self.rredcot: RREDCoTConfig | None = active_settings(config)
        self._source = None
        self._measuring_seconds = 0.0
        if self.rredcot is None:
            tell_whose_words(config)
        else:
            switch_on(config)
            self._source = run_source(config, self.rredcot)
            warn_of_unread(config, self.rredcot, self._source)
            for doubt in expectation_doubts(config, self.rredcot):
                logger.warning("rredcot: %s", doubt)
            if config.algorithm.adv_estimator in SOURCES:
                rule, calibration = credit_rule(config.algorithm, self.rredcot), self.rredcot.self_value.calibration
                logger.warning(
                    "rredcot: credit.form=%s (lambda %s, gamma %s) on values with self_value.calibration=%s",
                    *(rule.form, rule.lam, rule.gamma, calibration),
                )
            if self.rredcot.live_every_s is not None:
                self.live = LiveLine(self.rredcot.live_every_s)
        super().__init__(config)

    def _init_tokenizer(self) -> None:
        super()._init_tokenizer()
        if self.rredcot is not None:
            # Only its checks are wanted here: before any worker or model is started.
            Elicitation(Vocabulary(self.tokenizer, self.rredcot.segmentation.keywords), self.rredcot)
            self._engine = self._source.choose_engine(self.config)
            apply_choice(self.config, self._engine)
            # Who measures is settled now, for the trainer as for the workers.
            self._source = run_source(self.config, parse_block(self.config))
            if self.rredcot.check_data:
                check_data(self.config, self.tokenizer)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        if self.rredcot is None:
            return super()._compute_advantage(batch, metrics)
        started = time.perf_counter()
        rows = read_rewards(self._recorded.on(batch), self.global_steps)
        rows.check_outcomes(self.rredcot.self_value.reward_range, reward_penalty(self.config))
        segments = rows.segments(self._source.values(rows))
        own = str(self.config.algorithm.adv_estimator) in SOURCES
        token_level_rewards = redistribute(segments, rows.response_mask, pay_start=own)
        write_token_level_rewards(rows, token_level_rewards)
        segmented = Segmented(segments, rows.final_rows, credit_rule(self.config.algorithm, self.rredcot))
        own_seconds = self._measuring_seconds + time.perf_counter() - started
        with with_segments(segmented):
            batch = super()._compute_advantage(batch, metrics)
        # A foreign estimator reads the redistributed rewards; what ours would have given is shown all the same.
        credit = segmented.credit or compute_credit(segmented, rows.index, rows.response_mask)
        errors = return_error(token_level_rewards, rows.outcomes if own else rows.outcomes - segments.self_values[:, 0])
        metrics["rredcot/return_error/max"] = errors.max().item()
        num_tokens = segments.num_tokens(rows.response_mask)
        for name, value in credit_metrics(segments, num_tokens, credit.segment_weights).items():
            metrics[f"rredcot/{name}"] = value
        metrics.update(self._cost_metrics(rows, own_seconds))
        reward_range = self.rredcot.self_value.reward_range
        self._show(batch, CreditedRows(rows, segments, credit, errors, self._engine.label, self._source, reward_range))
        return self._leave(batch)

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

    def _save_checkpoint(self) -> None:
        if self._source is not None:
            self._source.save(checkpoint_folder(self.config.trainer, self.global_steps))
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self._source is not None and self.global_steps > 0:
            self._source.load(checkpoint_folder(self.config.trainer, self.global_steps, resumes=True))

    def _cost_metrics(self, rows: Rows, own_seconds: float) -> dict[str, float]:
        """What was measured, what it cost, and what was left out and why."""
        records = [record for record in rows.records if record is not None]
        if not records:
            return {}
        self._warn_of_nothing_measured(records)
        num_probe_tokens = sum(record.num_probe_tokens for record in records)
        # What the server measures is hidden behind generation as long as some response is still generated or verified.
        exposed = max(record.recorded_time for record in records) - max(record.ready_time for record in records)
        return {
            **{f"rredcot/rows_{s.value}/mean": sum(r.status is s for r in records) / len(records) for s in COUNTED},
            **self._source.metrics(records),
            "rredcot/rows_truncated/mean": sum(record.truncated for record in records) / len(records),
            "rredcot/probes/sum": float(sum(record.num_probes for record in records)),
            "rredcot/probe_tokens/sum": float(num_probe_tokens),
            "rredcot/probe_tokens_per_response_token/mean": num_probe_tokens / max(1, int(rows.response_mask.sum())),
            "rredcot/recomputed_tokens/sum": float(sum(record.num_recomputed_tokens for record in records)),
            "rredcot/recomputed_prefixes/sum": float(sum(record.num_recomputed_tokens > 0 for record in records)),
            "rredcot/waiting_seconds/mean": sum(record.waiting_seconds for record in records) / len(records),
            "rredcot/waiting_seconds/max": max(record.waiting_seconds for record in records),
            "rredcot/lost_closing_mass/max": max(record.lost_closing_mass for record in records),
            "rredcot/dropped_answers/sum": float(sum(record.num_dropped_answers for record in records)),
            "rredcot/dropped_boundaries/sum": float(sum(record.num_dropped_boundaries for record in records)),
            "rredcot/scored_by_actor/mean": float(self._engine.engine == "actor"),
            "rredcot/scoring_seconds/sum": sum(record.measuring_seconds for record in records),
            "timing_s/self_value": max(0.0, exposed) + own_seconds,
        }

    def _warn_of_nothing_measured(self, records: list[Record]) -> None:
        if self._warned_nothing_measured or any(record.status is not Status.NO_PROPOSAL for record in records):
            return
        self._warned_nothing_measured = True
        logger.warning(
            "rredcot: no response of this step had an answer to measure segments by, so each is one segment; %s",
            self._source.way_out(),
        )


def checkpoint_folder(config: Any, step: int, resumes: bool = False) -> str:
    """verl's folder of a step's checkpoint.

    Args:
        config: verl's `trainer` node.
        step: The trainer's step.
        resumes: The one that the run resumes from, which may be another run's.
    """
    if resumes and config.resume_mode == "resume_path":
        return str(config.resume_from_path)
    return os.path.join(config.default_local_dir, f"global_step_{step}")


def _stand_in(registry: dict[str, type[PPOTrainer]]) -> None:
    """Stand in for each of verl's trainers under its own mode name."""
    for mode, trainer in list(registry.items()):
        if not issubclass(trainer, RREDCoTTrainerMixin):
            # What is measured stands behind verl's trainer, inside what it does around `old_log_prob`.
            bases = (RREDCoTTrainerMixin, trainer, MeasuringMixin)
            registry[mode] = type(f"RREDCoT{trainer.__name__}", bases, {"__doc__": trainer.__doc__})


_stand_in(TRAINER_REGISTRY)
