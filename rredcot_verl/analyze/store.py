"""The folder of a measurement while it is being made: what is there is kept, what was cut off is done again."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rredcot_verl.analyze.records import (
    HIDDEN_FOLDER,
    RECORDS,
    RUN_FILE,
    Key,
    Measurements,
    Record,
    TraceArrays,
    TraceRecord,
    append,
    load,
)

_PARTS = "parts"
_ADDS_UP: dict[str, Any] = {"seconds": {}, "sampling": {}, "notes": []}

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
        path = folder / RUN_FILE
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        # What adds up over the calls that made the folder.
        self.run |= {name: earlier.get(name, empty) for name, empty in _ADDS_UP.items()}
        self.write_run()
        found = self.records()
        self._keys: set[Key] = {record.key for name in RECORDS for record in getattr(found, name)}
        parts = (folder / HIDDEN_FOLDER / _PARTS).glob("*.npz")
        self._keys |= {(HIDDEN_FOLDER, int(part.stem)) for part in parts}

    def write_run(self) -> None:
        """Write `run.json`, whole or not at all."""
        text = json.dumps(self.run, indent=2, ensure_ascii=False, default=str) + "\n"
        _replace(self.folder / RUN_FILE, lambda fresh: fresh.write_text(text, encoding="utf-8"))

    def has(self, key: Key) -> bool:
        """Whether a record is there."""
        return key in self._keys

    def add(self, records: Iterable[Record | TraceArrays]) -> None:
        """Keep records, one after the other; those that are there already stay as they are."""
        for record in records:
            if record.key in self._keys:
                continue
            if isinstance(record, TraceArrays):
                part = self._part(record.kind, record.trace)
                part.parent.mkdir(parents=True, exist_ok=True)
                _save(part, record.arrays)
            else:
                append(self.folder, record)
            self._keys.add(record.key)

    def arrays(self, kind: str, trace: int) -> dict[str, np.ndarray]:
        """The arrays of a trace."""
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
        traces = self.records().traces
        lines = [json.dumps(vars(record), ensure_ascii=False) + "\n" for record in traces if keep(record)]
        _replace(self.folder / TraceRecord.FILE, lambda fresh: fresh.write_text("".join(lines), encoding="utf-8"))
        self._keys -= {record.key for record in traces if not keep(record)}

    def _repair(self) -> None:
        """Cut off a last line that is not whole, as the next record would be written behind it."""
        for kind in RECORDS.values():
            path = self.folder / kind.FILE
            if path.exists():
                with path.open("rb+") as file:
                    file.truncate(file.read().rfind(b"\n") + 1)


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
    def write(fresh: Path) -> None:
        with fresh.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    _replace(path, write)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all."""
    fresh = path.with_suffix(".new")
    write(fresh)
    fresh.replace(path)
