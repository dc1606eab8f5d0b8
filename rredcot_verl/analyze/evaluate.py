"""From measurements to `results.json`: every method, every measure, each with its interval (docs/analyze.md)."""

import time
from collections import Counter
from typing import Any

import numpy as np

from rredcot_verl.analyze.ablations import ablations
from rredcot_verl.analyze.comparison import Comparison
from rredcot_verl.analyze.estimators import CALIBRATED, PROBES, SMOOTHED, methods_from, weighed
from rredcot_verl.analyze.example_traces import examples
from rredcot_verl.analyze.method_values import Evidence, Method, from_all_rollouts, group_mean, smoothed
from rredcot_verl.analyze.records import Measurements
from rredcot_verl.analyze.regressions import regression_methods
from rredcot_verl.analyze.statistics import CONFIDENCE, Resamples
from rredcot_verl.analyze.trace_table import NUM_ROLLOUTS, TraceTable, make_table

SCHEMA = 1
FEW_PROMPTS = 20
STRENGTHS = (0.25, 0.5)


def evaluate(
    measurements: Measurements,
    *,
    seed: int = 0,
    num_resamples: int = 1000,
    cutting: str | None = None,
    temperature: float | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate a folder of measurements.

    Args:
        measurements: From `records.load`.
        seed: Of the bootstrap and of the readouts' folds.
        num_resamples: Resamples of the bootstrap.
        cutting: The cutting all methods are compared on; None: `main_cutting` of `run.json`, else the one with most
            measured traces.
        temperature: The probes' temperature; None: `temperature` of `run.json`, else that of most probes.
        progress: Whether to show how far it is.

    Returns:
        The results as docs/analyze.md describes them, ready for `json.dumps(..., allow_nan=False)`.

    Raises:
        ValueError: No trace, no cutting, or one of that name or temperature was not measured.
    """
    started = time.perf_counter()
    cutting = _main_cutting(measurements, cutting)
    temperature = _temperature(measurements, temperature)
    num_groups = len({trace.group for trace in measurements.traces})
    table = make_table(measurements, cutting, Resamples.draw(num_groups, num_resamples, seed))
    if not table.traces:
        raise ValueError(f"cutting {cutting}: no trace with a segment was measured; there is nothing to evaluate")
    evidence = Evidence(measurements, table, temperature, seed, progress=progress)
    methods = all_methods(evidence)
    if num_groups < FEW_PROMPTS:
        evidence.notes.append(
            f"{num_groups} prompts: a bootstrap over so few gives intervals that are too narrow, and regressions keep "
            "the group's mean below 10 prompts"
        )
    comparison = Comparison(evidence, methods)
    entries = [comparison.entry(method) for method in evidence.each(methods, "methods")]
    sections = ablations(comparison)
    return {
        "schema": SCHEMA,
        "run": measurements.run,
        "evaluation": {
            "seed": seed,
            "num_resamples": num_resamples,
            "confidence": CONFIDENCE,
            "cutting": cutting,
            "temperature": temperature,
            "layer": evidence.layer,
            "seconds": time.perf_counter() - started,
        },
        "data": _data(table),
        "gold": comparison.gold(),
        "chance": comparison.chance(),
        "grpo": comparison.grpo(),
        "methods": entries,
        "costs": comparison.costs(),
        "ablations": sections,
        "examples": examples(table, methods, evidence.layer),
        "notes": evidence.notes,
    }


def all_methods(evidence: Evidence) -> list[Method]:
    """Every method that the measurements of a table allow; what is missing is noted."""
    table, notes = evidence.table, evidence.notes
    probes = methods_from(evidence, PROBES)
    if not probes:
        notes.append(
            f"no probes for {table.cutting} at temperature {evidence.temperature:g}: no probe methods, no calibration"
        )
    attributions = weighed(evidence)
    if not attributions:
        notes.append("no weights of segments were measured: no attribution methods")
    rollouts = methods_from(evidence)
    if not rollouts:
        notes.append("fewer than two continuations a state: no monte_carlo method, and nothing to compare with")
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
    methods = [group_mean(table), *everything, *rollouts, *probes, *attributions]
    methods += regression_methods(evidence, calibrated, evidence.hidden)
    found = {method.name: method for method in methods}
    methods += [smoothed(table, found[name], s) for name in SMOOTHED if name in found for s in STRENGTHS]
    return methods


def _main_cutting(measurements: Measurements, cutting: str | None) -> str:
    counts = Counter(cut.cutting for cut in measurements.cuttings)
    if not counts:
        raise ValueError("cuttings.jsonl: no trace was cut; there is nothing to evaluate")
    chosen = cutting or measurements.run.get("main_cutting") or max(counts, key=lambda name: counts[name])
    if chosen not in counts:
        raise ValueError(f"cutting {chosen!r} was not measured; measured are {sorted(counts)}")
    return str(chosen)


def _temperature(measurements: Measurements, temperature: float | None) -> float:
    counts = Counter(record.temperature for record in measurements.probes)
    chosen = measurements.run.get("temperature") if temperature is None else temperature
    if chosen is None or (temperature is None and counts and chosen not in counts):
        chosen = max(counts, key=lambda number: counts[number]) if counts else 1.0
    if temperature is not None and temperature not in counts:
        raise ValueError(f"temperature {temperature:g} was not probed; probed are {sorted(counts)}")
    return float(chosen)


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
