"""Charts as inline SVG. They carry class names only; their colours and fonts stand in the page's style sheet.

Every chart has the same width, so that two stand side by side on a wide window and text has one size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH = 520
MARGIN_LEFT = 62
# More would touch each other.
MOST_MARKERS = 20


@dataclass(frozen=True)
class Line:
    """One line of a line chart.

    Attributes:
        name: The label written at the line's end.
        points: ``(step, value)`` in order.
        style: Class name that sets colour and dashes: ``"run"`` or ``"baseline"``.
    """

    name: str
    points: Sequence[tuple[int, float]]
    style: str


@dataclass(frozen=True)
class Bars:
    """One series of a bar chart.

    Attributes:
        name: What the series is, for the tooltip.
        shares: One share in [0, 1] per bin.
        style: Class name that sets the fill: ``"first"`` or ``"last"``.
    """

    name: str
    shares: Sequence[float]
    style: str


@dataclass(frozen=True)
class _Axis:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, at_most: int = 6, *, integer: bool = False) -> list[float]:
    """Round tick values that enclose a range.

    Args:
        low: The smallest value to show.
        high: The largest one.
        at_most: Most ticks wanted.
        integer: Whether only whole numbers make sense.

    Returns:
        Evenly spaced round numbers, the first at most ``low`` and the last at least ``high``; at least two.
    """
    if high - low < 1e-12:
        low, high = (low, low + 1.0) if integer else (low - 0.05, high + 0.05)
    exponent = math.floor(math.log10((high - low) / at_most))
    for scale in (exponent, exponent + 1, exponent + 2):
        for factor in (1, 2, 5):
            size = factor * 10.0**scale
            if integer and size < 1:
                continue
            # The small slack keeps 0.3 / 0.1 = 2.9999999999999996 from costing a tick.
            first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
            if last - first < at_most:
                return [round(k * size, 12) for k in range(first, max(last, first + 1) + 1)]
    raise AssertionError("a step of 100 ranges always fits")


def line_chart(lines: Sequence[Line], *, y_label: str, description: str) -> str:
    """Draws values over training steps, each line labelled at its end with its last value.

    Args:
        lines: The lines, at least one, each with at least one point.
        y_label: Title of the vertical axis.
        description: What the chart shows, for readers who do not see it.

    Returns:
        An ``<svg>`` element.
    """
    height, right = 300, WIDTH - 112
    values = [value for line in lines for _, value in line.points]
    steps = [step for line in lines for step, _ in line.points]
    # Zero belongs to the axis unless the differences would be lost by it.
    y_ticks = ticks(0.0 if 0.0 <= min(values) <= 0.6 * max(values) else min(values), max(values))
    x_ticks = ticks(min(steps), max(steps), integer=True)
    x = _Axis(min(steps), max(max(steps), min(steps) + 1), MARGIN_LEFT + 8, right)
    y = _Axis(y_ticks[0], y_ticks[-1], height - 48, 16)
    body = _y_axis(y, [(tick, f"{tick:g}".replace("-", "−")) for tick in y_ticks], right, y_label)
    body += _x_axis(x, [(tick, f"{tick:g}") for tick in x_ticks if x.low <= tick <= x.high], y.start, "training step")
    for line in lines:
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line.points)
        body.append(f'<polyline class="line {line.style}" points="{path}"/>')
        marked = line.points if len(line.points) <= MOST_MARKERS else line.points[-1:]
        body += [_marker(line, x(step), y(value), f"{step}: {value:.3f}") for step, value in marked]
    ends = _spread([y(line.points[-1][1]) for line in lines], 32.0, y.end + 8, y.start - 20)
    for line, end in zip(lines, ends, strict=True):
        label_x = x(line.points[-1][0]) + 12
        body.append(_text(label_x, end + 1, line.name, f"label {line.style}"))
        body.append(_text(label_x, end + 16, f"{line.points[-1][1]:.3f}", f"label {line.style}"))
    return _svg(height, body, description)


def bar_chart(series: Sequence[Bars], *, description: str) -> str:
    """Draws shares by relative position in the trace, with the number, in per cent, on every bar.

    Args:
        series: One or two series over the same bins.
        description: What the chart shows, for readers who do not see it.

    Returns:
        An ``<svg>`` element.
    """
    height, right = 260, WIDTH - 10
    num_bins = len(series[0].shares)
    y_ticks = ticks(0.0, max(max(bars.shares) for bars in series), at_most=5)
    x, y = _Axis(0.0, num_bins, MARGIN_LEFT, right), _Axis(0.0, y_ticks[-1], height - 48, 20)
    body = _y_axis(y, [(tick, f"{100 * tick:g} %") for tick in y_ticks], right, "")
    labels = [(k, f"{100 * k / num_bins:g} %") for k in range(0, num_bins + 1, 2)]
    body += _x_axis(x, labels, y.start, "position in the trace, by tokens")
    width = (x(1) - x(0) - 6) / len(series)
    even = y(1 / num_bins)
    body.append(f'<line class="even" x1="{x.start}" x2="{right}" y1="{even:.1f}" y2="{even:.1f}"/>')
    for rank, bars in enumerate(series):
        for k, share in enumerate(bars.shares):
            left, top = x(k) + 3 + rank * width, y(share)
            body.append(
                f'<rect class="bar {bars.style}" x="{left + 1:.1f}" y="{top:.1f}" width="{width - 2:.1f}" '
                f'height="{y.start - top:.1f}"><title>{escape(bars.name)}: {100 * share:.1f} %</title></rect>'
            )
            body.append(_text(left + width / 2, top - 4, f"{100 * share:.0f}", "number", "middle"))
    return _svg(height, body, description)


def reliability_chart(bins: Sequence[dict[str, Any]], *, x_label: str, description: str) -> str:
    """Draws the mean outcome over the mean self-value of each bin, above the number of traces in it.

    Args:
        bins: Bins as in the summary's ``calibration``; only those that hold a trace.
        x_label: Which self-value it is.
        description: What the chart shows, for readers who do not see it.

    Returns:
        An ``<svg>`` element.
    """
    height, right, floor, base = 380, WIDTH - 10, 236, 332
    x, y = _Axis(0.0, 1.0, MARGIN_LEFT, right), _Axis(0.0, 1.0, floor, 16)
    body = _y_axis(y, [(k / 5, f"{k / 5:g}") for k in range(6)], right, "mean reward")
    body.append(f'<line class="even" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>')
    most = max(row["num_traces"] for row in bins)
    for row in bins:
        num_traces = row["num_traces"]
        # Values and rewards outside [0, 1] are drawn on the frame.
        centre, mean = (x(min(max(row["mean_value"], 0.0), 1.0)), min(max(row["mean_reward"], 0.0), 1.0))
        low, high = _wilson(mean, num_traces)
        body.append(f'<line class="error" x1="{centre:.1f}" x2="{centre:.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}"/>')
        body.append(
            f'<circle class="dot" cx="{centre:.1f}" cy="{y(mean):.1f}" r="5"><title>self-value '
            f"{row['mean_value']:.3f}, reward {row['mean_reward']:.3f}, {num_traces} traces</title></circle>"
        )
        tall = max(1.0, 52 * num_traces / most)
        left, width = x(row["low"]) + 3, x(row["high"]) - x(row["low"]) - 6
        body.append(
            f'<rect class="count" x="{left:.1f}" y="{base - tall:.1f}" width="{width:.1f}" height="{tall:.1f}"/>'
        )
        body.append(_text(left + width / 2, base - tall - 4, f"{num_traces:,}", "number", "middle"))
    body.append(_text(x(0) + 4, floor + 19, "traces in the bin", "tick"))
    body += _x_axis(x, [(k / 5, f"{k / 5:g}") for k in range(6)], base, x_label)
    return _svg(height, body, description)


def _svg(height: int, body: Sequence[str], description: str) -> str:
    label = escape(description)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(body)}</svg>'


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _y_axis(y: _Axis, labels: Sequence[tuple[float, str]], right: float, title: str) -> list[str]:
    parts = []
    for tick, label in labels:
        parts.append(f'<line class="grid" x1="{MARGIN_LEFT}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(_text(MARGIN_LEFT - 7, y(tick) + 4, label, "tick", "end"))
    if title:
        middle = (y.start + y.end) / 2
        parts.append(
            f'<text class="title" transform="translate(14 {middle:.1f}) rotate(-90)" text-anchor="middle">'
            f"{escape(title)}</text>"
        )
    return parts


def _x_axis(x: _Axis, labels: Sequence[tuple[float, str]], base: float, title: str) -> list[str]:
    parts = [f'<line class="axis" x1="{MARGIN_LEFT}" x2="{x.end}" y1="{base}" y2="{base}"/>']
    for tick, label in labels:
        parts.append(f'<line class="axis" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{base}" y2="{base + 4}"/>')
        # The label of the last tick would reach over the frame if it were centred there.
        at_frame = x(tick) > WIDTH - 24
        parts.append(_text(x(tick) + (8 if at_frame else 0), base + 18, label, "tick", "end" if at_frame else "middle"))
    parts.append(_text((x.start + x.end) / 2, base + 38, title, "title", "middle"))
    return parts


def _marker(line: Line, x: float, y: float, tooltip: str) -> str:
    title = f"<title>{escape(line.name)}, step {escape(tooltip)}</title>"
    # The shape tells the two lines apart where colour does not.
    if line.style == "run":
        return f'<circle class="dot run" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{title}</circle>'
    return f'<rect class="dot baseline" x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6">{title}</rect>'


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
    result = [0.0] * len(placed)
    for index, value in zip(order, placed, strict=True):
        result[index] = value
    return result


def _wilson(mean: float, num: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share; for rewards between 0 and 1 it is too wide rather than too narrow."""
    z = 1.96
    centre = (mean + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(mean * (1 - mean) / num + z * z / (4 * num * num))
    return max(0.0, centre - half), min(1.0, centre + half)
