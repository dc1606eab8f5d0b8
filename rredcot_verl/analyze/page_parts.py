"""Parts of the bench's page: tables, keys, and the traces shown."""

from collections.abc import Sequence
from typing import Any

from rredcot_verl.analyze.conclusions import shown
from rredcot_verl.analyze.page_charts import Guide, Row, describe, forest, legend_mark, number
from rredcot_verl.report.traces import credit_colour, safe, signed

Results = dict[str, Any]

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

HIGHER, LOWER, NEAR_ZERO = 1, -1, 0


def section(name: str, heading: str, how: str, body: str) -> str:
    """A section of the page."""
    return f'<section id="{name}"><h2>{heading}</h2><p class="how">{how}</p>{body}</section>'


def panel(heading: str, chart: str, details: str = "") -> str:
    """A chart on a card."""
    return f'<figure class="card"><h3>{heading}</h3><div class="scroll">{chart}</div>{details}</figure>'


def panels(items: Sequence[str]) -> str:
    """Cards side by side."""
    return f'<div class="panels">{"".join(items)}</div>'


def key(families: Sequence[str]) -> str:
    """What the marks mean."""
    items = [
        f"<span>{legend_mark(family)}{name.split(':')[0]}</span>"
        for family, name in FAMILIES.items()
        if family in families
    ]
    return f'<div class="key">{"".join(items)}</div>'


def cell(value: dict[str, Any] | None, mark: str = "", *, num_digits: int | None = 3) -> str:
    """A table cell: estimate above its interval; the reason as a tooltip where there is none."""
    if value is None or value["estimate"] is None:
        reason = "" if value is None or not value["reason"] else f' title="{safe(str(value["reason"]))}"'
        return f"<td{reason}>—</td>"
    text = f'<span class="{mark}">{number(value["estimate"], num_digits)}</span>'
    if value["low"] is not None:
        text += f'<span class="iv">{number(value["low"], num_digits)} to {number(value["high"], num_digits)}</span>'
    return f"<td>{text}</td>"


def verdict(difference: dict[str, Any] | None, direction: int) -> str:
    """`better` or `worse` where the interval of the difference to the reference leaves 0 out."""
    if difference is None or difference.get("low") is None or direction == NEAR_ZERO:
        return ""
    if difference["low"] > 0:
        return "better" if direction == HIGHER else "worse"
    if difference["high"] < 0:
        return "worse" if direction == HIGHER else "better"
    return ""


def methods_table(
    methods: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str, str, int]], *, about: bool = False
) -> str:
    """A row a method, grouped by family.

    Args:
        methods: Entries of the results.
        columns: Heading, part (`measures`, `cost`, or a credit form), name of the measure, and which way is better.
        about: Whether to say what each method is.
    """
    head = "".join(f'<th scope="col">{heading}</th>' for heading, *_ in columns)
    if about:
        head += '<th scope="col" style="text-align:left">what it is</th>'
    body = []
    for family, title in FAMILIES.items():
        members = [entry for entry in methods if entry["family"] == family]
        if members:
            body.append(
                f'<tr class="family"><th colspan="{len(columns) + 1 + about}" scope="colgroup">{title}</th></tr>'
            )
        for entry in members:
            cells = "".join(_method_cell(entry, part, name, direction) for _, part, name, direction in columns)
            if about:
                cells += f'<td class="about">{safe(entry["about"])}</td>'
            body.append(f'<tr><th scope="row">{legend_mark(family)}{safe(entry["name"])}</th>{cells}</tr>')
    return _wide(f'<th scope="col">method</th>{head}', "".join(body))


def rows_table(
    rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str]], by: tuple[str, str] = ("setting", "method")
) -> str:
    """A table of an ablation, grouped by its first column.

    Args:
        rows: `{setting, method, measures}`.
        columns: Heading and name of each measure.
        by: Which of `setting` and `method` stands first.
    """
    first, second = by
    head = f'<th scope="col">{first}</th><th scope="col" style="text-align:left">{second}</th>'
    head += "".join(f'<th scope="col">{heading}</th>' for heading, _ in columns)
    body, before = [], None
    for row in rows:
        name, before = "" if row[first] == before else safe(row[first]), row[first]
        cells = "".join(cell(row["measures"].get(measure)) for _, measure in columns)
        body.append(f'<tr><th scope="row">{name}</th><td style="text-align:left">{safe(row[second])}</td>{cells}</tr>')
    return _wide(head, "".join(body))


def numbers(columns: Sequence[str], rows: Sequence[Sequence[str]], summary: str = "The numbers") -> str:
    """The figures behind a chart, folded away. Cells are HTML."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{item}</td>" for item in row) + "</tr>" for row in rows)
    return (
        f'<details><summary>{summary}</summary><div class="numbers" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def interval_numbers(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The figures of a forest plot, with what each stands on and why one is missing."""
    table = [
        [safe(name), describe(value), str(value["num"]), str(value["num_groups"]), safe(str(value["reason"] or ""))]
        for name, value in rows
    ]
    return numbers(["method", "estimate (95 % interval)", "items", "prompts", ""], table)


def example_card(example: dict[str, Any]) -> str:
    """One trace: a row a segment, with the gold and each method's value after it."""
    expected = "unknown" if example["ground_truth"] is None else safe(str(example["ground_truth"]))
    names = "".join(f'<th scope="col">{safe(name)}</th>' for name in ["Monte Carlo", *example["methods"]])
    start = "".join(f"<td>{_value(value)}</td>" for value in [example["start"]["gold"], *example["start"]["values"]])
    before = [example["start"]["gold"], *example["start"]["values"]]
    rows = [f'<tr><td class="what"><span class="soft">before the first token</span></td>{start}</tr>']
    for part in example["segments"]:
        after = [part["gold"], *part["values"]]
        cells = "".join(_step(old, new) for old, new in zip(before, after, strict=True))
        text = safe(part["text"].strip("\n")) or '<span class="soft">(no text)</span>'
        if part["holds_wrong_line"]:
            text = f'<span class="wrong-line">{text}</span><span class="tag">first wrong line</span>'
        rows.append(f'<tr><td class="what"><span class="text">{text}</span></td>{cells}</tr>')
        before = after
    return f"""<article class="card trace example"><header><h3>Trace {example["trace"]}: {safe(example["why"])}</h3>
<div class="facts"><span>reward <b>{example["reward"]:.2f}</b></span>
<span>answer expected <b>{expected}</b></span></div></header><div class="prompt"><span class="soft">Prompt</span>
<div class="text" tabindex="0">{safe(example["prompt"].strip())}</div></div>
<div class="rows" tabindex="0"><table><thead><tr><th class="what">segments of the response</th>{names}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div></article>"""


def _method_cell(entry: dict[str, Any], part: str, name: str, direction: int) -> str:
    if part == "measures":
        return cell(entry["measures"].get(name), verdict(entry["differences"].get(name), direction))
    if part == "cost":
        return cell(entry["cost"][name], num_digits=None)
    return cell(entry["credit"][part][name])


def _wide(head: str, body: str) -> str:
    return (
        f'<div class="card wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _step(old: float | None, new: float | None) -> str:
    if new is None:
        return "<td>—</td>"
    if old is None:
        return f"<td>{_value(new)}</td>"
    return f'<td {credit_colour(new - old)}>{_value(new)}<span class="delta">{signed(new - old)}</span></td>'


def _value(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}".replace("-", "−")


def model_name(run: dict[str, Any]) -> Any:
    """Name of the model in `run.json`, wherever it stands."""
    model = run.get("model", "unknown model")
    if isinstance(model, dict):
        return next((model[key] for key in ("name", "path", "folder") if key in model), model)
    return model


def num_parameters(run: dict[str, Any]) -> float | None:
    """Number of parameters in `run.json`, if it is there."""
    model = run.get("model")
    found = run.get("num_parameters", model.get("num_parameters") if isinstance(model, dict) else None)
    return float(found) if isinstance(found, int | float) else None


def forest_panel(
    results: Results, part: str, name: str, heading: str, label: str, guides: list[Guide], *, zero: bool = False
) -> str:
    entries = [entry for family in FAMILIES for entry in shown(results) if entry["family"] == family]
    values = [(entry, entry["measures"] if part == "measures" else entry["credit"][part]) for entry in entries]
    # The gold has no agreement with itself.
    rows = [
        Row(entry["name"], entry["family"], found[name])
        for entry, found in values
        if entry["name"] != "monte_carlo_gold" or found[name]["estimate"] is not None
    ]
    chart = forest(rows, guides, x_label=label, description=f"{heading}: {label}", zero=zero)
    return panel(heading, chart, interval_numbers([(row.name, row.value) for row in rows]))


def ceiling(value: dict[str, Any]) -> list[Guide]:
    return [] if value["estimate"] is None else [Guide("gold's noise", value["estimate"])]


def noise(gold: dict[str, Any]) -> str:
    if gold["noise"] is None:
        return "noise not known: fewer than two continuations a state"
    return f"its variance {number(gold['noise'], 4)}, that of the values over states {number(gold['variance'], 3)}"


def short(value: dict[str, Any], num_digits: int = 2) -> str:
    return "not known" if value["estimate"] is None else number(value["estimate"], num_digits)
