"""Regressions on the outcomes as methods of the bench: `calibrated`, `position`, `hidden` and `both`.

They are the plugin's own readout, cross-fitted by prompt: a fifth of the prompts is valued as a step of a run whose
earlier step were the other prompts, so a value comes from a fit that saw no outcome of its prompt.
"""

import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from rredcot_verl.analyze.method_values import Evidence, Method
from rredcot_verl.analyze.statistics import Array
from rredcot_verl.analyze.trace_table import Mask, TraceTable
from rredcot_verl.config.blocks import ReadoutConfig
from rredcot_verl.readout.features import build_features
from rredcot_verl.readout.readout import Readout, States
from rredcot_verl.sources.regression import LONG_RESPONSE

NUM_FOLDS = 5


def fit(
    table: TraceTable,
    *,
    probe: Array | None = None,
    hidden: Array | None = None,
    position: bool = False,
    seed: int = 0,
) -> tuple[Array, float]:
    """Value all states by a cross-fitted regression on the outcomes.

    Args:
        table: The traces.
        probe: `(num_traces, width)`, values of probes as a feature.
        hidden: `(num_traces, width, dim)`, hidden states as features.
        position: Whether the position in the trace is a feature.
        seed: Deals the prompts into folds.

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
    index = table.groups.tolist()

    def states_of(own: Mask) -> States:
        """The states of some of the traces."""
        where = np.nonzero(table.is_state & own[:, None])
        features, blocks = build_features(
            probe_values=None if probe is None else torch.from_numpy(np.clip(probe[where], 0, 1)),
            positions=torch.from_numpy(_positions(table, rows)[where]) if position else None,
            hidden=None if hidden is None else torch.from_numpy(hidden[where]),
        )
        return States(
            features=features,
            group_means=torch.from_numpy(table.others[where[0]]),
            outcomes=torch.from_numpy(np.clip(table.rewards[where[0]], 0, 1)),
            groups=[index[row] for row in where[0].tolist()],
            rows=torch.from_numpy(where[0].astype(np.int64)),
            # Every trace was measured, whatever its reward, as with credit.form=critic.
            counts=torch.ones(len(where[0]), dtype=torch.bool),
            blocks=blocks,
        )

    prompts = np.random.default_rng(seed).permutation(np.unique(table.groups[rows]))
    for fold in np.array_split(prompts, NUM_FOLDS) if len(prompts) else []:
        readout, own = Readout(settings), rows & np.isin(table.groups, fold)
        readout.fit_predict(states_of(rows & ~own), step=0)
        values[table.is_state & own[:, None]] = readout.fit_predict(states_of(own), step=1).numpy()
    return values, time.perf_counter() - started


def regression_methods(evidence: Evidence, probes: Sequence[Method], layers: Iterable[int]) -> list[Method]:
    """`position`, `calibrated` (on each probe, on the first with the position too); for each layer `hidden`, `both`.

    Args:
        evidence: The traces, their hidden states, and the seed of the folds.
        probes: Methods whose values are calibrated; the first is what `calibrated` and `both` read.
        layers: Those whose hidden states are read.
    """
    outcomes = "the group's other outcomes"
    methods = [_regression(evidence, "position", f"the position and {outcomes}", position=True)]
    for probe in probes[:1]:
        methods.append(_regression(evidence, "calibrated", f"{probe.name} and {outcomes}", probe))
        features = f"{probe.name}, position and {outcomes}"
        methods.append(_regression(evidence, "calibrated+position", features, probe, position=True))
    for probe in probes[1:]:
        methods.append(_regression(evidence, f"calibrated:{probe.name}", f"{probe.name} and {outcomes}", probe))
    for layer in layers:
        state = f"the hidden state after layer {layer}"
        methods.append(_regression(evidence, f"hidden:{layer}", f"{state} and {outcomes}; no probe", layer=layer))
        for probe in probes[:1]:
            methods.append(_regression(evidence, f"both:{layer}", f"{probe.name}, {state} and outcomes", probe, layer))
    return methods


def _regression(
    evidence: Evidence,
    name: str,
    features: str,
    probe: Method | None = None,
    layer: int | None = None,
    position: bool = False,
) -> Method:
    table = evidence.table
    states = None if layer is None else evidence.hidden[layer]
    given = None if probe is None else probe.values
    values, fit_seconds = fit(table, probe=given, hidden=states, position=position, seed=evidence.seed)
    seconds, num_tokens = np.zeros((2, len(table.traces))) if layer is None else evidence.cost("hidden")
    if probe is not None:
        seconds, num_tokens = probe.seconds + seconds, probe.num_tokens
    # The fit is shared by the traces.
    seconds = seconds + fit_seconds / max(1, len(table.traces))
    about = f"regression on {features}"
    return Method(name, "readout", about, values, seconds=seconds, num_tokens=num_tokens)


def _positions(table: TraceTable, members: Mask) -> Array:
    """Position as in training: tokens before the state over a long response's length, at most 1."""
    lengths = np.array(table.lengths, dtype=np.float64)
    long_response = np.quantile(lengths[members], LONG_RESPONSE)
    return np.minimum(table.position * lengths[:, None] / long_response, 1.0)
