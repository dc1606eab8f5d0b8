"""True values of states, where a program of the task can compute them."""

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rredcot_verl.analyze.measuring import Context, Measurement, Unit
from rredcot_verl.analyze.records import TraceRecord, TruthRecord

TrueValue = Callable[[str, str], float | None]
"""`(prompt, response so far)` -> the expected reward, in units of reward; None where it is not known. May have
`learn(prompt, response)`, then called with every trace first: a program may have to count what a policy can."""


def load_true_values(name: str) -> TrueValue:
    """What a name `MODULE:NAME` leads to, a function or a class, of which one is made; looked up as in `python -m`.

    Raises:
        ValueError: There is no such thing.
    """
    module, _, function = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function) if module and function else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--true-values {name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"--true-values {name!r}: expected MODULE:NAME of a function or a class")
    return cast(TrueValue, found() if isinstance(found, type) else found)


@dataclass(frozen=True)
class TruthMeasurement(Measurement):
    """Asks the task for the value of every state.

    Attributes:
        context: What the measurements share.
        true_value: The task's function.
        traces: All traces.
    """

    name = "truth"

    context: Context
    true_value: TrueValue
    traces: Sequence[TraceRecord]

    def __post_init__(self) -> None:
        if hasattr(self.true_value, "learn"):
            for trace in self.traces:
                self.true_value.learn(trace.prompt, trace.response)

    def units(self, trace: TraceRecord) -> list[Unit]:
        """See `Measurement`."""
        return [Unit(trace, (TruthRecord.key_of(trace.trace, name),), name) for name in self.context.segments.names]

    def measure(self, units: Sequence[Unit]) -> Iterable[TruthRecord]:
        """See `Measurement`."""
        for unit in units:
            trace, decode = unit.trace, self.context.elicitation.vocabulary.decode
            offsets = self.context.segments.boundaries(trace, unit.cutting)[:-1]
            values = [self.true_value(trace.prompt, decode(trace.response_ids[:offset])) for offset in offsets]
            yield TruthRecord(unit.trace.trace, unit.cutting, values)
