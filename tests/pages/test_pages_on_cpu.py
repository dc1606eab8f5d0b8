"""Charts, and numbers and text as they stand on pages."""

import re

import pytest

from rredcot_verl.pages import html
from rredcot_verl.pages.charts import Bin, Guide, Row, forest, reliability
from rredcot_verl.pages.drawing import Drawing, ticks
from rredcot_verl.pages.text import number, printable, signed


def interval(estimate, low, high):
    return {"estimate": estimate, "low": low, "high": high, "num": 3, "num_groups": 3, "reason": None}


NOTHING = {"estimate": None, "low": None, "high": None, "num": 0, "num_groups": 0, "reason": "why not"}


class TestCharts:
    def test_marks_stand_where_the_numbers_are(self):
        rows = [Row("a", "probe", interval(0.5, 0.25, 0.75)), Row("b", "peer", NOTHING)]
        chart = str(forest(rows, [Guide("chance", 1.0)], x_label="x", description="d", zero=True))
        left, right = 196, 506
        whisker = re.search(r'class="whisker probe" x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"', chart)
        assert [float(x) for x in whisker.groups()] == pytest.approx(
            [left + 0.25 * (right - left), left + 0.75 * (right - left)], abs=0.06
        )
        assert "—" in chart and "chance" in chart and "a: 0.500 (0.250 to 0.750)" in chart

    def test_reliability_holds_values_inside_the_frame(self):
        bins = [Bin(0.0, 0.1, -0.2, interval(0.5, -0.1, 1.2), 3)]
        chart = str(reliability(bins, "probe", small=True, description="d"))
        assert 'y2="12.0"' in chart and 'y1="206.0"' in chart


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [(0.1234, 3, "0.123"), (-0.5, 2, "−0.50"), (1234.5, 3, "1,234"), (0.00012, 3, "1.2e−04"), (0.0, 2, "0.00"),
     (0.00423, None, "0.00423"), (28.87, None, "28.9"), (4321.0, None, "4,321")],
)  # fmt: skip
def test_numbers(value, digits, expected):
    assert number(value, digits) == expected


def test_numbers_are_written_for_people():
    assert [signed(value) for value in (0.25, -0.5, -0.001, 0.0)] == ["+0.25", "−0.50", "0.00", "0.00"]
    assert printable("a < b\n\x1b") == "a < b\n\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (0.0, 0.3), (0.5, 0.5), (0.0, 0.0), (0.61, 0.64), (-1.0, 1.0), (0, 999), (-3e-9, 2e-9)],
)
def test_ticks_enclose_the_range_and_are_few(low, high):
    values = ticks(low, high)
    assert values[0] <= low + 1e-9 and values[-1] >= high - 1e-9
    assert 2 <= len(values) <= 7 and len(set(values)) == len(values)


def test_text_is_escaped_wherever_it_is_put():
    evil = "<b>&\x1b\u202e"
    drawing = Drawing(10, 10, evil)
    drawing.add("text", "tick", text=evil, tooltip=evil, x=1)
    samples = html.render("samples.html", title=evil, origin=evil, traces=[])
    for text in (str(drawing), samples):
        assert "<b>" not in text and text.count("&lt;b") >= 2 and not set(text) & {"\x1b", "\u202e"}
