"""All charts of the project as SVG. They carry class names only; colours and fonts stand in the page's style sheet.

Charts of a page have the same width, so that two stand side by side on a wide window and text has one size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rredcot_verl.pages.drawing import Axis, Drawing, short, ticks
from rredcot_verl.pages.text import describe

WIDTH, SMALL_WIDTH = 520, 260
MARGIN_LEFT = 62
# More would touch each other.
MOST_MARKERS = 20
# Of charts with a row a method: height of a row, where labels end, where the axis ends.
ROW, LABEL, RIGHT = 21, 196, WIDTH - 14

Interval = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """One line of a line chart, or one series of a bar chart.

    Attributes:
        name: The label written at a line's end; of bars, for the tooltip.
        points: ``(x, y)`` in order; of bars, the bin's number from 0 and its share in [0, 1].
        style: Class name that sets colour and dashes.
        band: Of a line chart, ``(x, low, high)``: an interval drawn behind the line.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Row:
    """One method in a chart.

    Attributes:
        name: Its name.
        family: Class name of its mark.
        value: Estimate and interval.
    """

    name: str
    family: str
    value: Interval


@dataclass(frozen=True)
class Guide:
    """A dashed line across a chart, e.g. chance or the gold's ceiling."""

    name: str
    at: float


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability chart: forecasts from ``low`` to ``high``, their mean, the mean outcome, their count."""

    low: float
    high: float
    mean: float
    outcome: Interval
    count: int


def line_chart(
    lines: Sequence[Series],
    *,
    y_label: str,
    description: str,
    x_label: str = "training step",
    tooltip: str = "{name}, step {x}: {y:.3f}",
    log_x: Sequence[float] = (),
    with_last_value: bool = True,
) -> Drawing:
    """Draws lines, each labelled at its end; every point is marked where there are few.

    Args:
        lines: The lines, each of at least one point.
        y_label: What is measured, or its unit.
        description: What the chart shows, for readers who do not see it.
        x_label: What lies along the axis.
        tooltip: Text of a mark; ``name``, ``x`` and ``y`` are filled in.
        log_x: Where given, both axes are logarithmic, and these are the ticks of the horizontal one.
        with_last_value: Whether the label has the line's last value below its name.

    Returns:
        The chart.
    """
    height, right = 300, WIDTH - 112
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    ys += [end for line in lines for _, *ends in line.band for end in ends]
    if log_x:
        low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)) + 1e-9)
        x_ticks, y_ticks = list(log_x), [10.0**power for power in range(low, high + 1)]
        x = Axis(log_x[0], log_x[-1], MARGIN_LEFT + 8, right, log=True)
    else:
        # Zero belongs to the axis unless the differences would be lost by it.
        y_ticks = ticks(0.0 if 0.0 <= min(ys) <= 0.6 * max(ys) else min(ys), max(ys))
        x = Axis(min(xs), max(max(xs), min(xs) + 1), MARGIN_LEFT + 8, right)
        x_ticks = [tick for tick in ticks(min(xs), max(xs), integer=True) if x.low <= tick <= x.high]
    y = Axis(y_ticks[0], y_ticks[-1], height - 48, 16, log=bool(log_x))
    drawing = Drawing(WIDTH, height, description)
    drawing.y_axis(y, [(tick, short(tick)) for tick in y_ticks], MARGIN_LEFT, right, y_label)
    drawing.x_axis(x, [(tick, short(tick)) for tick in x_ticks], y.start, x_label, None)
    gap, room = (32.0, 20) if with_last_value else (14.0, 4)
    # Labels of lines that end far apart do not touch.
    columns = [x(line.points[-1][0]) // 100 for line in lines]
    ends = [y(line.points[-1][1]) for line in lines]
    for column in set(columns):
        members = [place for place in range(len(lines)) if columns[place] == column]
        moved = _spread([ends[place] for place in members], gap, y.end + 8, y.start - room)
        for place, end in zip(members, moved, strict=True):
            ends[place] = end
    for line in lines:
        edge = [(at, high) for at, _, high in line.band] + [(at, low) for at, low, _ in reversed(line.band)]
        if edge:
            path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in edge)
            drawing.add("polygon", f"band {line.style}", points=path)
    for line, end in zip(lines, ends, strict=True):
        path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in line.points)
        drawing.add("polyline", f"line {line.style}", points=path)
        for at, value in line.points if len(line.points) <= MOST_MARKERS else line.points[-1:]:
            title = tooltip.format(name=line.name, x=at, y=value)
            # The shape tells two lines apart where colour does not.
            if line.style == "baseline":
                drawing.rect("dot baseline", x(at) - 3, y(value) - 3, 6, 6, title)
            else:
                drawing.add("circle", f"dot {line.style}", cx=x(at), cy=y(value), r=3.5, tooltip=title)
        left = x(line.points[-1][0]) + 12
        drawing.text(f"label {line.style}", left, end + (1 if with_last_value else 4), line.name)
        if with_last_value:
            drawing.text(f"label {line.style}", left, end + 16, f"{line.points[-1][1]:.3f}")
    return drawing


def bar_chart(series: Sequence[Series], *, description: str) -> Drawing:
    """Draws shares of one or two series over the same bins, by relative position in the trace, in per cent on every
    bar.
    """
    height, right = 260, WIDTH - 10
    num_bins = len(series[0].points)
    y_ticks = ticks(0.0, max(share for bars in series for _, share in bars.points), at_most=5)
    x, y = Axis(0.0, num_bins, MARGIN_LEFT, right), Axis(0.0, y_ticks[-1], height - 48, 20)
    drawing = Drawing(WIDTH, height, description)
    drawing.y_axis(y, [(tick, f"{100 * tick:g} %") for tick in y_ticks], MARGIN_LEFT, right)
    labels = [(k, f"{100 * k / num_bins:g} %") for k in range(0, num_bins + 1, 2)]
    drawing.x_axis(x, labels, y.start, "position in the trace, by tokens", None)
    drawing.line("even", x.start, y(1 / num_bins), right, y(1 / num_bins))
    width = (x(1) - x(0) - 6) / len(series)
    for rank, bars in enumerate(series):
        for k, share in bars.points:
            left, top = x(k) + 3 + rank * width, y(share)
            title = f"{bars.name}: {100 * share:.1f} %"
            drawing.rect(f"bar {bars.style}", left + 1, top, width - 2, y.start - top, title)
            drawing.text("number", left + width / 2, top - 4, f"{100 * share:.0f}", "middle")
    return drawing


def reliability(
    bins: Sequence[Bin],
    family: str,
    *,
    forecast: str = "value",
    outcome: str = "outcome",
    counted: str = "states",
    small: bool = False,
    description: str,
) -> Drawing:
    """Draws the mean outcome over the mean forecast of each bin, above the number of items in it.

    Args:
        bins: Those that hold an item; forecasts and outcomes outside [0, 1] are drawn on the frame.
        family: Class name of the marks.
        forecast: What is forecast by, for the axis and the tooltips.
        outcome: What is forecast, likewise.
        counted: What is counted, in the plural.
        small: For many charts side by side: half as wide, without titles, with counts in tooltips only.
        description: What the chart shows, for readers who do not see it.
    """
    width, height, floor, base, tallest = (SMALL_WIDTH, 272, 206, 250, 32) if small else (WIDTH, 380, 236, 332, 52)
    left, top = (40, 12) if small else (MARGIN_LEFT, 16)
    x, y = Axis(0.0, 1.0, left, width - 12), Axis(0.0, 1.0, floor, top)
    labels = [(k / 5, f"{k / 5:g}") for k in range(6)]
    drawing = Drawing(width, height, description, "chart small" if small else "chart")
    drawing.y_axis(y, labels, left, width - 12, "" if small else f"mean {outcome}")
    drawing.x_axis(x, labels, base, "" if small else forecast, None)
    drawing.line("even", x(0), y(0), x(1), y(1))
    most = max(row.count for row in bins)
    for row in bins:
        if row.outcome["low"] is not None:
            drawing.line(f"whisker {family}", x(row.mean), y(row.outcome["low"]), x(row.mean), y(row.outcome["high"]))
        label = f"{forecast} {row.mean:.3f}, {outcome} {describe(row.outcome)}, {row.count:,} {counted}"
        drawing.mark(family, x(row.mean), y(row.outcome["estimate"]), label)
        tall, start, end = max(1.0, tallest * row.count / most), x(row.low) + 2, x(row.high) - 2
        drawing.rect("count", start, base - tall, end - start, tall, f"{row.count:,} {counted}")
        if not small:
            drawing.text("number", (start + end) / 2, base - tall - 4, f"{row.count:,}", "middle")
    if not small:
        drawing.text("tick", left + 4, floor + 19, f"{counted} in the bin")
    return drawing


def forest(
    rows: Sequence[Row], guides: Sequence[Guide], *, x_label: str, description: str, zero: bool = False
) -> Drawing:
    """Draws each method's estimate with its interval; those without an estimate are listed without a mark.

    Args:
        rows: Methods in order.
        guides: Lines to compare with.
        x_label: What is measured.
        description: For readers who do not see it.
        zero: Whether the axis must hold 0.
    """
    numbers = [guide.at for guide in guides] + ([0.0] if zero else []) + _numbers(rows)
    marks = ticks(min(numbers, default=0.0), max(numbers, default=1.0))
    x = Axis(marks[0], marks[-1], LABEL, RIGHT)
    top = 34 if guides else 14
    base = top + ROW * len(rows)
    drawing = Drawing(WIDTH, base + 46, description)
    labels = [(tick, short(tick)) for tick in ticks(x.low, x.high) if x.low - 1e-9 <= tick <= x.high + 1e-9]
    drawing.x_axis(x, labels, base, x_label, top)
    for rank, guide in enumerate(sorted(guides, key=lambda guide: guide.at)):
        at = x(guide.at)
        drawing.line("even", at, top - 4, at, base)
        anchor = "end" if at > RIGHT - 60 else "start" if at < LABEL + 40 else "middle"
        drawing.text("tick", at, top - 8 - 13 * (rank % 2), guide.name, anchor)
    for place, row in enumerate(rows):
        y = top + ROW * (place + 0.5)
        drawing.text("row", LABEL - 9, y + 4, row.name if len(row.name) <= 31 else row.name[:30] + "…", "end")
        if row.value["estimate"] is None:
            drawing.text("tick", LABEL + 6, y + 4, "—")
            continue
        if row.value["low"] is not None:
            drawing.line(f"whisker {row.family}", x(row.value["low"]), y, x(row.value["high"]), y)
        drawing.mark(row.family, x(row.value["estimate"]), y, f"{row.name}: {describe(row.value)}")
    return drawing


def legend_mark(family: str) -> Drawing:
    """The mark of a family, for a key."""
    drawing = Drawing(16, 16, "", "keymark")
    drawing.root.set("viewBox", "-8 -8 16 16")
    drawing.mark(family, 0, 0, family)
    return drawing


def _numbers(rows: Sequence[Row]) -> list[float]:
    found = (row.value[key] for row in rows for key in ("estimate", "low", "high"))
    return [number for number in found if number is not None]


def _spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves labels apart until neighbours are ``gap`` apart, as little as possible, within ``low`` and ``high``."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed = [min(max(positions[index], low), high) for index in order]
    for _ in range(100):
        for k in range(len(placed) - 1):
            lack = gap - (placed[k + 1] - placed[k])
            if lack > 0:
                placed[k] -= lack / 2
                placed[k + 1] += lack / 2
        placed = [min(max(value, low), high) for value in placed]
    return [placed[order.index(index)] for index in range(len(positions))]
