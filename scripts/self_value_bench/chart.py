"""The chart: seconds against the length of a response and against the number of segments, as one SVG file."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

COLORS = {
    "plain": "#4d4d4d",
    "update": "#a6761d",
    "shared": "#1b7837",
    "fused": "#2166ac",
    "server": "#762a83",
    "naive": "#d6604d",
    "monte_carlo": "#b2182b",
    "generation": "#999999",
}
WIDTH, HEIGHT = 460, 340
LEFT, RIGHT, TOP, BOTTOM = 58, 96, 34, 46

Series = Mapping[str, Sequence[tuple[float, float]]]


def draw(cells: Sequence[Mapping[str, Any]]) -> str:
    """An SVG document with two panels, both axes logarithmic."""
    lengths, segments = sorted({c["length"] for c in cells}), sorted({c["segments"] for c in cells})
    length, number = lengths[len(lengths) // 2], segments[len(segments) // 2]
    by_length = _series([c for c in cells if c["segments"] == number], "length")
    by_segments = _series([c for c in cells if c["length"] == length], "segments")
    body = _panel(0, by_length, lengths, f"{number} segments", "tokens of a response")
    body += _panel(WIDTH, by_segments, segments, f"{length} tokens", "segments of a response")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="Seconds of each variant">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _series(cells: Sequence[Mapping[str, Any]], key: str) -> Series:
    found: dict[str, list[tuple[float, float]]] = {}
    for cell in sorted(cells, key=lambda cell: cell[key]):
        for name in COLORS:
            seconds = cell["variants"][name]["seconds"]
            if seconds is not None:
                found.setdefault(name, []).append((cell[key], seconds))
    return found


def _panel(offset: float, series: Series, x_values: Sequence[int], title: str, x_label: str) -> list[str]:
    seconds = [value for points in series.values() for _, value in points]
    low, high = math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)) + 1e-9)
    span = math.log2(x_values[-1] / x_values[0]) or 1.0
    left, right, base = offset + LEFT, offset + WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(value: float) -> float:
        return left + math.log2(value / x_values[0]) / span * (right - left)

    def y(value: float) -> float:
        return base - (math.log10(value) - low) / (high - low) * (base - TOP)

    parts = [_text(left, 18, title, weight="bold"), _text((left + right) / 2, HEIGHT - 8, x_label, "middle")]
    for power in range(low, high + 1):
        parts.append(f'<path d="M{left:.1f} {y(10**power):.1f}H{right:.1f}" stroke="#ddd"/>')
        parts.append(_text(left - 6, y(10**power) + 4, f"{10**power:g} s", "end"))
    parts += [_text(x(value), base + 18, f"{value}", "middle") for value in x_values]
    ends: dict[str, float] = {}
    for last_x in {points[-1][0] for points in series.values()}:
        ending = {name: points[-1] for name, points in series.items() if points[-1][0] == last_x}
        ends |= _spread({name: y(value) for name, (_, value) in ending.items()})
    for name, points in series.items():
        path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLORS[name]}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x(at):.1f}" cy="{y(value):.1f}" r="3" fill="{COLORS[name]}">'
            f"<title>{escape(name)}, {at}: {value:.3g} s</title></circle>"
            for at, value in points
        ]
        parts.append(_text(x(points[-1][0]) + 8, ends[name] + 4, name.replace("_", " "), color=COLORS[name]))
    return parts


def _spread(positions: Mapping[str, float], gap: float = 14.0) -> dict[str, float]:
    """Moves labels down where they would touch."""
    placed: dict[str, float] = {}
    last = -math.inf
    for name in sorted(positions, key=positions.__getitem__):
        last = max(positions[name], last + gap)
        placed[name] = last
    return placed


def _text(x: float, y: float, text: str, anchor: str = "start", color: str = "#222", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )
