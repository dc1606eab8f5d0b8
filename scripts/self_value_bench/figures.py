"""From measurements to figures: ratios, additions to the whole step, growth, targets, tables."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from self_value_bench.clock import Measured

Cell = dict[str, Any]

PER_TRACE = ("plain", "packed", "update", "generation")
"""Variants without probes: one measurement serves every number of segments."""

ADDED = {"fused": "plain", "shared": None, "server": None, "naive": None, "monte_carlo": None}
"""Variants that read self-values, and the pass of the step that each takes the place of."""


def paired(over: Measured, under: Measured) -> float | None:
    """Median over rounds of the quotient of seconds: what slows a whole round down does not count."""
    rounds = over.seconds.keys() & under.seconds.keys()
    return statistics.median(over.seconds[r] / under.seconds[r] for r in rounds) if rounds else None


def variant_figures(
    measured: Mapping[str, Measured], forward_tokens: Mapping[str, int], step_shares: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Figures of every variant of a cell; None for what was not run."""
    result = {}
    for name, tokens in forward_tokens.items():
        found = measured.get(name, Measured())
        seconds = list(found.seconds.values())
        result[name] = {
            "seconds": statistics.median(seconds) if seconds else None,
            "all_seconds": seconds,
            "extrapolated": found.extrapolated,
            "ratio_to_plain": paired(found, measured["plain"]),
            "forward_tokens": tokens,
            "forward_tokens_to_plain": tokens / forward_tokens["plain"],
            "peak_mib": None if found.peak_bytes is None else found.peak_bytes / 2**20,
            "added_to_step": {basis: shares[name] for basis, shares in step_shares.items() if name in shares},
        }
    return result


def step_figures(measured: Mapping[str, Measured], generation_share: float) -> dict[str, dict[str, float]]:
    """Seconds of a GRPO step: generation, old log-probabilities (`plain`) and update.

    Returns:
        By basis: `generation measured` (where it was), and `generation assumed`, in which generation takes
        `generation_share` of the step.
    """
    plain = statistics.median(measured["plain"].seconds.values())
    update = statistics.median(measured["update"].seconds.values()) if "update" in measured else 3 * plain
    steps = {"generation assumed": (plain + update) / (1 - generation_share)}
    if "generation" in measured:
        steps["generation measured"] = plain + update + statistics.median(measured["generation"].seconds.values())
    return {
        basis: {"step": step, "generation": step - plain - update, "plain": plain, "update": update}
        for basis, step in steps.items()
    }


def step_shares(
    measured: Mapping[str, Measured], steps: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """What every variant adds to the step, as a share of it, by basis."""
    shares: dict[str, dict[str, float]] = {}
    for basis, seconds in steps.items():
        shares[basis] = {}
        for name, replaced in ADDED.items():
            ratio = paired(measured[name], measured["plain"]) if name in measured else None
            if ratio is not None:
                shares[basis][name] = (ratio - (replaced is not None)) * seconds["plain"] / seconds["step"]
    return shares


def growth_figures(by_segments: Mapping[int, Mapping[str, Measured]], length: int) -> list[dict[str, Any]]:
    """How seconds grow from the fewest to the most segments."""
    few, many = min(by_segments), max(by_segments)
    rows = []
    for name in ADDED:
        if few < many and name in by_segments[few] and name in by_segments[many]:
            ratio = paired(by_segments[many][name], by_segments[few][name])
            rows.append({"length": length, "variant": name, "from": few, "to": many, "ratio": ratio})
    return rows


def _seconds(name: str) -> Callable[[Cell], float | None]:
    return lambda cell: cell["variants"][name]["ratio_to_plain"]


def _quotient(over: str, under: str, key: str) -> Callable[[Cell], float | None]:
    def read(cell: Cell) -> float | None:
        a, b = cell["variants"][over][key], cell["variants"][under][key]
        return None if a is None or b is None else a / b

    return read


def _beside_plain(over: str, under: str) -> Callable[[Cell], float | None]:
    """Forward tokens of one variant, to those that another adds to plain."""

    def read(cell: Cell) -> float | None:
        tokens = {name: found["forward_tokens"] for name, found in cell["variants"].items()}
        return tokens[over] / (tokens[under] - tokens["plain"])

    return read


def _added(name: str, basis: str) -> Callable[[Cell], float | None]:
    return lambda cell: cell["variants"][name]["added_to_step"].get(basis)


def targets(
    cells: Sequence[Cell], growth: Sequence[Mapping[str, Any]], length: int, segments: int
) -> list[dict[str, Any]]:
    """Each target with the figures of all cells, and whether the cell it is meant for meets it.

    Args:
        cells, growth: The figures.
        length: Tokens of a response in the cell that targets are meant for.
        segments: Segments in that cell.
    """
    most: list[tuple[str, float, Callable[[Cell], float | None]]] = [
        ("shared / plain, seconds", 1.15, _seconds("shared")),
        ("fused / plain, seconds", 1.15, _seconds("fused")),
        ("fused adds to the step, generation measured", 0.05, _added("fused", "generation measured")),
        ("fused adds to the step, generation assumed", 0.05, _added("fused", "generation assumed")),
        ("rollout server adds to the step, generation measured", 0.05, _added("server", "generation measured")),
        ("rollout server adds to the step, generation assumed", 0.05, _added("server", "generation assumed")),
    ]
    least: list[tuple[str, float, Callable[[Cell], float | None]]] = [
        ("naive / shared, seconds", 6.0, _quotient("naive", "shared", "seconds")),
        ("Monte Carlo / shared, forward tokens", 100.0, _quotient("monte_carlo", "shared", "forward_tokens")),
        (
            "Monte Carlo without a prefix cache / shared, forward tokens",
            100.0,
            _quotient("monte_carlo_uncached", "shared", "forward_tokens"),
        ),
        ("Monte Carlo / what fused adds, forward tokens", 100.0, _beside_plain("monte_carlo", "fused")),
    ]
    rows = [
        _target(
            name,
            limit,
            at_most,
            [(f"{cell['length']} x {cell['segments']}", read(cell)) for cell in cells],
            f"{length} x {segments}",
        )
        for group, at_most in ((most, True), (least, False))
        for name, limit, read in group
    ]
    for name in ("shared", "fused"):
        own = [(str(row["length"]), row["ratio"]) for row in growth if row["variant"] == name]
        rows.append(_target(f"{name}, growth from fewest to most segments", 1.2, True, own, str(length)))
    return rows


def _target(
    name: str, limit: float, at_most: bool, found: Sequence[tuple[str, float | None]], at: str
) -> dict[str, Any]:
    values = {where: value for where, value in found if value is not None}
    met = [where for where, value in values.items() if (value <= limit if at_most else value >= limit)]
    worst = (max if at_most else min)(values, key=values.__getitem__) if values else None
    verdict = "not measured" if at not in values else "met" if at in met else "missed"
    return {
        "target": name,
        "limit": limit,
        "at_most": at_most,
        "at": at,
        "figure": values.get(at),
        "worst": values.get(worst) if worst else None,
        "worst_at": worst,
        "num_met": len(met),
        "num_measured": len(values),
        "verdict": verdict,
        "values": values,
    }


def markdown(report: Mapping[str, Any]) -> str:
    """Tables for people."""
    bases = sorted(report["cells"][0]["steps"])
    head = ["tokens x segments", "variant", "seconds", "x plain", "forward tokens", "x plain", "peak MiB"]
    rows = []
    for cell in report["cells"]:
        first = cell["segments"] == report["cells"][0]["segments"]
        for name, found in cell["variants"].items():
            if (found["seconds"] is None and not name.startswith("monte_carlo")) or (name in PER_TRACE and not first):
                continue
            mark = "*" if found["extrapolated"] else ""
            rows.append(
                [str(cell["length"]) if name in PER_TRACE else f"{cell['length']} x {cell['segments']}", name]
                + [_number(found["seconds"], 3) + mark, _number(found["ratio_to_plain"], 2)]
                + [f"{found['forward_tokens']:,}", _number(found["forward_tokens_to_plain"], 2)]
                + [_number(found["peak_mib"], 0)]
                + [_percent(found["added_to_step"].get(basis)) for basis in bases]
            )
    notes = {
        f"{name}: {found['extrapolated']}"
        for cell in report["cells"]
        for name, found in cell["variants"].items()
        if found["extrapolated"]
    }
    parts = [_table(head + [f"added to step ({basis})" for basis in bases], rows)]
    parts.append("\n".join(f"\\* extrapolated, {note}" for note in sorted(notes)))
    growth = [
        [str(r["length"]), r["variant"], f"{r['from']} to {r['to']}", _number(r["ratio"], 2)] for r in report["growth"]
    ]
    if growth:
        parts.append(_table(["tokens", "variant", "segments", "seconds grow by"], growth))
    parts.append(
        _table(
            ["target", "limit", f"at {report['targets'][0]['at']}", "", "worst of all", "at", "cells met"],
            [_target_row(target) for target in report["targets"]],
        )
    )
    equal = report["equivalence"]
    parts.append(
        f"Same numbers: largest difference of an answer's log-probability {equal['probes']:.1e} nats, of a trace's "
        f"{equal['traces']:.1e}; allowed {equal['tolerance']:.1e}. Log-probabilities of answers differ by a standard "
        f"deviation of {equal['spread']:.1e} among themselves."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _target_row(row: Mapping[str, Any]) -> list[str]:
    show = _percent if "step" in row["target"] else lambda value: _number(value, 2)
    return [
        row["target"],
        ("<= " if row["at_most"] else ">= ") + show(row["limit"]),
        show(row["figure"]),
        row["verdict"],
        show(row["worst"]),
        row["worst_at"] or "",
        f"{row['num_met']} of {row['num_measured']}",
    ]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
