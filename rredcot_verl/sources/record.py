"""What the agent loop tells the trainer of one response: written into verl's `extra_fields`, read back by row key."""

from dataclasses import asdict, dataclass, field
from typing import Any

KEY = "rredcot"
"""Key of the record in `extra_fields`."""

SCORED = "scored"
UNIFORM_GROUP = "uniform_group"
NO_PROPOSAL = "no_proposal"
EMPTY = "empty"
TOO_LONG = "too_long"
FAILED = "failed"
PLANNED = "planned"
"""Its probes, or its attribution, wait for the training engine, which makes it scored."""
READOUT = "readout"
"""Its values wait for the trainer's regression on hidden states, which makes it scored."""
STATUSES = (SCORED, UNIFORM_GROUP, NO_PROPOSAL, EMPTY, TOO_LONG)
"""Why a response has segments or not:
scored; its whole group got the same reward; no useful answer known, or all too long; no token of its own; no probe fits
into the context."""


@dataclass(frozen=True)
class CreditRecord:
    """Segments of one response and what they cost.

    Attributes:
        status: One of `STATUSES`, `PLANNED`, `READOUT` or `FAILED`.
        segment_boundaries: `num_segments + 1` offsets from 0 to the response length; empty unless its values, or its
            hidden states, are wanted.
        self_values: `num_segments` values v_0 .. v_{K-1} in units of reward; empty unless scored.
        truncated: The response filled its budget and holds no final answer.
        num_probes: Probes scored, or continuations sampled.
        num_probe_tokens: Tokens computed, or generated, for them.
        num_recomputed_tokens: Tokens of the trace computed once more, because the server's cache had lost them.
        num_dropped_answers: Known answers not probed: longer than `self_value.max_answer_tokens`, or not to be written
            with this tokenizer.
        num_dropped_boundaries: Boundaries not probed because the probe would not fit into the context.
        ready_time: Unix time at which the response was generated and verified, seconds.
        scored_time: Unix time at which its values were known, seconds.
        scoring_seconds: Seconds between sending its probes and the last answer.
        probes: Its probes, encoded, for `PLANNED`; see `probes.codec`.
        utilities: Utility of each proposal, for `PLANNED`.
        attribution: What is attributed to its segments, encoded, for `PLANNED`; see `sources.attribution`.
        weights: Weight of each segment for the answer, for attributions; empty otherwise.
        standard_errors: Of each self-value, in units of reward, for Monte Carlo; empty otherwise.
        num_cut_short: Continuations that reached their limit, for Monte Carlo.
        num_weight_versions: Versions of the weights that wrote the continuations, for Monte Carlo.
        error: What went wrong, for `FAILED`.
    """

    status: str
    segment_boundaries: list[int] = field(default_factory=list)
    self_values: list[float] = field(default_factory=list)
    truncated: bool = False
    num_probes: int = 0
    num_probe_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_dropped_answers: int = 0
    num_dropped_boundaries: int = 0
    ready_time: float = 0.0
    scored_time: float = 0.0
    scoring_seconds: float = 0.0
    probes: list[int] = field(default_factory=list)
    utilities: list[float] = field(default_factory=list)
    attribution: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    standard_errors: list[float] = field(default_factory=list)
    num_cut_short: int = 0
    num_weight_versions: int = 0
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for verl's `extra_fields`."""
        return asdict(self)
