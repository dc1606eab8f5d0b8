"""The sections of the bench's page on credit: blame, cost, the policy gradient, ablations."""

from typing import Any

from rredcot_verl.analyze.conclusions import shown
from rredcot_verl.analyze.estimators import REFERENCE, SMOOTHED
from rredcot_verl.analyze.page_charts import Guide, Row, bars, describe, scatter
from rredcot_verl.analyze.page_parts import (
    NEAR_ZERO,
    Results,
    ceiling,
    forest_panel,
    interval_numbers,
    methods_table,
    numbers,
    panel,
    panels,
    rows_table,
    section,
    short,
)
from rredcot_verl.report.traces import safe


def blame(results: Results) -> str:
    """Where the blame of failed traces lands."""
    data, chance = results["data"]["lines"], results["chance"]
    if not data["num_counted"]:
        reason = safe(str(chance["chance"]["top1"]["reason"]))
        return section("blame", "Does blame find the wrong line?", "", f'<p class="soft">Not measured: {reason}.</p>')
    items = []
    for part, name, heading, label in (
        ("measures", "blame_top1", "Most negative d", "share of failed traces, top-1"),
        ("measures", "blame_auc", "AUC of −d", "wrong segment blamed more than another"),
        ("reweight", "blame_top1", "Most negative advantage, reweight", "share of failed traces, top-1"),
        ("td", "blame_top1", "Most negative advantage, td", "share of failed traces, top-1"),
    ):
        at = chance["chance"][name.removeprefix("blame_")]["estimate"]
        guides = [] if at is None else [Guide("chance", at)]
        items.append(forest_panel(results, part, name, heading, label, guides))
    doubtful = ""
    if 2 * data["num_solved_wrong"] > data["num_solved_checked"] > 0:
        doubtful = (
            f" Doubtful: the checker finds a wrong line in {data['num_solved_wrong']:,} of "
            f"{data['num_solved_checked']:,} solved traces."
        )
    how = (
        f"{data['num_counted']:,} failed traces whose first wrong line is known. A line belongs to the segment in "
        "which it ends. Equal numbers share their place, so credit that says nothing scores what chance does. By "
        "the final advantage only traces of groups with a GRPO advantage count. A constant value puts all blame on the "
        f"last segment, because the outcome is pinned there.{doubtful}"
    )
    ranks = [
        (entry["name"], entry["measures"]["blame_rank"])
        for entry in results["methods"]
        if entry["measures"]["blame_rank"]["estimate"] is not None
    ]
    table = [[safe(name), describe(value, 2)] for name, value in ranks]
    rules = [
        [
            rule.replace("_", " "),
            *(describe(found[name], digits) for name, digits in (("top1", 3), ("rank", 2), ("auc", 3))),
        ]
        for rule, found in chance.items()
    ]
    columns = ["always blaming", "top-1", "mean rank", "AUC"]
    details = numbers(columns, rules, "Rules that read nothing: chance, the first, the last segment")
    details += numbers(["method", "mean rank, 1 is the most blamed"], table, "Mean rank of the wrong segment")
    return section("blame", "Does blame find the wrong line?", how, panels(items) + details)


def cost(results: Results) -> str:
    """Quality over cost."""
    items = []
    guides = {
        "spearman_v": ceiling(results["gold"]["ceiling"]["spearman_v"]),
        "spearman_d": ceiling(results["gold"]["ceiling"]["spearman_d"]),
        "mse": [],
        "blame_top1": [
            Guide("chance", value) for value in [results["chance"]["chance"]["top1"]["estimate"]] if value is not None
        ],
    }
    for name, label in (
        ("spearman_v", "Spearman of v"),
        ("spearman_d", "Spearman of d"),
        ("mse", "squared error of v (lower is better)"),
        ("blame_top1", "wrong line, top-1"),
    ):
        points = [
            (Row(entry["name"], entry["family"], entry["measures"][name]), ratio)
            for entry in _for_scatter(results)
            if (ratio := entry["cost"]["seconds_of_generation"]["estimate"]) is not None
            and entry["measures"][name]["estimate"] is not None
        ]
        if points:
            x_label = "seconds over those of generating the trace"
            chart = scatter(points, guides[name], x_label=x_label, y_label=label, description=f"{label} over cost")
            items.append(panel(label[0].upper() + label[1:], chart))
    columns = [
        ("seconds", "cost", "seconds", NEAR_ZERO),
        ("tokens", "cost", "num_tokens", NEAR_ZERO),
        ("seconds over<br>the log-prob pass", "cost", "seconds_of_log_prob", NEAR_ZERO),
        ("seconds over<br>generation", "cost", "seconds_of_generation", NEAR_ZERO),
        ("tokens over<br>generated", "cost", "tokens_of_generation", NEAR_ZERO),
    ]
    plain = "; ".join(
        f"{what}: {describe(value['seconds'])} s, {short(value['num_tokens'], 0)} tokens"
        for what, value in (
            ("generation", results["costs"]["generate"]),
            ("log-prob pass", results["costs"]["log_prob"]),
        )
    )
    how = (
        "What a method adds to a step, a trace. All answers of a trace are probed in one pass: its seconds are those "
        "of every set of answers but the references, which were timed alone; its tokens are divided by the answers' "
        "lengths. Regressions carry their probe and their "
        f"share of the fit. Plain costs a trace: {plain}."
    )
    methods = shown(results)
    body = panels(items) if items else '<p class="soft">No cost was measured.</p>'
    return section("cost", "Cost against quality", how, body + "<br>" + methods_table(methods, columns))


def gradients(results: Results) -> str:
    """Variance and direction of the policy gradient."""
    methods = shown(results)
    known = [entry for entry in methods if entry["credit"]["reweight"]["variance"]["estimate"] is not None]
    if not known:
        reasons = sorted({str(entry["credit"]["reweight"]["variance"]["reason"]) for entry in methods})
        text = f'<p class="soft">Not measured: {safe("; ".join(reasons))}.</p>'
        return section("gradients", "Variance of the policy gradient", "", text)
    items = []
    for form in ("reweight", "td"):
        for name, heading, label in (
            ("variance_scaled", "variance", "variance over GRPO's, advantages of equal size"),
            ("efficiency", "progress for the noise", "progress for the noise, over GRPO's"),
        ):
            rows = [Row(entry["name"], entry["family"], entry["credit"][form][name]) for entry in methods]
            chart = bars(rows, 1.0, x_label=label, description=f"{form}: {label}")
            details = interval_numbers([(row.name, row.value) for row in rows])
            items.append(panel(f"<code>{form}</code>: {heading}", chart, details))
    columns = [
        (f"{form}<br>{label}", form, name, NEAR_ZERO)
        for form in ("reweight", "td")
        for label, name in (
            ("variance", "variance"),
            ("scaled", "variance_scaled"),
            ("cosine", "cosine_unbiased"),
            ("signal to noise", "snr"),
        )
    ]
    how = (
        "At equal batch, one update, token-mean loss, advantages from the plugin's own code. A small variance alone is "
        "worthless: advantages near 0 have it too, so the bars scale the advantages to GRPO's size, and the second "
        "chart counts only progress along GRPO's mean gradient. The cosine leaves a prompt's product with itself out: "
        "above 1 is noise. Credit that is right may leave GRPO's direction for a better one; that is not seen here. "
        f"GRPO's own squared signal over noise is {short(results['grpo']['snr'], 4)} a prompt."
    )
    body = panels(items) + "<br>" + methods_table(methods, columns)
    return section("gradients", "Variance of the policy gradient", how, body)


def ablations(results: Results) -> str:
    """Tables of the ablations."""
    columns = [
        ("Spearman v", "spearman_v"),
        ("within a trace", "spearman_v_within"),
        ("Spearman d", "spearman_d"),
        ("squared error", "mse"),
        ("Brier", "brier"),
        ("wrong line top-1", "blame_top1"),
    ]
    credit_columns = [
        ("variance", "variance"),
        ("variance, scaled", "variance_scaled"),
        ("cosine", "cosine_unbiased"),
        ("efficiency", "efficiency"),
        ("wrong line top-1", "blame_top1"),
    ]
    found = {**results["ablations"], **_of_methods(results)}
    parts = []
    for name, heading, chosen, by in (
        ("segmentation", "Segmenters and number of segments", columns, ("setting", "method")),
        ("calibration", "Calibration, hidden states and layers", columns, ("setting", "method")),
        ("training_size", "Prompts fitted together by a regression (5 folds)", columns, ("method", "setting")),
        ("smoothing", "Smoothing", columns, ("method", "setting")),
        ("temperature", "Temperature of the probes", columns, ("setting", "method")),
        ("credit", "Form and strength of the credit, relative to GRPO", credit_columns, ("method", "setting")),
    ):
        rows = sorted(found[name], key=lambda row: row["method"]) if by[0] == "method" else found[name]
        body = rows_table(rows, chosen, by) if rows else '<p class="soft">Not measured.</p>'
        parts.append(f"<h3 style='margin-top:22px'>{heading}</h3>{body}")
    how = (
        "A coarser cutting has fewer and easier states, so rows of different cuttings are compared with care; chance "
        "of finding the wrong line rises with it too. A fit of n prompts stands for the first step of a run with that "
        "many; later steps fit to a window of several."
    )
    return section("ablations", "Ablations", how, "".join(parts))


def _of_methods(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Ablations that are methods of their own, as rows of a table."""
    calibration, smoothing = [], []
    for entry in results["methods"]:
        kind, _, layer = entry["name"].partition(":")
        if entry["family"] == "readout" and kind in ("hidden", "both"):
            calibration.append({"setting": f"layer {layer}", "method": kind, "measures": entry["measures"]})
        elif entry["family"] == "readout" or entry["name"] == REFERENCE:
            calibration.append({"setting": "no hidden state", "method": entry["name"], "measures": entry["measures"]})
        base, _, strength = entry["name"].partition("+smooth=")
        if base in SMOOTHED:
            row = {"setting": strength or "0", "method": base, "measures": entry["measures"]}
            smoothing.append(row)
    return {"calibration": calibration, "smoothing": smoothing}


def _for_scatter(results: Results) -> list[dict[str, Any]]:
    """One of each kind: a chart with every name on it could not be read."""
    wanted = {
        "group_mean",
        "position",
        REFERENCE,
        "geometric:reference",
        "normalized:union",
        "vps",
        "mig",
        "calibrated",
    }
    families = ("attribution", "readout")
    return [
        entry
        for entry in shown(results)
        if entry["name"] in wanted or entry["family"] in families or entry["name"] == "monte_carlo"
    ]
