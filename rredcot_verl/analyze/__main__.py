"""`python -m rredcot_verl.analyze`: measures and evaluates; the same command goes on where it stopped."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rredcot_verl.analyze.command_line import Options, read_options
from rredcot_verl.analyze.records import Measurements


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command-line arguments; those of the process by default.

    Returns:
        The exit status: 0; 1 where something asked for is wrong; 3 where the budget did not last for a single trace.
    """
    # A traceback tells a user nothing about a wrong option.
    try:
        options = read_options(arguments)
        # Not at the top: --help and a misspelt option need no torch.
        from rredcot_verl.analyze.bench import measure

        measurements = measure(options)
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("RREDCOT_TRACEBACK"):
            raise
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; the same command goes on from here\n")
        return 130
    _say_how_much(measurements)
    if not measurements.traces:
        sys.stderr.write("error: the budget was spent before a trace was whole; the same command goes on from here\n")
        return 3
    write_results(measurements, options)
    return 0


def write_results(measurements: Measurements, options: Options) -> None:
    """Evaluate, and write `results.json`, `tables.md` and `report.html` into the folder."""
    from rredcot_verl.analyze import page, tables
    from rredcot_verl.analyze.evaluate import evaluate

    results = evaluate(measurements, seed=options.seed, num_resamples=options.num_resamples, progress=True)
    folder = options.out
    _write(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _write(folder / "tables.md", tables.render(results))
    _write(folder / "report.html", page.render(results))


def _say_how_much(measurements: Measurements) -> None:
    counts = measurements.run["num_traces"]
    share = 100 * counts["whole"] / max(1, counts["asked"])
    missing = "" if counts["whole"] == counts["asked"] else "; the same command goes on from here"
    sys.stdout.write(f"measured {counts['whole']} of {counts['asked']} traces ({share:.0f} %){missing}\n")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sys.stdout.write(f"wrote {path}\n")


if __name__ == "__main__":
    sys.exit(main())
