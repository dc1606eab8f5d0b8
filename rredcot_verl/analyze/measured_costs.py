"""What the plain pass, the default's probes and the reading of hidden states cost, to compare with."""

from collections.abc import Iterable, Sequence

from rredcot_verl.analyze.measured_hidden import HiddenStateMeasurement
from rredcot_verl.analyze.measured_probes import ProbeMeasurement
from rredcot_verl.analyze.measuring import Measurement, Unit
from rredcot_verl.analyze.records import CostRecord, TraceRecord


class CostMeasurement(Measurement):
    """Times passes that are not needed otherwise.

    Args:
        hidden: Knows a layer to read.
        probes: Knows the probes; None where none are measured.
    """

    name = "costs"

    def __init__(self, hidden: HiddenStateMeasurement, probes: ProbeMeasurement | None) -> None:
        self._hidden = hidden
        self._probes = probes

    def units(self, trace: TraceRecord) -> list[Unit]:
        """See `Measurement`."""
        names = ("log_prob", "hidden", *(("probe_reference",) if self._probes else ()))
        return [Unit(trace, tuple(CostRecord.key_of(trace.trace, what) for what in names))]

    def measure(self, units: Sequence[Unit]) -> Iterable[CostRecord]:
        """See `Measurement`."""
        traces = [unit.trace for unit in units]
        if self._probes is not None:
            yield from self._probes.reference_cost(traces)
        yield from self._hidden.cost(traces)
