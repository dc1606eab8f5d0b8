"""The report as one HTML page: it loads nothing, runs no script, and reads on light and dark screens."""

from collections.abc import Sequence
from typing import Any

from rredcot_verl.report.charts import Bars, Line, bar_chart, line_chart, reliability_chart
from rredcot_verl.report.data import LineChecker, Response, Run
from rredcot_verl.report.header import BASELINE_NAME, header, percent
from rredcot_verl.report.prompts import Prompt, prompts_of
from rredcot_verl.report.selection import KINDS, describe, extreme_traces
from rredcot_verl.report.style import STYLE
from rredcot_verl.report.summary import matching_curve, summarise
from rredcot_verl.report.thresholds import Thresholds
from rredcot_verl.report.traces import choose, credit_colour, judged, response_card, safe, signed, trace_card
from rredcot_verl.report.weak_points import weak_points_section

DEFAULT_TITLE = "Training run"
# The method's name where it is the estimator's; other estimators are called by their own.
RUN_NAMES = {"rredcot": "RREDCoT", None: "this run"}
PER_KIND = 3


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

    Returns:
        A complete HTML document.

    Raises:
        ReportError: The line checker gave offsets outside a response.
    """
    thresholds = thresholds or Thresholds()
    prompts = prompts_of(run, thresholds) if prompts is None else prompts
    if summary is None:
        summary = summarise(run, baseline, line_checker, thresholds=thresholds, prompts=prompts)
    sections = [
        header(title, summary),
        _learning_section(run, baseline, RUN_NAMES.get(summary["source"], summary["source"])),
        _credit_section(summary["credit_by_position"]),
        _calibration_section(summary["calibration"]),
        weak_points_section(prompts, thresholds),
        _traces_section(run, line_checker, seed, per_kind),
        _footer(summary),
    ]
    return document(title, "".join(sections))


def document(title: str, body: str) -> str:
    """A complete page around a body.

    Args:
        title: The page's title, any text.
        body: HTML.
    """
    # The policy makes the browser refuse anything that a trace might try to load, should its text ever get through.
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{safe(title)}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><main>{body}</main></body></html>
"""


def _panel(heading: str, chart: str, details: str = "") -> str:
    return f'<figure class="card"><h3>{heading}</h3><div class="scroll">{chart}</div>{details}</figure>'


def _section(name: str, heading: str, how: str, body: str) -> str:
    return f'<section id="{name}"><h2>{heading}</h2><p class="how">{how}</p>{body}</section>'


def _numbers(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        '<details><summary>The numbers</summary><div class="numbers" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _learning_section(run: Run, baseline: Run | None, name: str) -> str:
    panels = []
    shown: set[bool] = set()
    for curve in run.curves:
        # Of several sources of the same reward the best one is drawn.
        if not curve.points or curve.is_validation in shown:
            continue
        shown.add(curve.is_validation)
        lines = [Line(name, curve.points, "run")]
        other = None if baseline is None else matching_curve(curve, baseline)
        if other is not None:
            lines.append(Line(BASELINE_NAME, other.points, "baseline"))
        rows = [[safe(line.name), str(step), f"{value:.4f}"] for line in lines for step, value in line.points]
        chart = line_chart(lines, y_label=curve.name.lower(), description=f"{curve.name} over the training steps")
        panels.append(_panel(curve.name, chart, _numbers(["run", "step", "value"], rows)))
    if not panels:
        return _section("learning", "Learning curve", "No reward was found in metrics or dumps.", "")
    how = "Higher is better; the number at a line's end is its last value."
    if baseline is not None:
        how += " Each line is one run with one seed, so part of the gap between them is chance."
    return _section("learning", "Learning curve", how, f'<div class="panels">{"".join(panels)}</div>')


def _credit_section(periods: Sequence[dict[str, Any]]) -> str:
    how = (
        "Each bar is the share, in per cent, of all credit that fell on this tenth of the traces; if credit were "
        "spread evenly, every bar would reach the dashed line."
    )
    if not periods:
        return _section("credit", "Where the credit went", _NO_SEGMENTS, "")
    names, keys = {}, []
    for period in periods:
        low, high = period["first_step"], period["last_step"]
        steps = f"step {low}" if low == high else f"steps {low}–{high}"
        which = "all" if period["period"] == "all" else f"{period['period']} third of training"
        names[period["period"]] = f"{which} ({steps}, {period['num_traces']:,} traces)"
        style = "first" if period["period"] == "first" else "last"
        keys.append(f'<span><i class="swatch {style}"></i>{names[period["period"]]}</span>')
    keys.append('<span><i class="swatch even"></i>spread evenly</span>')
    panels = []
    for heading, key in (("All credit, |d|", "credit_share"), ("Negative credit only", "negative_credit_share")):
        series = [
            Bars(names[row["period"]], row[key], "first" if row["period"] == "first" else "last")
            for row in periods
            if row[key] is not None
        ]
        if not series:
            panels.append(f'<figure class="card"><h3>{heading}</h3><p class="soft">None in these traces.</p></figure>')
            continue
        columns = ["tenth", *(safe(bars.name) for bars in series)]
        rows = [[str(k + 1), *(percent(bars.shares[k]) for bars in series)] for k in range(len(series[0].shares))]
        chart = bar_chart(series, description=f"{heading}: share by relative position in the trace")
        panels.append(_panel(heading, chart, _numbers(columns, rows)))
    body = f'<div class="key">{"".join(keys)}</div><div class="panels">{"".join(panels)}</div>'
    return _section("credit", "Where the credit went", how, body)


def _calibration_section(calibration: dict[str, Any]) -> str:
    how = (
        "A dot shows the mean reward of the traces whose self-value lay in one bin: on the dashed diagonal the "
        "self-value is an honest forecast, above the diagonal it was too low, below it too high; the bar "
        "through a dot is its 95 % interval."
    )
    panels = []
    for heading, key, label in (
        ("At the prompt", "start_value", "self-value before the first token"),
        ("Before the last segment", "last_value_before_answer", "last self-value before the answer"),
    ):
        data = calibration[key]
        if data is None:
            continue
        chart = reliability_chart(data["bins"], x_label=label, description=f"{heading}: mean reward by self-value")
        score = (
            f'<p class="soft">Mean squared error {data["brier"]:.3f}; always forecasting the mean reward would give '
            f"{data['brier_of_mean_reward']:.3f}.</p>"
        )
        rows = [
            [f"{row['low']:g}–{row['high']:g}", f"{row['num_traces']:,}", *(f"{row[k]:.3f}" for k in _MEANS)]
            for row in data["bins"]
        ]
        panels.append(_panel(heading, chart, score + _numbers(["bin", "traces", "self-value", "reward"], rows)))
    if not panels:
        return _section("calibration", "Is the self-value right?", _NO_FORECAST, "")
    return _section("calibration", "Is the self-value right?", how, f'<div class="panels">{"".join(panels)}</div>')


_MEANS = ("mean_value", "mean_reward")
_NO_SEGMENTS = "No trace has self-values, so there is no credit of segments to show."
_NO_FORECAST = (
    "No trace has self-values that were made without knowing the reward (those of attributions are "
    "made of it), so there is nothing to compare with it."
)


def _traces_section(run: Run, line_checker: LineChecker | None, seed: int, per_kind: int) -> str:
    drawn = choose(run, line_checker, seed)
    if not drawn:
        return _section("traces", "Traces", _NO_SEGMENTS, _responses(run.rollouts))
    how = (
        "Read a trace from top to bottom: each row is a segment, its credit is the change of the self-value across it, "
        "blue where the outlook rose and orange where it fell; the last self-value is pinned to the reward."
    )
    if line_checker is not None:
        how += " In the margin, ✓ is a correct line and ✗ a wrong one."
    values = (-1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0)
    scale = "".join(f"<i {credit_colour(credit)}>{signed(credit, 1)}</i>" for credit in values)
    body = f'<div class="key"><span>credit <span class="scale">{scale}</span></span></div>'
    extremes = extreme_traces(run.traces, per_kind * len(KINDS))
    for kind, (heading, meaning) in enumerate(_GROUPS):
        cards = "".join(
            trace_card(judged(trace, describe(trace, kind), line_checker)) for trace, k in extremes if k == kind
        )
        if cards:
            body += _group(heading, meaning, cards)
    body += _group(
        "Drawn at random", "With a seed, among those that fit their heading.", "".join(map(trace_card, drawn))
    )
    return _section("traces", "Traces", how, body)


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
)


def _group(heading: str, meaning: str, cards: str) -> str:
    return f'<h3 class="group">{heading}</h3><p class="how">{meaning}</p>{cards}'


def _responses(rollouts: Sequence[Response]) -> str:
    """A few responses of the last dump, as they are."""
    last = [response for response in rollouts if response.response.strip()]
    failed = [response for response in last if response.is_failed][:2]
    solved = [response for response in last if not response.is_failed][:2]
    return "".join(map(response_card, failed + solved))


def _footer(summary: dict[str, Any]) -> str:
    blame = summary["blame"]
    notes = [
        "Worst blamed, best credited and most surprising traces are chosen from the whole run, one of each in turn, "
        "another prompt before the same one again; the others are drawn at random, with a seed."
    ]
    if blame is not None and blame["num_traces"]:
        notes.append(
            "Blame counts failed traces with a wrong line and at least two segments: does the segment with the most "
            "negative credit (the earliest of several) hold the end of the first wrong line? Chance is the mean of one "
            f"over the number of segments. {blame['num_without_negative_credit']:,} of these traces had no negative "
            "credit at all."
        )
    return f"<footer>{' '.join(notes)}</footer>"
