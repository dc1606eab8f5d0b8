"""The charts of the bench's page, each with its heading and the figures behind it."""

from collections.abc import Sequence
from typing import Any

from rredcot_verl.analyze.comparison import IS_THE_GOLD
from rredcot_verl.analyze.conclusions import label, label_name, shown
from rredcot_verl.pages.charts import Bin, Guide, Row, forest, reliability
from rredcot_verl.pages.text import describe, number

Results = dict[str, Any]
Panel = dict[str, Any]
"""`heading`, `chart`, and for most `columns` and `rows` of the figures."""

FAMILIES = {
    "baseline": "baselines: no measurement at all",
    "truth": "the true values, as the task computes them",
    "monte_carlo": "Monte Carlo: continuations from every state",
    "probe": "probes of known answers",
    "peer": "peers on the same probes",
    "attribution": "attributions: R − b shared by weights; they know the outcome",
    "readout": "regressions on the outcomes (cross-fitted by prompt)",
}
"""Families in the order of the page."""
AGREEMENT = (
    ("spearman_v", "Values over all states", "Spearman correlation of v with Monte Carlo"),
    ("spearman_v_within", "Values within a trace", "mean Spearman correlation of v within a trace"),
    ("spearman_d", "What a segment changed", "Spearman correlation of d with Monte Carlo"),
    ("spearman_d_within", "What a segment changed, within a trace", "mean Spearman correlation of d within a trace"),
    ("mse", "Squared error", "mean squared error of v, the gold's variance taken out"),
    ("bias", "Bias", "mean of v less Monte Carlo"),
)
FLUENCY = ("fluency", "Does credit only echo fluency?", "Spearman correlation of d with the mean log-probability")
BLAME = (
    ("blame_top1", "Most negative d", "share of failed traces, top-1"),
    ("blame_auc", "AUC of −d", "wrong segment blamed more than another"),
)
GRADIENTS = (
    ("samples", "Samples for GRPO's progress, by Adam", "share of GRPO's samples a step"),
    ("adam", "Progress of Adam's step", "over GRPO's"),
    ("efficiency", "Efficiency (Euclid)", "progress² over variance, over GRPO's"),
)


def all_panels(results: Results) -> dict[str, list[Panel]]:
    """The charts of each section; none where nothing of it was measured."""
    return {
        "agreement": [
            _forest(results, name, heading, x_label, _ceiling(results, name), zero=True)
            for name, heading, x_label in AGREEMENT
        ],
        "fluency": [_forest(results, *FLUENCY, [], zero=True)],
        "calibration": _calibration(results),
        "blame": [_forest(results, name, heading, x_label, _chance(results, name)) for name, heading, x_label in BLAME]
        if results["data"]["lines"]["num_counted"]
        else [],
        "gradients": _gradients(results),
        "labels": _labels(results),
    }


def _ceiling(results: Results, name: str) -> list[Guide]:
    return _guide("gold's noise", results["gold"]["ceiling"].get(name))


def _chance(results: Results, name: str) -> list[Guide]:
    return _guide("chance", results["chance"]["chance"][name.removeprefix("blame_")])


def _guide(name: str, value: dict[str, Any] | None) -> list[Guide]:
    return [] if value is None or value["estimate"] is None else [Guide(name, value["estimate"])]


def _with_intervals(heading: str, chart: Any, rows: Sequence[Row]) -> Panel:
    """A panel with the figures of its rows, what each stands on, and why one is missing."""
    figures = [
        (row.name, describe(row.value), row.value["num"], row.value["num_groups"], row.value["reason"] or "")
        for row in rows
    ]
    columns = ("method", "estimate (95 % interval)", "items", "prompts", "")
    return {"heading": heading, "chart": chart, "columns": columns, "rows": figures}


def _forest(
    results: Results, name: str, heading: str, x_label: str, guides: Sequence[Guide], *, zero: bool = False
) -> Panel:
    entries = [entry for family in FAMILIES for entry in shown(results) if entry["family"] == family]
    rows = []
    for entry in entries:
        value = entry["measures"][name]
        # The gold has no agreement with itself.
        if value["reason"] != IS_THE_GOLD:
            rows.append(Row(entry["name"], entry["family"], value))
    chart = forest(rows, guides, x_label=x_label, description=f"{heading}: {x_label}", zero=zero)
    return _with_intervals(heading, chart, rows)


def _calibration(results: Results) -> list[Panel]:
    panels = []
    for entry in shown(results):
        # The values of vps are those of the probe it reads.
        if not entry["calibration"] or entry["name"] == "vps":
            continue
        bins = [
            Bin(row["low"], row["high"], row["mean_value"], row["outcome"], row["num_states"])
            for row in entry["calibration"]
        ]
        description = f"{entry['name']}: mean outcome by value"
        panels.append({**entry, "chart": reliability(bins, entry["family"], small=True, description=description)})
    return panels


def _gradients(results: Results) -> list[Panel]:
    found = results["gradients"]
    panels = []
    for name, heading, x_label in GRADIENTS if found else ():
        rows = [Row(label(row), _family(results, row["method"]), row["measures"][name]) for row in found["rows"]]
        chart = forest(rows, [Guide("GRPO", 1.0)], x_label=x_label, description=f"{heading}: {x_label}")
        panels.append(_with_intervals(heading, chart, rows))
    return panels


def _labels(results: Results) -> list[Panel]:
    """F1 of the methods of the charts and of the rules; below it the figures of all methods."""
    found = results.get("labels")
    if not found:
        return []
    charted = {entry["name"] for entry in shown(results)}
    rows = [
        Row(entry["name"], "baseline" if entry["family"] == "rule" else entry["family"], entry["measures"]["f1"])
        for entry in found["entries"]
        if entry["family"] == "rule" or entry["name"] in charted
    ]
    guide = _guide("chance", found["entries"][0]["measures"]["f1"])
    heading, x_label = "First wrong step, or that there is none", "F1 of ProcessBench"
    chart = forest(rows, guide, x_label=x_label, description=f"{heading}: {x_label}")
    figures = [
        (
            label_name(entry),
            *(describe(entry["measures"][name], 3) for name in ("f1", "wrong", "right", "exact", "largest")),
            describe(entry["over_chance"], 3),
            ", ".join(number(threshold, None) for threshold in entry["thresholds"] or ()),
        )
        for entry in found["entries"]
    ]
    columns = ("method", "F1", "wrong traces", "right traces", "all", "largest fall", "F1 over chance", "thresholds")
    return [{"heading": heading, "chart": chart, "columns": columns, "rows": figures}]


def _family(results: Results, method: str) -> str:
    return next((entry["family"] for entry in results["methods"] if entry["name"] == method), "baseline")
