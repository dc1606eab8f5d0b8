"""The analysis of self-values on programs: its figures on traces made by hand."""

import dataclasses
import math
import random

import numpy as np
import pytest

from recipes.code.tiny import task
from recipes.code.tiny.figures import describe
from rredcot_verl.report import Segment, Trace

PROMPT = "odd: add 8+7; big: take 3+4"


def trace(uid: int, values: list[float], reward: float, wrong: int | None = None) -> Trace:
    """A response whose every line is a segment; line `wrong` of its plan states a sum that is off."""
    lines = task.solve(task.parse_problem(PROMPT)).splitlines(keepends=True)
    if wrong is not None:
        lines[wrong] = lines[wrong].replace("=15", "=14").replace("=7", "=8")
    ends = np.cumsum([len(line) for line in lines]).tolist()
    known = [*values, reward]
    segments = tuple(
        Segment(start, end, 1, known[k + 1], known[k + 1] - known[k], 1.0, 0.0)
        for k, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    )
    assert len(segments) == len(values)
    return Trace(1, str(uid), PROMPT, "".join(lines), None, reward, 0.0, "scored", values[0], segments, 0.0, "test")


def made_up(scale: float = 1.0) -> list[Trace]:
    """Right responses keep their value, wrong ones fall at their wrong line, and somewhat at their pinned end."""
    rng, traces = random.Random(0), []
    for uid in range(12):
        for wrong in (None, 0, 1):
            start = 0.6 + 0.1 * rng.random()
            fall = [start - 0.3 * (wrong is not None and k > wrong) for k in range(8)]
            traces.append(trace(uid, [scale * value for value in fall], 1.0 if wrong is None else 0.25, wrong))
    return traces


def test_values_that_fall_at_the_wrong_line():
    figures = describe(made_up(), task.check_lines)
    assert figures["num_traces"] == 36 and figures["num_prompts"] == 12
    assert figures["blame"]["num_failed"] == 24
    assert figures["blame"]["rate"] == [1.0, 1.0, 1.0]
    assert figures["blame"]["chance"] == pytest.approx(1 / 8)
    assert figures["blame"]["credit_rank_of_first_wrong_line"] == 0.0
    assert figures["range_within_trace_mean"] == pytest.approx(0.2)
    assert figures["share_below_1e-6"] == 0.0
    value, low, high = figures["correlation_with_outcome"]["last"]["pearson"]
    assert 0.9 < low <= value <= high <= 1.0


def test_values_that_vanish_are_told_apart_from_values_that_say_nothing():
    vanished = describe(made_up(scale=1e-8), task.check_lines)
    assert vanished["share_below_1e-6"] == 1.0
    # Their order is what it was: a correlation does not see that no credit is left.
    assert vanished["correlation_with_outcome"]["last"]["pearson"][0] > 0.9
    flat = [trace(uid, [0.5] * 8, reward, None if reward else 0) for uid in range(4) for reward in (0.0, 1.0)]
    figures = describe(flat, task.check_lines)
    assert math.isnan(figures["correlation_with_outcome"]["mean"]["pearson"][0])
    assert figures["std_within_trace_mean"] == 0.0


def test_a_level_above_the_reward_puts_the_blame_on_the_last_segment():
    traces = [trace(uid, [0.9, *[0.8] * 7], 0.0, wrong=0) for uid in range(4)]
    blame = describe(traces, task.check_lines)["blame"]
    assert blame["rate"][0] == 0.0 and blame["blames_last_segment"] == 1.0
    assert blame["rate_before_last"][0] == 1.0
    assert describe(traces, task.check_lines)["weights_of_punished"] is None
    punished = [dataclasses.replace(trace, grpo_advantage=-1.0) for trace in traces]
    weights = describe(punished, task.check_lines)["weights_of_punished"]
    assert weights == {"num_traces": 4, "first_wrong_line": 1.0, "other_segments": 1.0, "last_segment": 1.0}
    with pytest.raises(ValueError, match="none of the 0 traces"):
        describe([], task.check_lines)
