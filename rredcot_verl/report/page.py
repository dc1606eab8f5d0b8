"""The report as one HTML page: it loads nothing, runs no script, and reads on light and dark screens.

Its words stand in ``pages/templates/run.html``; what is made here are charts and the figures beside them.
"""

import math
from collections.abc import Sequence
from typing import Any

from rredcot_verl.pages import html
from rredcot_verl.pages.charts import Bin, Series, bar_chart, line_chart, reliability
from rredcot_verl.pages.text import percent
from rredcot_verl.report.data import Run
from rredcot_verl.report.learning import ALONE, Twins, curve_series
from rredcot_verl.report.line_checker import LineChecker
from rredcot_verl.report.prompt_lists import blamed_prompts, guessing_prompts
from rredcot_verl.report.prompts import Prompt, prompts_of
from rredcot_verl.report.selection import KINDS, describe, extreme_traces
from rredcot_verl.report.shown_traces import choose, judged
from rredcot_verl.report.summary import summarise
from rredcot_verl.report.thresholds import Thresholds
from rredcot_verl.report.trace import Response

DEFAULT_TITLE = "Training run"
BASELINE_NAME = "GRPO"
# The method's name where it is the estimator's; other estimators are called by their own.
RUN_NAMES = {"rredcot": "RREDCoT", None: "this run"}
PER_KIND = 3
MOST_LISTED = 20
_GROUPS = (
    (
        "Worst blamed",
        "The largest falls of the self-value across one segment, of responses with a negative GRPO advantage.",
    ),
    (
        "Best credited",
        "The largest rises of the self-value across one segment, of responses with a positive GRPO advantage.",
    ),
    ("Most surprising", "The reward lies farthest from the mean of the self-values before it was known."),
    ("Drawn at random", "With a seed, among those that fit their heading."),
)


def render(
    run: Run,
    baseline: Run | None = None,
    line_checker: LineChecker | None = None,
    *,
    title: str = DEFAULT_TITLE,
    seed: int = 0,
    summary: dict[str, Any] | None = None,
    thresholds: Thresholds | None = None,
    prompts: Sequence[Prompt] | None = None,
    per_kind: int = PER_KIND,
    twins: Twins = ALONE,
) -> str:
    """Renders the report of a run.

    Args:
        run: The run, with its traces.
        baseline: The paired GRPO run.
        line_checker: Marks the lines of the traces and locates first mistakes.
        title: Heading of the page.
        seed: Draws the traces that are shown at random.
        summary: What ``summarise`` returned for the same arguments, to save computing it twice.
        thresholds: When a prompt is listed as guessing or as sharing a blame.
        prompts: What ``prompts_of`` returned for the same run and thresholds, to save computing it twice.
        per_kind: Traces shown of each kind: worst blamed, best credited, most surprising.
        twins: The same run, and the baseline, with other seeds: learning curves are then means with intervals.

    Returns:
        A complete HTML document.

    Raises:
        ReportError: The line checker gave offsets outside a response.
    """
    thresholds = thresholds or Thresholds()
    prompts = prompts_of(run, thresholds) if prompts is None else prompts
    if summary is None:
        summary = summarise(run, baseline, line_checker, thresholds=thresholds, prompts=prompts, twins=twins)
    periods = [_named(period) for period in summary["credit_by_position"]]
    return html.render(
        "run.html",
        title=title,
        summary=summary,
        baseline_name=BASELINE_NAME,
        curves=_curves(run, baseline, RUN_NAMES.get(summary["source"], summary["source"]), twins),
        periods=periods,
        credit=_credit_panels(periods),
        calibration=_calibration_panels(summary["calibration"]),
        lists=summary["prompts"],
        thresholds=thresholds,
        guessing=guessing_prompts(prompts, thresholds)[:MOST_LISTED],
        blamed=blamed_prompts(prompts)[:MOST_LISTED],
        num_credited=sum(prompt.num_scored > 0 for prompt in prompts),
        groups=_groups(run, line_checker, seed, per_kind),
        has_line_checker=line_checker is not None,
        responses=_some_responses(run.rollouts),
    )


def _curves(run: Run, baseline: Run | None, name: str, twins: Twins) -> list[dict[str, Any]]:
    panels: dict[bool, dict[str, Any]] = {}
    for curve in run.curves:
        # Of several sources of the same reward the best one is drawn.
        if not curve.points or curve.is_validation in panels:
            continue
        own, other = twins.curves(curve, run, baseline)
        named = ((name, "run", own), (BASELINE_NAME, "baseline", other))
        lines = [curve_series(name, style, curves) for name, style, curves in named if curves is not None]
        panels[curve.is_validation] = {
            "heading": curve.name,
            "chart": line_chart(lines, y_label=curve.name.lower(), description=f"{curve.name} over the training steps"),
            "columns": ("run", "step", "value", "low", "high"),
            "rows": [row for line in lines for row in _rows(line)],
        }
    return list(panels.values())


def _rows(line: Series) -> list[tuple[Any, ...]]:
    intervals = {at: (f"{low:.4f}", f"{high:.4f}") for at, low, high in line.band}
    return [(line.name, f"{at:g}", f"{value:.4f}", *intervals.get(at, ("", ""))) for at, value in line.points]


def _named(period: dict[str, Any]) -> dict[str, Any]:
    """A part of the training with its name and the style of its bars."""
    low, high = period["first_step"], period["last_step"]
    steps = f"step {low}" if low == high else f"steps {low}–{high}"
    which = "all" if period["period"] == "all" else f"{period['period']} third of training"
    name = f"{which} ({steps}, {period['num_traces']:,} traces)"
    return {**period, "name": name, "style": "first" if period["period"] == "first" else "last"}


def _credit_panels(periods: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    panels = []
    for heading, key in (("All credit, |d|", "credit_share"), ("Negative credit only", "negative_credit_share")):
        known = [row for row in periods if row[key] is not None]
        series = [Series(row["name"], list(enumerate(row[key])), row["style"]) for row in known]
        description = f"{heading}: share by relative position in the trace"
        shares = zip(*(row[key] for row in known), strict=True)
        panels.append(
            {
                "heading": heading,
                "chart": bar_chart(series, description=description) if known else None,
                "columns": ("tenth", *(row["name"] for row in known)),
                "rows": [(tenth, *map(percent, row)) for tenth, row in enumerate(shares, start=1)],
            }
        )
    return panels


def _calibration_panels(calibration: dict[str, Any]) -> list[dict[str, Any]]:
    panels = []
    for heading, key, label in (
        ("At the prompt", "start_value", "self-value before the first token"),
        ("Before the last segment", "last_value_before_answer", "last self-value before the answer"),
    ):
        data = calibration[key]
        if data is None:
            continue
        bins = []
        for row in data["bins"]:
            interval = _wilson(row["mean_reward"], row["num_traces"])
            bins.append(Bin(row["low"], row["high"], row["mean_value"], interval, row["num_traces"]))
        chart = reliability(
            bins,
            "probe",
            forecast=label,
            outcome="reward",
            counted="traces",
            description=f"{heading}: mean reward by self-value",
        )
        figures = [
            (f"{row.low:g}–{row.high:g}", f"{row.count:,}", f"{row.mean:.3f}", f"{row.outcome['estimate']:.3f}")
            for row in bins
        ]
        columns = ("bin", "traces", "self-value", "reward")
        panels.append({**data, "heading": heading, "chart": chart, "columns": columns, "rows": figures})
    return panels


def _wilson(mean: float, num: int) -> dict[str, float]:
    """The 95 % Wilson interval of a share; for rewards between 0 and 1 it is too wide rather than too narrow."""
    z, share = 1.96, min(max(mean, 0.0), 1.0)
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return {"estimate": mean, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def _groups(run: Run, line_checker: LineChecker | None, seed: int, per_kind: int) -> list[dict[str, Any]]:
    """The traces under their headings; none where no trace has self-values."""
    drawn = choose(run, line_checker, seed)
    extremes = extreme_traces(run.traces, per_kind * len(KINDS)) if drawn else []
    shown = [
        [judged(trace, describe(trace, kind), line_checker) for trace, own in extremes if own == kind]
        for kind in range(len(KINDS))
    ]
    groups = zip(_GROUPS, [*shown, drawn], strict=True)
    return [
        {"heading": heading, "meaning": meaning, "traces": traces} for (heading, meaning), traces in groups if traces
    ]


def _some_responses(rollouts: Sequence[Response]) -> list[Response]:
    """A few responses of the last dump, failed ones first."""
    last = [response for response in rollouts if response.response.strip()]
    return [one for one in last if one.is_failed][:2] + [one for one in last if not one.is_failed][:2]
