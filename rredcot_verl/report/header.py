"""The head of the page: its title, its notes, and the main figures as tiles."""

from typing import Any

from rredcot_verl.report.traces import safe

BASELINE_NAME = "GRPO"


def duration(seconds: float | None) -> str:
    """Writes a time in the unit a reader thinks in.

    Args:
        seconds: The time, if known.

    Returns:
        For example ``42 s``, ``12.5 min`` or ``3.1 h``.
    """
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def percent(share: float | None) -> str:
    """Writes a share in per cent, with a decimal where it is small."""
    if share is None:
        return "unknown"
    return f"{100 * share:.1f} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"


def header(title: str, summary: dict[str, Any]) -> str:
    """The head of the page: title, where the figures come from, what is missing, and a tile for each main figure.

    Args:
        title: Heading of the page.
        summary: What ``summarise`` returned.

    Returns:
        HTML.
    """
    baseline = summary["baseline"]
    compared = f", compared with {safe(baseline['run'])}" if baseline else ""
    tiles = "".join(
        f'<div class="tile"><div class="name">{name}</div><div class="figure">{figure}</div>'
        f'<div class="note">{note}</div></div>'
        for name, figure, note in _tiles(summary)
    )
    curve, source = summary["curve"], summary["source"]
    told = "" if curve is None else f" {safe(curve['name'])}: <code>{safe(curve['metric'])}</code>."
    if source is not None:
        told += (
            f" Values of the segments: <code>{safe(source)}</code>, read by {safe(summary['self_value']['engine'])}."
        )
    notes = "".join(f"<li>{safe(note)}</li>" for note in summary["notes"])
    return (
        f'<h1>{safe(title)}</h1><p class="soft">Run <code>{safe(summary["run"])}</code>{compared}.{told}</p>'
        f"{f'<ul class=notes>{notes}</ul>' if notes else ''}"
        f'<section class="tiles" aria-label="Summary">{tiles}</section>'
    )


def _tiles(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, figure and note of each summary tile; all of them HTML."""
    cost, baseline = summary["self_value"], summary["baseline"]
    tokens, error = cost["probe_tokens_per_response_token"], summary["max_return_error"]
    time_note = f"in {summary['num_steps']} steps"
    if baseline is not None:
        time_note += f"; {BASELINE_NAME}: {duration(baseline['seconds'])} in {baseline['num_steps']}"
    skipped = ", ".join(f"{count:,} {safe(status)}" for status, count in summary["skipped_traces"].items())
    return [
        _curve_tile(summary["curve"], None if baseline is None else baseline["curve"]),
        _blame_tile(summary["blame"]),
        (
            "Cost of the self-values",
            "unknown" if cost["seconds"] is None else f"{percent(cost['share_of_step_seconds'])} of step time",
            ("no metric of it" if cost["seconds"] is None else duration(cost["seconds"]))
            + ("" if tokens is None else f"; {tokens:.3g} probe tokens per response token")
            + ("" if cost["engine"] is None else f"; read by {safe(cost['engine'])}"),
        ),
        ("Training time", duration(summary["seconds"]), time_note),
        (
            "Return equivalence",
            "unknown" if error is None else f"{error:.1e}" if error else "exact",
            "largest |sum of redistributed rewards − reward|",
        ),
        (
            "Traces with self-values",
            f"{summary['num_scored_traces']:,} of {summary['num_traces']:,}",
            _no_traces(summary) or (f"skipped: {skipped}" if skipped else "none skipped"),
        ),
    ]


def _curve_tile(curve: dict[str, Any] | None, other: dict[str, Any] | None) -> tuple[str, str, str]:
    if curve is None:
        return "Reward", "unknown", "no metric and no dump holds one"
    note = f"steps {curve['first_step']} and {curve['last_step']}"
    if other is not None:
        note = f"{BASELINE_NAME}: {other['before']:.3f} → {other['after']:.3f}"
        if (other["first_step"], other["last_step"]) != (curve["first_step"], curve["last_step"]):
            note += f" (its steps {other['first_step']} and {other['last_step']})"
    return curve["name"], f"{curve['before']:.3f} → {curve['after']:.3f}", note


def _no_traces(summary: dict[str, Any]) -> str:
    if summary["num_traces"]:
        return ""
    rollouts = summary["num_rollouts"]
    return f"no credited traces; {rollouts:,} responses in rollout dumps" if rollouts else "no credited traces"


def _blame_tile(blame: dict[str, Any] | None) -> tuple[str, str, str]:
    name = "Blame on the first wrong line"
    if blame is None:
        return name, "not measured", "needs a line checker"
    if not blame["num_traces"]:
        return name, "no data", "no failed trace with a wrong line and two segments"
    note = (
        f"by chance {percent(blame['chance_rate'])}, always the last segment {percent(blame['last_segment_rate'])}; "
        f"{blame['num_traces']:,} failed traces"
    )
    num_solved, num_doubtful = blame["num_solved_traces"], blame["num_solved_traces_with_wrong_line"]
    if 2 * num_doubtful > num_solved:
        note += f". Doubtful: the checker finds a wrong line in {num_doubtful:,} of {num_solved:,} solved traces"
    return name, percent(blame["rate"]), note
