"""What the bench measures of each trace, and the files that hold it.

Measuring is dear and evaluating is cheap, so they are apart: the measuring side appends these records, one JSON line
each, as it goes (a run that is cut off goes on where it stopped), and the evaluating side reads nothing else.

A *cutting* is one way to cut traces into segments, e.g. `keyword_entropy-8`. Boundaries are token offsets in the
response, from 0 to its length; state k stands after boundary k, and K segments have states 0 .. K-1 and an outcome.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

RUN_FILE = "run.json"
"""Model, task, settings, versions, machine and command of a measurement."""

HIDDEN_FOLDER = "hidden"
"""`<cutting>.npz`: `traces` (num_states,) and `states` (num_states,) int64, and for each layer read `layer_<index>`
(num_states, dim) float32: the projected hidden state at the last token before the boundary."""

GRADIENTS_FOLDER = "gradients"
"""`<cutting>.npz`: `traces` (num_segments_in_all,), `segments` int64 (0 is the first) and `sketches`
(num_segments_in_all, dim) float32: a random sketch, one for all, of the gradient of the segment's summed
log-probability with respect to the policy's parameters. Inner products of sketches are those of the gradients in
expectation."""


@dataclass(frozen=True)
class TraceRecord:
    """One sampled and verified response.

    Attributes:
        trace: Number of the trace, from 0.
        group: Which prompt; traces of a prompt form GRPO's group.
        prompt: What the user asked, without the chat template.
        response: Text of the response, decoded without special tokens.
        prompt_ids, response_ids: Tokens.
        log_probs: Log-probability of each response token at the sampling temperature, nats; empty if not known.
        reward: Verified reward.
        ground_truth: The reference answer, None if not known.
        answer_start: Offset of the first token of the final answer's opening; None without an answer.
        wrong_from, wrong_to: Character offsets in `response` of the first wrong line; None where no line is wrong or
            none can be checked.
        lines_checked: Whether the task could check the lines of this trace.
    """

    FILE: ClassVar[str] = "traces.jsonl"

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


@dataclass(frozen=True)
class CuttingRecord:
    """The segments of one trace under one cutting.

    Attributes:
        trace, cutting: Which.
        boundaries: `num_segments + 1` token offsets.
        characters: The same in characters of `response`.
    """

    FILE: ClassVar[str] = "cuttings.jsonl"

    trace: int
    cutting: str
    boundaries: list[int]
    characters: list[int]


@dataclass(frozen=True)
class RolloutRecord:
    """Monte Carlo continuations from one state of a trace; states of different cuttings share them.

    Attributes:
        trace, offset: The state: the trace's tokens before `offset` of the response.
        rewards: Verified reward of each continuation, in order of drawing.
        seconds: Time they took; a batch's time is shared among its continuations by their tokens.
        num_tokens: Tokens generated.
    """

    FILE: ClassVar[str] = "rollouts.jsonl"

    trace: int
    offset: int
    rewards: list[float]
    seconds: float
    num_tokens: int


@dataclass(frozen=True)
class ProbeRecord:
    """Log-probabilities of known answers at every state of a trace under one cutting.

    Every form (joint, normalized, geometric) and choice of proposals is made from them without another pass.

    Attributes:
        trace, cutting: Which.
        temperature: What divides the logits.
        answers: Text of each answer.
        utilities: Verified utility of each answer in [0, 1].
        is_reference: Whether the answer is the ground truth (it may be the group's too).
        is_group: Whether a rollout of the group gave it.
        log_probs: `[num_states][num_answers]`, nats; null in JSON for -inf.
        lengths: `[num_states][num_answers]` tokens each log-probability sums over.
        seconds: Time of the pass beyond the plain one, which may come out slightly negative; null if it was shared with
            another temperature's.
        num_tokens: Tokens forced.
    """

    FILE: ClassVar[str] = "probes.jsonl"

    trace: int
    cutting: str
    temperature: float
    answers: list[str]
    utilities: list[float]
    is_reference: list[bool]
    is_group: list[bool]
    log_probs: list[list[float | None]]
    lengths: list[list[int]]
    seconds: float | None
    num_tokens: int


@dataclass(frozen=True)
class WeightRecord:
    """Weights of the segments of a trace for its answer.

    Attributes:
        trace, cutting: Which.
        method: `attention_attribution`, `input_x_gradient`, `integrated_gradients` or `leave_one_out`.
        weights: `num_segments` numbers >= 0.
        seconds: Time it took.
        num_tokens: Tokens computed, forward and backward.
    """

    FILE: ClassVar[str] = "weights.jsonl"

    trace: int
    cutting: str
    method: str
    weights: list[float]
    seconds: float
    num_tokens: int


@dataclass(frozen=True)
class CostRecord:
    """What else one trace cost, to compare with.

    Attributes:
        trace: Which.
        what: `generate`, `log_prob` (the plain pass of `old_log_prob`); its surplus with hidden states read (`hidden`),
            or with the probes of the reference answer alone (`probe_reference`).
        seconds: Time.
        num_tokens: Tokens.
    """

    FILE: ClassVar[str] = "costs.jsonl"

    trace: int
    what: str
    seconds: float
    num_tokens: int


Record = TypeVar("Record", TraceRecord, CuttingRecord, RolloutRecord, ProbeRecord, WeightRecord, CostRecord)


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
    weights: list[WeightRecord] = field(default_factory=list)
    costs: list[CostRecord] = field(default_factory=list)


def append(folder: Path, record: Any) -> None:
    """Add a record to its file: one line, written at once."""
    with open(folder / record.FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(record), ensure_ascii=False, allow_nan=False) + "\n")


def read(folder: Path, kind: type[Record]) -> Iterator[Record]:
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
    return Measurements(
        folder,
        run,
        list(read(folder, TraceRecord)),
        list(read(folder, CuttingRecord)),
        list(read(folder, RolloutRecord)),
        list(read(folder, ProbeRecord)),
        list(read(folder, WeightRecord)),
        list(read(folder, CostRecord)),
    )
