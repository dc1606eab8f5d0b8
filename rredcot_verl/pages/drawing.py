"""What charts are drawn with: axes, ticks, and SVG elements that carry class names only.

Text is escaped by ElementTree, which builds the elements.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from rredcot_verl.pages.text import printable

# Families without a shape have a circle.
_SHAPES: dict[str, Sequence[tuple[float, float]]] = {
    "peer": ((0, -5.5), (5, 4), (-5, 4)),
    "attribution": ((0, 5.5), (5, -4), (-5, -4)),
    "monte_carlo": ((-4.2, -4.2), (4.2, -4.2), (4.2, 4.2), (-4.2, 4.2)),
    "readout": ((0, -5.8), (5.8, 0), (0, 5.8), (-5.8, 0)),
    "baseline": ((-1.5, -5), (1.5, -5), (1.5, 5), (-1.5, 5)),
    "truth": ((-5, -2.5), (5, -2.5), (5, 2.5), (-5, 2.5)),
}


@dataclass(frozen=True)
class Axis:
    """A map from values to pixels, linear or logarithmic, held inside the frame."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0) * (self.end - self.start)


class Drawing:
    """An SVG element that charts draw on; numbers are pixels. Templates take it as markup."""

    def __init__(self, width: float, height: float, description: str, style: str = "chart") -> None:
        self.width, self.height = width, height
        self.root = ElementTree.Element("svg", {"class": style, "viewBox": f"0 0 {width:g} {height:g}"})
        hidden = {"aria-hidden": "true"}
        self.root.attrib |= {"role": "img", "aria-label": printable(description)} if description else hidden

    def __str__(self) -> str:
        return ElementTree.tostring(self.root, encoding="unicode")

    __html__ = __str__

    def add(
        self, tag: str, style: str, *, tooltip: str | None = None, text: str | None = None, **attributes: Any
    ) -> None:
        """Adds an element; numbers are rounded to a tenth, ``_`` in the name of an attribute stands for ``-``."""
        written = {name.replace("_", "-"): x if isinstance(x, str) else f"{x:.1f}" for name, x in attributes.items()}
        element = ElementTree.SubElement(self.root, tag, {"class": style, **written})
        if text is not None:
            element.text = printable(text)
        if tooltip is not None:
            ElementTree.SubElement(element, "title").text = printable(tooltip)

    def line(self, style: str, x1: float, y1: float, x2: float, y2: float) -> None:
        self.add("line", style, x1=x1, y1=y1, x2=x2, y2=y2)

    def text(self, style: str, x: float, y: float, text: str, anchor: str = "start") -> None:
        self.add("text", style, text=text, x=x, y=y, text_anchor=anchor)

    def rect(self, style: str, x: float, y: float, width: float, height: float, tooltip: str) -> None:
        self.add("rect", style, x=x, y=y, width=width, height=height, tooltip=tooltip)

    def mark(self, family: str, x: float, y: float, tooltip: str) -> None:
        """The mark of a family: its shape and its colour say which, so that neither is needed alone."""
        shape = _SHAPES.get(family)
        path = f"M{x - 4.5:.1f} {y:.1f}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z"
        if shape:
            path = "M" + "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in shape) + "Z"
        self.add("path", f"mark {family}", d=path, tooltip=tooltip)

    def x_axis(
        self, x: Axis, labels: Sequence[tuple[float, str]], base: float, title: str, grid_top: float | None
    ) -> None:
        """Labels and title below a rule; with ``grid_top`` a grid line up to there at each label."""
        for at, label in labels:
            if grid_top is None:
                self.line("axis", x(at), base, x(at), base + 4)
            else:
                self.line("grid", x(at), grid_top, x(at), base)
            # The label of the last tick would reach over the frame if it were centred there.
            is_last = x(at) > self.width - 24
            self.text("tick", x(at) + (8 if is_last else 0), base + 18, label, "end" if is_last else "middle")
        self.line("axis", x.start, base, x.end, base)
        if title:
            self.text("title", (x.start + x.end) / 2, base + 38, title, "middle")

    def y_axis(self, y: Axis, labels: Sequence[tuple[float, str]], left: float, right: float, title: str = "") -> None:
        """Labels left of grid lines, and the title upright."""
        for at, label in labels:
            self.line("grid", left, y(at), right, y(at))
            self.text("tick", left - 7, y(at) + 4, label, "end")
        if title:
            turn = f"translate(14 {(y.start + y.end) / 2:.1f}) rotate(-90)"
            self.add("text", "title", text=title, transform=turn, text_anchor="middle")


def side_by_side(panels: Sequence[Drawing], description: str, style: str) -> str:
    """Drawings of one size as an SVG file of its own, on white paper.

    Args:
        panels: From left to right.
        description: For those who do not see it.
        style: CSS of the drawings' classes, but for text, grid and axes.
    """
    document = Drawing(sum(panel.width for panel in panels), max(panel.height for panel in panels), description)
    document.root.set("xmlns", "http://www.w3.org/2000/svg")
    common = "text { font: 12px sans-serif; fill: #222 } .grid { stroke: #ddd } .axis { stroke: #888 }"
    ElementTree.SubElement(document.root, "style").text = f".paper {{ fill: white }} {common} {style}"
    document.add("rect", "paper", width="100%", height="100%")
    left = 0.0
    for panel in panels:
        panel.root.attrib |= {"x": f"{left:g}", "width": f"{panel.width:g}", "height": f"{panel.height:g}"}
        document.root.append(panel.root)
        left += panel.width
    return f"{document}\n"


def ticks(low: float, high: float, at_most: int = 6, *, integer: bool = False) -> list[float]:
    """Round tick values that enclose a range: evenly spaced, at least two, and only whole numbers where ``integer``.

    The first is at most ``low``, the last at least ``high``, and there are no more than ``at_most``.
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


def short(value: float) -> str:
    """A tick's label, with a true minus sign."""
    return f"{value:g}".replace("-", "−")
