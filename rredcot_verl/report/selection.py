"""Which credited responses are worth a look: the worst blamed, the best credited, the most surprising.

Of a response with self-values v_0 .. v_{K-1}, credit d_1 .. d_K and reward R, all in units of reward (ours):

- blame: the largest fall, ``-min d_k``, of a response whose GRPO advantage is negative;
- credit: the largest rise, ``max d_k``, of one whose advantage is positive;
- surprise: how far the reward lies from what the self-values foretold along the way, ``|R - mean(v_0 .. v_{K-1})|``.

A response of one segment has nothing to compare and is not chosen. The choice draws no lots: the same responses in the
same order give the same ones.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from rredcot_verl.report.trace import Trace

KINDS = ("worst blamed", "best credited", "most surprising")


@dataclass(frozen=True)
class Extreme:
    """A response that was chosen.

    Attributes:
        row: Its place among the responses.
        kind: Index of the reason in ``KINDS``.
    """

    row: int
    kind: int


def scores(
    values: Sequence[float], credit: Sequence[float], reward: float, advantage: float
) -> tuple[float, float, float] | None:
    """Blame, credit and surprise of a response with values v_0 .. v_{K-1}, credit d_1 .. d_K, R and GRPO's advantage.

    Returns:
        One number for each of ``KINDS``, not above 0 where that is no reason to choose it; none where there are fewer
        than two segments.
    """
    if len(credit) < 2:
        return None
    blame, praise = -min(credit) if advantage < 0 else 0.0, max(credit) if advantage > 0 else 0.0
    return blame, praise, abs(reward - sum(values) / len(values))


def choose_extremes(
    rows: Sequence[tuple[float, float, float] | None], groups: Sequence[Hashable], count: int
) -> list[Extreme]:
    """Chooses responses, taking turns: one of each kind, then the next of each kind.

    Args:
        rows: ``scores`` of each response.
        groups: Prompt of each response; one that the kind has not shown yet comes before one that it has.
        count: Most responses chosen.

    Returns:
        At most ``count`` responses, none twice; of equals the earlier. Chosen from those chosen, they are the same
        again.
    """
    taken: dict[int, int] = {}
    shown: set[tuple[int, Hashable]] = set()
    open_kinds = list(range(len(KINDS)))
    while open_kinds and len(taken) < count:
        for kind in list(open_kinds):
            candidates = [
                (row, values[kind])
                for row, values in enumerate(rows)
                if values and values[kind] > 0 and row not in taken
            ]
            if not candidates or len(taken) == count:
                open_kinds.remove(kind)
                continue
            row, _ = max(candidates, key=lambda item: ((kind, groups[item[0]]) not in shown, item[1], -item[0]))
            taken[row] = kind
            shown.add((kind, groups[row]))
    return [Extreme(row, kind) for row, kind in taken.items()]


def extreme_traces(traces: Sequence[Trace], count: int) -> list[tuple[Trace, int]]:
    """Chooses at most ``count`` traces, with the kind of each; those without self-values are passed over."""
    chosen = choose_extremes([_scores(trace) for trace in traces], [trace.prompt for trace in traces], count)
    return [(traces[extreme.row], extreme.kind) for extreme in chosen]


def describe(trace: Trace, kind: int) -> str:
    """Why a trace was chosen, with the figure, in words."""
    row = _scores(trace)
    assert row is not None
    mean = sum(trace.measured_values) / len(trace.measured_values)
    return (
        f"Worst blamed: its largest fall is {row[0]:.2f}",
        f"Best credited: its largest rise is {row[1]:.2f}",
        f"Most surprising: reward {trace.reward:.2f}, self-values before it {mean:.2f} on average",
    )[kind]


def _scores(trace: Trace) -> tuple[float, float, float] | None:
    if not trace.is_scored:
        return None
    return scores(trace.measured_values, trace.credits, trace.reward, trace.grpo_advantage)
