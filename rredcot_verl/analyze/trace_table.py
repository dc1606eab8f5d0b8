"""All traces of a measurement under one cutting, padded to rectangles, with their Monte Carlo values."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rredcot_verl.analyze.records import CuttingRecord, Measurements, TraceRecord
from rredcot_verl.analyze.statistics import Array, Labels, Resamples
from rredcot_verl.core.groups import leave_one_out_means

SOLVED_AT = 0.5
"""Lowest reward, as a share of the reward range, of a solved trace; the same as in `rredcot_verl.report`."""
NUM_ROLLOUTS = 9
"""Continuations a state of the method `monte_carlo`: VinePPO's number (arXiv 2410.01679)."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class MonteCarloValues:
    """Mean rewards of continuations from the states.

    Attributes:
        values: `(num_traces, width)`, mean reward of the continuations, in [0, 1]; NaN where there are none.
        noise: `(num_traces, width)`, unbiased estimate of the variance of that mean; NaN below two continuations.
        num_rollouts: `(num_traces, width)` continuations.
    """

    values: Array
    noise: Array
    num_rollouts: Array


@dataclass(frozen=True)
class TraceTable:
    """Traces under one cutting. `width` is the largest number of segments; state k of a row stands before segment k+1.

    Attributes:
        resamples: Of the prompts, for all intervals; the same under every cutting, so that differences are paired.
        reward_range: Lowest and highest reward of the task.
        cutting: Name of the cutting.
        traces: The traces that were cut, in order.
        cuts: Their cuttings.
        groups: `(num_traces,)` number of the prompt among all prompts of the measurement.
        rewards: `(num_traces,)` reward, mapped to [0, 1].
        others: `(num_traces,)` mean reward of the group's other traces (leave-one-out); NaN where there are none.
        num_segments: `(num_traces,)`.
        is_state: `(num_traces, width)`, whether k < K.
        position: `(num_traces, width)`, offset of state k over the length of the response.
        truth: `(num_traces, width)`, the task's own values, in [0, 1]; NaN where there are none.
        monte_carlo: From all continuations.
        halves: From the odd and from the even ones.
        first_rollouts: From the first `NUM_ROLLOUTS`; half of them where there are fewer than twice as many.
        other_rollouts: From those after.
        seconds, num_tokens: `(num_traces,)`, what the continuations from the trace's states took.
    """

    resamples: Resamples
    reward_range: tuple[float, float]
    cutting: str
    traces: list[TraceRecord]
    cuts: list[CuttingRecord]
    groups: Labels
    rewards: Array
    others: Array
    num_segments: Labels
    is_state: Mask
    position: Array
    truth: Array
    monte_carlo: MonteCarloValues
    halves: tuple[MonteCarloValues, MonteCarloValues]
    first_rollouts: MonteCarloValues
    other_rollouts: MonteCarloValues
    seconds: Array
    num_tokens: Array

    @property
    def width(self) -> int:
        """Most segments of a trace."""
        return int(self.is_state.shape[1])

    @cached_property
    def has_truth(self) -> bool:
        """Whether every state's true value is known."""
        return bool(np.isfinite(self.truth[self.is_state]).all())

    @cached_property
    def gold(self) -> MonteCarloValues:
        """What methods are compared with: the true values where all are known, else all continuations."""
        if not self.has_truth:
            return self.monte_carlo
        return MonteCarloValues(self.truth, np.zeros_like(self.truth), self.monte_carlo.num_rollouts)

    @cached_property
    def fluency(self) -> Array:
        """`(num_traces, width)`, mean log-probability of a segment's tokens, nats; NaN where it is not known."""
        means = np.full(self.is_state.shape, np.nan)
        for row, (trace, cut) in enumerate(zip(self.traces, self.cuts, strict=True)):
            if len(trace.log_probs) == cut.boundaries[-1]:
                sums = np.add.reduceat(trace.log_probs, cut.boundaries[:-1])
                means[row, : self.num_segments[row]] = sums / np.diff(cut.boundaries)
        return means

    @cached_property
    def row_of(self) -> dict[int, int]:
        """Row of each trace number."""
        return {trace.trace: row for row, trace in enumerate(self.traces)}

    @cached_property
    def failed(self) -> Mask:
        """`(num_traces,)`, whether the trace is not solved."""
        return self.rewards < SOLVED_AT

    @cached_property
    def wrong_segments(self) -> Labels:
        """`(num_traces,)`, the segment that holds a failed trace's first wrong line, 0 is the first.

        -1 where the trace is solved, no wrong line is known, or there is no second segment to blame.
        """
        found = np.full(len(self.traces), -1)
        for row in np.nonzero(self.failed & (self.num_segments > 1))[0].tolist():
            trace = self.traces[row]
            if trace.wrong_from is not None and trace.wrong_to is not None:
                line = trace.response[trace.wrong_from : trace.wrong_to]
                last = trace.wrong_from + max(len(line.rstrip()), 1) - 1
                segment = int(np.searchsorted(self.cuts[row].characters, last, side="right")) - 1
                found[row] = segment if segment < self.num_segments[row] else -1
        return found

    @cached_property
    def lines_checked(self) -> Mask:
        """`(num_traces,)`, whether the task could check the lines of the trace."""
        return np.array([trace.lines_checked for trace in self.traces], dtype=bool)

    @cached_property
    def has_wrong_line(self) -> Mask:
        """`(num_traces,)`, whether a line is known to be wrong."""
        return np.array([trace.wrong_from is not None for trace in self.traces], dtype=bool)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each response."""
        return [cut.boundaries[-1] for cut in self.cuts]

    @cached_property
    def is_inner(self) -> Mask:
        """`(num_traces, width)`, segments 1 .. K-1: those whose reward does not hold the trace's own outcome."""
        return np.concatenate([self.is_state[:, 1:], np.zeros((len(self.traces), 1), dtype=bool)], axis=1)

    @cached_property
    def segment_ends(self) -> Array:
        """`(num_traces, width)`, where segment k ends, as a share of the response."""
        following = np.concatenate([self.position[:, 1:], np.zeros((len(self.traces), 1))], axis=1)
        return np.where(self.is_inner, following, 1.0)

    def groups_of(self, where: Mask) -> Labels:
        """The prompts of some states or segments `(num_traces, width)`, one each."""
        return np.broadcast_to(self.groups[:, None], where.shape)[where]

    def padded(self, traces: Labels, places: Labels, vectors: Array, fill: float) -> tuple[Array, Mask]:
        """Lay out one vector a state or segment.

        Args:
            traces, places: `(num,)`, the number of the trace, and of the state or segment in it.
            vectors: `(num, dim)`.
            fill: What stands where there is none.

        Returns:
            `(num_traces, width, dim)`, and `(num_traces, width)` where there is one.
        """
        result = np.full((len(self.traces), self.width, vectors.shape[1] if vectors.ndim == 2 else 1), fill)
        present = np.zeros(self.is_state.shape, dtype=bool)
        for vector, trace, place in zip(vectors, traces.tolist(), places.tolist(), strict=True):
            row = self.row_of.get(trace)
            if row is not None and place < self.width:
                result[row, place], present[row, place] = vector, True
        return result, present

    def segment_rewards(self, values: Array) -> Array:
        """d_1 .. d_K `(num_traces, width)` of values v_0 .. v_{K-1}, with v_K pinned to the outcome; 0 beyond K."""
        pinned = np.concatenate([values, self.rewards[:, None]], axis=1)
        rows = np.arange(len(self.traces))
        pinned[rows, self.num_segments] = self.rewards
        return np.where(self.is_state, np.diff(pinned, axis=1), 0.0)


def make_table(measurements: Measurements, cutting: str, resamples: Resamples) -> TraceTable:
    """Lay out one cutting.

    Traces whose cutting has not been measured are left out; `resamples` are of the prompts of all traces.

    Raises:
        ValueError: A cutting whose offsets do not rise from 0, or that names an unknown trace.
    """
    traces_by_number = {trace.trace: trace for trace in measurements.traces}
    cuts = sorted((cut for cut in measurements.cuttings if cut.cutting == cutting), key=lambda cut: cut.trace)
    for cut in cuts:
        _check(cut, traces_by_number)
    # An empty response has no segment to credit.
    cuts = [cut for cut in cuts if len(cut.boundaries) > 1]
    traces = [traces_by_number[cut.trace] for cut in cuts]
    low, high = map(float, measurements.run.get("reward_range") or (0.0, 1.0))
    rewards = np.array([(trace.reward - low) / (high - low) for trace in traces], dtype=np.float64)
    # Numbered in order of appearance.
    numbers = {group: number for number, group in enumerate(dict.fromkeys(t.group for t in measurements.traces))}
    groups = np.array([numbers[trace.group] for trace in traces], dtype=np.int64)
    num_segments = np.array([len(cut.boundaries) - 1 for cut in cuts], dtype=np.int64)
    width = int(num_segments.max(initial=1))
    position = np.zeros((len(cuts), width))
    for row, cut in enumerate(cuts):
        position[row, : num_segments[row]] = np.array(cut.boundaries[:-1]) / cut.boundaries[-1]
    others, _ = leave_one_out_means(torch.from_numpy(rewards), groups.tolist(), torch.arange(len(rewards)))
    return TraceTable(
        resamples,
        (low, high),
        cutting,
        traces,
        cuts,
        groups,
        rewards,
        others.numpy(),
        num_segments,
        np.arange(width) < num_segments[:, None],
        position,
        _truth(measurements, cuts, width, low, high),
        **_rollouts(measurements, cuts, width, low, high),
    )


def _truth(measurements: Measurements, cuts: list[CuttingRecord], width: int, low: float, high: float) -> Array:
    known = {(record.trace, record.cutting): record.values for record in measurements.truth}
    values = np.full((len(cuts), width), np.nan)
    for row, cut in enumerate(cuts):
        own = known.get((cut.trace, cut.cutting), [])
        values[row, : len(own)] = [np.nan if value is None else (value - low) / (high - low) for value in own]
    return values


def _rollouts(
    measurements: Measurements, cuts: list[CuttingRecord], width: int, low: float, high: float
) -> dict[str, Any]:
    records = {(record.trace, record.offset): record for record in measurements.rollouts}
    drawn: dict[tuple[int, int], Array] = {}
    seconds, num_tokens = np.full((2, len(cuts)), np.nan)
    for row, cut in enumerate(cuts):
        states = {k: records.get((cut.trace, offset)) for k, offset in enumerate(cut.boundaries[:-1])}
        found = {k: record for k, record in states.items() if record is not None}
        for k, record in found.items():
            drawn[row, k] = (np.array(record.rewards, dtype=np.float64) - low) / (high - low)
        if len(found) == len(states):
            # For one continuation a state: methods multiply by theirs.
            seconds[row] = sum(each.seconds / max(len(each.rewards), 1) for each in found.values())
            num_tokens[row] = sum(each.num_tokens / max(len(each.rewards), 1) for each in found.values())

    def values(pick: Callable[[Array], Array]) -> MonteCarloValues:
        means, noise, num_rollouts = np.full((3, len(cuts), width), np.nan)
        num_rollouts[:] = 0.0
        for place, rewards in drawn.items():
            chosen = pick(rewards)
            num_rollouts[place] = len(chosen)
            if len(chosen):
                means[place] = chosen.mean()
            if len(chosen) > 1:
                noise[place] = chosen.var(ddof=1) / len(chosen)
        return MonteCarloValues(means, noise, num_rollouts)

    return {
        "monte_carlo": values(lambda rewards: rewards),
        "halves": (values(lambda rewards: rewards[0::2]), values(lambda rewards: rewards[1::2])),
        "first_rollouts": values(lambda rewards: rewards[: num_first_rollouts(len(rewards))]),
        "other_rollouts": values(lambda rewards: rewards[num_first_rollouts(len(rewards)) :]),
        "seconds": seconds,
        "num_tokens": num_tokens,
    }


def num_first_rollouts(num_rollouts: int) -> int:
    """How many of a state's continuations the method `monte_carlo` takes for itself."""
    return min(NUM_ROLLOUTS, num_rollouts // 2)


def _check(cut: CuttingRecord, traces: dict[int, TraceRecord]) -> None:
    rising = all(a < b for a, b in zip(cut.boundaries, cut.boundaries[1:], strict=False))
    if cut.trace not in traces or not cut.boundaries or cut.boundaries[0] != 0 or not rising:
        raise ValueError(
            f"cuttings.jsonl: trace {cut.trace}, cutting {cut.cutting}: boundaries {cut.boundaries} must rise from 0 "
            "in a trace of traces.jsonl"
        )
    if len(cut.characters) != len(cut.boundaries):
        raise ValueError(
            f"cuttings.jsonl: trace {cut.trace}, cutting {cut.cutting}: {len(cut.characters)} characters for "
            f"{len(cut.boundaries)} boundaries"
        )
