"""The charts of the bench's page, each with its heading and the figures behind it."""

from collections.abc import Sequence
from typing import Any

from rredcot_verl.analyze.conclusions import shown
from rredcot_verl.analyze.estimators import REFERENCE
from rredcot_verl.analyze.measures import THIRDS
from rredcot_verl.pages.charts import Bin, Guide, Row, bars, by_position, forest, reliability, scatter
from rredcot_verl.pages.text import describe

Results = dict[str, Any]
Panel = dict[str, Any]
"""`heading`, `chart`, and for most `columns` and `rows` of the figures."""

FAMILIES = {
    "baseline": "baselines: no measurement at all",
    "monte_carlo": "Monte Carlo: continuations from every state",
    "probe": "probes of known answers",
    "peer": "peers on the same probes",
    "attribution": "attributions: R − b shared by weights; they know the outcome",
    "readout": "regressions on the outcomes (cross-fitted by prompt)",
    "smoothed": "smoothed over neighbouring boundaries",
}
"""Families in the order of the page."""
IN_SCATTER = (
    "group_mean", "position", REFERENCE, "geometric:reference", "normalized:union", "vps", "mig", "calibrated",
    "monte_carlo",
)  # fmt: skip
"""Methods drawn over their cost, beside all attributions and readouts: with every name on it no chart could be read."""
AGREEMENT = (
    ("spearman_v", "Values over all states", "Spearman correlation of v with Monte Carlo"),
    ("spearman_v_within", "Values within a trace", "mean Spearman correlation of v within a trace"),
    ("spearman_d", "What a segment changed", "Spearman correlation of d with Monte Carlo"),
    ("spearman_d_within", "What a segment changed, within a trace", "mean Spearman correlation of d within a trace"),
    ("mse", "Squared error", "mean squared error of v, the gold's variance taken out"),
    ("bias", "Bias", "mean of v less Monte Carlo"),
)
BLAME = (
    ("measures", "blame_top1", "Most negative d", "share of failed traces, top-1"),
    ("measures", "blame_auc", "AUC of −d", "wrong segment blamed more than another"),
    ("reweight", "blame_top1", "Most negative advantage, reweight", "share of failed traces, top-1"),
    ("td", "blame_top1", "Most negative advantage, td", "share of failed traces, top-1"),
)
COST = (
    ("spearman_v", "Spearman of v"),
    ("spearman_d", "Spearman of d"),
    ("mse", "squared error of v (lower is better)"),
    ("blame_top1", "wrong line, top-1"),
)
GRADIENTS = (
    ("variance_scaled", "variance", "variance over GRPO's, advantages of equal size"),
    ("efficiency", "progress for the noise", "progress for the noise, over GRPO's"),
)


def all_panels(results: Results) -> dict[str, list[Panel]]:
    """The charts of each section; none where nothing of it was measured."""
    return {
        "agreement": [
            _forest(results, "measures", name, heading, label, _ceiling(results, name), zero=True)
            for name, heading, label in AGREEMENT
        ],
        "position": [_by_position(results, what) for what in ("v", "d")],
        "calibration": _calibration(results),
        "blame": [
            _forest(results, part, name, heading, label, _chance(results, name)) for part, name, heading, label in BLAME
        ]
        if results["data"]["lines"]["num_counted"]
        else [],
        "cost": _cost(results),
        "gradients": _gradients(results),
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
    results: Results, part: str, name: str, heading: str, label: str, guides: Sequence[Guide], *, zero: bool = False
) -> Panel:
    entries = [entry for family in FAMILIES for entry in shown(results) if entry["family"] == family]
    rows = []
    for entry in entries:
        value = (entry["measures"] if part == "measures" else entry["credit"][part])[name]
        # The gold has no agreement with itself.
        if entry["name"] != "monte_carlo_gold" or value["estimate"] is not None:
            rows.append(Row(entry["name"], entry["family"], value))
    chart = forest(rows, guides, x_label=label, description=f"{heading}: {label}", zero=zero)
    return _with_intervals(heading, chart, rows)


def _by_position(results: Results, what: str) -> Panel:
    heading = {"v": "Values", "d": "What a segment changed"}[what]
    rows = [
        (entry["name"], [entry["measures"][f"spearman_{what}_{third}"] for third in THIRDS])
        for entry in shown(results)
        if entry["name"] != "monte_carlo_gold"
    ]
    chart = by_position(
        rows,
        x_label=f"Spearman correlation of {what} with Monte Carlo",
        description=f"{heading}: correlation in the early, middle and late third of the trace",
    )
    figures = [(name, *map(describe, thirds)) for name, thirds in rows]
    return {"heading": heading, "chart": chart, "columns": ("method", "early", "middle", "late"), "rows": figures}


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


def _cost(results: Results) -> list[Panel]:
    drawn = [
        (entry, entry["cost"]["seconds_of_generation"]["estimate"])
        for entry in shown(results)
        if entry["name"] in IN_SCATTER or entry["family"] in ("attribution", "readout")
    ]
    panels = []
    for name, label in COST:
        points = [
            (Row(entry["name"], entry["family"], entry["measures"][name]), ratio)
            for entry, ratio in drawn
            if ratio is not None and entry["measures"][name]["estimate"] is not None
        ]
        if points:
            guides = _chance(results, name) if name == "blame_top1" else _ceiling(results, name)
            chart = scatter(
                points,
                guides,
                x_label="seconds over those of generating the trace",
                y_label=label,
                description=f"{label} over cost",
            )
            panels.append({"heading": label[0].upper() + label[1:], "chart": chart})
    return panels


def _gradients(results: Results) -> list[Panel]:
    methods = shown(results)
    if all(entry["credit"]["reweight"]["variance"]["estimate"] is None for entry in methods):
        return []
    panels = []
    for form in ("reweight", "td"):
        for name, heading, label in GRADIENTS:
            rows = [Row(entry["name"], entry["family"], entry["credit"][form][name]) for entry in methods]
            chart = bars(rows, 1.0, x_label=label, description=f"{form}: {label}")
            panels.append({**_with_intervals(heading, chart, rows), "form": form})
    return panels
