"""A run as the report sees it: metrics, credited traces, and the responses of verl's own dumps.

Every problem a user can cause is a ``ReportError`` that names the file, and the line where there is one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rredcot_verl.report.dumps import load_responses, mean_scores
from rredcot_verl.report.files import INTEGER, ReportError, entry, is_number, json_lines
from rredcot_verl.report.run_files import RunFiles, find_files, step_files
from rredcot_verl.report.trace import SOLVED_AT, Response, Trace, read_trace

TRAINING_REWARDS = ("critic/score/mean", "critic/rewards/mean")
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curve:
    """What the run has learnt, as far as its files tell.

    Attributes:
        name: What is measured, as a heading.
        metric: The metric's key, or the files that it was computed from.
        points: ``(step, value)`` in order of step, at least one.
        is_validation: Whether it is of prompts that are not trained on.
    """

    name: str
    metric: str
    points: Points
    is_validation: bool = False


@dataclass(frozen=True)
class Run:
    """The files of one training run.

    Attributes:
        path: The run's folder.
        metrics: ``(step, {metric: value})`` in file order; only finite numbers are kept.
        validation_metric: The validation accuracy's key; none where no metric of validation was logged.
        traces: Credited responses in order of step; empty for a run loaded without them, and where none were written.
        files: The files that were there.
        rollouts: Responses of verl's rollout dumps, without segments.
        validation_scores: ``(step, mean score)`` of verl's validation dumps.
        solved_at: Lowest reward of a solved response.
    """

    path: Path
    metrics: tuple[tuple[int, dict[str, float]], ...]
    validation_metric: str | None
    traces: tuple[Trace, ...] = ()
    files: RunFiles = RunFiles()
    rollouts: tuple[Response, ...] = ()
    validation_scores: tuple[tuple[int, float], ...] = ()
    solved_at: float = SOLVED_AT

    def series(self, key: str) -> Points:
        """A metric as ``(step, value)`` in order of step; of two values logged for a step, the later one."""
        return sorted({step: data[key] for step, data in self.metrics if key in data}.items())

    @property
    def validation(self) -> Points:
        """Validation accuracy as ``(step, value)``; empty where no metric of validation was logged."""
        return [] if self.validation_metric is None else self.series(self.validation_metric)

    @property
    def curve(self) -> Curve | None:
        """The best learning curve that the files give: validation before training, metrics before dumps."""
        return next((curve for curve in self.curves if curve.points), None)

    @property
    def curves(self) -> list[Curve]:
        """All of them, the best first; those without a point belong to files that are not there."""
        training = next((key for key in TRAINING_REWARDS if self.series(key)), TRAINING_REWARDS[0])
        return [
            Curve("Validation accuracy", self.validation_metric or "", self.validation, True),
            Curve("Validation score", "mean score of the validation dumps", list(self.validation_scores), True),
            Curve("Mean training reward", training, self.series(training)),
            Curve("Mean training reward", "mean score of the rollout dumps", _mean_rewards(self.rollouts)),
            Curve("Mean reward of the traces", "mean reward of the traces written", _mean_rewards(self.traces)),
        ]


def load_run(
    path: str | Path,
    *,
    with_traces: bool = True,
    validation_metric: str | None = None,
    solved_at: float = SOLVED_AT,
    given: RunFiles | None = None,
    steps: tuple[int, int] | None = None,
) -> Run:
    """Reads a run's folder.

    Args:
        path: Folder that holds metrics, credited traces or verl's dumps, at any depth down to four levels.
        with_traces: Off for a run of which only the curve is needed, such as the GRPO baseline.
        validation_metric: The key to take; by default the first ``val-core/`` one with ``mean@`` and ``acc``
            or ``reward``, if there is one.
        solved_at: Lowest reward of a solved response.
        given: Files and folders that the user named.
        steps: First and last step of the traces and rollouts to read; all by default.

    Returns:
        The run.

    Raises:
        ReportError: There is nothing to report on, a file is empty or malformed, or the validation metric that was
            asked for is not there.
    """
    folder = Path(path)
    files = find_files(folder, given or RunFiles())
    metrics = tuple(_metrics_row(row, where) for row, where in json_lines(files.metrics)) if files.metrics else ()
    key = _validation_metric(metrics, files.metrics or folder, validation_metric)
    trace_files, rollout_files = (
        step_files(part, steps) if with_traces else [] for part in (files.traces, files.rollouts)
    )
    return Run(
        folder,
        metrics,
        key,
        tuple(read_trace(row, where, solved_at) for file in trace_files for row, where in json_lines(file)),
        files,
        tuple(load_responses(rollout_files, solved_at)),
        tuple(mean_scores(step_files(files.validation))),
        solved_at,
    )


def _metrics_row(row: dict[str, Any], where: str) -> tuple[int, dict[str, float]]:
    data = row.get("data")
    if not isinstance(data, dict):
        raise ReportError(f"{where}: expected {{'step': int, 'data': {{...}}}}, got the keys {sorted(row)}")
    # verl's logger writes a metric that is not a number as null.
    numbers = {key: float(value) for key, value in data.items() if is_number(value) and math.isfinite(value)}
    return entry(row, "step", INTEGER, where), numbers


def _validation_metric(metrics: Sequence[tuple[int, dict[str, float]]], file: Path, wanted: str | None) -> str | None:
    keys = [key for _, data in metrics for key in data]
    if wanted is not None:
        if wanted in keys:
            return wanted
        raise ReportError(f"{file}: no validation metric {wanted!r}, which the run it is compared with has")
    usual = (
        key for key in keys if key.startswith("val-core/") and "mean@" in key and ("acc" in key or "reward" in key)
    )
    return next(usual, None)


def _mean_rewards(responses: Sequence[Response]) -> Points:
    rewards: dict[int, list[float]] = {}
    for response in responses:
        rewards.setdefault(response.step, []).append(response.reward)
    return [(step, float(np.mean(values))) for step, values in sorted(rewards.items())]
