"""Regressions on the outcomes as methods of the bench: `calibrated`, `position`, `hidden` and `both`.

They are the plugin's own readout, cross-fitted by prompt: a value comes from fits that saw no outcome of its prompt.
A training size of n is a batch of n prompts, as in the first step of a run: the prompts are dealt into batches of
that size and each is fitted on its own, so with 5 folds a value comes from a fit to 4 n / 5 prompts.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rredcot_verl.analyze.board import Board, Mask
from rredcot_verl.analyze.methods import Method, cost
from rredcot_verl.analyze.records import HIDDEN_FOLDER, Measurements
from rredcot_verl.analyze.statistics import Array
from rredcot_verl.config.blocks import ReadoutConfig
from rredcot_verl.readout.features import build_features
from rredcot_verl.readout.readout import Readout, States

SIZES = (16, 32, 64, 128, 256)
"""Prompts in a batch, for the ablation over training-set sizes; those below the number of prompts are run."""
READ = ("hidden:", "both:")
"""How the names of methods begin that read hidden states; the layer follows."""


LONG_RESPONSE = 0.9
"""Positions are measured against this quantile of the response lengths, as in `trainer.calibration`: a state does
not know how long its own response will become."""


@dataclass(frozen=True)
class Hidden:
    """Projected hidden states of a board.

    Attributes:
        layers: `(num_traces, width, dim)` for each layer read; NaN where there is none.
        seconds, num_tokens: `(num_traces,)`, surplus of reading them.
    """

    layers: dict[int, Array]
    seconds: Array
    num_tokens: Array


def load_hidden(measurements: Measurements, board: Board) -> Hidden | None:
    """Read the hidden states of a cutting; None where there are none."""
    path = measurements.folder / HIDDEN_FOLDER / f"{board.cutting}.npz"
    if not path.exists():
        return None
    with np.load(path) as arrays:
        traces, states = arrays["traces"].tolist(), arrays["states"].tolist()
        read = {int(name.removeprefix("layer_")): arrays[name] for name in arrays if name.startswith("layer_")}
    layers = {}
    for layer, vectors in sorted(read.items()):
        padded = np.full((len(board.traces), board.width, vectors.shape[1]), np.nan)
        for vector, trace, state in zip(vectors, traces, states, strict=True):
            row = board.row_of.get(trace)
            if row is not None and state < board.width:
                padded[row, state] = vector
        layers[layer] = padded
    return Hidden(layers, *cost(board, measurements.costs, "hidden"))


def fit(
    board: Board,
    *,
    probe: Array | None = None,
    hidden: Array | None = None,
    position: bool = False,
    batch: int | None = None,
    seed: int = 0,
) -> tuple[Array, float]:
    """Value all states by a cross-fitted regression on the outcomes.

    Args:
        board: The traces.
        probe: `(num_traces, width)`, values of probes as a feature.
        hidden: `(num_traces, width, dim)`, hidden states as features.
        position: Whether the position in the trace is a feature.
        batch: Prompts fitted together; None: all.
        seed: Deals the prompts into batches and folds.

    Returns:
        `(num_traces, width)` values, NaN where a feature is missing, and the seconds it took.
    """
    started = time.perf_counter()
    rows = np.ones(len(board.traces), dtype=bool)
    for feature in (probe, None if hidden is None else hidden[:, :, 0]):
        if feature is not None:
            rows &= (np.isfinite(feature) | ~board.is_state).all(axis=1)
    values = np.full((len(board.traces), board.width), np.nan)
    settings = ReadoutConfig(seed=seed, max_rows=max(1, int(board.is_state.sum())))
    for members in _batches(board, rows, batch, seed):
        states = board.is_state & members[:, None]
        where = np.nonzero(states)
        features, blocks = build_features(
            probe_values=None if probe is None else torch.from_numpy(np.clip(probe[where], 0, 1)),
            positions=torch.from_numpy(_positions(board, members)[where]) if position else None,
            hidden=None if hidden is None else torch.from_numpy(hidden[where]),
        )
        given = States(
            features=features,
            group_means=torch.from_numpy(_group_means(board, members)[where[0]]),
            outcomes=torch.from_numpy(np.clip(board.rewards[where[0]], 0, 1)),
            groups=[board.traces[row].group for row in where[0].tolist()],
            rows=torch.from_numpy(where[0].astype(np.int64)),
            blocks=blocks,
        )
        values[where] = Readout(settings).fit_predict(given, step=0).numpy()
    return values, time.perf_counter() - started


def default_layer(hidden: Hidden, run: dict[str, Any]) -> int:
    """The layer that the plugin reads by default if it was measured, else the last one measured."""
    default, model = ReadoutConfig().layer, run.get("model")
    num_layers = model.get("num_layers", 0) if isinstance(model, dict) else 0
    known = [layer for layer in (default, default + num_layers) if layer in hidden.layers]
    return known[0] if known else max(hidden.layers, key=lambda layer: (layer < 0, layer))


def readout_methods(board: Board, probes: Sequence[Method], hidden: Hidden | None, *, seed: int = 0) -> list[Method]:
    """`position`, `calibrated` (on each probe, on the first with the position too); for each layer `hidden`, `both`.

    Args:
        board: The traces.
        probes: Methods whose values are calibrated; the first is what `calibrated` and `both` read.
        hidden: Hidden states, if they were measured.
        seed: Of the folds.
    """
    nothing = np.zeros(len(board.traces))
    values, seconds = fit(board, position=True, seed=seed)
    methods = [
        _method(
            board, "position", "regression on the position and the group's other outcomes", values, seconds, nothing
        )
    ]
    for rank, probe in enumerate(probes):
        values, seconds = fit(board, probe=probe.values, seed=seed)
        name = f"calibrated:{probe.name}" if rank else "calibrated"
        about = f"regression on {probe.name} and the group's other outcomes"
        methods.append(_method(board, name, about, values, seconds, probe.seconds, probe.num_tokens))
        if rank == 0:
            values, seconds = fit(board, probe=probe.values, position=True, seed=seed)
            about = f"regression on {probe.name}, position and the group's other outcomes"
            name = "calibrated+position"
            methods.append(_method(board, name, about, values, seconds, probe.seconds, probe.num_tokens))
    if hidden is None:
        return methods
    for layer, states in hidden.layers.items():
        values, seconds = fit(board, hidden=states, seed=seed)
        about = f"regression on the hidden state after layer {layer} and the group's other outcomes; no probe"
        methods.append(_method(board, f"hidden:{layer}", about, values, seconds, hidden.seconds, hidden.num_tokens))
        if probes:
            values, seconds = fit(board, probe=probes[0].values, hidden=states, seed=seed)
            about = f"regression on {probes[0].name}, the hidden state after layer {layer} and outcomes"
            both_seconds = probes[0].seconds + hidden.seconds
            methods.append(_method(board, f"both:{layer}", about, values, seconds, both_seconds, probes[0].num_tokens))
    return methods


def _method(
    board: Board,
    name: str,
    about: str,
    values: Array,
    fit_seconds: float,
    seconds: Array,
    num_tokens: Array | None = None,
) -> Method:
    """A readout's method; its fit is shared by the traces."""
    share = fit_seconds / max(1, len(board.traces))
    tokens = np.zeros(len(board.traces)) if num_tokens is None else num_tokens
    return Method(name, "readout", about, values, seconds=seconds + share, num_tokens=tokens)


def _batches(board: Board, rows: Mask, batch: int | None, seed: int) -> list[Mask]:
    prompts = np.unique(board.groups[rows])
    if batch is None or batch >= len(prompts):
        return [rows] if rows.any() else []
    prompts = np.random.default_rng(seed).permutation(prompts)
    # What does not fill a batch is dealt to the others, so that none is smaller.
    parts = np.array_split(prompts, len(prompts) // batch)
    return [rows & np.isin(board.groups, part) for part in parts]


def _positions(board: Board, members: Mask) -> Array:
    """Position as in training: tokens before the state over a long response's length, at most 1."""
    lengths = np.array(board.lengths, dtype=np.float64)
    long_response = np.quantile(lengths[members], LONG_RESPONSE)
    return np.minimum(board.position * lengths[:, None] / long_response, 1.0)


def _group_means(board: Board, members: Mask) -> Array:
    """Leave-one-out mean reward of the group among the traces of the board; NaN where there is no other."""
    sums = np.bincount(board.groups, board.rewards)
    others = np.bincount(board.groups)[board.groups] - 1
    means = (sums[board.groups] - board.rewards) / np.maximum(others, 1)
    return np.where(members & (others > 0), np.clip(means, 0, 1), np.nan)
