"""A finished run of a race as one line of JSON: made of its metrics, and read again."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rredcot_verl.report.data import TRAINING_REWARDS, Run, load_run
from rredcot_verl.report.files import INTEGER, LIST, TEXT, ReportError, entry, json_lines

Array = NDArray[np.float64]

SERIES = {
    "reward": TRAINING_REWARDS[0],
    "response_tokens": "response_length/mean",
    "seconds": "timing_s/step",
    "entropy": "actor/entropy",
    "grad_norm": "actor/grad_norm",
    "lr": "actor/lr",
    "self_value_seconds": "timing_s/self_value",
}
"""What a line holds of every step, and the metric it is."""
NUM_DIGITS = 4
"""Significant digits of a line's numbers."""


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        task: Name of the task.
        arm: Name of the arm.
        seed: Seed of the run.
        num_steps: Optimiser steps.
        digest: Hash of what the run was, apart from seed and steps.
        overrides: Hydra overrides of the run.
        line: The whole line, as `measure` and `scripts/race.py` made it.
    """

    task: str
    arm: str
    seed: int
    num_steps: int
    digest: str
    overrides: tuple[str, ...]
    line: dict[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two runs the same."""
        return self.task, self.arm, self.digest, self.seed, self.num_steps

    @property
    def is_single_epoch(self) -> bool:
        """Whether no problem was trained on twice, so that the training reward is of fresh problems."""
        return bool(self.line["num_epochs"] == 1)

    @property
    def samples_per_step(self) -> int:
        """Responses of a step."""
        return int(self.line["samples_per_step"])

    def per_step(self, key: str) -> Array:
        """A series of `SERIES`, `(num_steps,)`; NaN where it was not logged."""
        values = self.line["series"].get(key) or [None] * self.num_steps
        return np.array([math.nan if value is None else value for value in values])

    @property
    def training(self) -> tuple[Array, Array]:
        """Samples spent before each step, and its mean reward: that of the policy before the step's updates."""
        return np.arange(self.num_steps, dtype=np.float64) * self.samples_per_step, self.per_step("reward")

    @property
    def validation(self) -> tuple[Array, Array]:
        """Samples spent before each validation, and its accuracy."""
        steps = np.array(self.line["validation"]["step"], dtype=np.float64)
        return steps * self.samples_per_step, np.array(self.line["validation"]["accuracy"], dtype=np.float64)


def read(files: Iterable[Path]) -> list[Result]:
    """The runs of several files in order; of a run that stands there twice the later line.

    Raises:
        ReportError: A file is missing or malformed.
    """
    results = (_result(row, where) for file in files for row, where in json_lines(file))
    return list({result.key: result for result in results}.values())


def measure(folder: Path, samples_per_step: int, num_validated: int | None) -> dict[str, Any]:
    """What a line holds of a run's metrics.

    Args:
        folder: The run's folder.
        samples_per_step: Responses of a step.
        num_validated: Responses of a validation; none where it is not known.

    Returns:
        ``samples_per_step``, ``num_epochs`` begun, ``series`` (of every step, see `SERIES`), ``validation``, and
        ``totals`` (seconds of all steps, response tokens, samples).

    Raises:
        ReportError: There are no metrics, or no step in them.
    """
    run = load_run(folder, with_traces=False)
    steps = [step for step, _ in run.series(SERIES["seconds"])]
    if not steps:
        raise ReportError(f"{folder}: no step was logged")
    series = {name: _rounded(run, key, steps) for name, key in SERIES.items()}
    tokens = [length for length in series["response_tokens"] if length is not None]
    epochs = [epoch for _, epoch in run.series("training/epoch")]
    validation = {
        "metric": run.validation_metric,
        "step": [step for step, _ in run.validation],
        "accuracy": [_round(accuracy) for _, accuracy in run.validation],
        "num_responses": num_validated,
    }
    totals = {
        "seconds": round(sum(seconds for _, seconds in run.series(SERIES["seconds"])), 1),
        "tokens": round(sum(tokens) * samples_per_step),
        "samples": samples_per_step * len(steps),
    }
    return {
        "samples_per_step": samples_per_step,
        "num_epochs": int(max(epochs, default=-2)) + 1,
        "series": {"step": steps, **{name: values for name, values in series.items() if set(values) != {None}}},
        "validation": validation,
        "totals": totals,
    }


def _rounded(run: Run, key: str, steps: Sequence[int]) -> list[float | None]:
    values = dict(run.series(key))
    return [_round(values[step]) if step in values else None for step in steps]


def _round(value: float) -> float:
    return float(f"{value:.{NUM_DIGITS}g}")


def _result(row: dict[str, Any], where: str) -> Result:
    task, arm, digest = (entry(row, key, TEXT, where) for key in ("task", "arm", "digest"))
    seed, steps = (entry(row, key, INTEGER, where) for key in ("seed", "steps"))
    # Of two of one key the last one counts.
    overrides = tuple({text.partition("=")[0]: text for text in entry(row, "overrides", LIST, where)}.values())
    for key in ("series", "validation", "totals"):
        if not isinstance(row.get(key), dict):
            raise ReportError(f"{where}: {key!r} is missing; expected a line of scripts/race.py")
    return Result(task, arm, seed, steps, digest, overrides, row)
