"""What the results say, in sentences made from the numbers, for the top of the page and of the tables."""

from typing import Any

from rredcot_verl.analyze.estimators import READ, REFERENCE
from rredcot_verl.pages.text import describe, number, percent

Entry = dict[str, Any]

QUESTIONS = (
    ("spearman_v", "Tracks Monte Carlo over states (Spearman of v)", 1, 2),
    ("spearman_v_within", "Orders the states of a trace (mean Spearman of v within a trace)", 1, 2),
    ("spearman_d", "Tracks what a segment changed (Spearman of d)", 1, 2),
    ("mse", "Is nearest to the true value (mean squared error, the gold's own variance taken out)", -1, 3),
    ("blame_top1", "Finds the first wrong line (top-1)", 1, 2),
)
"""Measure, question, which way is better, digits."""
_OUTCOMES = {
    "given": "Of {} the set says whether the final answer is right.",
    "verified": "Of {} the final answer was verified.",
    "assumed": "Of {} the set does not say whether the final answer is right: it counts as right where no step is "
    "wrong, so regressions learn from the labels of other prompts.",
}
OF_GOLD = ("spearman_v", "spearman_v_within", "spearman_d", "mse")
"""Those that compare with the truth."""


FEWEST_COVERED = 0.5
"""Share of the traces below which a method is not named the best."""


def by_name(results: dict[str, Any]) -> dict[str, Entry]:
    """Entries of the methods by name."""
    return {entry["name"]: entry for entry in results["methods"]}


def shown(results: dict[str, Any]) -> list[Entry]:
    """The methods of the charts: without further calibrations and further layers, which have a table."""
    layer = results["evaluation"]["layer"]
    return [
        entry
        for entry in results["methods"]
        if not entry["name"].startswith("calibrated:")
        and (not entry["name"].startswith(READ) or entry["name"].partition(":")[2] == str(layer))
    ]


def cheap(results: dict[str, Any]) -> list[Entry]:
    """Methods that need no continuation and do not know the outcome: those that can be compared as forecasts."""
    return [
        entry
        for entry in shown(results)
        if entry["family"] not in ("truth", "monte_carlo", "attribution") and entry["coverage"] > FEWEST_COVERED
    ]


def findings(results: dict[str, Any]) -> list[str]:
    """One sentence a question, in plain text: the best cheap method, the probes as they are, Monte Carlo and chance.

    The best of many is partly luck: the sentences give its interval and its difference to the default, no more.
    """
    methods = by_name(results)
    sentences = []
    gold = results["gold"]
    has_gold = gold["exact"] or gold["num_rollouts"]["max"] > 0
    for name, question, direction, digits in QUESTIONS:
        if name in OF_GOLD and not has_gold:
            continue
        known = [entry for entry in cheap(results) if entry["measures"][name]["estimate"] is not None]
        if not known:
            reasons = [entry["measures"][name]["reason"] for entry in results["methods"]]
            reason = next((found for found in reasons if found), "")
            sentences.append(f"{question}: not measured ({reason or 'no method'}).")
            continue
        best = max(known, key=lambda entry: direction * entry["measures"][name]["estimate"])
        parts = [f"best without continuations is {best['name']} with {describe(best['measures'][name], digits)}"]
        difference = best["differences"].get(name)
        if REFERENCE in methods and best["name"] != REFERENCE:
            parts.append(f"{REFERENCE} has {describe(methods[REFERENCE]['measures'][name], digits)}")
            if difference is not None and difference["low"] is not None:
                parts.append(f"difference {describe(difference, digits)}")
        parts += _limits(results, name, digits)
        sentences.append(f"{question}: {'; '.join(parts)}.")
    if not has_gold:
        sentences.append(
            "Agreement with the truth: not measured, as no continuations were drawn and no true values known."
        )
    return [*_labels(results), *sentences, *_gradients(results), *_cost(results)]


def about_labels(found: dict[str, Any]) -> str:
    """What the labelled traces are, in sentences."""
    how = " ".join(_OUTCOMES[name].format(num) for name, num in found["outcomes"].items())
    steps = number(found["mean_steps"], 1)
    counts = (
        f"{found['num_traces']} labelled traces of {found['num_groups']} prompts, {steps} steps each: "
        f"{found['num_wrong']} with a wrong one ({found['num_wrong_solved']} with a right final answer all the same), "
        f"{found['num_right']} without ({found['num_right_failed']} with a wrong final answer)."
    )
    authors = ", ".join(found["generators"]) or "others"
    return (
        f"{counts} {how} Off-policy: they were written by {authors}, not by this model, whose values and "
        "log-probabilities are those of a reader. Thresholds are chosen for F1 on the other half of the prompts; "
        "intervals take them as given."
    )


def label_name(entry: dict[str, Any]) -> str:
    """Name of an entry of `labels` with what sets it apart from the others."""
    marks = ["knows the outcome"] if entry["uses_outcome"] else []
    marks += [f"on {percent(entry['coverage'])} of the traces"] if entry["coverage"] < 1 else []
    return f"{entry['name']} ({', '.join(marks)})" if marks else str(entry["name"])


def _labels(results: dict[str, Any]) -> list[str]:
    found = results.get("labels")
    if not found:
        return []
    known = [entry for entry in found["entries"] if entry["measures"]["f1"]["estimate"] is not None]
    values = [
        entry
        for entry in known
        if entry["family"] != "rule" and not entry["uses_outcome"] and entry["coverage"] > FEWEST_COVERED
    ]
    if not values:
        return ["Finds the first wrong step: not measured (no values at both kinds of traces)."]
    best = max(values, key=lambda entry: entry["measures"]["f1"]["estimate"])
    parts = [f"best is {best['name']} with {describe(best['measures']['f1'], 2)}"]
    names = (REFERENCE, "chance", "surprisal", "entropy")
    others = {entry["name"]: entry["measures"]["f1"] for entry in known if entry is not best}
    parts += [f"{name} {describe(others[name], 2)}" for name in names if name in others]
    return [f"Finds the first wrong step of labelled traces (ProcessBench's F1): {'; '.join(parts)}."]


def _gradients(results: dict[str, Any]) -> list[str]:
    found = results["gradients"]
    rows = [] if found is None else found["rows"]
    known = [row for row in rows if row["measures"]["samples"]["estimate"] is not None]
    if not known:
        return []
    parts = []
    cheap_ones = [row for row in known if row["method"] not in ("oracle", "monte_carlo")]
    for about, some in (("of all forms", known), ("without true values or continuations", cheap_ones)):
        if some:
            best = min(some, key=lambda row: row["measures"]["samples"]["estimate"])
            parts.append(f"{about} {label(best)} with {describe(best['measures']['samples'], 2)}")
    return [f"Fewest samples for the progress of GRPO's step, by Adam (share of GRPO's): {'; '.join(parts)}."]


def label(row: dict[str, Any]) -> str:
    """A form of credit and the method whose values it credits, e.g. `td, lambda 0 (oracle)`."""
    return f"{row['form']} ({row['method']})" if row["method"] else str(row["form"])


def _limits(results: dict[str, Any], name: str, digits: int) -> list[str]:
    parts = []
    rollouts = by_name(results).get("monte_carlo")
    if rollouts is not None and rollouts["measures"][name]["estimate"] is not None:
        parts.append(f"Monte Carlo with few continuations {describe(rollouts['measures'][name], digits)}")
    if name == "blame_top1" and results["chance"]["chance"]["top1"]["estimate"] is not None:
        parts.append(f"chance {number(results['chance']['chance']['top1']['estimate'], digits)}")
    ceiling = results["gold"]["ceiling"].get(name)
    if ceiling is not None and ceiling["estimate"] is not None:
        parts.append(f"the gold's noise allows {number(ceiling['estimate'], digits)} at most")
    return parts


def _cost(results: dict[str, Any]) -> list[str]:
    methods = by_name(results)
    names = (REFERENCE, "calibrated+position", f"hidden:{results['evaluation']['layer']}", "monte_carlo")
    parts = []
    for name in [name for name in names if name in methods]:
        ratio = methods[name]["cost"]["seconds_of_generation"]["estimate"]
        if ratio is not None:
            parts.append(f"{name} {number(ratio, None)}")
    return [f"Seconds a trace, as a share of generating it: {', '.join(parts)}."] if parts else []
