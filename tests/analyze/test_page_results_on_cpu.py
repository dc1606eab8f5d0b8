"""The page and the tables of the bench."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import pytest

from rredcot_verl.analyze import page, tables
from rredcot_verl.analyze.conclusions import findings
from rredcot_verl.analyze.evaluate import evaluate
from rredcot_verl.analyze.page_charts import Guide, Row, bars, forest, number, reliability, scatter
from rredcot_verl.analyze.page_parts import verdict
from tests.analyze.synthetic import write

CHROMIUM = shutil.which("chromium")
VOID = {"meta", "br", "line", "rect", "circle", "path", "polyline"}
SECTIONS = (
    "answers", "methods", "agreement", "position", "calibration", "blame", "cost", "gradients", "ablations", "traces",
    "tiny", "measured",
)  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    world = write(tmp_path_factory.mktemp("world") / "m", num_groups=12, num_rollouts=20)
    return evaluate(world.load(), num_resamples=20)


@pytest.fixture(scope="module")
def html(results):
    return page.render(results)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    options = {"probes": False, "hidden": False, "gradients": False, "weights": False, "lines": False, "coarse": False}
    world = write(tmp_path_factory.mktemp("bare") / "m", num_groups=2, group_size=2, **options)
    return evaluate(world.load(), num_resamples=10)


class _Checker(HTMLParser):
    """Every element is closed where it must be; nothing is loaded and nothing runs."""

    def __init__(self):
        super().__init__()
        self.stack, self.text = [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert tag not in ("script", "link", "img", "iframe", "object"), tag
        assert not any(name.startswith("on") or name in ("src", "href") for name in given), (tag, given)
        if tag not in VOID or (tag in ("rect", "circle", "path") and not self.get_starttag_text().endswith("/>")):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def _interval(estimate, low, high):
    return {"estimate": estimate, "low": low, "high": high, "num": 3, "num_groups": 3, "reason": None}


NOTHING = {"estimate": None, "low": None, "high": None, "num": 0, "num_groups": 0, "reason": "why not"}


@pytest.mark.parametrize("which", ["results", "bare"])
def test_page_is_well_formed_and_loads_nothing(which, request):
    text = page.render(request.getfixturevalue(which))
    checker = _Checker()
    checker.feed(text)
    assert checker.stack == []
    assert "default-src 'none'" in text and "url(" not in text and "@import" not in text
    assert re.findall(r"(?<![a-z])(?:nan|inf|None)(?![a-z])", "".join(checker.text)) == []


def test_sections_and_methods_are_there(results, html):
    assert re.findall(r'<section id="(\w+)"', html) == list(SECTIONS)
    for entry in results["methods"]:
        assert f"{entry['name']}</th>" in html, entry["name"]
    for heading in ("Segmenters", "Temperature", "Prompts fitted", "Form and strength", "layer -1"):
        assert heading in html


def test_text_of_traces_is_escaped(results, html):
    assert "line 0 &lt;b&gt;" in html and "line 0 <b>" not in html
    assert "synthetic &lt;model&gt;" in html and "&amp; &lt;i&gt;?" in html
    assert results["examples"]


def test_says_what_was_not_measured(bare):
    text = page.render(bare)
    for reason in (
        "no probes for",
        "no hidden states were measured",
        "no gradient sketches",
        "the task cannot check lines",
    ):
        assert reason in text, reason
    assert "Not measured: the task cannot check lines" in text
    assert "joint:reference" not in [entry["name"] for entry in bare["methods"]]


def test_figures_of_the_page_are_those_of_the_results(results, html):
    entry = next(entry for entry in results["methods"] if entry["name"] == "calibrated")
    for name in ("spearman_v", "mse", "blame_top1"):
        assert f">{number(entry['measures'][name]['estimate'])}</span>" in html


def test_findings_name_the_best_and_its_difference(results):
    sentences = findings(results)
    rivals = {"group_mean", "position", "calibrated", "vps", "mig", "hidden:-2", "both:-2"}
    forms = ("joint:", "geometric:", "normalized:")
    known = [entry for entry in results["methods"] if entry["name"] in rivals or entry["name"].startswith(forms)]
    # What needs continuations, knows the outcome or is a second layer does not compete.
    best = min((e for e in known if "+smooth" not in e["name"]), key=lambda e: e["measures"]["mse"]["estimate"])
    told = next(sentence for sentence in sentences if "squared error" in sentence)
    assert f"is {best['name']} with" in told and best["name"] != "joint:reference" and "difference" in told
    assert "chance" in next(sentence for sentence in sentences if "top-1" in sentence)


@pytest.mark.parametrize(
    ("difference", "direction", "expected"),
    [
        (_interval(0.2, 0.1, 0.3), 1, "better"),
        (_interval(0.2, 0.1, 0.3), -1, "worse"),
        (_interval(-0.2, -0.3, -0.1), -1, "better"),
        (_interval(0.2, -0.1, 0.3), 1, ""),
        (NOTHING, 1, ""),
        (None, 1, ""),
        (_interval(0.2, 0.1, 0.3), 0, ""),
    ],
)
def test_only_intervals_that_leave_0_out_are_marked(difference, direction, expected):
    assert verdict(difference, direction) == expected


class TestCharts:
    def test_marks_stand_where_the_numbers_are(self):
        rows = [Row("a", "probe", _interval(0.5, 0.25, 0.75)), Row("b", "peer", NOTHING)]
        chart = forest(rows, [Guide("chance", 1.0)], x_label="x", description="d", zero=True)
        left, right = 196, 506
        whisker = re.search(r'class="whisker probe" x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"', chart)
        assert [float(x) for x in whisker.groups()] == pytest.approx(
            [left + 0.25 * (right - left), left + 0.75 * (right - left)], abs=0.06
        )
        assert "—" in chart and "chance" in chart and "a: 0.500 (0.250 to 0.750)" in chart

    def test_bars_cut_what_is_far_off(self):
        rows = [Row("a", "probe", _interval(2.0, 1.5, 400.0)), Row("b", "probe", _interval(0.5, 0.4, 0.6))]
        chart = bars(rows, 1.0, x_label="x", description="d")
        assert 'x2="506.0"' in chart and "400" in chart

    def test_scatter_shows_what_is_free(self):
        points = [(Row("free", "baseline", _interval(0.1, 0.0, 0.2)), 0.0)]
        points += [(Row(f"m{k}", "probe", _interval(0.5, 0.4, 0.6)), 0.01) for k in range(6)]
        chart = scatter(points, [], x_label="x", y_label="y", description="d")
        boxes = [float(y) for y in re.findall(r'class="name probe" x="[\d.]+" y="([\d.]+)"', chart)]
        assert len(boxes) == 6 and ">free<" in chart, "six names at one point are all legible"
        assert len({(x, y) for x, y in re.findall(r'class="name \w+" x="([\d.]+)" y="([\d.]+)"', chart)}) == 7

    def test_reliability_holds_values_inside_the_frame(self):
        row = {"low": 0.0, "high": 0.1, "num_states": 3, "mean_value": -0.2, "outcome": _interval(0.5, -0.1, 1.2)}
        chart = reliability([row], "probe", description="d")
        assert 'y2="12.0"' in chart and 'y1="206.0"' in chart


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [(0.1234, 3, "0.123"), (-0.5, 2, "−0.50"), (1234.5, 3, "1,234"), (0.00012, 3, "1.2e−04"), (0.0, 2, "0.00"),
     (0.00423, None, "0.00423"), (28.87, None, "28.9"), (4321.0, None, "4,321")],
)  # fmt: skip
def test_numbers(value, digits, expected):
    assert number(value, digits) == expected


@pytest.mark.parametrize("which", ["results", "bare"])
def test_tables_are_rectangular(which, request):
    text = tables.render(request.getfixturevalue(which))
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1, block
    assert text.endswith("\n") and "nan" not in text and "None" not in text


# Written into a copy of the page; it reports what is wrong in the title, which --dump-dom prints.
PROBE = """<script>addEventListener('load', () => {
  const faults = [];
  const beside = (a, b) => a.right <= b.left + 1 || b.right <= a.left + 1;
  const apart = (a, b) => beside(a, b) || a.bottom <= b.top + 3 || b.bottom <= a.top + 3;
  document.querySelectorAll('svg.chart').forEach((svg, n) => {
    const frame = svg.getBoundingClientRect();
    if (frame.width < 150 || frame.height < 100) faults.push(`chart ${n} is too small`);
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([text, box], i) => {
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
          || box.bottom > frame.bottom + 1) faults.push(`chart ${n}: ${text} is clipped`);
      texts.slice(i + 1).forEach(([other, place]) => {
        if (!apart(box, place)) faults.push(`chart ${n}: ${text} overlaps ${other}`);
      });
    });
  });
  if (document.documentElement.scrollWidth > innerWidth) faults.push('the page is wider than the window');
  document.title = JSON.stringify({traces: document.querySelectorAll('.example').length, faults});
})</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("window", ["1200,900", "500,900"])
def test_nothing_overlaps_in_a_browser(results, html, tmp_path, window):
    file = tmp_path / "page.html"
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    file.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={window}", "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(unescape(re.search(r"<title>(.*?)</title>", dom)[1]))
    assert found == {"traces": len(results["examples"]), "faults": []}
