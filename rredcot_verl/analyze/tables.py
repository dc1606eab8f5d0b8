"""The results as Markdown tables, for documents and terminals."""

from collections.abc import Sequence
from typing import Any

from rredcot_verl.analyze.conclusions import about_labels, findings, label, label_name
from rredcot_verl.pages.text import describe, number

AGREEMENT = (
    ("Spearman v", "spearman_v"),
    ("within a trace", "spearman_v_within"),
    ("Spearman d", "spearman_d"),
    ("d within a trace", "spearman_d_within"),
    ("squared error", "mse"),
    ("bias", "bias"),
    ("Brier", "brier"),
    ("ECE", "ece"),
)
POSITIONS = tuple(
    (f"{what} {third}", f"spearman_{what}_{third}") for what in "vd" for third in ("early", "middle", "late")
)
FLUENCY = (("fluency", "fluency"), ("within a trace", "fluency_within"))
BLAME = (("top-1", "blame_top1"), ("mean rank", "blame_rank"), ("AUC", "blame_auc"))
GRADIENT = (("efficiency", "efficiency"), ("Adam's progress", "adam"), ("share of GRPO's samples", "samples"))
LABELS = (
    ("F1", "f1"),
    ("wrong traces", "wrong"),
    ("right traces", "right"),
    ("all traces", "exact"),
    ("largest fall", "largest"),
)
COST = (
    ("seconds", "seconds"),
    ("tokens", "num_tokens"),
    ("seconds over log-prob pass", "seconds_of_log_prob"),
    ("seconds over generation", "seconds_of_generation"),
)


def render(results: dict[str, Any]) -> str:
    """Renders the results as Markdown.

    Args:
        results: What `evaluate` returned, or `results.json`.

    Returns:
        The document, ending with a newline. Every interval is the 95 % bootstrap over prompts.
    """
    data, gold, methods = results["data"], results["gold"], results["methods"]
    counts = gold["num_rollouts"]
    noise = (
        "not known" if gold["noise"] is None else f"{number(gold['noise'], 4)} (values {number(gold['variance'], 3)})"
    )
    told = f"{counts['min']} to {counts['max']} continuations a state, variance of a gold value {noise}"
    if not counts["max"]:
        told = "none, as no continuations were drawn"
    told = "the task's true values" if gold["exact"] else told
    lines = [
        heading(results),
        "",
        f"{data['num_traces']} traces of {data['num_groups']} prompts, {data['num_states']} states, cut by "
        f"`{results['evaluation']['cutting']}`; gold: {told}. In brackets: 95 % bootstrap over prompts, "
        f"{results['evaluation']['num_resamples']} resamples, seed {results['evaluation']['seed']}.",
        "",
        *[f"- {sentence}" for sentence in findings(results)],
        "",
    ]
    lines += _labels(results)
    ceiling = gold["ceiling"]
    limit = {"name": "*gold's noise allows*", "measures": ceiling}
    lines += _table("Agreement with Monte Carlo and the outcome", AGREEMENT, [limit, *methods], "measures")
    lines += _table("Spearman by third of the trace", POSITIONS, [limit, *methods], "measures")
    rules = [
        {"name": f"*{rule.replace('_', ' ')}*", "measures": {f"blame_{name}": value for name, value in found.items()}}
        for rule, found in results["chance"].items()
    ]
    lines += _table("First wrong line of failed traces, by the most negative d", BLAME, [*rules, *methods], "measures")
    lines += _table("Correlation of d with the segment's mean log-probability", FLUENCY, methods, "measures")
    found = results["gradients"]
    lines += _table(
        "Policy gradient, over GRPO's",
        GRADIENT,
        [{**row, "name": label(row)} for row in found["rows"]] if found else [],
        "measures",
    )
    lines += _table("Cost a trace", COST, methods, "cost")
    columns = (*AGREEMENT[:3], *AGREEMENT[4:5], BLAME[0])
    entries = [{**row, "name": f"{row['cutting']}: {row['method']}"} for row in results["cuttings"]]
    lines += _table("Ways to cut", columns, entries, "measures")
    if results["notes"]:
        lines += ["## Left out", "", *[f"- {note}" for note in results["notes"]], ""]
    return "\n".join(lines).rstrip() + "\n"


def heading(results: dict[str, Any]) -> str:
    """First line of the document: what credit is compared with."""
    gold = results["gold"]
    if gold["exact"]:
        return "# Credit against the true values"
    return "# Credit against Monte Carlo" if gold["num_rollouts"]["max"] else "# Credit without continuations"


def _labels(results: dict[str, Any]) -> list[str]:
    found = results.get("labels")
    if not found:
        return []
    entries = [{**entry, "name": label_name(entry)} for entry in found["entries"]]
    title, _, *rows = _table("First wrong step of labelled traces", LABELS, entries, "measures")
    return [title, "", about_labels(found), "", *rows]


def _table(heading: str, columns: Sequence[tuple[str, str]], entries: Sequence[dict[str, Any]], part: str) -> list[str]:
    shown = [column for column in columns if any(_known(entry[part].get(column[1])) for entry in entries)]
    if not shown or not entries:
        return [f"## {heading}", "", "Not measured.", ""]
    lines = [f"## {heading}", "", "| method | " + " | ".join(name for name, _ in shown) + " |"]
    lines.append("|---" * (len(shown) + 1) + "|")
    for entry in entries:
        cells = [_cell(entry[part].get(name)) for _, name in shown]
        lines.append(f"| {entry['name']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _known(value: dict[str, Any] | None) -> bool:
    return value is not None and value["estimate"] is not None


def _cell(value: dict[str, Any] | None) -> str:
    return describe(value) if value is not None and value["estimate"] is not None else "-"
