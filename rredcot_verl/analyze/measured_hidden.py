"""Hidden states at the states' last tokens, as the readout of `rredcot_verl.readout.readout` gets them in training."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rredcot_verl.analyze.measuring import Context, Measurement, Unit
from rredcot_verl.analyze.policy import run_pack
from rredcot_verl.analyze.records import HIDDEN_FOLDER, CostRecord, TraceArrays, TraceRecord
from rredcot_verl.analyze.store import Store
from rredcot_verl.passes.hidden_states import decoder_layers, hidden_states, layer_index


def parse_layers(names: Sequence[str], num_layers: int) -> list[int]:
    """Layers by index, negative ones from the end; `all` for every one.

    Raises:
        ValueError: No number, or a layer that the model does not have.
    """
    if list(names) == ["all"]:
        return list(range(num_layers))
    layers = []
    for name in names:
        try:
            layers.append(layer_index(int(name), num_layers))
        except ValueError as error:
            raise ValueError(f"--layers {name!r}: expected 'all' or layers of this model: {error}") from error
    return list(dict.fromkeys(layers))


@dataclass(frozen=True)
class HiddenStateMeasurement(Measurement):
    """Reads several layers in one pass, and what reading one costs.

    Attributes:
        context: What the measurements share.
        layers: Indices of the layers, from 0.
        dim: Features that the projection keeps.
        seed: Of the projection.
    """

    name = "hidden"

    context: Context
    layers: Sequence[int]
    dim: int
    seed: int

    def __post_init__(self) -> None:
        decoder_layers(self.context.policy.model)

    def units(self, trace: TraceRecord) -> list[Unit]:
        """See `Measurement`."""
        return [Unit(trace, ((HIDDEN_FOLDER, trace.trace),))]

    def measure(self, units: Sequence[Unit]) -> Iterable[TraceArrays]:
        """See `Measurement`: `offsets` `(num_states,)` and for each layer `layer_<index>` `(num_states, dim)`."""
        segments, watch = self.context.segments, self.context.watch
        for part in self._parts([unit.trace for unit in units]):
            offsets = [segments.states(trace) for trace in part]
            with watch.measure("hidden"):
                by_layer = self._read(part, offsets, self.layers)
            ends = list(itertools.accumulate(map(len, offsets)))
            for trace, own, end in zip(part, offsets, ends, strict=True):
                rows = {f"layer_{layer}": values[end - len(own) : end] for layer, values in by_layer.items()}
                yield TraceArrays(HIDDEN_FOLDER, trace.trace, {"offsets": np.array(own), **rows})

    def lay_out(self, store: Store, traces: Sequence[TraceRecord]) -> None:
        """See `Measurement`: `hidden/<cutting>.npz`."""
        parts = [store.arrays(HIDDEN_FOLDER, trace.trace) for trace in traces]
        for cutting in self.context.segments.names:
            chosen = [self._states(*pair, cutting) for pair in zip(traces, parts, strict=True)]
            store.write_arrays(HIDDEN_FOLDER, cutting, chosen)

    def _states(self, trace: TraceRecord, arrays: dict[str, np.ndarray], cutting: str) -> dict[str, np.ndarray]:
        places = {offset: place for place, offset in enumerate(arrays["offsets"].tolist())}
        rows = [places[offset] for offset in self.context.segments.boundaries(trace, cutting)[:-1]]
        chosen = {name: values[rows] for name, values in arrays.items() if name != "offsets"}
        return {"traces": np.full(len(rows), trace.trace), "states": np.arange(len(rows)), **chosen}

    def cost(self, traces: Sequence[TraceRecord]) -> Iterator[CostRecord]:
        """The plain pass of `old_log_prob` over some traces, and what reading one layer at their states adds."""
        segments, watch = self.context.segments, self.context.watch
        for part in self._parts(traces):
            with watch.measure("log_prob"):
                run_pack(self.context.policy.model, [trace.token_ids for trace in part])
            plain = watch.last
            with watch.measure("hidden_cost"):
                self._read(part, [segments.boundaries(trace)[:-1] for trace in part], self.layers[:1])
            # A difference of two passes: less than nothing is noise.
            surplus = max(0.0, watch.last - plain)
            total = sum(len(trace.token_ids) for trace in part)
            for trace in part:
                size = len(trace.token_ids)
                share = size / total
                yield CostRecord(trace.trace, "log_prob", plain * share, size)
                yield CostRecord(trace.trace, "hidden", surplus * share, 0)

    def _parts(self, traces: Sequence[TraceRecord]) -> list[list[TraceRecord]]:
        return [[traces[place] for place in part] for part in self.context.packs([len(t.token_ids) for t in traces])]

    def _read(
        self, traces: Sequence[TraceRecord], offsets: Sequence[Sequence[int]], layers: Sequence[int]
    ) -> dict[int, np.ndarray]:
        """For each layer `(num_states, dim)` float32, the states of all traces, in one pass."""
        starts = itertools.accumulate((len(trace.token_ids) for trace in traces), initial=0)
        rows = [
            start + len(trace.prompt_ids) + offset - 1
            for start, trace, own in zip(starts, traces, offsets, strict=False)
            for offset in own
        ]
        model = self.context.policy.model
        with contextlib.ExitStack() as stack:
            readers = {layer: stack.enter_context(hidden_states(model, layer, self.dim, self.seed)) for layer in layers}
            for reader in readers.values():
                reader.rows = torch.tensor(rows, dtype=torch.int64)
            run_pack(model, [trace.token_ids for trace in traces])
        return {layer: reader.collected[0].cpu().numpy() for layer, reader in readers.items()}
