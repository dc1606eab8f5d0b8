"""From measurements to `results.json`: every method, every measure, each with its interval (docs/analyze.md)."""

import json
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from rredcot_verl.analyze import measures
from rredcot_verl.analyze.comparison import Comparison
from rredcot_verl.analyze.estimators import (
    ACROSS_CUTTINGS,
    CALIBRATED,
    PROBES,
    READ,
    REFERENCE,
    methods_from,
    weighed,
)
from rredcot_verl.analyze.example_traces import examples
from rredcot_verl.analyze.labelled_traces import labelled_results
from rredcot_verl.analyze.method_values import Evidence, Method, from_all_rollouts, group_mean, true_values
from rredcot_verl.analyze.records import GRADIENTS_FILE, Measurements
from rredcot_verl.analyze.regressions import regression_methods
from rredcot_verl.analyze.statistics import CONFIDENCE, Resamples, intervals
from rredcot_verl.analyze.trace_table import NUM_ROLLOUTS, TraceTable, make_table

SCHEMA = 2
FEW_PROMPTS = 20


def evaluate(
    measurements: Measurements,
    *,
    seed: int = 0,
    num_resamples: int = 1000,
    cutting: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate a folder of measurements.

    Args:
        measurements: From `records.load`.
        seed: Of the bootstrap and of the readouts' folds.
        num_resamples: Resamples of the bootstrap.
        cutting: The cutting all methods are compared on; None: `main_cutting` of `run.json`, else the one with most
            measured traces.
        progress: Whether to show how far it is.

    Returns:
        The results as docs/analyze.md describes them, ready for `json.dumps(..., allow_nan=False)`.

    Raises:
        ValueError: No trace, no cutting, or one of that name was not measured.
    """
    started = time.perf_counter()
    cutting = _main_cutting(measurements, cutting)
    num_groups = len({trace.group for trace in measurements.traces})
    table = make_table(measurements, cutting, Resamples.draw(num_groups, num_resamples, seed))
    if not table.traces:
        raise ValueError(f"cutting {cutting}: no trace with a segment was measured; there is nothing to evaluate")
    evidence = Evidence(measurements, table, seed, progress=progress)
    methods = all_methods(evidence)
    if num_groups < FEW_PROMPTS:
        evidence.notes.append(
            f"{num_groups} prompts: a bootstrap over so few gives intervals that are too narrow, and regressions keep "
            "the group's mean below 10 prompts"
        )
    comparison = Comparison(evidence, methods)
    entries = [comparison.entry(method) for method in evidence.each(methods, "methods")]
    across, gradients = _across_cuttings(comparison), _gradients(evidence)
    return {
        "schema": SCHEMA,
        "run": measurements.run,
        "evaluation": {
            "seed": seed,
            "num_resamples": num_resamples,
            "confidence": CONFIDENCE,
            "cutting": cutting,
            "layer": evidence.layer,
            "seconds": time.perf_counter() - started,
        },
        "data": _data(table),
        "gold": comparison.gold(),
        "chance": comparison.chance(),
        "methods": entries,
        "labels": labelled_results(evidence, methods),
        "costs": comparison.costs(),
        "gradients": gradients,
        "cuttings": across,
        "examples": examples(table, methods, evidence.layer),
        "notes": evidence.notes,
    }


def all_methods(evidence: Evidence) -> list[Method]:
    """Every method that the measurements of a table allow; what is missing is noted."""
    table, notes = evidence.table, evidence.notes
    probes = methods_from(evidence, PROBES)
    if not probes:
        notes.append(f"no probes for {table.cutting}: no probe methods, no calibration")
    attributions = weighed(evidence)
    if not attributions:
        notes.append("no weights of segments were measured: no attribution methods")
    rollouts = methods_from(evidence)
    if not rollouts:
        nothing = "" if table.has_truth else ", and no truth to compare values with"
        notes.append(f"fewer than two continuations a state: no monte_carlo method{nothing}")
    elif np.median(table.first_rollouts.num_rollouts[table.is_state]) < NUM_ROLLOUTS:
        notes.append(
            f"fewer than {2 * NUM_ROLLOUTS} continuations a state: monte_carlo takes half of them, fewer than "
            f"{NUM_ROLLOUTS}"
        )
    if not evidence.hidden:
        notes.append("no hidden states were measured: no hidden or both")
    by_name = {method.name: method for method in probes}
    calibrated = [by_name[name] for name in CALIBRATED if name in by_name]
    everything = [from_all_rollouts(table)] if rollouts else []
    methods = [group_mean(table), *true_values(table), *everything, *rollouts, *probes, *attributions]
    return methods + regression_methods(evidence, calibrated, evidence.hidden)


def _across_cuttings(comparison: Comparison) -> list[dict[str, Any]]:
    """A short list of methods and measures under every cutting, given the comparison under the main one."""
    measurements, main = comparison.evidence.measurements, comparison.table
    rows: list[dict[str, Any]] = []
    for name in comparison.evidence.each(list(dict.fromkeys(cut.cutting for cut in measurements.cuttings)), "cuttings"):
        other = comparison
        if name != main.cutting:
            table = make_table(measurements, name, main.resamples)
            other = Comparison(replace(comparison.evidence, table=table, notes=[]))
        own = other.evidence
        probes = methods_from(own, PROBES)
        first = [method for method in probes if method.name == REFERENCE]
        layers = [] if own.layer is None else [own.layer]
        for method in [*probes, *methods_from(own), *regression_methods(own, first, layers)]:
            if method.name in ACROSS_CUTTINGS or method.name.startswith(READ):
                measured = other.measure(method, method.covers(own.table), measures.KEPT)
                row = {"cutting": name, "method": method.name, "measures": intervals(measured)}
                rows.append({**row, "mean_segments": float(own.table.num_segments.mean())})
    return rows


def _gradients(evidence: Evidence) -> dict[str, Any] | None:
    """What `measured_gradients` found, if the folder holds it."""
    path = evidence.measurements.folder / GRADIENTS_FILE
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    evidence.notes.append("no gradients were measured: nothing is said of what a form of credit is worth")
    return None


def _main_cutting(measurements: Measurements, cutting: str | None) -> str:
    counts = Counter(cut.cutting for cut in measurements.cuttings)
    if not counts:
        raise ValueError("cuttings.jsonl: no trace was cut; there is nothing to evaluate")
    chosen = cutting or measurements.run.get("main_cutting") or max(counts, key=lambda name: counts[name])
    if chosen not in counts:
        raise ValueError(f"cutting {chosen!r} was not measured; measured are {sorted(counts)}")
    return str(chosen)


def _data(table: TraceTable) -> dict[str, Any]:
    failed, checked, wrong = table.failed, table.lines_checked, table.has_wrong_line
    sums = np.bincount(table.groups, table.rewards)
    counts = np.bincount(table.groups)
    squares = np.bincount(table.groups, table.rewards**2)
    present = counts > 0
    spread = squares[present] / counts[present] - (sums[present] / counts[present]) ** 2
    return {
        "num_traces": len(table.traces),
        "num_groups": int(present.sum()),
        "num_uniform_groups": int((spread <= 1e-12).sum()),
        "num_solved": int((~failed).sum()),
        "num_failed": int(failed.sum()),
        "mean_reward": float(np.mean([trace.reward for trace in table.traces])),
        "num_states": int(table.is_state.sum()),
        "mean_segments": float(table.num_segments.mean()),
        "mean_tokens": float(np.mean(table.lengths)),
        "lines": {
            "num_checked": int((failed & checked).sum()),
            "num_wrong": int((failed & wrong).sum()),
            "num_counted": int((table.wrong_segments >= 0).sum()),
            "num_solved_checked": int((~failed & checked).sum()),
            "num_solved_wrong": int((~failed & wrong).sum()),
        },
    }
