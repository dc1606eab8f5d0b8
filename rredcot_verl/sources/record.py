"""What the agent side tells the trainer of one response: written once into verl's `extra_fields`, read once a step."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

KEY = "rredcot"
"""Key of the record in `extra_fields`."""


class Status(str, Enum):
    """Why a response has segments or not."""

    SCORED = "scored"
    """It has segments, and what their values are made of is known, or read by the training engine."""
    UNIFORM_GROUP = "uniform_group"
    """Its whole group got the same reward, so nothing was measured."""
    NO_PROPOSAL = "no_proposal"
    """There is no answer to measure it by: none useful is known, all are too long, or it gives none itself."""
    EMPTY = "empty"
    """No token of it is the policy's own."""
    TOO_LONG = "too_long"
    """Nothing that would be measured fits into the context."""
    FAILED = "failed"
    """It could not be verified or measured; the trainer stops."""


COUNTED = tuple(status for status in Status if status is not Status.FAILED)
"""What becomes of the responses of a step that goes on."""


@dataclass(frozen=True)
class Record:
    """Segments of one response and what they cost.

    Attributes:
        status: Why it has segments or not.
        segment_boundaries: `num_segments + 1` offsets from 0 to the response length; empty where nothing is measured.
        payload: What its source needs to make values of it, in plain containers; see the source.
        shaping: What was added to the verifier's score for other reasons (verl's penalty for overlong responses).
        truncated: The response filled its budget and holds no final answer.
        num_probes: Probes read, or continuations sampled.
        num_probe_tokens: Tokens computed, or generated, for them.
        num_recomputed_tokens: Tokens of the trace computed once more, because the server's cache had lost them.
        num_dropped_answers: Known answers not probed: longer than `self_value.max_answer_tokens`, or not to be written
            with this tokenizer.
        num_dropped_boundaries: Boundaries left out, because what is measured there would not fit.
        ready_time: Unix time at which the response was generated and verified, seconds.
        recorded_time: Unix time at which this record was made, seconds.
        measuring_seconds: Seconds that the rollout server measured for it, its wait among them.
        waiting_seconds: Seconds that it waited for its turn at the rollout server.
        lost_closing_mass: Probability of ends of an answer that the rollout server leaves out, where it was measured.
        error: What went wrong, for `FAILED`.
    """

    status: Status
    segment_boundaries: list[int] = field(default_factory=list)
    payload: dict[str, Any] = field(default_factory=dict)
    shaping: float = 0.0
    truncated: bool = False
    num_probes: int = 0
    num_probe_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_dropped_answers: int = 0
    num_dropped_boundaries: int = 0
    ready_time: float = 0.0
    recorded_time: float = 0.0
    measuring_seconds: float = 0.0
    waiting_seconds: float = 0.0
    lost_closing_mass: float = 0.0
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for verl's `extra_fields`."""
        return {**asdict(self), "status": self.status.value}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Record":
        """Read what `to_dict` gave."""
        return cls(**{**fields, "status": Status(fields["status"])})


@dataclass(frozen=True)
class Plan:
    """What the agent side leaves of a response.

    Attributes:
        record: For the trainer.
        rows: For the training engine: a row of integers for each of the source's `payload_fields` that it needs;
            `passes.protocol.NOTHING` stands for the others.
    """

    record: Record
    rows: Mapping[str, Sequence[int]] = field(default_factory=dict)
