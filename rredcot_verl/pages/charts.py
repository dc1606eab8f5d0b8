"""All charts of the project as SVG. They carry class names only; colours and fonts stand in the page's style sheet.

Charts of a page have the same width, so that two stand side by side on a wide window and text has one size.
"""

import math
from collections.abc import Callable, Sequence
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

    def draw(drawing: Drawing, x: Axis, y: float, row: Row) -> None:
        if row.value["low"] is not None:
            drawing.line(f"whisker {row.family}", x(row.value["low"]), y, x(row.value["high"]), y)
        drawing.mark(row.family, x(row.value["estimate"]), y, f"{row.name}: {describe(row.value)}")

    return _rows_chart([(row.name, [row]) for row in rows], draw, numbers, guides, x_label, description)


def bars(rows: Sequence[Row], at: float, *, x_label: str, description: str) -> Drawing:
    """Draws each method's estimate as a bar from ``at``, with its interval; what goes beyond the axis is cut."""
    largest = max([row.value["estimate"] for row in rows if row.value["estimate"] is not None], default=at)
    numbers = [at, 0.0, *[min(number, max(2.0, 1.6 * largest)) for number in _numbers(rows)]]

    def draw(drawing: Drawing, x: Axis, y: float, row: Row) -> None:
        left, right = sorted((x(at), x(row.value["estimate"])))
        title = f"{row.name}: {describe(row.value)}"
        drawing.rect(f"fill {row.family}", left, y - 6, max(right - left, 1.0), 12, title)
        if row.value["low"] is not None:
            drawing.line("whisker over", x(row.value["low"]), y, x(row.value["high"]), y)

    return _rows_chart([(row.name, [row]) for row in rows], draw, numbers, [Guide("GRPO", at)], x_label, description)


def by_position(rows: Sequence[tuple[str, Sequence[Interval]]], *, x_label: str, description: str) -> Drawing:
    """Draws three marks a method: early, middle and late in the trace, from hollow to full."""
    methods = [
        (name, [Row(name, third, value) for third, value in zip(("early", "middle", "late"), thirds, strict=True)])
        for name, thirds in rows
    ]
    numbers = [part.value["estimate"] for _, parts in methods for part in parts if part.value["estimate"] is not None]

    def draw(drawing: Drawing, x: Axis, y: float, *parts: Row) -> None:
        places = [x(part.value["estimate"]) for part in parts]
        drawing.line("join", min(places), y, max(places), y)
        for part, at in zip(parts, places, strict=True):
            title = f"{part.name}, {part.family}: {describe(part.value)}"
            drawing.add("circle", f"third {part.family}", cx=at, cy=y, r=5, tooltip=title)

    return _rows_chart(methods, draw, [*numbers, 0.0], [], x_label, description)


def scatter(
    points: Sequence[tuple[Row, float]], guides: Sequence[Guide], *, x_label: str, y_label: str, description: str
) -> Drawing:
    """Draws quality over cost, the cost on a logarithmic axis.

    Args:
        points: Methods with their cost; what costs nothing stands at the left edge.
        guides: Lines of quality to compare with.
        x_label: Unit of the cost.
        y_label: What the quality is.
        description: For readers who do not see it.
    """
    height, left, right, base = 360, 56, RIGHT - 8, 306
    costs = [cost for _, cost in points if cost > 0] or [1.0]
    low = math.floor(math.log10(min(costs)))
    high = max(math.ceil(math.log10(max(costs)) + 1e-9), low + 1)
    x = Axis(10.0 ** (low - 0.7), 10.0**high, left, right, log=True)
    ends = _numbers([row for row, _ in points]) + [guide.at for guide in guides]
    y_ticks = ticks(min(ends), max(ends))
    y = Axis(y_ticks[0], y_ticks[-1], base, 16)
    drawing = Drawing(WIDTH, height, description)
    drawing.y_axis(y, [(tick, short(tick)) for tick in y_ticks], left, right, y_label)
    drawing.x_axis(x, [(10.0**k, short(10.0**k)) for k in range(low, high + 1)], base, x_label, None)
    drawing.text("tick", left + 2, base + 18, "0")
    for guide in guides:
        drawing.line("even", left, y(guide.at), right, y(guide.at))
        drawing.text("tick", right, y(guide.at) - 4, guide.name, "end")
    placed = [(x(cost) if cost > 0 else left + 6, y(row.value["estimate"]), row) for row, cost in points]
    for at, _, row in placed:
        if row.value["low"] is not None:
            drawing.line(f"whisker thin {row.family}", at, y(row.value["low"]), at, y(row.value["high"]))
    for at, up, row in placed:
        drawing.mark(row.family, at, up, f"{row.name}: {describe(row.value)}")
    _label_points(drawing, placed, right, base)
    return drawing


def legend_mark(family: str) -> Drawing:
    """The mark of a family, or of a third of the trace, for a key."""
    drawing = Drawing(16, 16, "", "keymark")
    drawing.root.set("viewBox", "-8 -8 16 16")
    if family in ("early", "middle", "late"):
        drawing.add("circle", f"third {family}", r=5)
    else:
        drawing.mark(family, 0, 0, family)
    return drawing


def _rows_chart(
    rows: Sequence[tuple[str, Sequence[Row]]],
    draw: Callable[..., None],
    numbers: Sequence[float],
    guides: Sequence[Guide],
    x_label: str,
    description: str,
) -> Drawing:
    """A chart with a labelled row a method over one axis; ``draw`` draws what is known of a row."""
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
    for place, (name, parts) in enumerate(rows):
        y = top + ROW * (place + 0.5)
        drawing.text("row", LABEL - 9, y + 4, name if len(name) <= 31 else name[:30] + "…", "end")
        known = [part for part in parts if part.value["estimate"] is not None]
        if known:
            draw(drawing, x, y, *known)
        else:
            drawing.text("tick", LABEL + 6, y + 4, "—")
    return drawing


def _numbers(rows: Sequence[Row]) -> list[float]:
    found = (row.value[key] for row in rows for key in ("estimate", "low", "high"))
    return [number for number in found if number is not None]


def _label_points(drawing: Drawing, placed: Sequence[tuple[float, float, Row]], right: float, base: float) -> None:
    """Names beside their points, moved up or down where they would touch another name."""
    taken = [(at - 5, up - 5, at + 5, up + 5) for at, up, _ in placed]
    for at, up, row in sorted(placed, key=lambda item: item[1]):
        width = 6.8 * len(row.name)
        tried = ((left, offset) for offset in sorted(range(-150, 151, 6), key=abs) for left in (at + 9, at - 9 - width))
        for left, offset in tried:
            box = (left, up + offset - 9, left + width, up + offset + 7)
            is_inside = left >= 58 and box[2] <= right and box[1] >= 4 and box[3] <= base - 1
            if is_inside and not any(_touch(box, other) for other in taken):
                taken.append(box)
                if abs(offset) > 8:
                    drawing.line("leader", at, up, left - 2 if left > at else left + width + 2, up + offset)
                drawing.text(f"name {row.family}", left, up + offset + 4, row.name)
                break


def _touch(box: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


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
