"""The folder of a measurement while it is being made: what is there is kept, what was cut off is done again."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rredcot_verl.analyze.records import (
    RUN_FILE,
    CostRecord,
    CuttingRecord,
    Measurements,
    ProbeRecord,
    RolloutRecord,
    TraceRecord,
    WeightRecord,
    append,
    load,
)

_KINDS = (TraceRecord, CuttingRecord, RolloutRecord, ProbeRecord, WeightRecord, CostRecord)
_PARTS = "parts"
_ADDS_UP: dict[str, Any] = {"seconds": {}, "sampling": {}, "notes": []}
_LISTS = ("traces", "cuttings", "rollouts", "probes", "weights", "costs")

Arrays = Mapping[str, np.ndarray]


class Store:
    """Records and arrays of one measurement.

    Args:
        folder: Made if it is not there.
        run: What is measured and how; `run["identity"]` must be that of the folder's earlier run.

    Raises:
        ValueError: The folder holds another measurement; the message says where they differ.
    """

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        self.folder = folder
        self.run = run
        check_identity(folder, run["identity"])
        folder.mkdir(parents=True, exist_ok=True)
        self._repair()
        earlier = self._read_run()
        # What adds up over the calls that made the folder.
        self.run |= {name: earlier.get(name, empty) for name, empty in _ADDS_UP.items()}
        self.write_run()

    def _read_run(self) -> dict[str, Any]:
        path = self.folder / RUN_FILE
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found

    def write_run(self) -> None:
        """Write `run.json`, whole or not at all."""
        path = self.folder / RUN_FILE
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(self.run, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
        fresh.replace(path)

    def add(self, records: Sequence[Any]) -> None:
        """Append records to their files."""
        for record in records:
            append(self.folder, record)

    def add_arrays(self, kind: str, trace: int, arrays: Arrays) -> None:
        """Keep the arrays of one trace; `write_arrays` puts those of all traces together."""
        path = self._part(kind, trace)
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(path, arrays)

    def has_arrays(self, kind: str, trace: int) -> bool:
        """Whether a trace's arrays are there."""
        return self._part(kind, trace).exists()

    def arrays(self, kind: str, trace: int) -> dict[str, np.ndarray]:
        """A trace's arrays."""
        with np.load(self._part(kind, trace)) as part:
            return dict(part)

    def write_arrays(self, kind: str, cutting: str, parts: Sequence[Arrays]) -> None:
        """Write `<kind>/<cutting>.npz`: the arrays of all traces, laid end to end; nothing for no part."""
        if parts:
            merged = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            _save(self.folder / kind / f"{cutting}.npz", merged)

    def _part(self, kind: str, trace: int) -> Path:
        return self.folder / kind / _PARTS / f"{trace}.npz"

    def records(self) -> Measurements:
        """All records, those of traces that are not whole included."""
        return load(self.folder)

    def keep_traces(self, keep: Callable[[TraceRecord], bool]) -> None:
        """Drop traces, e.g. those of a group that was cut off; before anything else is measured of them."""
        path = self.folder / TraceRecord.FILE
        kept = [record for record in self.records().traces if keep(record)]
        fresh = path.with_suffix(".new")
        lines = (json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n" for record in kept)
        fresh.write_text("".join(lines), encoding="utf-8")
        fresh.replace(path)

    def _repair(self) -> None:
        """Cut off a last line that is not whole, as the next record would be written behind it."""
        for kind in _KINDS:
            path = self.folder / kind.FILE
            if not path.exists():
                continue
            with path.open("rb+") as file:
                content = file.read()
                file.truncate(content.rfind(b"\n") + 1)


def check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to mix measurements of different things.

    Raises:
        ValueError: The folder holds another measurement; the message says where they differ.
    """
    path = folder / RUN_FILE
    if not path.exists():
        others = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        if others:
            raise ValueError(f"--out {folder}: the folder is not empty and holds no measurement ({others[0]}, ...)")
        return
    # Through JSON, so that tuples and lists compare.
    wanted = json.loads(json.dumps(identity, default=str))
    earlier = json.loads(path.read_text(encoding="utf-8")).get("identity", {})
    differences = [
        f"  {name}: {earlier.get(name)!r} there, {wanted[name]!r} now"
        for name in wanted
        if earlier.get(name) != wanted[name]
    ]
    if differences:
        listing = "\n".join(differences)
        raise ValueError(f"--out {folder}: it holds another measurement; choose a new folder. Differences:\n{listing}")


def _save(path: Path, arrays: Arrays) -> None:
    """Whole or not at all."""
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    fresh.replace(path)


def only_traces(measurements: Measurements, traces: set[int]) -> Measurements:
    """The records of some traces."""
    lists = {name: [each for each in getattr(measurements, name) if each.trace in traces] for name in _LISTS}
    return Measurements(measurements.folder, measurements.run, **lists)
