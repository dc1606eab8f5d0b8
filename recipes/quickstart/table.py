"""The summary of a quickstart as a Markdown table: `python -m recipes.quickstart.table SUMMARY.json`."""

import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _validation(run: dict[str, Any] | None, when: str) -> float | None:
    return run["validation"][when] if run and run["validation"] else None


ROWS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "validation accuracy before": lambda s: _validation(s, "before"),
    "after, RREDCoT": lambda s: _validation(s, "after"),
    "after, GRPO (paired)": lambda s: _validation(s["baseline"], "after"),
    "most negative segment of a failed trace holds the first wrong line": lambda s: s["blame"]["rate"],
    "the same by chance": lambda s: s["blame"]["chance_rate"],
    "failed traces in that count": lambda s: s["blame"]["num_traces"],
    "largest return-equivalence error": lambda s: s["max_return_error"],
    "probe tokens per response token": lambda s: s["self_value"]["probe_tokens_per_response_token"],
    "self-value seconds not hidden, share of the step": lambda s: s["self_value"]["share_of_step_seconds"],
    "seconds of all steps, RREDCoT": lambda s: s["seconds"],
    "seconds of all steps, GRPO": lambda s: s["baseline"]["seconds"] if s["baseline"] else None,
}


def table(summary: dict[str, Any], name: str) -> str:
    """A row a figure; a dash where a run has none, as of failed traces when all were solved."""
    figures = {label: figure(summary) for label, figure in ROWS.items()}
    rows = [f"| {label} | {'—' if value is None else f'{value:.3g}'} |\n" for label, value in figures.items()]
    return f"| | {name} |\n|---|---|\n{''.join(rows)}"


def main(path: str) -> None:
    """Print the table and how it was made."""
    summary = json.loads(Path(path).read_text(encoding="utf-8"))
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    sys.stdout.write(f"`scripts/quickstart.sh` on {machine}; {summary['num_steps']} optimiser steps a run.\n\n")
    sys.stdout.write(f"Probes read by: {summary['self_value']['engine']}.\n\n")
    sys.stdout.write(table(summary, Path(path).parent.name.replace("-", " ")))


if __name__ == "__main__":
    main(sys.argv[1])
