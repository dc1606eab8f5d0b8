"""The report as one HTML page: it loads nothing, runs no script, and reads on light and dark screens."""

from collections.abc import Sequence
from typing import Any

from rredcot_verl.report.charts import Bars, Line, bar_chart, line_chart, reliability_chart
from rredcot_verl.report.data import LineChecker, Run
from rredcot_verl.report.style import STYLE
from rredcot_verl.report.summary import summarise
from rredcot_verl.report.traces import choose, credit_colour, safe, signed, trace_card

DEFAULT_TITLE = "RREDCoT training run"
RUN_NAME, BASELINE_NAME = "RREDCoT", "GRPO"


def render(
    run: Run,
    baseline: Run | None = None,
    line_checker: LineChecker | None = None,
    *,
    title: str = DEFAULT_TITLE,
    seed: int = 0,
    summary: dict[str, Any] | None = None,
) -> str:
    """Renders the report of a run.

    Args:
        run: The run, with its traces.
        baseline: The paired GRPO run.
        line_checker: Marks the lines of the traces and locates first mistakes.
        title: Heading of the page.
        seed: Draws the traces that are shown.
        summary: What ``summarise`` returned for the same arguments, to save computing it twice.

    Returns:
        A complete HTML document.

    Raises:
        ReportError: The line checker gave offsets outside a response.
    """
    summary = summarise(run, baseline, line_checker) if summary is None else summary
    sections = [
        _header(title, summary),
        _learning_section(run, baseline),
        _credit_section(summary["credit_by_position"]),
        _calibration_section(summary["calibration"]),
        _traces_section(run, line_checker, seed),
        _footer(summary),
    ]
    # The policy makes the browser refuse anything that a trace might try to load, should its text ever get through.
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{safe(title)}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><main>{"".join(sections)}</main></body></html>
"""


def duration(seconds: float | None) -> str:
    """Writes a time in the unit a reader thinks in.

    Args:
        seconds: The time, if known.

    Returns:
        For example ``42 s``, ``12.5 min`` or ``3.1 h``.
    """
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _percent(share: float | None) -> str:
    if share is None:
        return "unknown"
    return f"{100 * share:.1f} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"


def _header(title: str, summary: dict[str, Any]) -> str:
    baseline = summary["baseline"]
    compared = f", compared with {safe(baseline['run'])}" if baseline else ""
    tiles = "".join(
        f'<div class="tile"><div class="name">{name}</div><div class="figure">{figure}</div>'
        f'<div class="note">{note}</div></div>'
        for name, figure, note in _tiles(summary)
    )
    return (
        f'<h1>{safe(title)}</h1><p class="soft">Run <code>{safe(summary["run"])}</code>{compared}. '
        f"Validation metric <code>{safe(summary['validation']['metric'])}</code>.</p>"
        f'<section class="tiles" aria-label="Summary">{tiles}</section>'
    )


def _tiles(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, figure and note of each summary tile; all of them HTML."""
    validation, cost, baseline = summary["validation"], summary["self_value"], summary["baseline"]
    note = f"steps {validation['first_step']} and {validation['last_step']}"
    if baseline is not None:
        other = baseline["validation"]
        note = f"{BASELINE_NAME}: {other['before']:.3f} → {other['after']:.3f}"
        if (other["first_step"], other["last_step"]) != (validation["first_step"], validation["last_step"]):
            note += f" (its steps {other['first_step']} and {other['last_step']})"
    tokens, error = cost["probe_tokens_per_response_token"], summary["max_return_error"]
    time_note = f"in {summary['num_steps']} steps"
    if baseline is not None:
        time_note += f"; {BASELINE_NAME}: {duration(baseline['seconds'])} in {baseline['num_steps']}"
    skipped = ", ".join(f"{count:,} {safe(status)}" for status, count in summary["skipped_traces"].items())
    return [
        ("Validation accuracy", f"{validation['before']:.3f} → {validation['after']:.3f}", note),
        _blame_tile(summary["blame"]),
        (
            "Cost of the self-values",
            "unknown" if cost["seconds"] is None else f"{_percent(cost['share_of_step_seconds'])} of step time",
            duration(cost["seconds"])
            + ("" if tokens is None else f"; {tokens:.3g} probe tokens per response token")
            + ("" if cost["engine"] is None else f"; read by {safe(cost['engine'])}"),
        ),
        ("Training time", duration(summary["seconds"]), time_note),
        (
            "Return equivalence",
            "unknown" if error is None else f"{error:.1e}" if error else "exact",
            "largest |sum of redistributed rewards − reward|",
        ),
        (
            "Traces with self-values",
            f"{summary['num_scored_traces']:,} of {summary['num_traces']:,}",
            f"skipped: {skipped}" if skipped else "none skipped",
        ),
    ]


def _blame_tile(blame: dict[str, Any] | None) -> tuple[str, str, str]:
    name = "Blame on the first wrong line"
    if blame is None:
        return name, "not measured", "needs a line checker"
    if not blame["num_traces"]:
        return name, "no data", "no failed trace with a wrong line and two segments"
    note = (
        f"by chance {_percent(blame['chance_rate'])}, always the last segment {_percent(blame['last_segment_rate'])}; "
        f"{blame['num_traces']:,} failed traces"
    )
    num_solved, num_doubtful = blame["num_solved_traces"], blame["num_solved_traces_with_wrong_line"]
    if 2 * num_doubtful > num_solved:
        note += f". Doubtful: the checker finds a wrong line in {num_doubtful:,} of {num_solved:,} solved traces"
    return name, _percent(blame["rate"]), note


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


def _learning_section(run: Run, baseline: Run | None) -> str:
    panels = []
    for heading, key in (("Validation accuracy", run.validation_metric), ("Mean training reward", "critic/score/mean")):
        lines = [Line(RUN_NAME, run.series(key), "run")] if run.series(key) else []
        if baseline is not None and baseline.series(key):
            lines.append(Line(BASELINE_NAME, baseline.series(key), "baseline"))
        if lines:
            rows = [[safe(line.name), str(step), f"{value:.4f}"] for line in lines for step, value in line.points]
            chart = line_chart(lines, y_label=heading.lower(), description=f"{heading} over the training steps")
            panels.append(_panel(heading, chart, _numbers(["run", "step", "value"], rows)))
    how = "Higher is better; the number at a line's end is its last value."
    if baseline is not None:
        how += " Each line is one run with one seed, so part of the gap between them is chance."
    return _section("learning", "Learning curve", how, f'<div class="panels">{"".join(panels)}</div>')


def _credit_section(periods: Sequence[dict[str, Any]]) -> str:
    how = (
        "Each bar is the share, in per cent, of all credit that fell on this tenth of the traces; if credit were "
        "spread evenly, every bar would reach the dashed line."
    )
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
        rows = [[str(k + 1), *(_percent(bars.shares[k]) for bars in series)] for k in range(len(series[0].shares))]
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
    body = f'<div class="panels">{"".join(panels)}</div>' if panels else '<p class="soft">No trace has self-values.</p>'
    return _section("calibration", "Is the self-value right?", how, body)


_MEANS = ("mean_value", "mean_reward")


def _traces_section(run: Run, line_checker: LineChecker | None, seed: int) -> str:
    how = (
        "Read a trace from top to bottom: each row is a segment, its credit is the change of the self-value across it, "
        "blue where the outlook rose and orange where it fell; the last self-value is pinned to the reward."
    )
    if line_checker is not None:
        how += " In the margin, ✓ is a correct line and ✗ a wrong one."
    steps = (-1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0)
    scale = "".join(f"<i {credit_colour(credit)}>{signed(credit, 1)}</i>" for credit in steps)
    key = f'<div class="key"><span>credit <span class="scale">{scale}</span></span></div>'
    cards = "".join(trace_card(pick) for pick in choose(run, line_checker, seed))
    body = key + cards if cards else '<p class="soft">No trace has self-values.</p>'
    return _section("traces", "Traces", how, body)


def _footer(summary: dict[str, Any]) -> str:
    blame = summary["blame"]
    notes = ["The traces are drawn at random, with a seed, among those that fit their heading."]
    if blame is not None and blame["num_traces"]:
        notes.append(
            "Blame counts failed traces with a wrong line and at least two segments: does the segment with the most "
            "negative credit (the earliest of several) hold the end of the first wrong line? Chance is the mean of one "
            f"over the number of segments. {blame['num_without_negative_credit']:,} of these traces had no negative "
            "credit at all."
        )
    return f"<footer>{' '.join(notes)}</footer>"
