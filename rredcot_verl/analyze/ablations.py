"""The same measures under other settings: how traces are cut, temperature, training sizes, credit.

Value forms, proposals, layers and smoothing are methods of their own and need no list here.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from rredcot_verl.analyze import measures
from rredcot_verl.analyze.comparison import Comparison
from rredcot_verl.analyze.estimators import (
    ACROSS_CUTTINGS,
    CALIBRATED,
    CREDITED,
    PROBES,
    READ,
    REFERENCE,
    from_all_rollouts,
    methods_from,
)
from rredcot_verl.analyze.method_values import Evidence, Method
from rredcot_verl.analyze.regressions import SIZES, LayerStates, default_layer, fit, load_hidden, regression_methods
from rredcot_verl.analyze.statistics import intervals
from rredcot_verl.analyze.trace_table import make_table

BETAS = (0.5, 1.0, 2.0, 5.0)
PENALTY = 0.5

Report = Callable[[str, int, int], None]
Rows = list[dict[str, Any]]


def ablations(
    evidence: Evidence, comparison: Comparison, hidden: LayerStates | None, seed: int, notes: list[str], report: Report
) -> dict[str, Rows]:
    """Run all of them.

    Args:
        evidence: All records, with the main cutting, and the temperature outside the ablation over it.
        comparison: That of the main cutting.
        hidden: Its hidden states.
        seed: Of the regressions' folds and batches.
        notes: What could not be done is added here.
        report: Called with what is done, how many are done and of how many.
    """
    layer = None if hidden is None else default_layer(hidden, evidence.measurements.run)
    read = None if hidden is None or layer is None else hidden.only(layer)
    return {
        "segmentation": _segmentation(evidence, comparison, seed, report),
        "temperature": _temperature(evidence, comparison, notes),
        "training_size": _training_size(comparison, read, seed, notes, report),
        "credit": _credit(comparison, layer),
    }


def _segmentation(evidence: Evidence, comparison: Comparison, seed: int, report: Report) -> Rows:
    measurements = evidence.measurements
    names = list(dict.fromkeys(cut.cutting for cut in measurements.cuttings))
    rows: Rows = []
    for done, name in enumerate(names):
        other = comparison
        if name != comparison.table.cutting:
            other = Comparison(measurements, make_table(measurements, name), comparison.resamples, [], [])
        table = other.table
        own = replace(evidence, table=table)
        probes = methods_from(own, PROBES)
        first = [method for method in probes if method.name == REFERENCE]
        hidden = load_hidden(measurements, table)
        read = None if hidden is None else hidden.only(default_layer(hidden, measurements.run))
        methods = [*probes, *methods_from(own), *regression_methods(table, first, read, seed=seed)]
        extra = {"mean_segments": float(table.num_segments.mean()), "num_traces": len(table.traces)}
        for method in methods:
            if method.name in ACROSS_CUTTINGS or method.name.startswith(READ):
                rows.append({**_row(other, method, name), **extra})
        report(f"ablation: segmentation ({name})", done + 1, len(names))
    return rows


def _temperature(evidence: Evidence, comparison: Comparison, notes: list[str]) -> Rows:
    cutting = evidence.table.cutting
    temperatures = sorted({r.temperature for r in evidence.measurements.probes if r.cutting == cutting})
    if len(temperatures) < 2:
        notes.append("one temperature was probed: no ablation over it")
        return []
    return [
        _row(comparison, method, f"{temperature:g}")
        for temperature in temperatures
        for method in methods_from(replace(evidence, temperature=temperature), PROBES)
        if method.name in CALIBRATED
    ]


def _training_size(
    comparison: Comparison, hidden: LayerStates | None, seed: int, notes: list[str], report: Report
) -> Rows:
    table = comparison.table
    probe = comparison.reference
    num_groups = len(np.unique(table.groups))
    sizes = [size for size in SIZES if size < num_groups] + [num_groups]
    features: dict[str, dict[str, Any]] = {"position": {"position": True}}
    if probe is not None:
        features["calibrated"] = {"probe": probe.values}
    for layer, states in () if hidden is None else hidden.layers.items():
        features[f"hidden:{layer}"] = {"hidden": states}
        if probe is not None:
            features[f"both:{layer}"] = {"probe": probe.values, "hidden": states}
    if num_groups <= SIZES[0]:
        notes.append(f"{num_groups} prompts: no ablation over training sizes")
        return []
    rows = []
    for done, size in enumerate(sizes):
        for name, given in features.items():
            values, _ = fit(table, **given, batch=size, seed=seed)
            rows.append(_row(comparison, Method(name, "readout", "", values), str(size)))
        report(f"ablation: training size ({size} prompts)", done + 1, len(sizes))
    return rows


def _credit(comparison: Comparison, layer: int | None) -> Rows:
    table = comparison.table
    names = [*CREDITED, *(f"{prefix}{layer}" for prefix in READ)]
    wanted = [comparison.methods[name] for name in names if name in comparison.methods]
    wanted += [from_all_rollouts(table)] if np.isfinite(table.monte_carlo.values[table.is_state]).any() else []
    rows = []
    for method in wanted:
        for beta in BETAS:
            rows.append(_credit_row(comparison, method, f"reweight, beta {beta:g}", form="reweight", beta=beta))
        rows.append(_credit_row(comparison, method, "td", form="td"))
        rows.append(_credit_row(comparison, method, "td, lambda 0", form="td", lam=0.0))
        setting = f"reweight, beta 1, error_penalty {PENALTY:g}"
        rows.append(_credit_row(comparison, method, setting, form="reweight", penalty=PENALTY))
    rows.append(_credit_row(comparison, None, f"error_penalty {PENALTY:g}", form="reweight", penalty=PENALTY))
    return rows


def _row(comparison: Comparison, method: Method, setting: str) -> dict[str, Any]:
    measured = comparison.measure(method, method.covers(comparison.table), measures.KEPT)
    return {"setting": setting, "method": method.name, "measures": intervals(measured)}


def _credit_row(comparison: Comparison, method: Method | None, setting: str, **options: Any) -> dict[str, Any]:
    name = "grpo" if method is None else method.name
    return {"setting": setting, "method": name, "measures": comparison.credit(method, **options)}
