"""The segment that the failures of one prompt share (ours): what it is, and how likely so much agreement is by luck."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from rredcot_verl.report.thresholds import Thresholds
from rredcot_verl.report.trace import Trace

NUM_DRAWS = 1000
# Weight of places drawn evenly beside those of other prompts' failures, in failures: a short run has few of them.
NUM_EVEN = 20
# Two ways to share a segment are tried, so luck has two chances.
NUM_WAYS = 2


@dataclass(frozen=True)
class SharedBlame:
    """Failed responses of a prompt whose blamed segments are the same one.

    Attributes:
        how: ``"text"``: the segments start alike; ``"line"``: they start in the same line of their responses.
        what: The text they start with, or the line's number from 1.
        num_failures: Failed responses of the prompt that have a blamed segment.
        num_sharing: Those among them that share this one.
        num_last: Those of the sharing ones for which it is the last segment, whose value is pinned to the reward.
        mean_credit: Mean credit of the shared segment.
        chance: How often segments drawn at random, one from each failure, agree as much beyond what is expected; the
            places in the response are drawn as the blame of the run's other prompts is spread.
        examples: A failed response and the index of its blamed segment, at most three.
    """

    how: str
    what: str
    num_failures: int
    num_sharing: int
    num_last: int
    mean_credit: float
    chance: float
    examples: tuple[tuple[Trace, int], ...]

    @property
    def share(self) -> float:
        """Share of the failures with a blamed segment."""
        return self.num_sharing / self.num_failures


def blamed_segments(traces: Sequence[Trace], min_fall: float) -> list[tuple[Trace, int]]:
    """The failed traces of at least two segments, with the index of the most negative one, the earliest of several.

    Traces whose largest fall is smaller than ``min_fall`` have no blamed segment.
    """
    failed = (trace for trace in traces if trace.is_scored and trace.is_failed and len(trace.segments) > 1)
    blamed = ((trace, int(np.argmin(trace.credits))) for trace in failed)
    return [(trace, k) for trace, k in blamed if trace.credits[k] <= -min_fall]


def shared_blame(
    blamed: Sequence[tuple[Trace, int]], thresholds: Thresholds, other_places: np.ndarray, seed: int = 0
) -> SharedBlame | None:
    """Finds the segment that the failures of a prompt share.

    Two blamed segments are the same one if their first ``num_alike`` visible characters are (white space and capitals
    aside), or, if no text is common enough, if they start in the same line of their responses.

    Args:
        blamed: Failed traces of one prompt with the index of the blamed segment.
        thresholds: What counts.
        other_places: Where the blame of other prompts' failures lies, in [0, 1] of the number of segments: blame that
            always falls late is not shared for that.
        seed: Draws the segments for ``chance``.

    Returns:
        The largest set of such responses, if it passes the thresholds.
    """
    if len(blamed) < max(thresholds.min_failures, 2):
        return None
    for how, key_of in (("text", _start_of(thresholds.num_alike)), ("line", line_of)):
        keys = [key_of(trace, k) for trace, k in blamed]
        counts = Counter(key for key in keys if key)
        if not counts:
            continue
        what, num_sharing = counts.most_common(1)[0]
        if num_sharing < 2 or num_sharing / len(blamed) < thresholds.min_share:
            continue
        chance = NUM_WAYS * _chance([trace for trace, _ in blamed], key_of, what, num_sharing, other_places, seed)
        if chance > thresholds.max_chance:
            continue
        sharing = [pair for pair, key in zip(blamed, keys, strict=True) if key == what]
        # One example of each wording.
        examples: dict[str, tuple[Trace, int]] = {}
        for trace, k in sharing:
            examples.setdefault(trace.text_of(k).strip(), (trace, k))
        return SharedBlame(
            how=how,
            what=str(what),
            num_failures=len(blamed),
            num_sharing=num_sharing,
            num_last=sum(k == len(trace.segments) - 1 for trace, k in sharing),
            mean_credit=float(np.mean([trace.credits[k] for trace, k in sharing])),
            chance=min(chance, 1.0),
            examples=tuple(examples.values())[:3],
        )
    return None


def line_of(trace: Trace, index: int) -> int:
    """Number, from 1, of the response's line in which a segment's first visible character stands."""
    segment = trace.segments[index]
    text = trace.text_of(index)
    start = segment.start + len(text) - len(text.lstrip())
    return trace.response.count("\n", 0, start) + 1


def _start_of(num_alike: int) -> Callable[[Trace, int], str]:
    return lambda trace, index: "".join(trace.text_of(index).lower().split())[:num_alike]


def place_of(trace: Trace, index: int) -> float:
    """Where a segment lies in its response, in [0, 1] of the number of segments."""
    return (index + 0.5) / len(trace.segments)


def _chance(
    failures: Sequence[Trace],
    key_of: Callable[[Trace, int], Hashable],
    what: Hashable,
    num_sharing: int,
    other_places: np.ndarray,
    seed: int,
) -> float:
    """How often segments drawn at random agree on some key as far beyond its expectation as the blamed ones do."""
    rng = np.random.default_rng(seed)
    size = (len(failures), NUM_DRAWS)
    places = rng.random(size)
    if len(other_places):
        is_drawn = rng.random(size) < len(other_places) / (len(other_places) + NUM_EVEN)
        places = np.where(is_drawn, rng.choice(other_places, size), places)
    numbers: dict[Hashable, int] = {}
    keys = [
        np.array([numbers.setdefault(key_of(trace, k), len(numbers)) for k in range(len(trace.segments))])
        for trace in failures
    ]
    counts = np.zeros((NUM_DRAWS, len(numbers)))
    for own, drawn in zip(keys, places, strict=True):
        counts[np.arange(NUM_DRAWS), own[(drawn * len(own)).astype(int)]] += 1
    expected = counts.mean(axis=0)
    excess = (counts - expected).max(axis=1)
    return float(np.mean(excess >= num_sharing - expected[numbers[what]] - 1e-9))
