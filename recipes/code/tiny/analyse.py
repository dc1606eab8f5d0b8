"""Are self-values on programs degenerate? ``python -m recipes.code.tiny.analyse run RUN_DIR`` reads a run's traces."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from recipes.code.tiny.figures import describe
from recipes.code.tiny.task import check_lines
from rredcot_verl.report import load_run


def analyse_run(folder: str | Path) -> dict[str, Any]:
    """Figures of the first and of the last third of a run's steps, and of all; None where nothing was scored."""
    traces = [trace for trace in load_run(folder).traces if trace.is_scored and len(trace.segments) > 1]
    steps = sorted({trace.step for trace in traces})
    third = max(1, len(steps) // 3)
    periods = {"all": steps, "first third": steps[:third], "last third": steps[-third:]}
    return {
        name: describe([trace for trace in traces if trace.step in chosen], check_lines) if chosen else None
        for name, chosen in periods.items()
    }


def _plain(figures: Any) -> Any:
    """Figures as JSON holds them: null for what is not a number."""
    if isinstance(figures, dict):
        return {key: _plain(value) for key, value in figures.items()}
    if isinstance(figures, list):
        return [_plain(value) for value in figures]
    return None if isinstance(figures, float) and math.isnan(figures) else figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run = parser.add_subparsers(dest="command", required=True).add_parser("run", help="traces of a training run")
    run.add_argument("folder", type=Path)
    sys.stdout.write(json.dumps(_plain(analyse_run(parser.parse_args().folder)), indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
