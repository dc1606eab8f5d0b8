"""A credited response: its segments with their self-values and credit, as ``algorithm.rredcot.traces`` writes them."""

import functools
import math
from dataclasses import dataclass, field, fields
from typing import Any

from rredcot_verl.report.files import INTEGER, LIST, NUMBER, SWITCH, TEXT, ReportError, entry, is_number

SOLVED_AT = 0.5
# A dump holds the sum of a response's token-level rewards: 0.99999994 is a 1.
ROUNDING = 1e-6
SCORED = "scored"
DEFAULT_SOURCE = "rredcot"
# Those that weigh segments, and those that do not forecast, for files whose rows do not say so themselves.
_WEIGHING_SOURCES = ("attention_attribution", "gradient_attribution", "leave_one_out")
_NO_FORECASTS = ("vps", "mig")


@dataclass(frozen=True)
class Segment:
    """One segment of a response.

    Attributes:
        start: First character, an offset into the response.
        end: One past the last character.
        num_tokens: Tokens in the segment.
        value: Self-value at the segment's end; the last one is pinned to the reward.
        segment_reward: The credit, ``d_k = v_k - v_{k-1}``.
        weight: Mean of the token weights sigma.
        advantage: Mean of the token advantages.
    """

    start: int
    end: int
    num_tokens: int
    value: float
    segment_reward: float
    weight: float
    advantage: float


_SEGMENT = {each.name: INTEGER if each.type is int else NUMBER for each in fields(Segment)}


@dataclass(frozen=True)
class Response:
    """One response of a training step.

    Attributes:
        step: Training step.
        uid: The prompt's group; without one in a dump, the prompt's text.
        prompt: Text of the prompt; of a dump as the model saw it, without special tokens.
        response: Its text; empty for dumps of steps before the last.
        ground_truth: The answer expected, if known.
        reward: The verifier's reward.
        solved_at: Lowest reward of a solved response.
    """

    step: int
    uid: str
    prompt: str
    response: str
    ground_truth: str | None
    reward: float
    solved_at: float = field(default=SOLVED_AT, kw_only=True)

    @property
    def is_failed(self) -> bool:
        """Whether the reward is below that of a solved response."""
        return self.reward < self.solved_at - ROUNDING


@dataclass(frozen=True)
class Trace(Response):
    """A response with its segments in order.

    Attributes:
        grpo_advantage: The advantage GRPO gives to every token of the response.
        status: ``"scored"``, or why no self-values were computed.
        start_value: Self-value of the prompt, ``v_0``; not a number for a skipped trace.
        segments: The segments; possibly none for a skipped trace.
        return_error: Redistributed rewards summed over the response, less the reward.
        engine: Who read its probes.
        source: Where its values come from: the name of the advantage estimator.
        index: The prompt's ``extra_info.index`` in the data, if known.
        weighs: Whether its values are made of weights of segments for the answer: they go from the group's mean reward
            to the reward, whatever happens.
        forecasts: Whether its values are meant to tell the reward to come.
        reward_range: Lowest and highest reward of the task.
    """

    grpo_advantage: float
    status: str
    start_value: float
    segments: tuple[Segment, ...]
    return_error: float
    engine: str
    source: str = DEFAULT_SOURCE
    index: str | None = None
    weighs: bool = False
    forecasts: bool = True
    reward_range: tuple[float, float] = (0.0, 1.0)

    @property
    def is_scored(self) -> bool:
        """Whether self-values were computed for this trace and it has a segment to show."""
        return self.status == SCORED and bool(self.segments)

    @property
    def is_forecast(self) -> bool:
        """Whether its self-values are estimates of the reward, made without knowing it."""
        return self.is_scored and self.forecasts

    @property
    def measured_values(self) -> list[float]:
        """``v_0 .. v_{K-1}``, the self-values before the outcome is known; empty for a skipped trace."""
        return [self.start_value, *(segment.value for segment in self.segments[:-1])] if self.is_scored else []

    def share_of_range(self, reward: float) -> float:
        """A reward, or a value, on the scale from 0, the lowest reward, to 1."""
        low, high = self.reward_range
        return (reward - low) / (high - low)

    @property
    def credits(self) -> list[float]:
        """``d_1 .. d_K``."""
        return [segment.segment_reward for segment in self.segments]

    def text_of(self, index: int) -> str:
        """The text of a segment."""
        segment = self.segments[index]
        return self.response[segment.start : segment.end]


def read_trace(row: dict[str, Any], where: str, solved_at: float = SOLVED_AT) -> Trace:
    """Makes a trace of a line of a traces file, and checks it; ``where`` is its place, for messages.

    Raises:
        ReportError: Something is missing, of the wrong type, or does not fit together.
    """
    get = functools.partial(entry, row, where=where)
    status, response, segments = get("status", TEXT), get("response", TEXT), get("segments", LIST)
    source, weighs = get("source", TEXT, optional=True) or DEFAULT_SOURCE, get("weighs", SWITCH, optional=True)
    weighs = source in _WEIGHING_SOURCES if weighs is None else weighs
    forecasts = get("forecasts", SWITCH, optional=True)

    def measured(key: str) -> float:
        # A skipped trace has no self-values to be finite.
        if status == SCORED:
            return float(get(key, NUMBER))
        return float(row[key]) if is_number(row.get(key)) else math.nan

    return Trace(
        step=get("step", INTEGER),
        uid=get("uid", TEXT),
        prompt=get("prompt", TEXT),
        response=response,
        ground_truth=get("ground_truth", TEXT, optional=True),
        reward=get("reward", NUMBER),
        grpo_advantage=get("grpo_advantage", NUMBER),
        status=status,
        start_value=measured("start_value"),
        segments=_segments(segments, len(response), where) if status == SCORED else (),
        return_error=measured("return_error"),
        engine=get("engine", TEXT),
        solved_at=solved_at,
        source=source,
        index=get("index", TEXT, optional=True),
        weighs=weighs,
        forecasts=not weighs and source not in _NO_FORECASTS if forecasts is None else forecasts,
        reward_range=_range(get("reward_range", LIST, optional=True) or [0.0, 1.0], where),
    )


def _range(bounds: list[Any], where: str) -> tuple[float, float]:
    if len(bounds) != 2 or not all(map(is_number, bounds)) or bounds[0] >= bounds[1]:
        raise ReportError(f"{where}: 'reward_range' must be the lowest and the highest reward, got {bounds!r}")
    return float(bounds[0]), float(bounds[1])


def _segments(rows: list[Any], num_characters: int, where: str) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    for index, row in enumerate(rows):
        here = f"{where}: segment {index}"
        if not isinstance(row, dict):
            raise ReportError(f"{here}: expected a JSON object, got {type(row).__name__}")
        segment = Segment(**{name: entry(row, name, kind, here) for name, kind in _SEGMENT.items()})
        floor = segments[-1].end if segments else 0
        if not floor <= segment.start <= segment.end <= num_characters:
            raise ReportError(f"{here}: offsets {segment.start}..{segment.end} do not lie in {floor}..{num_characters}")
        segments.append(segment)
    return tuple(segments)
