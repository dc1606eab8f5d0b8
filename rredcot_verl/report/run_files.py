"""What lies where in a run's folder: metrics, credited traces, and verl's own dumps.

Nothing has to have a fixed name: a file is known by its first row. Traces are RREDCoT's
(``algorithm.rredcot.traces.dir``); rollouts and validation are verl's (``trainer.rollout_data_dir``,
``trainer.validation_data_dir``), which have the same rows and are told apart by ``val`` in the folder's name.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rredcot_verl.report.files import ReportError

METRICS_FILE = "metrics.jsonl"
# How far below the run's folder its files are looked for: runs keep checkpoints with thousands of files beside them.
MOST_LEVELS = 4
METRICS, TRACES, ROLLOUTS, VALIDATION = "metrics", "traces", "rollouts", "validation"
_NOUNS = {
    METRICS: "metrics file",
    TRACES: "folder of traces",
    ROLLOUTS: "folder of rollouts",
    VALIDATION: "folder of validation dumps",
}


@dataclass(frozen=True)
class RunFiles:
    """The parts of a run that are there.

    Attributes:
        metrics: The file of verl's ``file`` logger.
        traces: Folder of credited traces, ``<step>.jsonl``.
        rollouts: Folder of verl's rollout dumps, ``<step>.jsonl``.
        validation: Folder of verl's validation dumps, ``<step>.jsonl``.
    """

    metrics: Path | None = None
    traces: Path | None = None
    rollouts: Path | None = None
    validation: Path | None = None


def find_files(run: Path, given: RunFiles) -> RunFiles:
    """Finds the parts of a run.

    Args:
        run: The run's folder.
        given: Parts that the user named; they are taken as they are, and their kind is not looked for.

    Raises:
        ReportError: The folder or a given part does not exist, the folder holds none of them, or several of one kind
            among which only the user can choose.
    """
    if not run.is_dir():
        raise ReportError(f"{run}: no such run folder")
    found: dict[str, list[Path]] = {kind: [] for kind in _NOUNS}
    for path, kind in _parts(run):
        found[kind].append(path)
    chosen = {kind: _one(run, kind, found[kind], getattr(given, kind)) for kind in _NOUNS}
    if not any(chosen.values()):
        raise ReportError(
            f"{run}: nothing to report on: no {METRICS_FILE} (trainer.logger with 'file'), no <step>.jsonl of credited "
            "traces (algorithm.rredcot.traces.dir) or of verl's dumps (trainer.rollout_data_dir, "
            f"trainer.validation_data_dir) down to {MOST_LEVELS} levels below it"
        )
    return RunFiles(**chosen)


def step_files(folder: Path | None, steps: tuple[int, int] | None = None) -> list[Path]:
    """The ``<step>.jsonl`` files of a folder in order of step; none where there is no folder.

    ``steps`` are the first and the last one wanted; all by default.

    Raises:
        ReportError: There is no such file, or none for these steps.
    """
    if folder is None:
        return []
    files = _in_order(file for file in folder.glob("*.jsonl") if file.stem.isdecimal())
    if not files:
        raise ReportError(f"{folder}: no <step>.jsonl file in it")
    first, last = steps or (int(files[0].stem), int(files[-1].stem))
    wanted = [file for file in files if first <= int(file.stem) <= last]
    if not wanted:
        raise ReportError(f"{folder}: no file for steps {first} to {last}; it has {files[0].stem} to {files[-1].stem}")
    return wanted


def _in_order(files: Iterator[Path]) -> list[Path]:
    return sorted(files, key=lambda file: int(file.stem))


def _parts(run: Path) -> Iterator[tuple[Path, str]]:
    for name, folders, names in os.walk(run):
        folder = Path(name)
        level = len(folder.relative_to(run).parts)
        # verl's checkpoints are large and hold nothing of this.
        folders[:] = sorted(
            entry for entry in folders if level < MOST_LEVELS and not entry.startswith((".", "global_step_"))
        )
        files = [folder / name for name in sorted(names) if name.endswith(".jsonl")]
        kind = _kind_of_rows(folder, _in_order(file for file in files if file.stem.isdecimal()))
        if kind is not None:
            yield folder, kind
        for file in files:
            row = {} if file.stem.isdecimal() else _first_row(file) or {}
            if "step" in row and isinstance(row.get("data"), dict):
                yield file, METRICS


def _kind_of_rows(folder: Path, files: Sequence[Path]) -> str | None:
    row = next((row for row in map(_first_row, files[:3]) if row is not None), None)
    # A folder by that name is taken for what it is called, so that a broken file in it is reported, not passed over.
    if row is None:
        return TRACES if files and folder.name == TRACES else None
    if "segments" in row or (folder.name == TRACES and "input" not in row):
        return TRACES
    if "input" in row and "output" in row:
        return VALIDATION if "val" in folder.name.lower() else ROLLOUTS
    return None


def _first_row(file: Path) -> dict[str, Any] | None:
    try:
        with file.open(encoding="utf-8", newline="\n") as lines:
            row = json.loads(next((line for line in lines if line.strip()), ""))
    except (OSError, ValueError):
        # Not a row of ours; where the file is read in earnest its faults are reported.
        return None
    return row if isinstance(row, dict) else None


def _one(run: Path, kind: str, found: Sequence[Path], given: Path | None) -> Path | None:
    if given is not None:
        if not (given.is_file() if kind == METRICS else given.is_dir()):
            raise ReportError(f"{given}: no such {_NOUNS[kind]}")
        return given
    usual = run / (METRICS_FILE if kind == METRICS else kind)
    # The usual place wins, also where the file is there and cannot be read: that is then an error of its own.
    if usual in found or (kind == METRICS and usual.is_file()):
        return usual
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(run)) for path in found[:5])
        noun = _NOUNS[kind].replace("file", "files").replace("folder", "folders")
        raise ReportError(f"{run}: several {noun} ({names}): choose one with --{kind}")
    return found[0] if found else None
