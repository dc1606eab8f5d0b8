"""The page and the tables of the bench."""

import json
import re
from html.parser import HTMLParser

import pytest

from rredcot_verl.analyze import page, tables
from rredcot_verl.analyze.conclusions import findings
from rredcot_verl.analyze.evaluate import evaluate
from rredcot_verl.analyze.page import verdict
from rredcot_verl.analyze.records import GRADIENTS_FILE
from rredcot_verl.pages.text import number
from tests.analyze.synthetic import write
from tests.in_browser import CHROMIUM, look

VOID = {"meta", "br", "line", "rect", "circle", "path", "polyline"}
SECTIONS = (
    "answers", "methods", "agreement", "fluency", "calibration", "blame", "cost", "gradients", "settings", "traces",
    "tiny", "measured",
)  # fmt: skip


def _interval(estimate, low, high):
    return {"estimate": estimate, "low": low, "high": high, "num": 3, "num_groups": 3, "reason": None}


NOTHING = {"estimate": None, "low": None, "high": None, "num": 0, "num_groups": 0, "reason": "why not"}


GRADIENTS = {
    "whole": True,
    "num_prompts": 256,
    "num_traces": 2048,
    "batch_prompts": 16,
    "signal_to_noise": _interval(0.04, 0.01, 0.07),
    "rows": [
        {"form": form, "method": method, "measures": dict.fromkeys(("efficiency", "adam", "samples"), value)}
        for form, method, value in (
            ("GRPO without std", "", _interval(1.0, 0.9, 1.1)),
            ("td, lambda 0", "oracle", _interval(0.6, 0.5, 0.7)),
            ("reweight, beta 1", "joint:reference", _interval(0.9, 0.8, 1.0)),
            ("td, lambda 0", "joint:reference", NOTHING),
        )
    ],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    world = write(tmp_path_factory.mktemp("world") / "m", num_groups=12, num_rollouts=20)
    (world.folder / GRADIENTS_FILE).write_text(json.dumps(GRADIENTS))
    return evaluate(world.load(), num_resamples=20)


@pytest.fixture(scope="module")
def html(results):
    return page.render(results)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    options = {"probes": False, "hidden": False, "weights": False, "lines": False, "coarse": False}
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
    for heading in ("Ways to cut", "layer -1", "td, lambda 0 (oracle)", "2,048 traces", "0.040"):
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
        "no gradients were measured",
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
    best = min(known, key=lambda e: e["measures"]["mse"]["estimate"])
    told = next(sentence for sentence in sentences if "squared error" in sentence)
    assert f"is {best['name']} with" in told and best["name"] != "joint:reference" and "difference" in told
    assert "chance" in next(sentence for sentence in sentences if "top-1" in sentence)
    told = next(sentence for sentence in sentences if "share of GRPO's" in sentence)
    assert "of all forms td, lambda 0 (oracle) with 0.60" in told
    assert "without true values or continuations reweight, beta 1 (joint:reference) with 0.90" in told


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


@pytest.mark.parametrize("which", ["results", "bare"])
def test_tables_are_rectangular(which, request):
    text = tables.render(request.getfixturevalue(which))
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1, block
    assert text.endswith("\n") and "nan" not in text and "None" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("window", ["1200,900", "500,900"])
def test_nothing_overlaps_in_a_browser(results, html, tmp_path, window):
    found = look(html, tmp_path, window, slack=3)
    assert (found["traces"], found["faults"]) == (len(results["examples"]), [])
