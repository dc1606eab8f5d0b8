"""How values and their differences agree with Monte Carlo, and with the outcome.

v_k is compared for k = 0 .. K-1: v_K is the outcome for every method and would only dilute the comparison. d_k is
compared for k = 1 .. K-1, since d_K = R - v_{K-1} holds the trace's own outcome for both sides; `d_last` counts it in.
"""

from collections.abc import Iterable

import numpy as np

from rredcot_verl.analyze.statistics import Array, Measured, row_correlation, within_ranks
from rredcot_verl.analyze.trace_table import Mask, MonteCarloValues, TraceTable

THIRDS = ("early", "middle", "late")
NUM_BINS = 10
USES_OUTCOME = "its values are made with the trace's own outcome, so they are no forecast of it"

KEPT = ("spearman_v", "spearman_d", "spearman_v_within", "spearman_d_within", "mse", "bias", "brier", "ece")
"""What is measured where a short list is asked for."""
FLUENCY = ("fluency", "fluency_within")
"""Spearman correlation of d with the mean log-probability of the segment's tokens: credit that only echoes it says how
usual a segment's words are."""
NAMES = (
    "spearman_v",
    "spearman_d",
    "spearman_d_last",
    "spearman_v_within",
    "spearman_d_within",
    *(f"spearman_{what}_{third}" for what in ("v", "d") for third in THIRDS),
    *FLUENCY,
    "mse",
    "bias",
    "brier",
    "ece",
)
"""All measures of this module."""


def agreement(
    table: TraceTable,
    values: Array,
    gold: MonteCarloValues,
    rows: Mask,
    *,
    rewards: Array | None = None,
    names: Iterable[str] = NAMES,
    uses_outcome: bool = False,
) -> dict[str, Measured]:
    """All measures of one method.

    Args:
        table: The traces.
        values: `(num_traces, width)`, v_0 .. v_{K-1}.
        gold: What they are compared with.
        rows: `(num_traces,)`, the traces to count.
        rewards: d_1 .. d_K; from the values where not given.
        names: Which measures.
        uses_outcome: Leaves `brier` and `ece` out.
    """
    valued = table.is_state & rows[:, None] & np.isfinite(values)
    states = valued & np.isfinite(gold.values)
    rewards = table.segment_rewards(values) if rewards is None else rewards
    gold_rewards = table.segment_rewards(gold.values)
    segments = table.is_state & rows[:, None] & np.isfinite(rewards) & np.isfinite(gold_rewards)
    inner = segments & table.is_inner
    third_of_state = np.minimum(np.floor(3 * table.position), 2)
    third_of_segment = np.minimum(np.floor(3 * table.segment_ends), 2)
    known = np.isfinite(table.fluency)
    sides = {
        "v": (values, gold.values, states, third_of_state),
        "d": (rewards, gold_rewards, inner, third_of_segment),
        "d_last": (rewards, gold_rewards, segments, third_of_segment),
        "fluency": (
            rewards,
            table.fluency,
            table.is_inner & rows[:, None] & np.isfinite(rewards) & known,
            third_of_segment,
        ),
    }
    measured = {}
    for name in names:
        if name in ("mse", "bias"):
            measured[name] = _error(table, name, values, gold, states)
        elif name in ("brier", "ece"):
            measured[name] = Measured.none(USES_OUTCOME) if uses_outcome else _forecast(table, name, values, valued)
        else:
            measured[name] = _correlation(table, name, sides)
    return measured


def calibration_curve(table: TraceTable, values: Array, rows: Mask) -> list[dict[str, object]]:
    """Mean outcome of the traces by value, in bins of equal width that hold a state.

    Returns:
        One row a bin: `low`, `high`, `num_states`, `mean_value`, and `outcome` as an interval.
    """
    valued = table.is_state & rows[:, None] & np.isfinite(values)
    bins = _bins(values)
    outcomes = np.broadcast_to(table.rewards[:, None], values.shape)
    curve = []
    for number in range(NUM_BINS):
        inside = valued & (bins == number)
        if not inside.any():
            continue
        groups = table.groups_of(inside)
        samples = table.resamples.mean(outcomes[inside], groups)
        # A bin of few prompts is empty in many resamples; those are not counted against it.
        drawn = np.concatenate([samples[:1], samples[1:][np.isfinite(samples[1:])]])
        curve.append(
            {
                "low": number / NUM_BINS,
                "high": (number + 1) / NUM_BINS,
                "num_states": int(inside.sum()),
                "mean_value": float(values[inside].mean()),
                "outcome": Measured.of(drawn, groups).interval(),
            }
        )
    return curve


def _correlation(table: TraceTable, name: str, sides: dict[str, tuple[Array, Array, Mask, Array]]) -> Measured:
    what, _, where = name.removeprefix("spearman_").partition("_")
    if where == "last":
        what, where = "d_last", ""
    x, y, valid, thirds = sides[what]
    if where in THIRDS:
        valid = valid & (thirds == THIRDS.index(where))
    if where == "within":
        per_trace = row_correlation(within_ranks(x, valid), within_ranks(y, valid), valid)
        defined = np.isfinite(per_trace)
        groups = table.groups[defined]
        reason = "no trace with three or more that differ in the gold"
        return Measured.of(table.resamples.mean(per_trace[defined], groups), groups, reason)
    groups = table.groups_of(valid)
    return Measured.of(table.resamples.spearman(x[valid], y[valid], groups), groups)


def _error(table: TraceTable, name: str, values: Array, gold: MonteCarloValues, states: Mask) -> Measured:
    if name == "mse":
        states = states & np.isfinite(gold.noise)
    groups = table.groups_of(states)
    off = values[states] - gold.values[states]
    # The gold is a mean of few continuations: its own variance is in every square, and is taken out.
    quantity = off**2 - gold.noise[states] if name == "mse" else off
    reason = "fewer than two continuations a state" if name == "mse" else None
    return Measured.of(table.resamples.mean(quantity, groups), groups, reason)


def _forecast(table: TraceTable, name: str, values: Array, valued: Mask) -> Measured:
    groups, resamples = table.groups_of(valued), table.resamples
    off = (values - table.rewards[:, None])[valued]
    if name == "brier":
        return Measured.of(resamples.mean(off**2, groups), groups)
    bins = _bins(values)[valued]
    gaps = [np.abs(resamples.total(np.where(bins == k, off, 0.0), groups)) for k in range(NUM_BINS)]
    total = resamples.total(np.ones_like(off), groups)
    samples = np.sum(gaps, axis=0) / np.where(total > 0, total, np.nan)
    # A sum of absolute gaps only grows by noise, so resamples lie above the estimate; they are moved back by that much.
    drawn = samples[1:][np.isfinite(samples[1:])]
    surplus = drawn.mean() - samples[0] if drawn.size else 0.0
    return Measured.of(np.r_[samples[:1], np.maximum(samples[1:] - surplus, 0.0)], groups)


def _bins(values: Array) -> Array:
    filled = np.nan_to_num(values, nan=0.0)
    return np.clip(np.floor(filled * NUM_BINS), 0, NUM_BINS - 1)
