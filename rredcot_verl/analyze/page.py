"""The bench as one HTML page: it loads nothing, runs no script, and reads on light and dark screens.

Its words stand in ``pages/templates/bench.html``; charts are made by `page_panels`, tables chosen here.
"""

import platform
from typing import Any

from rredcot_verl.analyze.conclusions import about_labels, by_name, findings, shown
from rredcot_verl.analyze.estimators import REFERENCE
from rredcot_verl.analyze.page_panels import FAMILIES, Results, all_panels
from rredcot_verl.pages import html
from rredcot_verl.pages.text import describe

TITLE = "Which credit is right"
FOLDED = ("settings", "identity", "notes")
"""Of `run.json`, what only a few readers want."""
SEEN_TINY = 1e9
"""Parameters below which the page warns that the model is tiny."""
HIGHER, LOWER, NEAR_ZERO = 1, -1, 0

Columns = tuple[tuple[str, str, str, int], ...]
"""Heading, part (`measures` or `cost`), name of the measure, and which way is better."""
HEADLINE: Columns = (
    ("Spearman v", "measures", "spearman_v", HIGHER),
    ("Spearman v\nwithin a trace", "measures", "spearman_v_within", HIGHER),
    ("Spearman d", "measures", "spearman_d", HIGHER),
    ("squared error", "measures", "mse", LOWER),
    ("Brier score", "measures", "brier", LOWER),
    ("wrong line\ntop-1", "measures", "blame_top1", HIGHER),
    ("seconds over\ngeneration", "cost", "seconds_of_generation", NEAR_ZERO),
)
COST: Columns = (
    ("seconds", "cost", "seconds", NEAR_ZERO),
    ("tokens", "cost", "num_tokens", NEAR_ZERO),
    ("seconds over\nthe log-prob pass", "cost", "seconds_of_log_prob", NEAR_ZERO),
    ("seconds over\ngeneration", "cost", "seconds_of_generation", NEAR_ZERO),
    ("tokens over\ngenerated", "cost", "tokens_of_generation", NEAR_ZERO),
)
AGREEMENT = (
    ("Spearman v", "spearman_v"),
    ("within a trace", "spearman_v_within"),
    ("Spearman d", "spearman_d"),
    ("squared error", "mse"),
    ("Brier", "brier"),
    ("wrong line top-1", "blame_top1"),
)


def render(results: Results, *, title: str | None = None) -> str:
    """Renders the results.

    Args:
        results: What `evaluate` returned, or `results.json`.
        title: Heading of the page; the default names what was measured.

    Returns:
        A complete HTML document.
    """
    run, methods = results["run"], shown(results)
    if title is None:
        title = f"{TITLE}: {run['title']}" if run.get("title") else TITLE
    model = run.get("model", "unknown model")
    if isinstance(model, dict):
        model = next((model[key] for key in ("name", "path", "folder") if key in model), model)
    num_parameters = _num_parameters(run)
    return html.render(
        "bench.html",
        title=title,
        results=results,
        model=str(model),
        num_parameters=num_parameters,
        is_tiny=num_parameters is not None and num_parameters < SEEN_TINY,
        reference=REFERENCE,
        families=FAMILIES,
        findings=findings(results),
        label_text=about_labels(results["labels"]) if results.get("labels") else "",
        has_monte_carlo="monte_carlo" in by_name(results),
        methods=methods,
        panels=all_panels(results),
        columns={"headline": HEADLINE, "cost": COST},
        verdict=verdict,
        agreement=AGREEMENT,
        blame_rules=[
            (rule.replace("_", " "), *(describe(found[name], n) for name, n in (("top1", 3), ("rank", 2), ("auc", 3))))
            for rule, found in results["chance"].items()
        ],
        blame_ranks=[
            (entry["name"], describe(entry["measures"]["blame_rank"], 2))
            for entry in results["methods"]
            if entry["measures"]["blame_rank"]["estimate"] is not None
        ],
        tables=_tables(results),
        segments_of=_segments_of,
        facts=[(name.replace("_", " "), _plain(value)) for name, value in run.items() if name not in FOLDED],
        folded=[(name, _plain(run[name])) for name in FOLDED if name in run],
        python=platform.python_version(),
    )


def verdict(difference: dict[str, Any] | None, direction: int) -> str:
    """`better` or `worse` where the interval of the difference to the reference leaves 0 out."""
    if difference is None or difference.get("low") is None or direction == NEAR_ZERO:
        return ""
    if difference["low"] > 0:
        return "better" if direction == HIGHER else "worse"
    if difference["high"] < 0:
        return "worse" if direction == HIGHER else "better"
    return ""


def _num_parameters(run: dict[str, Any]) -> float | None:
    model = run.get("model")
    found = run.get("num_parameters", model.get("num_parameters") if isinstance(model, dict) else None)
    return float(found) if isinstance(found, int | float) else None


def _tables(results: Results) -> list[dict[str, Any]]:
    """Rows of further cuttings and of further regressions, each with what is named first and second."""
    cuttings = [(row["cutting"], row["method"], row["measures"]) for row in results["cuttings"]]
    readouts = []
    for entry in results["methods"]:
        kind, _, layer = entry["name"].partition(":")
        if entry["family"] == "readout" and kind in ("hidden", "both"):
            readouts.append((f"layer {layer}", kind, entry["measures"]))
        elif entry["family"] == "readout" or entry["name"] == REFERENCE:
            readouts.append(("no hidden state", entry["name"], entry["measures"]))
    return [
        {"heading": "Ways to cut, and number of segments", "rows": cuttings},
        {"heading": "Calibration, hidden states and layers", "rows": readouts},
    ]


def _segments_of(example: dict[str, Any]) -> list[dict[str, Any]]:
    """The segments of a trace shown, with what each method's value is after it and by how much it changed."""
    before = [example["start"]["gold"], *example["start"]["values"]]
    rows = []
    for segment in example["segments"]:
        after = [segment["gold"], *segment["values"]]
        pairs = zip(before, after, strict=True)
        changes = [None if old is None or new is None else new - old for old, new in pairs]
        rows.append({**segment, "cells": list(zip(after, changes, strict=True))})
        before = after
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_plain(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return str(value)
