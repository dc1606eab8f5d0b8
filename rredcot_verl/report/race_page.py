"""A race as one HTML page and as a Markdown table."""

import math
from collections.abc import Sequence
from typing import Any

from rredcot_verl.pages import html
from rredcot_verl.pages.charts import Guide, Row, forest, line_chart
from rredcot_verl.pages.drawing import side_by_side
from rredcot_verl.pages.text import describe, duration, number
from rredcot_verl.report.learning import curve_series
from rredcot_verl.report.race import LAST_VALIDATIONS, TRAINING, Arm, Comparison, Reached
from rredcot_verl.report.seeds import Interval

FIGURES = {"final": "final", "validation": f"last {LAST_VALIDATIONS} validations", "area": "mean over the samples"}
# Longer names would leave the chart.
MOST_LABEL_CHARACTERS = 13
CHART_STYLE = (
    ".line { fill: none; stroke-width: 2 } .band { opacity: .16 } .line.baseline { stroke-dasharray: 6 4 } "
    ".line.run { stroke: #0b62b0 } .band.run, .label.run, .dot.run { fill: #0b62b0 } "
    ".line.baseline { stroke: #b3541e } .band.baseline, .label.baseline, .dot.baseline { fill: #b3541e }"
)


def render(comparisons: Sequence[Comparison], title: str) -> str:
    """The page: of each task learning curves with intervals, and a table of its arms."""
    return html.render("race.html", title=title, tasks=[_task(comparison) for comparison in comparisons])


def table(comparisons: Sequence[Comparison]) -> str:
    """The same figures as Markdown."""
    return html.render("race.md", tasks=[_task(comparison) for comparison in comparisons])


def chart(comparisons: Sequence[Comparison]) -> str:
    """The learning curves as one SVG file."""
    panels = [panel["chart"] for comparison in comparisons for panel in _curve_panels(comparison)]
    return side_by_side(panels, "Learning curves", CHART_STYLE)


def _task(comparison: Comparison) -> dict[str, Any]:
    return {
        "comparison": comparison,
        "is_training": comparison.curve == TRAINING,
        "curves": _curve_panels(comparison),
        "ratios": _ratio_panels(comparison),
        "columns": ["seeds", *FIGURES.values(), *map(_level_heading, comparison.arms[0].reached), "s/step"],
        "rows": [{"name": arm.name, "cells": _cells(arm)} for arm in comparison.arms],
        "spent": [row for arm in comparison.arms for row in _spent(arm)],
    }


def _curve_panels(comparison: Comparison) -> list[dict[str, Any]]:
    """A chart for each arm, beside the baseline; the baseline alone where there is no other."""
    baseline, others = comparison.arms[0], comparison.arms[1:]
    what = "training reward" if comparison.curve == TRAINING else "validation accuracy"
    panels = []
    for arm in others or (baseline,):
        drawn = [(baseline, "baseline")] if arm is baseline else [(baseline, "baseline"), (arm, "run")]
        lines = [curve_series(_label(one.name), style, one.curves) for one, style in drawn]
        chart = line_chart(
            lines,
            y_label=what,
            x_label="samples",
            description=f"{what} of {arm.name} and {comparison.baseline} over the samples spent",
            tooltip="{name}, {x:.0f} samples: {y:.3f}",
        )
        points = [(line.name, f"{at:,.0f}", f"{value:.4f}") for line in lines for at, value in line.points]
        panels.append({"heading": arm.name, "chart": chart, "rows": points})
    return panels


def _ratio_panels(comparison: Comparison) -> list[dict[str, Any]]:
    """A chart for each level that an arm reaches."""
    panels = []
    for level, name in enumerate(reached.name for reached in comparison.arms[0].reached):
        ratios = [(arm.name, arm.reached[level].ratio) for arm in comparison.arms]
        rows = [Row(arm, "probe", ratio) for arm, ratio in ratios if ratio is not None]
        if any(row.value["estimate"] is not None for row in rows):
            label = f"ratio to {comparison.baseline}'s samples"
            chart = forest(rows, [Guide(comparison.baseline, 1.0)], x_label=label, description=f"{label} to {name}")
            panels.append({"heading": f"To {name}", "chart": chart})
    return panels


def _label(name: str) -> str:
    return name if len(name) <= MOST_LABEL_CHARACTERS else name[: MOST_LABEL_CHARACTERS - 1] + "…"


def _level_heading(reached: Reached) -> str:
    level = f"samples to {number(reached.level)}"
    return f"{level} ({reached.name})" if reached.is_relative else level


def _cells(arm: Arm) -> list[tuple[str, str]]:
    """Of each column the figure and what is said below it."""
    cells = [(str(len(arm.results)), "")]
    for key in FIGURES:
        difference = arm.differences.get(key)
        below = "" if difference is None or difference["estimate"] is None else _difference(difference)
        cells.append((number(arm.figures[key]["estimate"]) if arm.figures[key]["estimate"] is not None else "—", below))
    cells += [_reached(reached, len(arm.results)) for reached in arm.reached]
    return [*cells, (_number(arm.mean("seconds")), "")]


def _difference(difference: Interval) -> str:
    estimate, low, high = (
        None if difference[key] is None else f"{difference[key]:+.3f}".replace("-", "−")
        for key in ("estimate", "low", "high")
    )
    return f"{estimate} ({low} to {high})" if low is not None else f"{estimate}"


def _reached(reached: Reached, num_seeds: int) -> tuple[str, str]:
    ratio = reached.ratio
    samples = f"{reached.samples:,.0f}" if math.isfinite(reached.samples) else "not reached"
    if ratio is None:
        return samples, f"{reached.num_seeds} of {num_seeds} seeds"
    if ratio["estimate"] is None:
        why = f"more than {number(ratio['at_least'], 2)}" if ratio["at_least"] is not None else str(ratio["reason"])
        return samples, f"{why}; {reached.num_seeds} of {num_seeds} seeds"
    text = "× " + describe(ratio, 2)
    return samples, f"{text}; {reached.num_seeds} of {num_seeds} seeds"


def _spent(arm: Arm) -> list[tuple[str, str, str, str]]:
    return [
        (
            arm.name,
            reached.name,
            "not reached" if reached.tokens is None else f"{reached.tokens:,.0f}",
            "" if reached.seconds is None else duration(reached.seconds),
        )
        for reached in arm.reached
    ]


def _number(value: float | None) -> str:
    return "—" if value is None else number(value, None)
