"""What self-values say about credited traces: are they spread out, do they foresee the outcome, is the blame right?"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from rredcot_verl.report import Trace
from rredcot_verl.report.line_checker import LineChecker, check_lines, segment_of_line

VANISHED = 1e-6
"""A value below this pays nothing: the weight exp(beta * d) is 1 but for rounding."""

NUM_RESAMPLES = 1000


def values_of(trace: Trace) -> np.ndarray:
    """The estimates v_0 .. v_{K-1} of a scored trace; v_K is left out, as it is the reward."""
    return np.array([trace.start_value, *(segment.value for segment in trace.segments[:-1])])


def describe(traces: Sequence[Trace], line_checker: LineChecker, seed: int = 0) -> dict[str, Any]:
    """Computes the figures of one value form.

    Args:
        traces: Credited traces; those not scored, or of one segment, are left out.
        line_checker: Judges the lines of a response.
        seed: Seed of the bootstrap.

    Returns:
        Plain numbers. Intervals are 95 % bootstrap intervals over prompts (a prompt's responses are drawn together).

    Raises:
        ValueError: No trace is left.
    """
    scored = [trace for trace in traces if trace.is_scored and len(trace.segments) > 1]
    if not scored:
        raise ValueError(f"none of the {len(traces)} traces is scored and has two segments")
    values = [values_of(trace) for trace in scored]
    flat = np.concatenate(values)
    frame = pd.DataFrame(
        {
            "uid": [f"{trace.step}/{trace.uid}" for trace in scored],
            "last": [own[-1] for own in values],
            "mean": [own.mean() for own in values],
            "outcome": [trace.reward for trace in scored],
        }
    )
    return {
        "num_traces": len(scored),
        "num_prompts": int(frame["uid"].nunique()),
        "value_mean": float(flat.mean()),
        "value_quantiles_5_50_95": np.quantile(flat, [0.05, 0.5, 0.95]).tolist(),
        "share_below_1e-6": float((flat < VANISHED).mean()),
        "range_within_trace_mean": float(np.mean([np.ptp(own) for own in values])),
        "std_within_trace_mean": float(np.mean([own.std() for own in values])),
        "std_between_traces_of_mean": float(frame["mean"].std()),
        "mean_by_third": _by_third(values),
        "correlation_with_outcome": _correlations(frame, seed),
        "blame": _blame(scored, line_checker, seed),
        "weights_of_punished": _weights(scored, line_checker),
    }


def _by_third(values: Sequence[np.ndarray]) -> list[float]:
    thirds = [np.array_split(own, 3) for own in values if len(own) >= 3]
    return [float(np.mean([part[k].mean() for part in thirds])) for k in range(3)] if thirds else []


def _correlations(frame: pd.DataFrame, seed: int) -> dict[str, dict[str, list[float]]]:
    """Pearson and Spearman of v_{K-1} and of the mean value with the outcome, also within prompts, with intervals."""
    columns = ["last", "mean", "outcome"]
    centred = frame[columns] - frame.groupby("uid")[columns].transform("mean")
    uids = frame["uid"].to_numpy()
    result = {}
    for name in ("last", "mean"):
        value, outcome = frame[name].to_numpy(), frame["outcome"].to_numpy()
        pairs = {
            "pearson": (value, outcome),
            # Ranks over all traces: drawing prompts again leaves their order as it is.
            "spearman": (frame[name].rank().to_numpy(), frame["outcome"].rank().to_numpy()),
            "pearson_within_prompt": (centred[name].to_numpy(), centred["outcome"].to_numpy()),
        }
        result[name] = {
            kind: _with_interval(uids, lambda rows, x=x, y=y: _pearson(x[rows], y[rows]), seed)
            for kind, (x, y) in pairs.items()
        }
    return result


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    # Scaled, so that values of 1e-9 lose nothing.
    return float(np.corrcoef(x / np.abs(x).max(), y / np.abs(y).max())[0, 1])


def _blame(scored: Sequence[Trace], line_checker: LineChecker, seed: int) -> dict[str, Any]:
    """How often the most negative segment of a response that failed a test holds its first wrong line.

    `rate_before_last` leaves out the last segment on both sides: its end is pinned to the reward, so a value whose
    level is not that of the reward falls or rises there whatever the response says.
    """
    rows = []
    for trace in scored:
        wrong = _first_wrong_segment(trace, line_checker)
        if trace.reward >= 1.0 or wrong is None:
            continue
        credit = np.array([segment.segment_reward for segment in trace.segments])
        last = len(credit) - 1
        rows.append(
            {
                "uid": f"{trace.step}/{trace.uid}",
                "hit": float(credit.argmin() == wrong),
                "chance": 1.0 / len(credit),
                "blames_last": float(credit.argmin() == last),
                "hit_before_last": float(credit[:-1].argmin() == wrong) if wrong < last else np.nan,
                "chance_before_last": 1.0 / last if wrong < last else np.nan,
                # 0: the lowest credit of all segments, 1: the highest; 0.5 by chance.
                "rank": float((credit[:-1] < credit[wrong]).mean()) if wrong < last and last > 1 else np.nan,
            }
        )
    if not rows:
        return {"num_failed": 0}
    frame = pd.DataFrame(rows)
    uids = frame["uid"].to_numpy()

    def rate(column: str) -> list[float]:
        hits = frame[column].to_numpy()
        return _with_interval(uids, lambda rows: _mean_of_known(hits[rows]), seed)

    return {
        "num_failed": len(frame),
        "rate": rate("hit"),
        "chance": float(frame["chance"].mean()),
        "blames_last_segment": float(frame["blames_last"].mean()),
        "rate_before_last": rate("hit_before_last"),
        "chance_before_last": float(frame["chance_before_last"].mean()),
        "credit_rank_of_first_wrong_line": float(frame["rank"].mean()),
    }


def _mean_of_known(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _weights(scored: Sequence[Trace], line_checker: LineChecker) -> dict[str, float] | None:
    """What the values come to: mean sigma of segments in responses with a negative advantage and a wrong line.

    None where there is no such response.
    """
    rows = []
    for trace in scored:
        wrong = _first_wrong_segment(trace, line_checker)
        last = len(trace.segments) - 1
        if trace.grpo_advantage >= 0 or wrong is None or wrong == last:
            continue
        weights = [segment.weight for segment in trace.segments]
        others = [weight for k, weight in enumerate(weights) if k not in (wrong, last)]
        rows.append((weights[wrong], float(np.mean(others)) if others else np.nan, weights[last]))
    if not rows:
        return None
    means = np.nanmean(rows, axis=0)
    return {"num_traces": len(rows), "first_wrong_line": means[0], "other_segments": means[1], "last_segment": means[2]}


def _first_wrong_segment(trace: Trace, line_checker: LineChecker) -> int | None:
    line = next((line for line in check_lines(line_checker, trace) if not line.ok), None)
    return segment_of_line(trace, line) if line is not None else None


def _with_interval(uids: np.ndarray, statistic: Callable[[np.ndarray], float], seed: int) -> list[float]:
    """A statistic of rows, and the ends of its 95 % interval when prompts are drawn again with all their rows."""
    value = statistic(np.arange(len(uids)))
    if np.isnan(value):
        return [value] * 3
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(uids == uid) for uid in dict.fromkeys(uids)]
    draws = [
        statistic(np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]))
        for _ in range(NUM_RESAMPLES)
    ]
    return [value, *map(float, np.nanquantile(draws, [0.025, 0.975]))]
