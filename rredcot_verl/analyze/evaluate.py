"""From measurements to `results.json`: every method, every measure, each with its interval. See docs/analyze.md.

Schema of the results (`schema` = 1), in JSON types. An *interval* is `{estimate, low, high, num, num_groups, reason}`:
the 95 % percentile interval of a bootstrap over prompts, `num` the states, segments or traces behind it; a number that
cannot be had is null and `reason` says why.

- `run`: contents of the measurement's `run.json`.
- `evaluation`: `seed`, `num_resamples`, `confidence`, `cutting` (the one all methods are compared on), `temperature`,
  `layer` (the one the plugin reads by default, or the last one read; null without hidden states), `seconds`.
- `data`: `num_traces`, `num_groups`, `num_uniform_groups`, `num_solved`, `num_failed`, `mean_reward`, `num_states`,
  `mean_segments`, `mean_tokens`, `lines` (`num_checked`, `num_wrong`, `num_counted`, `num_solved_checked`,
  `num_solved_wrong`).
- `gold`: `num_rollouts` (`min`, `mean`, `max` a state), `noise` (mean variance of a state's gold value), `variance` (of
  the values over states), `split_half` and `ceiling`: for each correlation measure an interval; the first is the
  correlation of two halves of the continuations, the second the correlation with the gold that the true values would
  reach: sqrt(2 r / (1 + r)) by Spearman-Brown.
- `chance`: for `chance`, `first_segment`, `last_segment`: `top1`, `rank`, `auc`, each an interval.
- `grpo`: `snr`: squared mean gradient over the variance of one prompt's; an interval.
- `methods`: list of
  `name`, `family`, `about`, `estimator`, `uses_outcome`, `against` (`gold` or `rest`), `coverage` (share of the traces
  with values), `measures` (name to interval: `measures.NAMES`, and `blame_<top1|rank|auc>` by d_k), `differences`
  (the same names: this method less `joint:reference` on the same states, paired), `over_chance` (`blame_top1` less
  chance), `calibration` (bins: `low`, `high`, `num_states`, `mean_value`, `outcome` an interval; null for methods that
  use the outcome), `credit` (for `reweight` and `td`: `variance.NAMES` and `blame_<top1|rank|auc>` by the final
  advantage), `cost` (`seconds`, `num_tokens` a trace; `seconds_of_log_prob`, `seconds_of_generation`,
  `tokens_of_generation` as ratios; all intervals).
- `costs`: for `generate` and `log_prob`: `seconds`, `num_tokens` a trace, intervals.
- `ablations`: `segmentation`, `temperature`, `training_size`, `credit`: lists of `{setting, method, measures}`; a list
  that could not be made is empty and `notes` says why. Forms, proposals, layers and smoothing are `methods`.
- `examples`: traces with their segments, gold and estimated values, for the page.
- `notes`: what was left out, and why.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rredcot_verl.analyze.ablations import ablations
from rredcot_verl.analyze.comparison import Comparison
from rredcot_verl.analyze.estimators import CALIBRATED, PROBES, SMOOTHED, from_all_rollouts, methods_from, weighed
from rredcot_verl.analyze.example_traces import examples
from rredcot_verl.analyze.method_values import Evidence, Method, group_mean, smoothed
from rredcot_verl.analyze.records import Measurements
from rredcot_verl.analyze.regressions import LayerStates, default_layer, load_hidden, regression_methods
from rredcot_verl.analyze.statistics import CONFIDENCE, Resamples
from rredcot_verl.analyze.trace_table import NUM_ROLLOUTS, TraceTable, make_table
from rredcot_verl.analyze.wrong_lines import WrongSegments

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
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a folder of measurements.

    Args:
        measurements: From `records.load`.
        seed: Of the bootstrap and of the readouts' folds.
        num_resamples: Resamples of the bootstrap.
        cutting: The cutting all methods are compared on; None: `main_cutting` of `run.json`, else the one with most
            measured traces.
        temperature: The probes' temperature; None: `temperature` of `run.json`, else that of most probes.
        progress: Called with what is done, how many are done and of how many.

    Returns:
        The results as this module's docstring describes them, ready for `json.dumps(..., allow_nan=False)`.

    Raises:
        ValueError: No trace, no cutting, or one of that name or temperature was not measured.
    """
    started = time.perf_counter()
    report = progress or (lambda what, done, total: None)
    notes: list[str] = []
    cutting = _main_cutting(measurements, cutting)
    temperature = _temperature(measurements, temperature)
    table = make_table(measurements, cutting)
    if not table.traces:
        raise ValueError(f"cutting {cutting}: no trace with a segment was measured; there is nothing to evaluate")
    num_groups = int(len({trace.group for trace in measurements.traces}))
    resamples = Resamples.draw(num_groups, num_resamples, seed)
    hidden = load_hidden(measurements, table)
    layer = None if hidden is None else default_layer(hidden, measurements.run)
    evidence = Evidence(measurements, table, temperature)
    methods = all_methods(evidence, hidden, seed, notes)
    if num_groups < FEW_PROMPTS:
        notes.append(
            f"{num_groups} prompts: a bootstrap over so few gives intervals that are too narrow, and regressions keep "
            "the group's mean below 10 prompts"
        )
    comparison = Comparison(measurements, table, resamples, methods, notes)
    entries = []
    for done, method in enumerate(methods):
        entries.append(comparison.entry(method))
        report(f"methods ({method.name})", done + 1, len(methods))
    sections = ablations(evidence, comparison, hidden, seed, notes, report)
    return {
        "schema": SCHEMA,
        "run": measurements.run,
        "evaluation": {
            "seed": seed,
            "num_resamples": num_resamples,
            "confidence": CONFIDENCE,
            "cutting": cutting,
            "temperature": temperature,
            "layer": layer,
            "seconds": time.perf_counter() - started,
        },
        "data": _data(table, comparison.wrong),
        "gold": comparison.gold(),
        "chance": comparison.chance(),
        "grpo": comparison.grpo(),
        "methods": entries,
        "costs": comparison.costs(),
        "ablations": sections,
        "examples": examples(table, methods, comparison.wrong, layer),
        "notes": notes,
    }


def all_methods(evidence: Evidence, hidden: LayerStates | None, seed: int, notes: list[str]) -> list[Method]:
    """Every method that the measurements of a table allow; what is missing is noted."""
    table = evidence.table
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
    if hidden is None:
        notes.append("no hidden states were measured: no hidden or both")
    by_name = {method.name: method for method in probes}
    calibrated = [by_name[name] for name in CALIBRATED if name in by_name]
    everything = [from_all_rollouts(table)] if rollouts else []
    methods = [group_mean(table), *everything, *rollouts, *probes, *attributions]
    methods += regression_methods(table, calibrated, hidden, seed=seed)
    found = {method.name: method for method in methods}
    methods += [smoothed(table, found[name], s) for name in SMOOTHED if name in found for s in STRENGTHS]
    return methods


def _main_cutting(measurements: Measurements, cutting: str | None) -> str:
    counts: dict[str, int] = {}
    for cut in measurements.cuttings:
        counts[cut.cutting] = counts.get(cut.cutting, 0) + 1
    if not counts:
        raise ValueError("cuttings.jsonl: no trace was cut; there is nothing to evaluate")
    chosen = cutting or measurements.run.get("main_cutting") or max(counts, key=lambda name: counts[name])
    if chosen not in counts:
        raise ValueError(f"cutting {chosen!r} was not measured; measured are {sorted(counts)}")
    return str(chosen)


def _temperature(measurements: Measurements, temperature: float | None) -> float:
    counts: dict[float, int] = {}
    for record in measurements.probes:
        counts[record.temperature] = counts.get(record.temperature, 0) + 1
    chosen = measurements.run.get("temperature") if temperature is None else temperature
    if chosen is None or (temperature is None and counts and chosen not in counts):
        chosen = max(counts, key=lambda number: counts[number]) if counts else 1.0
    if temperature is not None and temperature not in counts:
        raise ValueError(f"temperature {temperature:g} was not probed; probed are {sorted(counts)}")
    return float(chosen)


def _data(table: TraceTable, wrong: WrongSegments) -> dict[str, Any]:
    sums = np.bincount(table.groups, table.rewards)
    counts = np.bincount(table.groups)
    squares = np.bincount(table.groups, table.rewards**2)
    present = counts > 0
    spread = squares[present] / counts[present] - (sums[present] / counts[present]) ** 2
    return {
        "num_traces": len(table.traces),
        "num_groups": int(present.sum()),
        "num_uniform_groups": int((spread <= 1e-12).sum()),
        "num_solved": int((~table.failed).sum()),
        "num_failed": int(table.failed.sum()),
        "mean_reward": float(np.mean([trace.reward for trace in table.traces])),
        "num_states": int(table.is_state.sum()),
        "mean_segments": float(table.num_segments.mean()),
        "mean_tokens": float(np.mean(table.lengths)),
        "lines": {
            "num_checked": wrong.num_checked,
            "num_wrong": wrong.num_wrong,
            "num_counted": len(wrong.rows),
            "num_solved_checked": wrong.num_solved_checked,
            "num_solved_wrong": wrong.num_solved_wrong,
        },
    }
