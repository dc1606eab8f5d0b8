"""Learning curves of a run and of its twin, over as many seeds as there are of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rredcot_verl.pages.charts import Series
from rredcot_verl.report.data import Curve, Run
from rredcot_verl.report.seeds import Curves, t_interval


@dataclass(frozen=True)
class Twins:
    """Further runs that differ from a run, or from its baseline, in the seed alone.

    Attributes:
        runs: Of the run.
        baselines: Of the baseline; in the same order as the runs, so that they are paired by seed.
    """

    runs: tuple[Run, ...] = ()
    baselines: tuple[Run, ...] = ()

    def curves(self, curve: Curve, run: Run, baseline: Run | None) -> list[Curves | None]:
        """The curve that measures the same, of the runs and of the baselines; none where there is none."""
        return [
            mean_curves([found for one in runs if (found := matching_curve(curve, one)) is not None])
            for runs in ((run, *self.runs), () if baseline is None else (baseline, *self.baselines))
        ]

    def summarise(self, run: Run, baseline: Run | None) -> dict[str, Any] | None:
        """What the run's main curve ends at, over seeds; none for a single seed.

        Returns:
            ``run`` and ``baseline``, intervals of the last point; where there are as many seeds of each ``difference``,
            paired, at the last step that all have, and ``area_difference``, the same of the mean over the steps.
        """
        if run.curve is None or not (self.runs or self.baselines):
            return None
        own, other = self.curves(run.curve, run, baseline)
        summary: dict[str, Any] = {
            "run": None if own is None else t_interval(own.accuracy[:, -1]),
            "baseline": None if other is None else t_interval(other.accuracy[:, -1]),
            "difference": None,
            "area_difference": None,
        }
        if own is not None and other is not None and own.seeds == other.seeds:
            common = np.intersect1d(own.samples, other.samples)
            if not common.size:
                return summary
            own, other = own.at(common), other.at(common)
            summary["difference"] = t_interval(own.accuracy[:, -1] - other.accuracy[:, -1])
            summary["area_difference"] = t_interval(own.area - other.area)
        return summary


ALONE = Twins()


def matching_curve(curve: Curve | None, other: Run) -> Curve | None:
    """The curve of another run that measures the same, if it has one."""
    named = (candidate for candidate in other.curves if candidate.points and curve and candidate.name == curve.name)
    return next(named, None)


def mean_curves(curves: Sequence[Curve]) -> Curves | None:
    """The curves of several seeds at the steps that all of them have; none where they have none in common."""
    by_step = [dict(curve.points) for curve in curves]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    if not steps:
        return None
    rows = np.array([[own[step] for step in steps] for own in by_step], dtype=np.float64)
    return Curves(tuple(range(len(rows))), np.array(steps, dtype=np.float64), rows)


def curve_series(name: str, style: str, curves: Curves) -> Series:
    """A line of the mean over seeds, with its interval as a band where there are several."""
    rows = list(zip(curves.samples.tolist(), curves.band(), strict=True))
    band = [(at, row["low"], row["high"]) for at, row in rows if row["low"] is not None]
    return Series(name, [(at, row["estimate"]) for at, row in rows], style, band)
