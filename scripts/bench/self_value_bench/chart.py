"""The chart: seconds against the length of a response and against the number of segments, as one SVG file.

    PYTHONPATH=. python scripts/bench/self_value_bench/chart.py OUT.json CHART.svg

draws the measurements of an earlier run anew.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rredcot_verl.pages.charts import Series, line_chart
from rredcot_verl.pages.drawing import Drawing, side_by_side

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
STYLE = " ".join(
    f".line.{name} {{ fill: none; stroke: {color}; stroke-width: 2 }} .{name} {{ fill: {color} }}"
    for name, color in COLORS.items()
)


def draw(cells: Sequence[Mapping[str, Any]]) -> str:
    """An SVG document with two panels, both axes logarithmic."""
    lengths, segments = sorted({c["length"] for c in cells}), sorted({c["segments"] for c in cells})
    length, number = lengths[len(lengths) // 2], segments[len(segments) // 2]
    panels = [
        _panel([c for c in cells if c["segments"] == number], "length", f"{number} segments", "tokens of a response"),
        _panel([c for c in cells if c["length"] == length], "segments", f"{length} tokens", "segments of a response"),
    ]
    return side_by_side(panels, "Seconds of each variant", STYLE)


def _panel(cells: Sequence[Mapping[str, Any]], key: str, title: str, x_label: str) -> Drawing:
    cells = sorted(cells, key=lambda cell: cell[key])
    lines = []
    for name in COLORS:
        points = [(cell[key], cell["variants"][name]["seconds"]) for cell in cells]
        known = [(at, seconds) for at, seconds in points if seconds is not None]
        if known:
            lines.append(Series(name.replace("_", " "), known, name))
    return line_chart(
        lines,
        y_label=f"seconds, {title}",
        x_label=x_label,
        description=f"Seconds over {x_label}, {title}",
        tooltip="{name}, {x}: {y:.3g} s",
        log_x=[cell[key] for cell in cells],
        with_last_value=False,
    )


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    target.write_text(draw(json.loads(source.read_text(encoding="utf-8"))["cells"]), encoding="utf-8")
