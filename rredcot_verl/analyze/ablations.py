"""The same measures under other settings: how traces are cut, temperature, training sizes, credit.

Value forms, proposals, layers and smoothing are methods of their own and need no list here.
"""

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
    methods_from,
)
from rredcot_verl.analyze.method_values import Method, from_all_rollouts
from rredcot_verl.analyze.regressions import SIZES, fit, regression_methods
from rredcot_verl.analyze.statistics import intervals
from rredcot_verl.analyze.trace_table import make_table

BETAS = (0.5, 1.0, 2.0, 5.0)
PENALTY = 0.5

Rows = list[dict[str, Any]]


def ablations(comparison: Comparison) -> dict[str, Rows]:
    """Run all of them, given the comparison under the main cutting at the main temperature."""
    return {
        "segmentation": _segmentation(comparison),
        "temperature": _temperature(comparison),
        "training_size": _training_size(comparison),
        "credit": _credit(comparison),
    }


def _segmentation(comparison: Comparison) -> Rows:
    measurements, main = comparison.evidence.measurements, comparison.table
    rows: Rows = []
    for name in comparison.evidence.each(
        list(dict.fromkeys(cut.cutting for cut in measurements.cuttings)), "ablation: segmentation"
    ):
        other = comparison
        if name != main.cutting:
            table = make_table(measurements, name, main.resamples)
            other = Comparison(replace(comparison.evidence, table=table, notes=[]))
        own = other.evidence
        probes = methods_from(own, PROBES)
        first = [method for method in probes if method.name == REFERENCE]
        layers = [] if own.layer is None else [own.layer]
        methods = [*probes, *methods_from(own), *regression_methods(own, first, layers)]
        extra = {"mean_segments": float(own.table.num_segments.mean()), "num_traces": len(own.table.traces)}
        for method in methods:
            if method.name in ACROSS_CUTTINGS or method.name.startswith(READ):
                rows.append({**_row(other, method, name), **extra})
    return rows


def _temperature(comparison: Comparison) -> Rows:
    evidence, cutting = comparison.evidence, comparison.table.cutting
    temperatures = sorted({r.temperature for r in evidence.measurements.probes if r.cutting == cutting})
    if len(temperatures) < 2:
        evidence.notes.append("one temperature was probed: no ablation over it")
        return []
    return [
        _row(comparison, method, f"{temperature:g}")
        for temperature in temperatures
        for method in methods_from(replace(evidence, temperature=temperature), PROBES)
        if method.name in CALIBRATED
    ]


def _training_size(comparison: Comparison) -> Rows:
    table, evidence, probe = comparison.table, comparison.evidence, comparison.reference
    num_groups = len(np.unique(table.groups))
    if num_groups <= SIZES[0]:
        evidence.notes.append(f"{num_groups} prompts: no ablation over training sizes")
        return []
    features: dict[str, dict[str, Any]] = {"position": {"position": True}}
    if probe is not None:
        features["calibrated"] = {"probe": probe.values}
    if evidence.layer is not None:
        features[f"hidden:{evidence.layer}"] = {"hidden": evidence.hidden[evidence.layer]}
        if probe is not None:
            features[f"both:{evidence.layer}"] = {"probe": probe.values, **features[f"hidden:{evidence.layer}"]}
    rows = []
    for size in evidence.each([*(size for size in SIZES if size < num_groups), num_groups], "ablation: training size"):
        for name, given in features.items():
            values, _ = fit(table, **given, batch=size, seed=evidence.seed)
            rows.append(_row(comparison, Method(name, "readout", "", values), str(size)))
    return rows


def _credit(comparison: Comparison) -> Rows:
    table, layer = comparison.table, comparison.evidence.layer
    names = [*CREDITED, *(f"{prefix}{layer}" for prefix in READ)]
    wanted = [comparison.methods[name] for name in names if name in comparison.methods]
    wanted += [from_all_rollouts(table)] if np.isfinite(table.monte_carlo.values[table.is_state]).any() else []
    penalty = f"error_penalty {PENALTY:g}"
    settings: dict[str, dict[str, Any]] = {
        **{f"reweight, beta {beta:g}": {"form": "reweight", "beta": beta} for beta in BETAS},
        "td": {"form": "td"},
        "td, lambda 0": {"form": "td", "lam": 0.0},
        f"reweight, beta 1, {penalty}": {"form": "reweight", "penalty": PENALTY},
    }
    rows = [
        {"setting": setting, "method": method.name, "measures": comparison.credit(method, **options)}
        for method in wanted
        for setting, options in settings.items()
    ]
    grpo = comparison.credit(None, "reweight", penalty=PENALTY)
    return [*rows, {"setting": penalty, "method": "grpo", "measures": grpo}]


def _row(comparison: Comparison, method: Method, setting: str) -> dict[str, Any]:
    measured = comparison.measure(method, method.covers(comparison.table), measures.KEPT)
    return {"setting": setting, "method": method.name, "measures": intervals(measured)}
