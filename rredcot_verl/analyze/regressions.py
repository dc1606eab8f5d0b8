"""Regressions on the outcomes as methods of the bench: `calibrated`, `position`, `hidden` and `both`.

They are the plugin's own readout, cross-fitted by prompt: a value comes from fits that saw no outcome of its prompt.
A training size of n is a batch of n prompts, as in the first step of a run: the prompts are dealt into batches of
that size and each is fitted on its own, so with 5 folds a value comes from a fit to 4 n / 5 prompts.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rredcot_verl.analyze.method_values import Evidence, Method
from rredcot_verl.analyze.records import HIDDEN_FOLDER
from rredcot_verl.analyze.statistics import Array
from rredcot_verl.analyze.trace_table import Mask, TraceTable
from rredcot_verl.config.blocks import ReadoutConfig
from rredcot_verl.readout.features import build_features
from rredcot_verl.readout.readout import Readout, States
from rredcot_verl.sources.regression import LONG_RESPONSE

SIZES = (16, 32, 64, 128, 256)
"""Prompts in a batch, for the ablation over training-set sizes; those below the number of prompts are run."""


@dataclass(frozen=True)
class LayerStates:
    """Projected hidden states of a table.

    Attributes:
        layers: `(num_traces, width, dim)` for each layer read; NaN where there is none.
        seconds, num_tokens: `(num_traces,)`, surplus of reading them.
    """

    layers: dict[int, Array]
    seconds: Array
    num_tokens: Array

    def only(self, layer: int) -> "LayerStates":
        """One layer."""
        return replace(self, layers={layer: self.layers[layer]})


def load_hidden(evidence: Evidence) -> LayerStates | None:
    """Read the hidden states of a cutting; None where there are none."""
    table = evidence.table
    path = evidence.measurements.folder / HIDDEN_FOLDER / f"{table.cutting}.npz"
    if not path.exists():
        return None
    with np.load(path) as arrays:
        read = {int(name.removeprefix("layer_")): arrays[name] for name in arrays if name.startswith("layer_")}
        traces, states = arrays["traces"], arrays["states"]
    layers = {layer: table.padded(traces, states, vectors, np.nan)[0] for layer, vectors in sorted(read.items())}
    return LayerStates(layers, *evidence.cost("hidden"))


def fit(
    table: TraceTable,
    *,
    probe: Array | None = None,
    hidden: Array | None = None,
    position: bool = False,
    batch: int | None = None,
    seed: int = 0,
) -> tuple[Array, float]:
    """Value all states by a cross-fitted regression on the outcomes.

    Args:
        table: The traces.
        probe: `(num_traces, width)`, values of probes as a feature.
        hidden: `(num_traces, width, dim)`, hidden states as features.
        position: Whether the position in the trace is a feature.
        batch: Prompts fitted together; None: all.
        seed: Deals the prompts into batches and folds.

    Returns:
        `(num_traces, width)` values, NaN where a feature is missing, and the seconds it took.
    """
    started = time.perf_counter()
    rows = np.ones(len(table.traces), dtype=bool)
    for feature in (probe, None if hidden is None else hidden[:, :, 0]):
        if feature is not None:
            rows &= (np.isfinite(feature) | ~table.is_state).all(axis=1)
    values = np.full((len(table.traces), table.width), np.nan)
    settings = ReadoutConfig(seed=seed, max_rows=max(1, int(table.is_state.sum())))
    for members in _batches(table, rows, batch, seed):
        states = table.is_state & members[:, None]
        where = np.nonzero(states)
        features, blocks = build_features(
            probe_values=None if probe is None else torch.from_numpy(np.clip(probe[where], 0, 1)),
            positions=torch.from_numpy(_positions(table, members)[where]) if position else None,
            hidden=None if hidden is None else torch.from_numpy(hidden[where]),
        )
        given = States(
            features=features,
            group_means=torch.from_numpy(table.others[where[0]]),
            outcomes=torch.from_numpy(np.clip(table.rewards[where[0]], 0, 1)),
            groups=[table.traces[row].group for row in where[0].tolist()],
            rows=torch.from_numpy(where[0].astype(np.int64)),
            blocks=blocks,
        )
        values[where] = Readout(settings).fit_predict(given, step=0).numpy()
    return values, time.perf_counter() - started


def default_layer(hidden: LayerStates, run: dict[str, Any]) -> int:
    """The layer that the plugin reads by default if it was measured, else the last one measured."""
    default, model = ReadoutConfig().layer, run.get("model")
    num_layers = model.get("num_layers", 0) if isinstance(model, dict) else 0
    known = [layer for layer in (default, default + num_layers) if layer in hidden.layers]
    return known[0] if known else max(hidden.layers, key=lambda layer: (layer < 0, layer))


def regression_methods(evidence: Evidence, probes: Sequence[Method], hidden: LayerStates | None) -> list[Method]:
    """`position`, `calibrated` (on each probe, on the first with the position too); for each layer `hidden`, `both`.

    Args:
        evidence: The traces, and the seed of the folds.
        probes: Methods whose values are calibrated; the first is what `calibrated` and `both` read.
        hidden: Hidden states, if they were measured.
    """
    table = evidence.table

    def fitted(
        name: str, features: str, probe: Method | None = None, layer: int | None = None, position: bool = False
    ) -> Method:
        states = None if hidden is None or layer is None else hidden.layers[layer]
        given = None if probe is None else probe.values
        values, fit_seconds = fit(table, probe=given, hidden=states, position=position, seed=evidence.seed)
        seconds, num_tokens = np.zeros((2, len(table.traces)))
        if hidden is not None and layer is not None:
            seconds, num_tokens = hidden.seconds, hidden.num_tokens
        if probe is not None:
            seconds, num_tokens = probe.seconds + seconds, probe.num_tokens
        # The fit is shared by the traces.
        seconds = seconds + fit_seconds / max(1, len(table.traces))
        about = f"regression on {features}"
        return Method(name, "readout", about, values, rests_on_group=True, seconds=seconds, num_tokens=num_tokens)

    methods = [fitted("position", "the position and the group's other outcomes", position=True)]
    for probe in probes:
        name = "calibrated" if probe is probes[0] else f"calibrated:{probe.name}"
        methods.append(fitted(name, f"{probe.name} and the group's other outcomes", probe))
        if probe is probes[0]:
            features = f"{probe.name}, position and the group's other outcomes"
            methods.append(fitted("calibrated+position", features, probe, position=True))
    for layer in () if hidden is None else hidden.layers:
        features = f"the hidden state after layer {layer} and the group's other outcomes; no probe"
        methods.append(fitted(f"hidden:{layer}", features, layer=layer))
        if probes:
            features = f"{probes[0].name}, the hidden state after layer {layer} and outcomes"
            methods.append(fitted(f"both:{layer}", features, probes[0], layer))
    return methods


def _batches(table: TraceTable, rows: Mask, batch: int | None, seed: int) -> list[Mask]:
    prompts = np.unique(table.groups[rows])
    if batch is None or batch >= len(prompts):
        return [rows] if rows.any() else []
    prompts = np.random.default_rng(seed).permutation(prompts)
    # What does not fill a batch is dealt to the others, so that none is smaller.
    parts = np.array_split(prompts, len(prompts) // batch)
    return [rows & np.isin(table.groups, part) for part in parts]


def _positions(table: TraceTable, members: Mask) -> Array:
    """Position as in training: tokens before the state over a long response's length, at most 1."""
    lengths = np.array(table.lengths, dtype=np.float64)
    long_response = np.quantile(lengths[members], LONG_RESPONSE)
    return np.minimum(table.position * lengths[:, None] / long_response, 1.0)
