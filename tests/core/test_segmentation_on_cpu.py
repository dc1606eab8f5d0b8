"""Segmentation: cuts are stopping times, invariants on random traces, the rules by hand, and a user's own segmenter."""

import itertools
import math
import random

import pytest
import torch

from rredcot_verl.core.segmentation import (
    NEVER,
    SEGMENTERS,
    Trace,
    check_online,
    get_segmenter,
    segment,
)

FIELDS = ("response_mask", "surprisal", "line_end", "sentence_end", "keyword", "answer_open", "think_end")


def make_trace(
    length: int,
    *,
    holes: tuple[int, ...] = (),
    surprisal: list[float] | None = None,
    lines: tuple[int, ...] = (),
    sentences: tuple[int, ...] = (),
    keywords: tuple[int, ...] = (),
    opens: tuple[int, ...] = (),
    closes: tuple[int, ...] = (),
) -> Trace:
    def marks(places: tuple[int, ...]) -> torch.Tensor:
        table = torch.zeros(length, dtype=torch.bool)
        table[list(places)] = True
        return table

    return Trace(
        response_mask=~marks(holes),
        surprisal=torch.tensor(surprisal if surprisal is not None else [0.0] * length, dtype=torch.float32),
        line_end=marks(lines),
        sentence_end=marks(sentences),
        keyword=marks(keywords),
        answer_open=marks(opens),
        think_end=marks(closes),
    )


def random_trace(rng: random.Random, length: int | None = None, *, forced: bool = True) -> Trace:
    length = rng.randint(1, 60) if length is None else length
    holes: set[int] = set()
    for _ in range(rng.choice([0, 0, 1, 3])):
        start = rng.randrange(length)
        holes.update(range(start, min(length, start + rng.randint(1, 8))))

    def some(share: float) -> tuple[int, ...]:
        return tuple(i for i in range(length) if rng.random() < share)

    return make_trace(
        length,
        holes=tuple(holes),
        # Rounded so that ties are common.
        surprisal=[round(rng.random() * 5, 1) for _ in range(length)],
        lines=some(0.15),
        sentences=some(0.15),
        keywords=some(0.1),
        opens=some(0.1) if forced else (),
        closes=some(0.1) if forced else (),
    )


def prefix(trace: Trace, length: int) -> Trace:
    return Trace(*(getattr(trace, name)[:length] for name in FIELDS))


def joined(first: Trace, second: Trace) -> Trace:
    return Trace(*(torch.cat([getattr(first, name), getattr(second, name)]) for name in FIELDS))


def cuts(
    trace: Trace,
    method: str,
    num_segments: int,
    min_tokens: int = 1,
    max_tokens: int | None = None,
    *,
    budget: int = 1,
) -> list[int]:
    """By default a budget so small that `min_tokens` is the spacing."""
    return segment(trace, get_segmenter(method), num_segments, budget, min_tokens, max_tokens).tolist()


def written(trace: Trace, start: int, end: int) -> int:
    return int(trace.response_mask[start:end].sum())


def sizes(trace: Trace, places: list[int]) -> list[int]:
    return [written(trace, a, b) for a, b in itertools.pairwise(places)]


# --- stopping times ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(SEGMENTERS))
def test_cuts_are_decided_by_what_stands_before_them(method):
    """A prefix has the trace's own cuts, and what is changed from t on moves no cut at or before t."""
    rng = random.Random(method)
    num_cuts = 0
    for _ in range(40):
        trace = random_trace(rng)
        length = trace.response_mask.numel()
        num_segments, min_tokens = rng.randint(1, 12), rng.randint(1, 4)
        rule = (num_segments, min_tokens, rng.choice([None, 2 * min_tokens, 20]))
        budget = rng.choice([length, 60, 400])
        whole = cuts(trace, method, *rule, budget=budget)
        num_cuts += len(whole) - 2
        for t in range(1, length):
            start = prefix(trace, t)
            assert cuts(start, method, *rule, budget=budget)[:-1] == [cut for cut in whole if cut < t]
            # Who writes token t is known before it is written.
            other = random_trace(rng, rng.randint(1, 30))
            other.response_mask[0] = trace.response_mask[t]
            changed = cuts(joined(start, other), method, *rule, budget=budget)[:-1]
            assert [cut for cut in changed if cut <= t] == [cut for cut in whole[:-1] if cut <= t]
    assert num_cuts > 40


@pytest.mark.parametrize("method", sorted(SEGMENTERS))
def test_the_rules_of_this_package_pass_their_own_check(method):
    rng = random.Random(1)
    for _ in range(20):
        check_online(SEGMENTERS[method], random_trace(rng))


def before_keywords(trace: Trace) -> torch.Tensor:
    """The rule that this package had: a segment starts at a keyword."""
    return torch.where(trace.keyword, 1.0, NEVER)


def at_surprise(trace: Trace) -> torch.Tensor:
    return torch.where(trace.surprisal > 1, 1.0, NEVER)


def in_halves(trace: Trace) -> torch.Tensor:
    wait = torch.full(trace.surprisal.shape, NEVER)
    wait[trace.surprisal.numel() // 2] = 1.0
    return wait


@pytest.mark.parametrize("segmenter", [before_keywords, at_surprise, in_halves])
def test_a_rule_that_looks_ahead_is_found_out(segmenter):
    with pytest.raises(ValueError, match="looks ahead"):
        check_online(segmenter, random_trace(random.Random(0), 30))


# A decision problem small enough to enumerate, with a policy of one logit a choice. The first token sets the chance of
# success, the second one is a keyword or not and changes nothing, the third one decides.
CHANCE = {"good": 0.8, "bad": 0.2}


def outcomes() -> list[tuple[tuple[str, str, str], float, float]]:
    """Every response, its probability and its reward."""
    found = []
    for first, second, third in itertools.product(("good", "bad"), ("so", "plain"), ("right", "wrong")):
        chance = CHANCE[first] if third == "right" else 1 - CHANCE[first]
        found.append(((first, second, third), 0.5 * 0.5 * chance, float(third == "right")))
    return found


def expected_advantages(method) -> dict[tuple[str, ...], float]:
    """E[R - V at the start of the segment] of the second token, by what stands before and the token itself."""
    exact: dict[tuple[str, ...], list[float]] = {}
    for tokens, probability, reward in outcomes():
        for length in range(3):
            entry = exact.setdefault(tokens[:length], [0.0, 0.0])
            entry[0] += probability * reward
            entry[1] += probability
    found: dict[tuple[str, ...], list[float]] = {}
    for tokens, probability, reward in outcomes():
        # Every token is a sentence; the token after a keyword is marked, as in a response.
        keyword = (1,) if method is before_keywords else (2,)
        trace = make_trace(
            3,
            sentences=(0, 1, 2),
            keywords=keyword if tokens[1] == "so" else (),
            surprisal=[0.7, 0.7, -math.log(CHANCE[tokens[0]] if tokens[2] == "right" else 1 - CHANCE[tokens[0]])],
        )
        places = segment(trace, method, 8, budget=1).tolist()
        start = max(place for place in places if place <= 1)
        useful, mass = exact[tokens[:start]]
        entry = found.setdefault(tokens[:2], [0.0, 0.0])
        entry[0] += probability * (reward - useful / mass)
        entry[1] += probability
    return {tokens: total / mass for tokens, (total, mass) in found.items()}


def test_a_cut_before_a_keyword_rewards_or_punishes_the_choice_of_one():
    """The second token changes nothing, but has a baseline of its own if it is a keyword: the policy is pushed."""
    found = expected_advantages(before_keywords)
    assert found["good", "so"] == pytest.approx(0) and found["bad", "so"] == pytest.approx(0)
    assert found["good", "plain"] == pytest.approx(0.3) and found["bad", "plain"] == pytest.approx(-0.3)


@pytest.mark.parametrize("method", sorted(SEGMENTERS))
def test_a_choice_that_changes_nothing_is_not_pushed(method):
    """Given what stands before, both choices have one expected advantage: the gradient is 0, as is the true one."""
    found = expected_advantages(SEGMENTERS[method])
    for first in CHANCE:
        assert found[first, "so"] == pytest.approx(found[first, "plain"])


# --- invariants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(SEGMENTERS))
def test_invariants_on_random_traces(method):
    rng = random.Random(method)
    for _ in range(100):
        trace = random_trace(rng)
        length = trace.response_mask.numel()
        num_segments, min_tokens = rng.randint(1, 9), rng.randint(1, 6)
        max_tokens = rng.choice([None, 2 * min_tokens, 20 + 2 * min_tokens])
        budget = rng.choice([1, length, 2 * length])
        found = cuts(trace, method, num_segments, min_tokens, max_tokens, budget=budget)
        assert found[0] == 0 and found[-1] == length
        assert all(a < b for a, b in itertools.pairwise(found))
        assert len(found) - 1 <= num_segments
        assert all(trace.response_mask[cut] for cut in found[1:-1]), "a segment starts in an observation"
        assert all(size >= min_tokens for size in sizes(trace, found)[:-1])


@pytest.mark.parametrize("method", sorted(SEGMENTERS))
def test_the_number_of_segments_suffices_for_the_longest_response(method):
    """The number is never what ends it: with more of them at the same spacing, the cuts are the same."""
    rng = random.Random(method)
    for _ in range(60):
        trace, num_segments = random_trace(rng, forced=False), rng.randint(3, 9)
        length = trace.response_mask.numel()
        spacing = math.ceil(length / (num_segments - 2))
        assert cuts(trace, method, num_segments, budget=length) == cuts(trace, method, 256, spacing)


@pytest.mark.parametrize("method", sorted(SEGMENTERS))
def test_empty_and_one_token_responses(method):
    assert cuts(make_trace(0), method, 4) == [0]
    assert cuts(make_trace(1), method, 4) == [0, 1]


@pytest.mark.parametrize("method", sorted(SEGMENTERS))
def test_a_response_of_observations_only_is_one_segment(method):
    assert cuts(make_trace(4, holes=(0, 1, 2, 3), lines=(1,)), method, 8) == [0, 4]


def test_segmenting_changes_nothing_in_the_trace():
    trace = random_trace(random.Random(5), 40)
    before = [getattr(trace, name).clone() for name in FIELDS]
    for method in SEGMENTERS:
        cuts(trace, method, 6, 2, 5)
    assert all(torch.equal(old, getattr(trace, name)) for old, name in zip(before, FIELDS, strict=True))


# --- the rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(SEGMENTERS))
def test_the_first_opening_of_an_answer_and_end_of_thinking_are_cut(method):
    trace = make_trace(60, closes=(19, 40), opens=(29, 50))
    assert cuts(trace, method, 3, budget=1000) == [0, 20, 30, 60]
    # They keep the shortest length.
    assert cuts(trace, method, 3, min_tokens=11, budget=1000) == [0, 20, 60]
    # With room for one only, it is the answer; with none, nothing.
    assert cuts(trace, method, 2, budget=1000) == [0, 30, 60]
    assert cuts(trace, method, 1, budget=1000) == [0, 60]
    # Nothing stands after the last token, and none of the model's after token 29 here.
    assert cuts(make_trace(30, opens=(29,)), method, 3, budget=1000) == [0, 30]
    assert cuts(make_trace(32, opens=(29,), holes=(30, 31)), method, 3, budget=1000) == [0, 32]


def test_the_spacing_is_the_budgets_share():
    lines = tuple(range(60))
    trace = make_trace(60, lines=lines)
    # 60 / (8 - 2) is 10, whatever the length; min_tokens is a floor.
    assert cuts(trace, "newline", 8, budget=60) == [0, 10, 20, 30, 40, 50, 60]
    assert cuts(prefix(trace, 34), "newline", 8, budget=60) == [0, 10, 20, 30, 34]
    assert cuts(trace, "newline", 8, 25, budget=60) == [0, 25, 50, 60]
    # A response beyond its budget ends in a long segment.
    assert cuts(trace, "newline", 4, budget=20) == [0, 10, 20, 30, 60]


def test_a_newline_ends_a_segment_and_a_sentence_one_of_twice_the_spacing():
    trace = make_trace(30, lines=(5, 24), sentences=(8, 11, 14))
    assert cuts(trace, "newline", 8, 4) == [0, 6, 15, 25, 30]
    # Six tokens are too few, twelve are enough.
    assert cuts(trace, "newline", 8, 6) == [0, 6, 25, 30]
    assert cuts(make_trace(30, sentences=(7, 11)), "newline", 8, 6) == [0, 12, 30]


def test_a_sentence_that_began_with_a_keyword_ends_a_segment():
    # Sentences 0-5, 6-11, 12-17; the keyword stands in the second one.
    trace = make_trace(24, sentences=(5, 11, 17), keywords=(7,))
    assert cuts(trace, "keyword", 8, 6) == [0, 12, 24]
    assert cuts(trace, "keyword_entropy", 8, 6) == [0, 12, 24]
    assert cuts(make_trace(24, sentences=(5, 11, 17)), "keyword", 8, 9) == [0, 18, 24]
    assert cuts(make_trace(24, sentences=(5, 11, 17), keywords=(7,)), "keyword", 8, 9) == [0, 12, 24]


def test_an_uncertain_sentence_ends_a_segment():
    # Means 1, 1, 3, 2: the third is above the median of 1 and 1, the fourth above that of 1, 1, 3.
    surprisal = [1.0] * 4 + [0.0, 2.0, 2.0, 0.0] + [3.0] * 4 + [2.0] * 4 + [9.0]
    trace = make_trace(17, sentences=(3, 7, 11, 15), surprisal=surprisal)
    assert cuts(trace, "entropy", 9, 4) == [0, 8, 12, 16, 17]
    assert cuts(trace, "keyword_entropy", 9, 4) == [0, 8, 12, 16, 17]
    assert cuts(trace, "newline", 9, 4) == [0, 8, 16, 17]
    # Without log-probabilities every sentence is like the others.
    assert cuts(make_trace(17, sentences=(3, 7, 11, 15)), "entropy", 9, 4) == [0, 8, 16, 17]


def test_what_a_tool_wrote_is_no_surprise():
    surprisal = [1.0] * 4 + [50.0] * 2 + [1.0] * 6 + [1.0] * 4
    trace = make_trace(16, holes=(4, 5), sentences=(3, 11), surprisal=surprisal)
    assert cuts(trace, "entropy", 9, 5) == [0, 12, 16]


def test_the_model_resuming_after_an_observation_is_preferred():
    trace = make_trace(12, holes=(3, 4, 8))
    for method in ("newline", "keyword", "entropy", "keyword_entropy"):
        assert cuts(trace, method, 8, 3) == [0, 5, 9, 12]
        assert cuts(trace, method, 8, 4) == [0, 9, 12]


def test_fixed_is_even_and_forced_cuts_only_make_segments_shorter():
    assert cuts(make_trace(12), "fixed", 6, budget=12) == [0, 3, 6, 9, 12]
    # Written tokens: 0-3 and 8-11.
    assert cuts(make_trace(12, holes=(4, 5, 6, 7)), "fixed", 4, budget=8) == [0, 8, 12]
    assert cuts(make_trace(40, closes=(13,), opens=(35,)), "fixed", 6, budget=40) == [0, 10, 14, 24, 34, 36, 40]
    rng = random.Random(3)
    for _ in range(50):
        trace = random_trace(rng)
        spacing = math.ceil(60 / 6)
        assert max(sizes(trace, cuts(trace, "fixed", 8, budget=60))) <= spacing


def test_max_tokens_cuts_anywhere():
    trace = make_trace(30, sentences=(5, 24))
    assert cuts(trace, "newline", 8, 3) == [0, 6, 25, 30]
    assert cuts(trace, "newline", 8, 3, max_tokens=8) == [0, 6, 14, 22, 30]
    # Less than the spacing counts as the spacing.
    assert cuts(make_trace(30), "newline", 5, 3, max_tokens=6, budget=30) == [0, 10, 20, 30]
    rng = random.Random(7)
    for _ in range(30):
        trace = random_trace(rng)
        assert max(sizes(trace, cuts(trace, "entropy", 256, 2, max_tokens=4))) <= 4


# --- a user's own -----------------------------------------------------------------------------------------------------


def every_other(trace: Trace) -> torch.Tensor:
    """A user's segmenter, for the tests below."""
    wait = torch.full(trace.response_mask.shape, NEVER)
    wait[::2] = 1.0
    return wait


def test_a_users_segmenter_by_path():
    by_path = get_segmenter(f"{__name__}:every_other")
    assert segment(make_trace(6), by_path, 8, 1).tolist() == [0, 2, 4, 6]
    check_online(by_path, make_trace(6))


@pytest.mark.parametrize(
    "method, message",
    [
        ("keyword_entropi", "'keyword_entropi'.*keyword_entropy.*package.module:function"),
        ("no.such.module:f", "'no.such.module:f' cannot be imported"),
        ("rredcot_verl.core.segmentation:nothing", "cannot be imported.*nothing"),
        ("rredcot_verl.core.segmentation:NEVER", "is float, expected a function"),
    ],
)
def test_an_unknown_segmenter_is_named(method, message):
    with pytest.raises(ValueError, match=message):
        get_segmenter(method)


@pytest.mark.parametrize(
    "wait", [torch.zeros(5), torch.zeros(6, 1), torch.tensor([0, 1, float("nan"), 0, 0, 0])], ids=str
)
def test_faulty_output_is_refused(wait):
    with pytest.raises(ValueError, match=r"expected \(6,\) without NaN"):
        segment(make_trace(6), lambda trace: wait, 8, 1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64])
def test_output_of_other_types_is_converted(dtype):
    wait = torch.tensor([0, 4, 2, 1, 1, -3]).to(dtype)
    assert segment(make_trace(6), lambda trace: wait, 8, 1).tolist() == [0, 2, 3, 4, 5, 6]
