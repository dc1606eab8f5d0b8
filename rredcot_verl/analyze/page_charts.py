"""Charts of the bench's page as inline SVG; colours and fonts stand in the page's style sheet.

Rows of a chart are methods, each with a mark whose shape and colour say its family, so that neither is needed alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rredcot_verl.report.charts import WIDTH, ticks

Interval = dict[str, Any]

ROW = 21
LABEL = 196
RIGHT = WIDTH - 14


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


def forest(rows: Sequence[Row], guides: Sequence[Guide], *, x_label: str, description: str, zero: bool = False) -> str:
    """Draws each method's estimate with its interval.

    Args:
        rows: Methods in order; those without an estimate are listed without a mark.
        guides: Lines to compare with.
        x_label: What is measured.
        description: For readers who do not see it.
        zero: Whether the axis must hold 0.

    Returns:
        An ``<svg>`` element.
    """
    numbers = [guide.at for guide in guides] + ([0.0] if zero else [])
    for row in rows:
        numbers += [row.value[key] for key in ("estimate", "low", "high") if row.value[key] is not None]
    x = _scale(numbers)
    top, base = 34 if guides else 14, (34 if guides else 14) + ROW * len(rows)
    body = _frame(x, top, base, x_label)
    body += _guides(guides, x, top, base)
    for number, row in enumerate(rows):
        y = top + ROW * (number + 0.5)
        body.append(_label(row.name, y))
        if row.value["estimate"] is None:
            body.append(_text(LABEL + 6, y + 4, "—", "tick"))
            continue
        if row.value["low"] is not None:
            body.append(_line(x(row.value["low"]), y, x(row.value["high"]), y, f"whisker {row.family}"))
        body.append(_mark(row.family, x(row.value["estimate"]), y, f"{row.name}: {describe(row.value)}"))
    return _svg(base + 46, body, description)


def bars(rows: Sequence[Row], at: float, *, x_label: str, description: str) -> str:
    """Draws each method's estimate as a bar from ``at``, with its interval; what goes beyond the axis is cut."""
    known = [row.value[key] for row in rows for key in ("estimate", "low", "high") if row.value[key] is not None]
    largest = max([row.value["estimate"] for row in rows if row.value["estimate"] is not None], default=at)
    x = _scale([at, 0.0, *[min(number, max(2.0, 1.6 * largest)) for number in known]])
    top, base = 34, 34 + ROW * len(rows)
    body = _frame(x, top, base, x_label) + _guides([Guide("GRPO", at)], x, top, base)
    for number, row in enumerate(rows):
        y = top + ROW * (number + 0.5)
        body.append(_label(row.name, y))
        if row.value["estimate"] is None:
            body.append(_text(LABEL + 6, y + 4, "—", "tick"))
            continue
        left, right = sorted((x(at), x(row.value["estimate"])))
        title = f"<title>{escape(row.name)}: {describe(row.value)}</title>"
        body.append(
            f'<rect class="fill {row.family}" x="{left:.1f}" y="{y - 6:.1f}" width="{max(right - left, 1):.1f}" '
            f'height="12">{title}</rect>'
        )
        if row.value["low"] is not None:
            body.append(_line(x(row.value["low"]), y, x(row.value["high"]), y, "whisker over"))
    return _svg(base + 46, body, description)


def by_position(rows: Sequence[tuple[str, Sequence[Interval]]], *, x_label: str, description: str) -> str:
    """Draws three marks a method: early, middle and late in the trace, from hollow to full."""
    numbers = [value["estimate"] for _, thirds in rows for value in thirds if value["estimate"] is not None]
    x = _scale([*numbers, 0.0])
    top, base = 14, 14 + ROW * len(rows)
    body = _frame(x, top, base, x_label)
    for number, (name, thirds) in enumerate(rows):
        y = top + ROW * (number + 0.5)
        body.append(_label(name, y))
        places = [x(value["estimate"]) for value in thirds if value["estimate"] is not None]
        if not places:
            body.append(_text(LABEL + 6, y + 4, "—", "tick"))
            continue
        body.append(_line(min(places), y, max(places), y, "join"))
        for which, value in zip(("early", "middle", "late"), thirds, strict=True):
            if value["estimate"] is not None:
                title = f"<title>{escape(name)}, {which}: {describe(value)}</title>"
                body.append(
                    f'<circle class="third {which}" cx="{x(value["estimate"]):.1f}" cy="{y:.1f}" r="5">{title}</circle>'
                )
    return _svg(base + 46, body, description)


def reliability(bins: Sequence[dict[str, Any]], family: str, *, description: str) -> str:
    """Draws the mean outcome over the mean value of each bin, above the number of states in it."""
    width, floor, base = 260, 206, 250
    x, y = _linear(0.0, 1.0, 40, width - 12), _linear(0.0, 1.0, floor, 12)
    body = []
    for k in range(0, 6):
        body.append(_line(40, y(k / 5), width - 12, y(k / 5), "grid"))
        if k % 5 == 0 or k % 2 == 0:
            body.append(_text(34, y(k / 5) + 4, f"{k / 5:g}", "tick", "end"))
            body.append(_text(x(k / 5), base + 16, f"{k / 5:g}", "tick", "middle"))
    body.append(_line(x(0), y(0), x(1), y(1), "even"))
    most = max(row["num_states"] for row in bins)
    for row in bins:
        centre = x(min(max(row["mean_value"], 0.0), 1.0))
        outcome = row["outcome"]
        if outcome["low"] is not None:
            body.append(_line(centre, y(_unit(outcome["low"])), centre, y(_unit(outcome["high"])), f"whisker {family}"))
        label = f"value {row['mean_value']:.2f}, outcome {describe(outcome)}, {row['num_states']} states"
        body.append(_mark(family, centre, y(_unit(outcome["estimate"])), label))
        tall = max(1.0, 32 * row["num_states"] / most)
        left, right = x(row["low"]) + 1.5, x(row["high"]) - 1.5
        body.append(
            f'<rect class="count" x="{left:.1f}" y="{base - tall:.1f}" width="{right - left:.1f}" '
            f'height="{tall:.1f}"><title>{row["num_states"]} states</title></rect>'
        )
    body.append(_line(40, base, width - 12, base, "axis"))
    return (
        f'<svg class="chart small" viewBox="0 0 {width} 272" role="img" aria-label="{escape(description)}">'
        f"{''.join(body)}</svg>"
    )


def scatter(
    points: Sequence[tuple[Row, float]], guides: Sequence[Guide], *, x_label: str, y_label: str, description: str
) -> str:
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
    low, high = math.floor(math.log10(min(costs))), math.ceil(math.log10(max(costs)) + 1e-9)
    x = _linear(low - 0.7, max(high, low + 1), left, right)
    ends = [row.value[key] for row, _ in points for key in ("estimate", "low", "high") if row.value[key] is not None]
    marks = ticks(min([*ends, *(g.at for g in guides)]), max([*ends, *(g.at for g in guides)]))
    y = _linear(marks[0], marks[-1], base, 16)
    body = []
    for tick in marks:
        body += [
            _line(left, y(tick), right, y(tick), "grid"),
            _text(left - 7, y(tick) + 4, _short(tick), "tick", "end"),
        ]
    for exponent in range(low, max(high, low + 1) + 1):
        body += [
            _line(x(exponent), base, x(exponent), base + 4, "axis"),
            _text(x(exponent), base + 18, _short(10.0**exponent), "tick", "middle"),
        ]
    body += [_text(x(low - 0.7) + 2, base + 18, "0", "tick"), _line(left, base, right, base, "axis")]
    for guide in guides:
        body += [
            _line(left, y(guide.at), right, y(guide.at), "even"),
            _text(right, y(guide.at) - 4, guide.name, "tick", "end"),
        ]
    placed = [(x(math.log10(cost)) if cost > 0 else x.start + 6, y(row.value["estimate"]), row) for row, cost in points]
    for at, _, row in placed:
        if row.value["low"] is not None:
            body.append(_line(at, y(row.value["low"]), at, y(row.value["high"]), f"whisker thin {row.family}"))
    for at, up, row in placed:
        body.append(_mark(row.family, at, up, f"{row.name}: {describe(row.value)}"))
    body += _point_labels(placed, right, base)
    body.append(_text((left + right) / 2, base + 40, x_label, "title", "middle"))
    body.append(
        f'<text class="title" transform="translate(13 {(base + 16) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return _svg(height, body, description)


def describe(value: Interval, num_digits: int = 3) -> str:
    """Estimate with its interval, in plain text."""
    if value["estimate"] is None:
        return "not measured"
    text = number(value["estimate"], num_digits)
    if value["low"] is None:
        return text
    return f"{text} ({number(value['low'], num_digits)} to {number(value['high'], num_digits)})"


def number(value: float, num_digits: int | None = 3) -> str:
    """A number with a true minus sign; three significant digits where `num_digits` is None."""
    size = abs(value)
    if num_digits is None:
        text = f"{value:.3g}" if size < 1000 else f"{value:,.0f}"
    elif size >= 100:
        text = f"{value:,.0f}"
    elif 0 < size < 10.0**-num_digits / 2:
        text = f"{value:.1e}"
    else:
        text = f"{value:.{num_digits}f}"
    return text.replace("-", "−")


class _linear:  # noqa: N801
    """A linear map from values to pixels, held inside the frame."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def _scale(numbers: Sequence[float]) -> _linear:
    marks = ticks(min(numbers, default=0.0), max(numbers, default=1.0))
    return _linear(marks[0], marks[-1], LABEL, RIGHT)


def _frame(x: _linear, top: float, base: float, x_label: str) -> list[str]:
    body = []
    for tick in ticks(x.low, x.high):
        if x.low - 1e-9 <= tick <= x.high + 1e-9:
            body.append(_line(x(tick), top, x(tick), base, "grid"))
            body.append(_text(x(tick), base + 17, _short(tick), "tick", "end" if x(tick) > RIGHT - 8 else "middle"))
    body.append(_line(LABEL, base, RIGHT, base, "axis"))
    body.append(_text((LABEL + RIGHT) / 2, base + 37, x_label, "title", "middle"))
    return body


def _guides(guides: Sequence[Guide], x: _linear, top: float, base: float) -> list[str]:
    body = []
    for rank, guide in enumerate(sorted(guides, key=lambda guide: guide.at)):
        at = x(guide.at)
        anchor = "end" if at > RIGHT - 60 else "start" if at < LABEL + 40 else "middle"
        body.append(_line(at, top - 4, at, base, "even"))
        body.append(_text(at, top - 8 - 13 * (rank % 2), guide.name, "tick", anchor))
    return body


def _point_labels(placed: Sequence[tuple[float, float, Row]], right: float, base: float) -> list[str]:
    """Names beside their points, moved up or down where they would touch another name."""
    body: list[str] = []
    taken: list[tuple[float, float, float, float]] = [(at - 5, up - 5, at + 5, up + 5) for at, up, _ in placed]
    for at, up, row in sorted(placed, key=lambda item: item[1]):
        width = 6.8 * len(row.name)
        best: tuple[float, float, float] | None = None
        for offset in sorted(range(-150, 151, 6), key=abs):
            for left in (at + 9, at - 9 - width):
                box = (left, up + offset - 9, left + width, up + offset + 7)
                if left < 58 or box[2] > right or box[1] < 4 or box[3] > base - 1:
                    continue
                if not any(_touch(box, other) for other in taken):
                    best = (left, up + offset, abs(offset))
                    taken.append(box)
                    break
            if best is not None:
                break
        if best is None:
            continue
        if best[2] > 8:
            end = best[0] - 2 if best[0] > at else best[0] + width + 2
            body.append(_line(at, up, end, best[1], "leader"))
        body.append(_text(best[0], best[1] + 4, row.name, f"name {row.family}"))
    return body


def _touch(box: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def _mark(family: str, x: float, y: float, title: str) -> str:
    shape = SHAPES.get(family, SHAPES["probe"])(x, y)
    return f'<path class="mark-{family} mark" d="{shape}"><title>{escape(title)}</title></path>'


def _polygon(points: Sequence[tuple[float, float]]) -> Callable[[float, float], str]:
    def draw(x: float, y: float) -> str:
        return "M" + "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in points) + "Z"

    return draw


def _circle(x: float, y: float) -> str:
    return f"M{x - 4.5:.1f} {y:.1f}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z"


SHAPES: dict[str, Callable[[float, float], str]] = {
    "probe": _circle,
    "peer": _polygon([(0, -5.5), (5, 4), (-5, 4)]),
    "attribution": _polygon([(0, 5.5), (5, -4), (-5, -4)]),
    "monte_carlo": _polygon([(-4.2, -4.2), (4.2, -4.2), (4.2, 4.2), (-4.2, 4.2)]),
    "readout": _polygon([(0, -5.8), (5.8, 0), (0, 5.8), (-5.8, 0)]),
    "baseline": _polygon([(-1.5, -5), (1.5, -5), (1.5, 5), (-1.5, 5)]),
    "smoothed": _polygon([(-5, -2.5), (5, -2.5), (5, 2.5), (-5, 2.5)]),
}


def legend_mark(family: str) -> str:
    """The mark of a family, for a key."""
    return f'<svg class="keymark" viewBox="-8 -8 16 16" aria-hidden="true">{_mark(family, 0, 0, family)}</svg>'


def _label(name: str, y: float) -> str:
    return _text(LABEL - 9, y + 4, name if len(name) <= 31 else name[:30] + "…", "row", "end")


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, body: Sequence[str], description: str) -> str:
    label = escape(description)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">{"".join(body)}</svg>'
    )


def _short(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _unit(value: float) -> float:
    return min(max(value, 0.0), 1.0)
