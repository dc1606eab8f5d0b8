"""The one way to measure: find what the folder lacks, measure it, keep it, go on until all is there or time is up.

A *unit* is the smallest part that is measured by itself. What a call has kept, the next one does not measure again.
"""

import abc
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from rredcot_verl.analyze.policy import Policy, split_by_size
from rredcot_verl.analyze.problems import Problem
from rredcot_verl.analyze.records import CuttingRecord, Key, Record, TraceArrays, TraceRecord
from rredcot_verl.analyze.store import Store
from rredcot_verl.analyze.timing import Budget, Stopwatch, describe_duration
from rredcot_verl.config.blocks import SegmentationConfig
from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.probes.cutting import cut
from rredcot_verl.probes.elicitation import Elicitation, ReadAnswer

_SHORT_BLOCK_S, _LONG_BLOCK_S, _LARGEST_BLOCK = 10.0, 60.0, 64
"""A block of traces that took less is followed by one twice as large, one that took more by one half as large."""


@dataclass(frozen=True)
class Unit:
    """A part of a trace's measurement.

    Attributes:
        trace: Of which trace.
        keys: Of the records that it leaves.
        cutting: Under which cutting; empty where it does not matter.
        offset: From which state, where it is about one.
    """

    trace: TraceRecord
    keys: tuple[Key, ...]
    cutting: str = ""
    offset: int = 0


class Measurement(abc.ABC):
    """One kind of measurement."""

    name: str

    @abc.abstractmethod
    def units(self, trace: TraceRecord) -> list[Unit]:
        """All that has to be measured of a trace."""

    @abc.abstractmethod
    def measure(self, units: Sequence[Unit]) -> Iterable[Record | TraceArrays]:
        """Measure some units, of any traces; gives the records as they are done."""

    def lay_out(self, store: Store, traces: Sequence[TraceRecord]) -> None:  # noqa: B027 - most have nothing to do
        """Lay the arrays of whole traces end to end, once all that time allows is measured."""


def missing(store: Store, measurement: Measurement, traces: Sequence[TraceRecord]) -> list[Unit]:
    """The units of some traces of which a record is not there."""
    units = [unit for trace in traces for unit in measurement.units(trace)]
    return [unit for unit in units if not all(map(store.has, unit.keys))]


def complete(store: Store, measurement: Measurement, traces: Sequence[TraceRecord]) -> None:
    """Measure what some traces lack."""
    units = missing(store, measurement, traces)
    if units:
        store.add(measurement.measure(units))


def is_whole(store: Store, measurements: Sequence[Measurement], trace: TraceRecord) -> bool:
    """Whether all is there of a trace."""
    return not any(missing(store, measurement, [trace]) for measurement in measurements)


def measure_in_blocks(
    store: Store, measurements: Sequence[Measurement], traces: Sequence[TraceRecord], budget: Budget
) -> None:
    """Complete trace after trace, in blocks as large as time allows, until a trace more would exceed the budget."""
    waiting = [trace for trace in traces if not is_whole(store, measurements, trace)]
    size, per_trace, num_blocks = 1, 0.0, 0
    with tqdm(total=len(traces), initial=len(traces) - len(waiting), desc="measuring", unit="trace") as bar:
        while waiting:
            while size > 1 and not budget.allows(per_trace * size):
                size //= 2
            if not budget.allows(per_trace):
                break
            block, waiting = waiting[:size], waiting[size:]
            seconds = {}
            for measurement in measurements:
                bar.set_postfix_str(measurement.name)
                started = time.perf_counter()
                complete(store, measurement, block)
                seconds[measurement.name] = time.perf_counter() - started
            bar.update(len(block))
            spent = sum(seconds.values())
            per_trace, num_blocks = spent / len(block), num_blocks + 1
            # The first block also warms up.
            if waiting and num_blocks == (1 if spent > _SHORT_BLOCK_S else 2):
                bar.write(_estimate(seconds, len(block), len(waiting), budget), file=sys.stdout)
            if spent < _SHORT_BLOCK_S:
                size = min(2 * max(size, 2), _LARGEST_BLOCK)
            elif spent > _LONG_BLOCK_S:
                size = max(1, size // 2)


def _estimate(seconds: dict[str, float], num_traces: int, num_waiting: int, budget: Budget) -> str:
    """What is left to do, from the traces just measured: too much where larger batches are faster."""
    lines = [f"estimate for the {num_waiting} traces left, from the last {num_traces}:"]
    for name, spent in {**seconds, "all": sum(seconds.values())}.items():
        per_trace = spent / num_traces
        lines.append(f"  {name:24}{1000 * per_trace:8.0f} ms a trace{describe_duration(per_trace * num_waiting):>14}")
    if budget.seconds is not None:
        lines.append(f"  the budget leaves {describe_duration(max(0.0, budget.seconds - budget.spent))}")
    return "\n".join(lines)


class Segments(Measurement):
    """The boundaries of the traces under every cutting; the first measurement, which the others ask.

    Args:
        rules: How to cut, by name, None where `given` says; the first one is the main one.
        elicitation: Knows the vocabulary.
        budget: Most tokens a response may have.
        known: What was cut already.
        given: Boundaries that the traces brought, by their numbers.
    """

    name = "cuttings"

    def __init__(
        self,
        rules: Mapping[str, SegmentationConfig | None],
        elicitation: Elicitation,
        budget: int,
        known: Iterable[CuttingRecord] = (),
        given: Mapping[int, list[int]] | None = None,
    ) -> None:
        self.names = list(rules)
        self.main = self.names[0]
        self._rules = rules
        self._elicitation = elicitation
        self._budget = budget
        self._given = given or {}
        self._boundaries = {(record.trace, record.cutting): record.boundaries for record in known}

    def units(self, trace: TraceRecord) -> list[Unit]:
        """See `Measurement`."""
        return [Unit(trace, (CuttingRecord.key_of(trace.trace, name),), name) for name in self.names]

    def measure(self, units: Sequence[Unit]) -> Iterable[CuttingRecord]:
        """See `Measurement`."""
        decode = self._elicitation.vocabulary.decode
        for unit in units:
            trace, ids, rule = unit.trace, unit.trace.response_ids, self._rules[unit.cutting]
            if rule is None:
                places = self._given[trace.trace]
            else:
                places = cut(rule, self._elicitation, trace.prompt_ids, ids, None, trace.log_probs, self._budget)
            self._boundaries[trace.trace, unit.cutting] = places
            yield CuttingRecord(trace.trace, unit.cutting, places, [len(decode(ids[:place])) for place in places])

    def boundaries(self, trace: TraceRecord, cutting: str | None = None) -> list[int]:
        """Boundaries of a trace under a cutting, the main one by default."""
        return self._boundaries[trace.trace, cutting or self.main]

    def states(self, trace: TraceRecord) -> list[int]:
        """Offsets of the states of a trace under any cutting, in ascending order."""
        return sorted({offset for name in self.names for offset in self.boundaries(trace, name)[:-1]})


@dataclass(frozen=True)
class Context:
    """What the measurements share.

    Attributes:
        policy: The model.
        elicitation: Has read all traces.
        settings: The `algorithm.rredcot` block.
        segments: Where the traces are cut.
        problems: The prompts, by group.
        answers: The final answer of each trace, by its number.
        temperature: Sampling temperature.
        max_pack_tokens: Most tokens of a forward pass.
        watch: Where seconds go.
    """

    policy: Policy
    elicitation: Elicitation
    settings: RREDCoTConfig
    segments: Segments
    problems: Mapping[str, Problem]
    answers: Mapping[int, ReadAnswer | None]
    temperature: float
    max_pack_tokens: int
    watch: Stopwatch

    def packs(self, sizes: Sequence[int]) -> list[list[int]]:
        """Places of consecutive entries that fit a forward pass together, by their tokens; at least one a pass."""
        return split_by_size(sizes, self.max_pack_tokens)
