"""What the plain pass, the default's probes and the reading of hidden states cost, to compare with."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rredcot_verl.analyze.measured_hidden import HiddenStateMeasurement
from rredcot_verl.analyze.measured_probes import ProbeMeasurement
from rredcot_verl.analyze.measuring import Measurement, Unit
from rredcot_verl.analyze.records import CostRecord, TraceRecord


@dataclass(frozen=True)
class CostMeasurement(Measurement):
    """Times passes that are not needed otherwise.

    Attributes:
        hidden: Knows a layer to read.
        probes: Knows the probes; None where none are measured.
    """

    name = "costs"

    hidden: HiddenStateMeasurement
    probes: ProbeMeasurement | None

    def units(self, trace: TraceRecord) -> list[Unit]:
        """See `Measurement`."""
        names = ("log_prob", "hidden", *(("probe_reference",) if self.probes else ()))
        return [Unit(trace, tuple(CostRecord.key_of(trace.trace, what) for what in names))]

    def measure(self, units: Sequence[Unit]) -> Iterable[CostRecord]:
        """See `Measurement`."""
        traces = [unit.trace for unit in units]
        if self.probes is not None:
            yield from self.probes.reference_cost(traces)
        yield from self.hidden.cost(traces)
