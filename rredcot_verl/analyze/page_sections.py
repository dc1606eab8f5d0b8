"""The first sections of the bench's page: the answers, the methods, agreement and calibration."""

from rredcot_verl.analyze.conclusions import by_name, findings, shown
from rredcot_verl.analyze.estimators import REFERENCE
from rredcot_verl.analyze.measures import THIRDS
from rredcot_verl.analyze.page_charts import by_position, describe, legend_mark, reliability
from rredcot_verl.analyze.page_parts import (
    HIGHER,
    LOWER,
    NEAR_ZERO,
    Results,
    ceiling,
    forest_panel,
    key,
    methods_table,
    model_name,
    noise,
    numbers,
    panel,
    panels,
    section,
    short,
)
from rredcot_verl.report.traces import safe


def header(results: Results, title: str) -> str:
    """Title and tiles."""
    run, data, gold = results["run"], results["data"], results["gold"]
    tiles = [
        ("Traces", f"{data['num_traces']:,}", f"{data['num_groups']:,} prompts; mean reward {data['mean_reward']:.2f}"),
        ("States", f"{data['num_states']:,}", f"{data['mean_segments']:.1f} segments a trace"),
        (
            "Continuations a state (the gold)",
            f"{gold['num_rollouts']['mean']:.3g}",
            noise(gold),
        ),
        (
            "Correlation the noise allows",
            short(gold["ceiling"]["spearman_v"]),
            f"of v; of d {short(gold['ceiling']['spearman_d'])} (Spearman)",
        ),
        (
            "Failed traces with a known wrong line",
            f"{data['lines']['num_counted']:,}",
            f"of {data['num_failed']:,} failed; chance finds it in {short(results['chance']['chance']['top1'], 2)}",
        ),
        (
            "Groups without GRPO advantage",
            f"{data['num_uniform_groups']:,} of {data['num_groups']:,}",
            "all traces earn the same",
        ),
    ]  # fmt: skip
    cards = "".join(
        f'<div class="tile"><div class="name">{name}</div><div class="figure">{figure}</div>'
        f'<div class="note">{note}</div></div>'
        for name, figure, note in tiles
    )
    model = safe(str(model_name(run)))
    cutting = safe(results["evaluation"]["cutting"])
    return (
        f'<h1>{safe(title)}</h1><p class="soft">Methods of credit against Monte Carlo, on the traces of '
        f"<code>{model}</code>, cut by <code>{cutting}</code>. Every interval is a 95 % bootstrap over prompts.</p>"
        f'<section class="tiles" aria-label="Summary">{cards}</section>'
    )


def reading(results: Results) -> str:
    """The answers in sentences."""
    items = "".join(f"<li>{safe(sentence)}</li>" for sentence in findings(results))
    how = (
        "Made from the numbers below. The best of many methods is partly luck: trust a difference whose interval "
        "leaves 0 out, and the order of neighbours not at all."
    )
    return section("answers", "In short", how, f'<ul class="read">{items}</ul>')


def headline(results: Results) -> str:
    """The table."""
    columns = [
        ("Spearman v", "measures", "spearman_v", HIGHER),
        ("Spearman v<br>within a trace", "measures", "spearman_v_within", HIGHER),
        ("Spearman d", "measures", "spearman_d", HIGHER),
        ("squared error", "measures", "mse", LOWER),
        ("Brier score", "measures", "brier", LOWER),
        ("wrong line<br>top-1", "measures", "blame_top1", HIGHER),
        ("seconds over<br>generation", "cost", "seconds_of_generation", NEAR_ZERO),
    ]
    how = (
        f"▲ better and ▼ worse than <code>{REFERENCE}</code> on the same states, where the paired interval of the "
        "difference leaves 0 out. v is compared at the states before the outcome, d for all segments but the last, "
        "whose reward holds the outcome. Attributions are made with the trace's own outcome, so "
        "they agree with anything that knows it; they are no forecasts and have no Brier score. Smoothing, further "
        "calibrations and other layers have tables among the ablations. "
        f"{_rest_note(results)}"
    )
    return section("methods", "All methods", how, methods_table(shown(results), columns))


def agreement(results: Results) -> str:
    """Forest plots of the correlations and errors."""
    items = []
    for name, heading, label in (
        ("spearman_v", "Values over all states", "Spearman correlation of v with Monte Carlo"),
        ("spearman_v_within", "Values within a trace", "mean Spearman correlation of v within a trace"),
        ("spearman_d", "What a segment changed", "Spearman correlation of d with Monte Carlo"),
        (
            "spearman_d_within",
            "What a segment changed, within a trace",
            "mean Spearman correlation of d within a trace",
        ),
        ("mse", "Squared error", "mean squared error of v, the gold's variance taken out"),
        ("bias", "Bias", "mean of v less Monte Carlo"),
    ):
        guides = [] if name not in results["gold"]["ceiling"] else ceiling(results["gold"]["ceiling"][name])
        items.append(forest_panel(results, "measures", name, heading, label, guides, zero=True))
    how = (
        "A mark is the estimate, the line its interval. <i>gold's noise</i> is what the true values would reach, by "
        "the agreement of two halves of the continuations (Spearman-Brown). Pearson correlations are in the tables and "
        "in results.json."
    )
    families = sorted({entry["family"] for entry in shown(results)})
    return section("agreement", "Agreement with Monte Carlo", how, key(families) + panels(items))


def positions(results: Results) -> str:
    """Correlation by thirds of the trace."""
    items = []
    for what, heading in (("v", "Values"), ("d", "What a segment changed")):
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
        table = [[safe(name), *(describe(value) for value in thirds)] for name, thirds in rows]
        items.append(panel(heading, chart, numbers(["method", "early", "middle", "late"], table)))
    marks = "".join(
        f'<span><svg class="keymark" viewBox="-8 -8 16 16" aria-hidden="true">'
        f'<circle class="third {which}" r="5"/></svg>{which} third</span>'
        for which in THIRDS
    )
    how = (
        "Over all states (segments) of a third of the trace, by tokens: a state by where it stands, a segment by where "
        "it ends. Intervals are in the numbers below each chart."
    )
    return section("position", "By position in the trace", how, f'<div class="key">{marks}</div>{panels(items)}')


def calibration(results: Results) -> str:
    """Reliability curves."""
    cards = []
    for entry in shown(results):
        bins = entry["calibration"]
        # The values of vps are those of the probe it reads.
        if not bins or entry["name"] == "vps":
            continue
        chart = reliability(bins, entry["family"], description=f"{entry['name']}: mean outcome by value")
        scores = " · ".join(
            f"{label} {short(entry['measures'][name], 3)}" for label, name in (("Brier", "brier"), ("ECE", "ece"))
        )
        cards.append(
            f'<figure class="card"><h3>{legend_mark(entry["family"])} {safe(entry["name"])}</h3>{chart}'
            f'<p class="soft">{scores}</p></figure>'
        )
    how = (
        "Horizontal: the value of a state. Vertical: the mean outcome of the traces it belongs to; on the dashed "
        "diagonal the value is an honest forecast. The bars below count states. The expected calibration error (ECE) "
        "of few states is above 0 even for an honest forecast."
    )
    body = f'<div class="small-panels">{"".join(cards)}</div>' if cards else '<p class="soft">Nothing to show.</p>'
    return section("calibration", "Calibration against the outcome", how, body)


def _rest_note(results: Results) -> str:
    rollouts = by_name(results).get("monte_carlo")
    if rollouts is None:
        return ""
    return (
        "<code>monte_carlo</code> is compared with the continuations it has not used itself, so its gold is a little "
        "noisier than the others'."
    )
