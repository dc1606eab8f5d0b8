"""Hidden states at the states' last tokens, as the readout of `rredcot_verl.readout.readout` gets them in training."""

import contextlib
import itertools
from collections.abc import Sequence

import numpy as np
import torch

from rredcot_verl.analyze.budget import Stopwatch
from rredcot_verl.analyze.model import Policy, run_pack
from rredcot_verl.analyze.probes import split_by_size
from rredcot_verl.analyze.records import CostRecord, TraceRecord
from rredcot_verl.passes.hidden_states import decoder_layers, hidden_states, layer_index

Arrays = dict[str, np.ndarray]


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


class HiddenReader:
    """Reads several layers in one pass, and what reading one costs.

    Args:
        policy: The model.
        layers: Indices of the layers, from 0.
        dim: Features that the projection keeps.
        seed: Of the projection.
        max_pack_tokens: Most tokens of a pass.
        watch: Where seconds go.
    """

    def __init__(
        self, policy: Policy, layers: Sequence[int], dim: int, seed: int, max_pack_tokens: int, watch: Stopwatch
    ) -> None:
        self._policy = policy
        self._layers = list(layers)
        self._dim = dim
        self._seed = seed
        self._max_pack_tokens = max_pack_tokens
        self._watch = watch
        decoder_layers(policy.model)

    def measure(self, traces: Sequence[TraceRecord], offsets: Sequence[Sequence[int]]) -> list[dict[int, Arrays]]:
        """For each trace, by offset of the state, `layer_<index>` `(dim,)` float32."""
        results: list[dict[int, Arrays]] = []
        for part in split_by_size([_length(trace) for trace in traces], self._max_pack_tokens):
            own = [traces[place] for place in part]
            wanted = [offsets[place] for place in part]
            starts = (0, *itertools.accumulate(_length(trace) for trace in own))
            rows = [
                start + len(trace.prompt_ids) + offset - 1
                for start, trace, states in zip(starts, own, wanted, strict=False)
                for offset in states
            ]
            with self._watch.measure("hidden"):
                by_layer = self._pass(own, rows, self._layers)
            states = iter(range(len(rows)))
            for each in wanted:
                results.append(
                    {
                        offset: {f"layer_{layer}": values[row] for layer, values in by_layer.items()}
                        for offset, row in zip(each, states, strict=False)
                    }
                )
        return results

    def _pass(self, traces: Sequence[TraceRecord], rows: Sequence[int], layers: Sequence[int]) -> dict[int, np.ndarray]:
        sequences = [trace.prompt_ids + trace.response_ids for trace in traces]
        with contextlib.ExitStack() as stack:
            readers = {
                layer: stack.enter_context(hidden_states(self._policy.model, layer, self._dim, self._seed))
                for layer in layers
            }
            for reader in readers.values():
                reader.rows = torch.tensor(list(rows), dtype=torch.int64)
            run_pack(self._policy.model, sequences, all_rows=True)
        return {layer: reader.collected[0].cpu().numpy() for layer, reader in readers.items()}

    def cost(self, traces: Sequence[TraceRecord], boundaries: Sequence[Sequence[int]]) -> list[CostRecord]:
        """The plain pass of `old_log_prob` over some traces, and what reading one layer at their states adds."""
        records = []
        for part in split_by_size([_length(trace) for trace in traces], self._max_pack_tokens):
            own = [traces[place] for place in part]
            starts = (0, *itertools.accumulate(_length(trace) for trace in own))
            rows = [
                start + len(trace.prompt_ids) + offset - 1
                for start, trace, place in zip(starts, own, part, strict=False)
                for offset in boundaries[place][:-1]
            ]
            plain = log_prob_seconds(self._policy, own, self._watch)
            with self._watch.measure("hidden_cost"):
                self._pass(own, rows, self._layers[:1])
            surplus = self._watch.last - plain
            total = sum(_length(trace) for trace in own)
            for trace in own:
                share = _length(trace) / total
                records.append(CostRecord(trace.trace, "log_prob", plain * share, _length(trace)))
                records.append(CostRecord(trace.trace, "hidden", surplus * share, 0))
        return records


def log_prob_seconds(policy: Policy, traces: Sequence[TraceRecord], watch: Stopwatch) -> float:
    """Seconds of the plain pass over packed traces, all logits computed."""
    with watch.measure("log_prob"):
        run_pack(policy.model, [trace.prompt_ids + trace.response_ids for trace in traces], all_rows=True)
    return watch.last


def _length(trace: TraceRecord) -> int:
    return len(trace.prompt_ids) + len(trace.response_ids)
