"""What a race shows: arms of a task compared over seeds, at fixed samples and at fixed accuracy."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rredcot_verl.report.files import ReportError
from rredcot_verl.report.race_results import Array, Result
from rredcot_verl.report.seeds import Curves, Interval, ratio_to_reach, samples_to_reach, t_interval

BASELINE = "grpo"
TRAINING, VALIDATION = "training", "validation"
SHARES = (0.5, 0.75, 1.0)
"""Levels to reach, as shares of what the baseline gains."""
WINDOWS = 8
"""The training reward is smoothed over one step in so many of the run."""
LAST_VALIDATIONS = 3


@dataclass(frozen=True)
class Level:
    """An accuracy to reach: as a share of what the baseline gains from its first to its last point, or fixed."""

    share: float | None = None
    accuracy: float | None = None

    def __call__(self, baseline: Curves) -> float:
        """The accuracy, given the (smoothed) curves of the baseline."""
        if self.accuracy is not None:
            return self.accuracy
        first, last = float(baseline.mean[0]), float(baseline.mean[-1])
        return last if self.share == 1.0 else first + float(self.share or 0.0) * (last - first)

    def name(self, baseline: str) -> str:
        """The level in words."""
        if self.share is None:
            return f"an accuracy of {self.accuracy:g}"
        return f"{baseline}'s final" if self.share == 1.0 else f"{100 * self.share:g} % of {baseline}'s gain"


@dataclass(frozen=True)
class Reached:
    """What an arm spends to reach an accuracy.

    Attributes:
        level: The accuracy.
        name: The level in words.
        is_relative: Whether it is a share of the baseline's gain.
        num_seeds: Seeds whose own curve reaches it.
        samples: Samples at which the mean curve does; infinite where it does not.
        tokens: Response tokens until then, mean over seeds; none where it does not.
        seconds: Seconds of steps until then, likewise.
        ratio: Samples over the baseline's, see `ratio_to_reach`; none for the baseline.
    """

    level: float
    name: str
    is_relative: bool
    num_seeds: int
    samples: float
    tokens: float | None
    seconds: float | None
    ratio: Interval | None


@dataclass(frozen=True)
class Arm:
    """An arm of a task, and how it does against the baseline.

    Attributes:
        name: The arm; with the overrides that set it apart where it ran with several.
        results: Its runs.
        curves: The learning curve, smoothed.
        figures: ``final``, ``validation`` (mean of the last validations) and ``area``: mean over seeds.
        differences: The same less the baseline's, paired over the seeds that both have; empty for the baseline.
        reached: One for each level.
    """

    name: str
    results: tuple[Result, ...]
    curves: Curves
    figures: dict[str, Interval]
    differences: dict[str, Interval]
    reached: tuple[Reached, ...]

    def mean(self, key: str) -> float | None:
        """Mean of a metric of `race_results.SERIES` over steps and seeds."""
        known = [values[np.isfinite(values)] for result in self.results if (values := result.per_step(key)).size]
        values = np.concatenate(known)
        return float(values.mean()) if values.size else None


@dataclass(frozen=True)
class Comparison:
    """The arms of a task that ran for as many steps.

    Attributes:
        task: Name of the task.
        num_steps: Optimiser steps of a run.
        curve: ``training`` or ``validation``: what the learning curve is of.
        window: Points over which it is smoothed.
        baseline: Name of the arm that the others are compared with.
        arms: All of them, the baseline first.
        notes: What a reader must know, in sentences.
    """

    task: str
    num_steps: int
    curve: str
    window: int
    baseline: str
    arms: tuple[Arm, ...]
    notes: tuple[str, ...]


def compare(
    results: Sequence[Result], baseline: str = BASELINE, levels: Sequence[float] = (), curve: str | None = None
) -> list[Comparison]:
    """Compares the arms of each task.

    Args:
        results: Finished runs.
        baseline: Name of the arm to compare with.
        levels: Accuracies to reach, besides those of the baseline's gain.
        curve: ``training`` or ``validation``; by default training where no problem was trained on twice.

    Raises:
        ReportError: A task has no run of the baseline, or several kinds of it.
    """
    tasks: dict[tuple[str, int], list[Result]] = defaultdict(list)
    for result in results:
        tasks[result.task, result.num_steps].append(result)
    wanted = [*(Level(share=share) for share in SHARES), *(Level(accuracy=accuracy) for accuracy in levels)]
    return [_compare(runs, baseline, wanted, curve) for _, runs in sorted(tasks.items())]


def _compare(runs: Sequence[Result], baseline: str, levels: Sequence[Level], curve: str | None) -> Comparison:
    task, num_steps = runs[0].task, runs[0].num_steps
    curve = curve or (TRAINING if all(result.is_single_epoch for result in runs) else VALIDATION)
    window = max(1, num_steps // WINDOWS) | 1 if curve == TRAINING else 1
    arms = named(runs)
    if baseline not in arms:
        raise ReportError(f"{task}, {num_steps} steps: no arm {baseline!r} to compare with; it has {', '.join(arms)}")
    drawn = {name: _curves(own, curve).smoothed(window) for name, own in arms.items()}
    # The baseline's own levels, for all.
    at = [(level, level(drawn[baseline])) for level in levels]
    order = [baseline, *(name for name in arms if name != baseline)]
    figures = {name: _figures(arms[name], drawn[name]) for name in order}
    compared = []
    for name in order:
        is_baseline = name == baseline
        reached = [
            _reached(arms[name], drawn[name], level, accuracy, None if is_baseline else drawn[baseline], baseline)
            for level, accuracy in at
        ]
        compared.append(
            Arm(
                name,
                tuple(arms[name]),
                drawn[name],
                {key: t_interval(list(values.values())) for key, values in figures[name].items()},
                {} if is_baseline else _differences(figures[name], figures[baseline]),
                tuple(reached),
            )
        )
    return Comparison(task, num_steps, curve, window, baseline, tuple(compared), tuple(_notes(runs)))


def named(runs: Iterable[Result]) -> dict[str, list[Result]]:
    """The runs by arm, in order of seed. Where an arm ran with several overrides, what not all of them have belongs to
    its name, e.g. ``grpo lr=1e-4``; one that has nothing of its own keeps the arm's name.
    """
    arms: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in runs:
        arms[result.arm][result.digest].append(result)
    found: dict[str, list[Result]] = {}
    for arm, kinds in arms.items():
        common = set.intersection(*(set(members[0].overrides) for members in kinds.values()))
        for digest, members in kinds.items():
            own = [_short(text) for text in members[0].overrides if text not in common]
            name = " ".join([arm, *own])
            # Overrides are not all that sets runs apart: data and model do, too.
            found[name if name not in found else f"{name} ({digest[:6]})"] = sorted(members, key=lambda run: run.seed)
    return found


def _short(override: str) -> str:
    key, _, value = override.partition("=")
    return f"{key.rpartition('.')[2]}={value}"


def _curves(runs: Sequence[Result], curve: str) -> Curves:
    points = [result.training if curve == TRAINING else result.validation for result in runs]
    return Curves(tuple(run.seed for run in runs), points[0][0], np.array([accuracy for _, accuracy in points]))


def _figures(runs: Sequence[Result], curves: Curves) -> dict[str, dict[int, float]]:
    """Figures of each seed."""
    validation = {run.seed: run.validation[1][-LAST_VALIDATIONS:] for run in runs}
    return {
        "final": dict(zip(curves.seeds, curves.accuracy[:, -1].tolist(), strict=True)),
        "validation": {seed: float(last.mean()) for seed, last in validation.items() if last.size},
        "area": dict(zip(curves.seeds, curves.area.tolist(), strict=True)),
    }


def _differences(
    own: Mapping[str, Mapping[int, float]], other: Mapping[str, Mapping[int, float]]
) -> dict[str, Interval]:
    return {
        key: t_interval([value - other[key][seed] for seed, value in own[key].items() if seed in other[key]])
        for key in own
    }


def _reached(
    runs: Sequence[Result], curves: Curves, level: Level, accuracy: float, baseline: Curves | None, baseline_name: str
) -> Reached:
    samples = samples_to_reach(curves.samples, curves.mean, accuracy)
    return Reached(
        accuracy,
        level.name(baseline_name),
        level.share is not None,
        sum(math.isfinite(samples_to_reach(curves.samples, row, accuracy)) for row in curves.accuracy),
        samples,
        _spent(runs, samples, lambda run: run.per_step("response_tokens") * run.samples_per_step),
        _spent(runs, samples, lambda run: run.per_step("seconds")),
        None if baseline is None else ratio_to_reach(curves, baseline, level),
    )


def _spent(runs: Sequence[Result], samples: float, amounts: Callable[[Result], Array]) -> float | None:
    """Mean over runs of what was spent after so many samples."""
    if not math.isfinite(samples):
        return None
    totals = [np.concatenate([[0.0], np.nancumsum(amounts(run))]) for run in runs]
    steps = samples / runs[0].samples_per_step
    return float(np.mean([np.interp(steps, np.arange(len(total)), total) for total in totals]))


def _notes(runs: Sequence[Result]) -> list[str]:
    notes = []
    starts: dict[int, set[str]] = defaultdict(set)
    for run in runs:
        starts[run.seed].add(str(run.line.get("start")))
    mixed = sorted(seed for seed, models in starts.items() if len(models) > 1)
    if mixed:
        notes.append(f"Not paired: runs of the seeds {mixed} started from different models.")
    commits = {str(run.line.get("commit"))[:9] + (" (changed)" if run.line.get("dirty") else "") for run in runs}
    notes.append(f"Code at {', '.join(sorted(commits))}.")
    machines = {", ".join(f"{key} {value}" for key, value in run.line["machine"].items()) for run in runs}
    notes.append(f"Machine: {'; '.join(sorted(machines))}.")
    return notes
