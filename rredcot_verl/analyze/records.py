"""What the bench measures of each trace, and the files that hold it.

Measuring is dear and evaluating is cheap, so they are apart: the measuring side appends these records, one JSON line
each, as it goes (a run that is cut off goes on where it stopped), and the evaluating side reads nothing else. What the
files and their fields hold is told in docs/analyze.md.

A *cutting* is one way to cut traces into segments, e.g. `keyword_entropy-8`. Boundaries are token offsets in the
response, from 0 to its length; state k stands after boundary k, and K segments have states 0 .. K-1 and an outcome.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

RUN_FILE = "run.json"
HIDDEN_FOLDER = "hidden"
GRADIENTS_FILE = "gradients.json"

Key = tuple[Any, ...]
"""Names one record of a folder: its file and the fields that tell it from the others there."""


class Record:
    """A line of a file.

    Attributes:
        FILE: Name of the file.
        KEY: The fields that tell a record from the others of its file.
    """

    FILE: ClassVar[str]
    KEY: ClassVar[tuple[str, ...]]

    @classmethod
    def key_of(cls, *fields: Any) -> Key:
        """The key of the record with these values of `KEY`."""
        return (cls.FILE, *fields)

    @property
    def key(self) -> Key:
        """Its key."""
        return self.key_of(*(getattr(self, name) for name in self.KEY))


@dataclass(frozen=True)
class TraceRecord(Record):
    """One sampled and verified response."""

    FILE = "traces.jsonl"
    KEY = ("trace",)

    trace: int
    group: str
    prompt: str
    response: str
    prompt_ids: list[int]
    response_ids: list[int]
    log_probs: list[float]
    reward: float
    ground_truth: str | None = None
    answer_start: int | None = None
    wrong_from: int | None = None
    wrong_to: int | None = None
    lines_checked: bool = False

    @property
    def token_ids(self) -> list[int]:
        """Prompt and response."""
        return self.prompt_ids + self.response_ids


@dataclass(frozen=True)
class LabelRecord(Record):
    """The steps of a labelled trace as its set gives them, and which of them is the first wrong one.

    `boundaries` cut the response at the ends of its steps; the end-of-sequence token after them is one more segment.
    `outcome` says how it is known whether the final answer is right: `given`, `verified`, or `assumed` from the label.
    """

    FILE = "labels.jsonl"
    KEY = ("trace",)

    trace: int
    boundaries: list[int]
    first_wrong: int | None
    outcome: str
    generator: str
    entropies: list[float]


@dataclass(frozen=True)
class CuttingRecord(Record):
    """The segments of one trace under one cutting."""

    FILE = "cuttings.jsonl"
    KEY = ("trace", "cutting")

    trace: int
    cutting: str
    boundaries: list[int]
    characters: list[int]


@dataclass(frozen=True)
class RolloutRecord(Record):
    """Monte Carlo continuations from one state of a trace; states of different cuttings share them."""

    FILE = "rollouts.jsonl"
    KEY = ("trace", "offset")

    trace: int
    offset: int
    rewards: list[float]
    seconds: float
    num_tokens: int


@dataclass(frozen=True)
class ProbeRecord(Record):
    """Log-probabilities of known answers at every state of a trace under one cutting.

    Every form (joint, normalized, geometric) and choice of proposals is made from them without another pass. A trace
    without a useful answer that can be forced has a record without answers.
    """

    FILE = "probes.jsonl"
    KEY = ("trace", "cutting")

    trace: int
    cutting: str
    answers: list[str]
    utilities: list[float]
    is_reference: list[bool]
    is_group: list[bool]
    log_probs: list[list[float | None]]
    lengths: list[list[int]]
    seconds: float
    num_tokens: int


@dataclass(frozen=True)
class TruthRecord(Record):
    """True values of the states of a trace under one cutting, as the task computes them."""

    FILE = "truth.jsonl"
    KEY = ("trace", "cutting")

    trace: int
    cutting: str
    values: list[float | None]


@dataclass(frozen=True)
class WeightRecord(Record):
    """Weights of the segments of a trace for its answer."""

    FILE = "weights.jsonl"
    KEY = ("trace", "cutting", "method")

    trace: int
    cutting: str
    method: str
    weights: list[float]
    seconds: float
    num_tokens: int


@dataclass(frozen=True)
class CostRecord(Record):
    """What else one trace cost, to compare with."""

    FILE = "costs.jsonl"
    KEY = ("trace", "what")

    trace: int
    what: str
    seconds: float
    num_tokens: int


@dataclass(frozen=True)
class TraceArrays:
    """Arrays of one trace, kept until those of all traces are laid end to end.

    Attributes:
        kind: `HIDDEN_FOLDER`.
        trace: Which.
        arrays: By name.
    """

    kind: str
    trace: int
    arrays: dict[str, np.ndarray]

    @property
    def key(self) -> Key:
        """See `Record.key`."""
        return (self.kind, self.trace)


RECORDS: dict[str, type[Record]] = {
    "traces": TraceRecord,
    "cuttings": CuttingRecord,
    "rollouts": RolloutRecord,
    "probes": ProbeRecord,
    "truth": TruthRecord,
    "weights": WeightRecord,
    "costs": CostRecord,
    "labels": LabelRecord,
}
"""Kinds of records, by the attribute of `Measurements` that holds them."""

R = TypeVar("R", bound=Record)


@dataclass
class Measurements:
    """All records of a folder.

    Attributes:
        run: Contents of `run.json`.
        folder: Where they are, for the arrays.
    """

    folder: Path
    run: dict[str, Any]
    traces: list[TraceRecord] = field(default_factory=list)
    cuttings: list[CuttingRecord] = field(default_factory=list)
    rollouts: list[RolloutRecord] = field(default_factory=list)
    probes: list[ProbeRecord] = field(default_factory=list)
    truth: list[TruthRecord] = field(default_factory=list)
    weights: list[WeightRecord] = field(default_factory=list)
    costs: list[CostRecord] = field(default_factory=list)
    labels: list[LabelRecord] = field(default_factory=list)

    def where(self, keep: Callable[[Any], bool]) -> "Measurements":
        """The same folder with the records that a condition keeps."""
        return Measurements(
            self.folder, self.run, **{name: [each for each in getattr(self, name) if keep(each)] for name in RECORDS}
        )


def append(folder: Path, record: Record) -> None:
    """Add a record to its file: one line, written at once."""
    with open(folder / record.FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(vars(record), ensure_ascii=False, allow_nan=False) + "\n")


def read(folder: Path, kind: type[R]) -> Iterator[R]:
    """Read the records of one kind; a last line that was cut off is left out.

    Raises:
        ValueError: A line that is no record; names file and line.
    """
    path = folder / kind.FILE
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        # A whole line ends with a newline, so the last piece is empty or cut off.
        if number == len(lines):
            break
        try:
            yield kind(**json.loads(line))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a {kind.__name__}: {error}") from error


def load(folder: Path) -> Measurements:
    """Read a folder of measurements.

    Raises:
        FileNotFoundError: It holds no measurement.
        ValueError: A file is malformed; names file and line.
    """
    path = folder / RUN_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no measurement here; expected a folder written by python -m rredcot_verl.analyze"
        )
    run = json.loads(path.read_text(encoding="utf-8"))
    records: dict[str, Any] = {name: list(read(folder, kind)) for name, kind in RECORDS.items()}
    return Measurements(folder, run, **records)
