"""What is measured of a block of traces, one phase a kind of measurement, and what a folder holds of it already."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rredcot_verl.analyze.attribution import Attributor
from rredcot_verl.analyze.gradients import GradientSketcher
from rredcot_verl.analyze.hidden import HiddenReader
from rredcot_verl.analyze.inputs import Problem
from rredcot_verl.analyze.monte_carlo import MonteCarlo
from rredcot_verl.analyze.options import HIDDEN, PROBES, Options
from rredcot_verl.analyze.probes import Answers, Prober
from rredcot_verl.analyze.records import GRADIENTS_FOLDER, HIDDEN_FOLDER, CostRecord, Measurements, TraceRecord
from rredcot_verl.analyze.store import Store
from rredcot_verl.probes.elicitation import ReadAnswer


@dataclass
class Done:
    """What the folder holds already, by the keys of the records."""

    cuttings: dict[tuple[int, str], list[int]] = field(default_factory=dict)
    rollouts: set[tuple[int, int]] = field(default_factory=set)
    probes: set[tuple[int, str, float]] = field(default_factory=set)
    weights: set[tuple[int, str]] = field(default_factory=set)
    costs: dict[tuple[int, str], int] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Measurements) -> "Done":
        """What some records cover."""
        return cls(
            {(each.trace, each.cutting): each.boundaries for each in found.cuttings},
            {(each.trace, each.offset) for each in found.rollouts},
            {(each.trace, each.cutting, each.temperature) for each in found.probes},
            {(each.trace, each.method) for each in found.weights},
            {(each.trace, each.what): each.num_tokens for each in found.costs},
        )


@dataclass(frozen=True)
class Instruments:
    """What measures.

    Attributes:
        monte_carlo, prober, attributor, hidden: One a kind of measurement.
        gradients: None where no gradient is asked for.
    """

    monte_carlo: MonteCarlo
    prober: Prober
    attributor: Attributor
    hidden: HiddenReader
    gradients: GradientSketcher | None


@dataclass(frozen=True)
class Phase:
    """One kind of measurement.

    Attributes:
        name: Its name.
        run: Measures traces that lack it.
        has: Whether a trace has it.
    """

    name: str
    run: Callable[[Sequence[TraceRecord]], None]
    has: Callable[[TraceRecord], bool]


class Phases:
    """All that is measured of a trace, made in blocks.

    Args:
        options: What the user asked for.
        store: Takes the records.
        instruments: What measures.
        done: What is there; kept up to date.
        traces: All traces.
        problems: By group.
        read: What was read of each trace, by its number.
        max_length: Longest sequence the model takes, tokens.
    """

    def __init__(
        self,
        options: Options,
        store: Store,
        instruments: Instruments,
        done: Done,
        traces: Sequence[TraceRecord],
        problems: dict[str, Problem],
        read: dict[int, ReadAnswer | None],
        max_length: int | None,
    ) -> None:
        self._options, self._store, self._instruments, self._done = options, store, instruments, done
        self._problems, self._read, self._max_length = problems, read, max_length
        self._main = options.cuttings[0].name
        groups: dict[str, list[TraceRecord]] = {}
        for trace in traces:
            groups.setdefault(trace.group, []).append(trace)
        self._answers: dict[str, Answers] = {
            group: instruments.prober.answers(problems[group], [(each, read[each.trace]) for each in members])
            for group, members in groups.items()
        }
        self._with_gradients = {trace.trace for trace in traces[: options.arguments.gradients]}
        self.phases = self._phases()

    def is_whole(self, trace: TraceRecord) -> bool:
        """Whether a trace has everything that was asked for."""
        return all(phase.has(trace) for phase in self.phases)

    def boundaries(self, trace: TraceRecord, cutting: str | None = None) -> list[int]:
        """Boundaries of a trace under a cutting, the main one by default."""
        return self._done.cuttings[trace.trace, cutting or self._main]

    def states(self, trace: TraceRecord) -> dict[int, int]:
        """Offsets of a trace's states under any cutting, with the number of continuations of each."""
        main, other = self._options.num_rollouts
        offsets = {
            offset: other for cutting in self._options.cuttings for offset in self.boundaries(trace, cutting.name)[:-1]
        }
        return dict(sorted((offsets | dict.fromkeys(self.boundaries(trace)[:-1], main)).items()))

    def _phases(self) -> list[Phase]:
        done, store, measured = self._done, self._store, self._options.measured
        phases = [
            Phase(
                "rollouts",
                self._run_rollouts,
                lambda trace: all((trace.trace, offset) in done.rollouts for offset in self.states(trace)),
            )
        ]
        if PROBES in measured:
            phases.append(Phase("probes", self._run_probes, self._is_probed))
        phases += [self._weights_phase(method) for method in measured if method not in (PROBES, HIDDEN)]
        if HIDDEN in measured:
            phases.append(Phase("hidden", self._run_hidden, lambda trace: store.has_arrays(HIDDEN_FOLDER, trace.trace)))
        phases.append(
            Phase(
                "costs",
                self._run_costs,
                lambda trace: {(trace.trace, "log_prob"), (trace.trace, "hidden")} <= done.costs.keys(),
            )
        )
        if self._instruments.gradients is not None:
            phases.append(
                Phase(
                    "gradients",
                    self._run_gradients,
                    lambda trace: (
                        trace.trace not in self._with_gradients or store.has_arrays(GRADIENTS_FOLDER, trace.trace)
                    ),
                )
            )
        return phases

    def _is_probed(self, trace: TraceRecord) -> bool:
        # Written last, and for traces that have no answer to probe too: those have no probes under any cutting.
        forced = self._done.costs.get((trace.trace, "probe_reference"))
        found = [
            (trace.trace, cutting.name, temperature) in self._done.probes
            for cutting in self._options.cuttings
            for temperature in self._options.arguments.temperatures
        ]
        return forced is not None and (all(found) or (forced == 0 and not any(found)))

    def _weights_phase(self, method: str) -> Phase:
        return Phase(
            method,
            lambda traces: self._run_weights(traces, method),
            lambda trace: (trace.trace, method) in self._done.weights,
        )

    def _run_rollouts(self, traces: Sequence[TraceRecord]) -> None:
        states = [
            (trace, offset, count)
            for trace in traces
            for offset, count in self.states(trace).items()
            if (trace.trace, offset) not in self._done.rollouts
        ]
        for record in self._instruments.monte_carlo.run(states, self._problems, self._max_length):
            self._store.add([record])
            self._done.rollouts.add((record.trace, record.offset))

    def _run_probes(self, traces: Sequence[TraceRecord]) -> None:
        answers = [self._answers[trace.group] for trace in traces]
        prober, done = self._instruments.prober, self._done
        for cutting in self._options.cuttings:
            work = [(trace, self._read[trace.trace], self.boundaries(trace, cutting.name)) for trace in traces]
            for record in prober.measure(work, cutting.name, answers):
                key = (record.trace, record.cutting, record.temperature)
                # A call that was cut off may have left some.
                if key not in done.probes:
                    self._store.add([record])
                    done.probes.add(key)
        main = [(trace, self._read[trace.trace], self.boundaries(trace)) for trace in traces]
        self._add_costs(prober.reference_cost(main, answers))

    def _add_costs(self, records: Sequence[CostRecord]) -> None:
        fresh = [record for record in records if (record.trace, record.what) not in self._done.costs]
        self._store.add(fresh)
        self._done.costs.update({(record.trace, record.what): record.num_tokens for record in fresh})

    def _run_weights(self, traces: Sequence[TraceRecord], method: str) -> None:
        records = self._instruments.attributor.measure(
            [(each, self.boundaries(each)) for each in traces], self._main, method
        )
        self._store.add(records)
        self._done.weights.update((each.trace, each.method) for each in records)

    def _run_hidden(self, traces: Sequence[TraceRecord]) -> None:
        offsets = [list(self.states(trace)) for trace in traces]
        for trace, own, found in zip(traces, offsets, self._instruments.hidden.measure(traces, offsets), strict=True):
            arrays = {name: np.stack([found[offset][name] for offset in own]) for name in found[own[0]]}
            self._store.add_arrays(HIDDEN_FOLDER, trace.trace, {"offsets": np.array(own), **arrays})

    def _run_costs(self, traces: Sequence[TraceRecord]) -> None:
        self._add_costs(self._instruments.hidden.cost(traces, [self.boundaries(trace) for trace in traces]))

    def _run_gradients(self, traces: Sequence[TraceRecord]) -> None:
        assert self._instruments.gradients is not None
        for trace in traces:
            sketches = self._instruments.gradients.measure(trace, self.boundaries(trace))
            count = len(sketches)
            arrays = {"traces": np.full(count, trace.trace), "segments": np.arange(count), "sketches": sketches}
            self._store.add_arrays(GRADIENTS_FOLDER, trace.trace, arrays)

    def hidden_part(self, trace: TraceRecord, cutting: str) -> dict[str, Any]:
        """A trace's rows of `hidden/<cutting>.npz`."""
        arrays = self._store.arrays(HIDDEN_FOLDER, trace.trace)
        places = {offset: place for place, offset in enumerate(arrays.pop("offsets").tolist())}
        rows = [places[offset] for offset in self.boundaries(trace, cutting)[:-1]]
        chosen = {name: values[rows] for name, values in arrays.items()}
        return {"traces": np.full(len(rows), trace.trace), "states": np.arange(len(rows)), **chosen}
