"""The figures of a run: what it reached, what it cost, where the credit went, and whether the blame is located.

``summarise`` returns plain numbers, lists and dicts, as they stand in ``summary.json``; the page draws from
the same ones.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rredcot_verl.report.data import Curve, Run
from rredcot_verl.report.learning import ALONE, Twins, matching_curve
from rredcot_verl.report.line_checker import LineChecker, blame_of, check_lines
from rredcot_verl.report.prompt_lists import summarise_prompts
from rredcot_verl.report.prompts import Prompt, prompts_of
from rredcot_verl.report.thresholds import Thresholds
from rredcot_verl.report.trace import Trace

NUM_BINS = 10
STEP_SECONDS = "timing_s/step"
SELF_VALUE_SECONDS = "timing_s/self_value"
PROBE_TOKENS = "rredcot/probe_tokens_per_response_token/mean"


def summarise(
    run: Run,
    baseline: Run | None = None,
    line_checker: LineChecker | None = None,
    *,
    thresholds: Thresholds | None = None,
    prompts: Sequence[Prompt] | None = None,
    twins: Twins = ALONE,
) -> dict[str, Any]:
    """Computes the figures of a run.

    Args:
        run: The run, with its traces.
        baseline: The paired GRPO run.
        line_checker: Judges the lines of a response; without one the blame is not measured.
        thresholds: When a prompt is listed as guessing or as sharing a blame.
        prompts: What ``prompts_of`` returned for the same run and thresholds, to save computing it twice.
        twins: The same run, and the baseline, with other seeds.

    Returns:
        The summary, ready for ``json.dumps``; what cannot be known is ``None``. Shares are in [0, 1], times in seconds.

    Raises:
        ReportError: The line checker gave offsets outside a response.
    """
    scored = [trace for trace in run.traces if trace.is_scored]
    skipped = Counter(trace.status for trace in run.traces if not trace.is_scored)
    errors = [abs(trace.return_error) for trace in scored]
    forecasts = [trace for trace in scored if trace.is_forecast]
    thresholds = thresholds or Thresholds()
    prompts = prompts_of(run, thresholds) if prompts is None else prompts
    return {
        "run": str(run.path),
        "source": "; ".join(dict.fromkeys(trace.source for trace in run.traces)) or None,
        "notes": notes(run),
        **_learning(run, run.curve),
        "baseline": None
        if baseline is None
        else {"run": str(baseline.path), **_learning(baseline, matching_curve(run.curve, baseline))},
        "over_seeds": twins.summarise(run, baseline),
        "self_value": _self_value_cost(run),
        "max_return_error": max(errors, default=None),
        "num_traces": len(run.traces),
        "num_scored_traces": len(scored),
        # A scored response without a segment is an empty response.
        "skipped_traces": {("no segment" if status == "scored" else status): n for status, n in skipped.most_common()},
        "blame": None if line_checker is None else _blame_rates(scored, line_checker),
        "credit_by_position": _credit_by_position(scored),
        "calibration": {
            "start_value": _calibration(forecasts, lambda trace: trace.start_value),
            # The last segment starts with it, and ends pinned to the reward.
            "last_value_before_answer": _calibration(forecasts, lambda trace: trace.measured_values[-1]),
        },
        "num_rollouts": len(run.rollouts),
        "prompts": summarise_prompts(prompts, thresholds),
    }


def notes(run: Run) -> list[str]:
    """What a reader must know because files are missing, in sentences."""
    found = []
    if run.files.metrics is None:
        found.append("There is no metrics file: add 'file' to trainer.logger for times, cost and the metrics' curves.")
    curve = run.curve
    if curve is None:
        found.append("Neither the metrics nor the dumps hold a reward, so there is no learning curve.")
    elif not curve.is_validation:
        text = f"No validation was logged: the curve is of training ({curve.metric})."
        if curve.metric == run.curves[-1].metric:
            text += " Traces are a selection, scored ones first, so it may not be the mean of the batches."
        found.append(text)
    if not run.traces:
        found.append(
            "There are no credited traces (set algorithm.rredcot.traces.dir), so nothing is known of the segments."
        )
    return found


def _learning(run: Run, curve: Curve | None) -> dict[str, Any]:
    seconds = run.series(STEP_SECONDS)
    steps = (
        [step for step, _ in run.metrics] or [trace.step for trace in run.traces] or [row.step for row in run.rollouts]
    )
    validation = None
    if run.validation_metric is not None:
        validation = {"metric": run.validation_metric, **_ends(run.validation)}
    return {
        "validation": validation,
        "curve": None if curve is None else {"name": curve.name, "metric": curve.metric, **_ends(curve.points)},
        "num_steps": len(seconds) if seconds else max(steps, default=0),
        "seconds": sum(value for _, value in seconds) if seconds else None,
    }


def _ends(points: Sequence[tuple[int, float]]) -> dict[str, float]:
    (first_step, before), (last_step, after) = points[0], points[-1]
    return {"before": before, "after": after, "first_step": first_step, "last_step": last_step}


def _self_value_cost(run: Run) -> dict[str, Any]:
    probing, tokens = run.series(SELF_VALUE_SECONDS), run.series(PROBE_TOKENS)
    seconds = sum(value for _, value in probing) if probing else None
    step_seconds = sum(value for _, value in run.series(STEP_SECONDS))
    return {
        "engine": "; ".join(dict.fromkeys(trace.engine for trace in run.traces)) or None,
        "seconds": seconds,
        "share_of_step_seconds": seconds / step_seconds if seconds is not None and step_seconds > 0 else None,
        "probe_tokens_per_response_token": _mean([value for _, value in tokens]),
    }


def _blame_rates(scored: Sequence[Trace], line_checker: LineChecker) -> dict[str, Any]:
    judged = [(trace, check_lines(line_checker, trace)) for trace in scored]
    solved = [any(not line.ok for line in lines) for trace, lines in judged if not trace.is_failed]
    counted = [(trace, blame) for trace, lines in judged if (blame := blame_of(trace, lines)) is not None]
    return {
        "num_traces": len(counted),
        "rate": _mean([blame.is_located for _, blame in counted]),
        "chance_rate": _mean([1.0 / len(trace.segments) for trace, _ in counted]),
        # The last value is pinned to the reward, so a failed trace tends to fall at its end whatever the probe saw.
        "last_segment_rate": _mean([blame.first_wrong == len(trace.segments) - 1 for trace, blame in counted]),
        "num_without_negative_credit": sum(min(trace.credits) >= 0.0 for trace, _ in counted),
        # Many of these mean that the checker cannot read the prompts, and then the rates above mean nothing.
        "num_solved_traces": len(solved),
        "num_solved_traces_with_wrong_line": sum(solved),
    }


def _mean(numbers: Sequence[float]) -> float | None:
    return float(np.mean(numbers)) if numbers else None


def _credit_by_position(scored: Sequence[Trace]) -> list[dict[str, Any]]:
    """Shares of the credit per tenth of the trace, in the first and in the last third of the training steps."""
    steps = sorted({trace.step for trace in scored})
    third = max(1, len(steps) // 3)
    if not steps:
        return []
    periods = [("first", steps[:third]), ("last", steps[-third:])] if len(steps) > 1 else [("all", steps)]
    return [
        _period(name, members[0], members[-1], [trace for trace in scored if members[0] <= trace.step <= members[-1]])
        for name, members in periods
    ]


def _period(name: str, first_step: int, last_step: int, traces: Sequence[Trace]) -> dict[str, Any]:
    return {
        "period": name,
        "first_step": first_step,
        "last_step": last_step,
        "num_traces": len(traces),
        "credit_share": position_shares(traces, abs),
        "negative_credit_share": position_shares(traces, lambda credit: max(-credit, 0.0)),
    }


def position_shares(traces: Sequence[Trace], amount: Callable[[float], float]) -> list[float] | None:
    """Spreads an amount per segment over the segment's tokens and adds it up by relative position.

    Args:
        traces: Scored traces.
        amount: Non-negative amount of a segment, from its segment reward.

    Returns:
        ``NUM_BINS`` shares that sum to 1, from the first token to the last; ``None`` where the amount is nil.
    """
    edges = np.linspace(0.0, 1.0, NUM_BINS + 1)
    total = np.zeros(NUM_BINS)
    for trace in traces:
        num_tokens = sum(segment.num_tokens for segment in trace.segments)
        end = 0
        for segment in trace.segments:
            start, end = end, end + segment.num_tokens
            if end == start:
                continue
            covered = np.clip(edges, start / num_tokens, end / num_tokens)
            total += amount(segment.segment_reward) * np.diff(covered) * num_tokens / (end - start)
    return [float(share) for share in total / total.sum()] if total.sum() > 0.0 else None


def _calibration(scored: Sequence[Trace], value_of: Callable[[Trace], float]) -> dict[str, Any] | None:
    """Reliability of a self-value as a forecast of the reward, both as shares of the range of rewards: bins of the
    value, and the Brier score.
    """
    if not scored:
        return None
    values = np.array([trace.share_of_range(value_of(trace)) for trace in scored])
    rewards = np.array([trace.share_of_range(trace.reward) for trace in scored])
    index = np.clip((values * NUM_BINS).astype(int), 0, NUM_BINS - 1)
    bins = [
        {
            "low": k / NUM_BINS,
            "high": (k + 1) / NUM_BINS,
            "num_traces": int(members.sum()),
            "mean_value": float(values[members].mean()),
            "mean_reward": float(rewards[members].mean()),
        }
        for k in range(NUM_BINS)
        if (members := index == k).any()
    ]
    return {
        "num_traces": len(scored),
        "mean_value": float(values.mean()),
        "mean_reward": float(rewards.mean()),
        "brier": float(((values - rewards) ** 2).mean()),
        # The score of always forecasting the mean reward: a value that does worse says nothing about its trace.
        "brier_of_mean_reward": float(rewards.var()),
        "bins": bins,
    }
