"""The same measures under other settings: how traces are cut, temperature, training sizes, credit.

Value forms, proposals, layers and smoothing are methods of their own and need no list here.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from rredcot_verl.analyze import measures
from rredcot_verl.analyze.board import make_board
from rredcot_verl.analyze.compare import Comparison, the_gold
from rredcot_verl.analyze.methods import REFERENCE, Method, monte_carlo, probe_methods
from rredcot_verl.analyze.readouts import READ, SIZES, default_layer, fit, load_hidden, readout_methods
from rredcot_verl.analyze.records import Measurements

PROBED = (REFERENCE, "geometric:reference", "normalized:union")
ACROSS_CUTTINGS = (*PROBED, "vps", "mig", "monte_carlo", "position", "calibrated")
CREDITED = (REFERENCE, "geometric:reference", "vps", "mig", "calibrated")
BETAS = (0.5, 1.0, 2.0, 5.0)
PENALTY = 0.5

Report = Callable[[str, int, int], None]
Rows = list[dict[str, Any]]


def ablations(
    measurements: Measurements,
    comparison: Comparison,
    temperature: float,
    seed: int,
    notes: list[str],
    report: Report,
) -> dict[str, Rows]:
    """Run all of them.

    Args:
        measurements: All records.
        comparison: That of the main cutting.
        temperature: Of the probes, outside the ablation over it.
        seed: Of the readouts' folds and batches.
        notes: What could not be done is added here.
        report: Called with what is done, how many are done and of how many.
    """
    return {
        "segmentation": _segmentation(measurements, comparison, temperature, seed, report),
        "temperature": _temperature(measurements, comparison, notes),
        "training_size": _training_size(measurements, comparison, seed, notes, report),
        "credit": _credit(comparison),
    }


def _segmentation(
    measurements: Measurements, comparison: Comparison, temperature: float, seed: int, report: Report
) -> Rows:
    names = list(dict.fromkeys(cut.cutting for cut in measurements.cuttings))
    rows: Rows = []
    for done, name in enumerate(names):
        other = comparison if name == comparison.board.cutting else _other(measurements, comparison, name)
        probes = probe_methods(measurements, other.board, temperature)
        first = [method for method in probes if method.name == REFERENCE]
        methods = [*probes, *monte_carlo(other.board), *readout_methods(other.board, first, None, seed=seed)]
        hidden = load_hidden(measurements, other.board)
        if hidden is not None:
            layer = default_layer(hidden, measurements.run)
            only = replace(hidden, layers={layer: hidden.layers[layer]})
            methods += readout_methods(other.board, first, only, seed=seed)[-(1 + len(first)) :]
        wanted = [method for method in methods if method.name in ACROSS_CUTTINGS or method.name.startswith(READ)]
        for method in wanted:
            extra = {"mean_segments": float(other.board.num_segments.mean()), "num_traces": len(other.board.traces)}
            rows.append({**_row(other, method, name), **extra})
        report(f"ablation: segmentation ({name})", done + 1, len(names))
    return rows


def _other(measurements: Measurements, comparison: Comparison, name: str) -> Comparison:
    board = make_board(measurements, name)
    return Comparison(measurements, board, comparison.resamples, [], [])


def _temperature(measurements: Measurements, comparison: Comparison, notes: list[str]) -> Rows:
    board = comparison.board
    temperatures = sorted({record.temperature for record in measurements.probes if record.cutting == board.cutting})
    if len(temperatures) < 2:
        notes.append("one temperature was probed: no ablation over it")
        return []
    rows = []
    for temperature in temperatures:
        for method in probe_methods(measurements, board, temperature):
            if method.name in PROBED:
                rows.append(_row(comparison, method, f"{temperature:g}"))
    return rows


def _training_size(
    measurements: Measurements, comparison: Comparison, seed: int, notes: list[str], report: Report
) -> Rows:
    board = comparison.board
    probe = comparison.reference
    hidden = load_hidden(measurements, board)
    num_groups = len(np.unique(board.groups))
    sizes = [size for size in SIZES if size < num_groups] + [num_groups]
    features: dict[str, dict[str, Any]] = {"position": {"position": True}}
    if probe is not None:
        features["calibrated"] = {"probe": probe.values}
    if hidden is not None:
        layer = default_layer(hidden, measurements.run)
        features[f"hidden:{layer}"] = {"hidden": hidden.layers[layer]}
        if probe is not None:
            features[f"both:{layer}"] = {"probe": probe.values, "hidden": hidden.layers[layer]}
    if num_groups <= SIZES[0]:
        notes.append(f"{num_groups} prompts: no ablation over training sizes")
        return []
    rows = []
    for done, size in enumerate(sizes):
        for name, given in features.items():
            values, _ = fit(board, **given, batch=size, seed=seed)
            method = Method(name, "readout", "", values)
            rows.append(_row(comparison, method, str(size)))
        report(f"ablation: training size ({size} prompts)", done + 1, len(sizes))
    return rows


def _credit(comparison: Comparison) -> Rows:
    board = comparison.board
    wanted = [comparison.methods[name] for name in CREDITED if name in comparison.methods]
    hidden = load_hidden(comparison.measurements, board)
    if hidden is not None:
        layer = default_layer(hidden, comparison.measurements.run)
        names = [prefix + str(layer) for prefix in READ]
        wanted += [comparison.methods[name] for name in names if name in comparison.methods]
    wanted += [the_gold(board)] if np.isfinite(board.gold.values[board.is_state]).any() else []
    rows = []
    for method in wanted:
        for beta in BETAS:
            setting = f"reweight, beta {beta:g}"
            rows.append(_credit_row(comparison, method, setting, form="reweight", beta=beta))
        rows.append(_credit_row(comparison, method, "td", form="td"))
        rows.append(_credit_row(comparison, method, "td, lambda 0", form="td", lam=0.0))
        setting = f"reweight, beta 1, error_penalty {PENALTY:g}"
        rows.append(_credit_row(comparison, method, setting, form="reweight", penalty=PENALTY))
    rows.append(_credit_row(comparison, None, f"error_penalty {PENALTY:g}", form="reweight", penalty=PENALTY))
    return rows


def _row(comparison: Comparison, method: Method, setting: str) -> dict[str, Any]:
    measured = comparison.measure(method, method.covers(comparison.board), measures.KEPT)
    return {
        "setting": setting,
        "method": method.name,
        "measures": {name: value.interval() for name, value in measured.items()},
    }


def _credit_row(comparison: Comparison, method: Method | None, setting: str, **options: Any) -> dict[str, Any]:
    name = "grpo" if method is None else method.name
    return {"setting": setting, "method": name, "measures": comparison.credit(method, **options)}
