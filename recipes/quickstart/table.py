"""The summaries of several seeds as one Markdown table: `python -m recipes.quickstart.table SUMMARY.json ...`."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS: dict[str, Callable[[dict[str, Any]], float]] = {
    "validation accuracy before": lambda s: s["validation"]["before"],
    "after, RREDCoT": lambda s: s["validation"]["after"],
    "after, GRPO (paired)": lambda s: s["baseline"]["validation"]["after"] if s["baseline"] else float("nan"),
    "most negative segment of a failed trace holds the first wrong line": lambda s: s["blame"]["rate"],
    "the same by chance": lambda s: s["blame"]["chance_rate"],
    "failed traces in that count": lambda s: s["blame"]["num_traces"],
    "largest return-equivalence error": lambda s: s["max_return_error"],
    "probe tokens per response token": lambda s: s["self_value"]["probe_tokens_per_response_token"],
    "self-value seconds not hidden, share of the step": lambda s: s["self_value"]["share_of_step_seconds"],
    "seconds of all steps, RREDCoT": lambda s: s["seconds"],
    "seconds of all steps, GRPO": lambda s: s["baseline"]["seconds"] if s["baseline"] else float("nan"),
}


def table(summaries: list[dict[str, Any]], names: list[str]) -> str:
    """A row a figure, a column a seed, and the mean."""
    lines = ["| | " + " | ".join([*names, "mean"]) + " |", "|---" * (len(names) + 2) + "|"]
    for label, figure in ROWS.items():
        values = [figure(summary) for summary in summaries]
        cells = [f"{value:.3g}" for value in [*values, statistics.mean(values)]]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(paths: list[str]) -> None:
    """Print the table and how it was made."""
    summaries = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    names = [Path(path).parent.name.replace("-", " ") for path in paths]
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    script = "quickstart.sh" if len(paths) == 1 else "quickstart_seeds.sh"
    sys.stdout.write(f"`scripts/{script}` on {machine}; {summaries[0]['num_steps']} optimiser steps a run.\n\n")
    engines = "; ".join(dict.fromkeys(summary["self_value"]["engine"] for summary in summaries))
    sys.stdout.write(f"Probes read by: {engines}.\n\n")
    sys.stdout.write(table(summaries, names))


if __name__ == "__main__":
    main(sys.argv[1:])
