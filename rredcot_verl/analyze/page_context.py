"""The last sections of the bench's page: traces, limits, and how it was measured."""

import platform
from typing import Any

from rredcot_verl.analyze.page_parts import (
    Results,
    example_card,
    methods_table,
    noise,
    num_parameters,
    numbers,
    section,
)
from rredcot_verl.report.traces import credit_colour, safe, signed

FOLDED = ("settings", "identity", "notes")
"""Of `run.json`, what only a few readers want."""
SEEN_TINY = 1e9
"""Parameters below which the page warns that the model is tiny."""


def traces(results: Results) -> str:
    """Example traces."""
    if not results["examples"]:
        return section("traces", "Traces", "", '<p class="soft">No trace has Monte Carlo values at all its states.</p>')
    scale = "".join(f"<i {credit_colour(c)}>{signed(c, 1)}</i>" for c in (-1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0))
    how = (
        "Not typical ones: those whose Monte Carlo value moves most, failed ones with a known wrong line first. A cell "
        "holds the value after the segment and, coloured, its change; the last value is pinned to the outcome."
    )
    cards = "".join(example_card(example) for example in results["examples"])
    legend = f'<div class="key"><span>change <span class="scale">{scale}</span></span></div>'
    return section("traces", "Traces", how, legend + cards)


def tiny(results: Results) -> str:
    """What does not carry over from a tiny model."""
    items = [
        "<b>Answers are short.</b> The probability of a one- or two-token answer does not vanish, as that of a long "
        "expression or a program does; the order of joint, normalized and geometric can turn over there.",
        "<b>The model may have been made to answer early.</b> A model trained on answers at random boundaries makes "
        "a forced answer mean something before the last step. Of a pretrained model it is a lower bound, flat until "
        "late.",
        "<b>Costs are of this machine.</b> With short traces and a small vocabulary the ratio of a pass to generation "
        "is not that of a large model on a GPU with a paged cache.",
        "<b>One kind of task.</b> Where every line can be checked and one mistake decides, the outlook falls at "
        "one place. Traces that try, doubt and go back are another matter.",
        "<b>Regressions see many prompts of one kind.</b> A hidden state that tells right from wrong on one narrow "
        "task may not on a mixed batch, with fewer prompts a kind.",
        "<b>The gradient is that of a small network,</b> at one stage of training. The noise of the whole batch, not "
        "of the placement inside a trace, may dominate elsewhere.",
    ]
    size = num_parameters(results["run"])
    known = "" if size is None else f" This model has {size:,.0f} parameters."
    hold = (
        " It is tiny: take the order of methods as a lead, and run the bench on your own model."
        if size is not None and size < SEEN_TINY
        else ""
    )
    how = f"Read the figures above with these limits.{known}{hold}"
    body = f'<ul class="read">{"".join(f"<li>{item}</li>" for item in items)}</ul>'
    return section("tiny", "What holds on a tiny model only", how, body)


def measured(results: Results) -> str:
    """How it was measured, what is missing, and every method in words."""
    run, evaluation, gold = results["run"], results["evaluation"], results["gold"]
    shown = {name: value for name, value in run.items() if name not in FOLDED}
    rows = [[safe(name.replace("_", " ")), f"<code>{safe(_plain(value))}</code>"] for name, value in shown.items()]
    rows += [
        ["evaluation", f"seed {evaluation['seed']}, {evaluation['num_resamples']:,} resamples, "
         f"{evaluation['seconds']:.0f} s, Python {platform.python_version()}"],
        ["continuations a state", f"{gold['num_rollouts']['min']} to {gold['num_rollouts']['max']}"],
        ["noise of the gold", noise(gold)],
    ]  # fmt: skip
    body = "".join(
        f'<tr><th scope="row">{name}</th><td style="text-align:left;white-space:normal">{value}</td></tr>'
        for name, value in rows
    )
    folded = [[safe(name), f"<code>{safe(_plain(run[name]))}</code>"] for name in FOLDED if name in run]
    said = [*run.get("notes", []), *results["notes"]]
    notes = "".join(f"<li>{safe(str(note))}</li>" for note in said)
    missing = (
        f'<h3 style="margin-top:18px">Notes, and what was left out</h3><ul class="read">{notes}</ul>' if notes else ""
    )
    table = f'<div class="card wide" tabindex="0"><table><tbody>{body}</tbody></table></div>'
    if folded:
        table += numbers(["", ""], folded, "All settings")
    words = methods_table(results["methods"], [], about=True)
    heading = "<h3 style='margin-top:22px'>The methods in words</h3>"
    how = "Contents of the measurement's run.json. All figures, with what each stands on, are in results.json."
    return section("measured", "How it was measured", how, table + missing + heading + words)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_plain(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return str(value)
