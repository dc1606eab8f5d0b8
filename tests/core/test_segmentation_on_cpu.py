"""Segmentation: invariants on random traces, the rules by hand, and what a user's own segmenter may get wrong."""

import random

import pytest
import torch

from rredcot_verl.core import segmentation
from rredcot_verl.core.segmentation import NEVER, SEGMENTERS, Trace, get_segmenter, register_segmenter, segment


def make_trace(
    length: int,
    *,
    holes: tuple[int, ...] = (),
    uncertainty: list[float] | None = None,
    newlines: tuple[int, ...] = (),
    keywords: tuple[int, ...] = (),
    answer_start: int | None = None,
    think_end: int | None = None,
) -> Trace:
    def marks(places: tuple[int, ...]) -> torch.Tensor:
        table = torch.zeros(length, dtype=torch.bool)
        table[list(places)] = True
        return table

    return Trace(
        response_mask=~marks(holes),
        uncertainty=torch.tensor(uncertainty if uncertainty is not None else [0.0] * length, dtype=torch.float32),
        newline=marks(newlines),
        keyword=marks(keywords),
        answer_start=length if answer_start is None else answer_start,
        think_end=length if think_end is None else think_end,
    )


def random_trace(rng: random.Random, *, forced: bool) -> Trace:
    length = rng.randint(1, 60)
    holes: set[int] = set()
    for _ in range(rng.choice([0, 0, 1, 3])):
        start = rng.randrange(length)
        holes.update(range(start, min(length, start + rng.randint(1, 8))))
    pick = [i for i in range(length) if rng.random() < 0.2]
    return make_trace(
        length,
        holes=tuple(holes),
        # Rounded so that ties are common.
        uncertainty=[round(rng.random() * 5, 1) for _ in range(length)],
        newlines=tuple(pick),
        keywords=tuple(i for i in range(length) if rng.random() < 0.15),
        answer_start=rng.randint(1, length) if forced else None,
        think_end=rng.randint(1, length) if forced else None,
    )


def cuts(trace: Trace, method: str, num_segments: int, min_tokens: int = 1, max_tokens: int | None = None) -> list[int]:
    return segment(trace, get_segmenter(method), num_segments, min_tokens, max_tokens).tolist()


def written(trace: Trace, start: int, end: int) -> int:
    return int(trace.response_mask[start:end].sum())


@pytest.mark.parametrize("method", sorted(SEGMENTERS))
@pytest.mark.parametrize("forced", [False, True])
def test_invariants_on_random_traces(method, forced):
    rng = random.Random(f"{method}{forced}")
    for _ in range(50):
        trace = random_trace(rng, forced=forced)
        if not trace.response_mask.any():
            continue
        length = trace.response_mask.numel()
        num_segments, min_tokens = rng.randint(1, 9), rng.randint(1, 6)
        max_tokens = rng.choice([None, 2 * min_tokens, 20 + 2 * min_tokens])
        found = cuts(trace, method, num_segments, min_tokens, max_tokens)
        assert found[0] == 0 and found[-1] == length
        assert all(a < b for a, b in zip(found, found[1:], strict=False))
        assert len(found) - 1 <= num_segments
        assert all(trace.response_mask[cut] for cut in found[1:-1]), "a segment starts in an observation"
        if not forced:
            sizes = [written(trace, a, b) for a, b in zip(found, found[1:], strict=False)]
            assert len(sizes) == 1 or min(sizes) >= min_tokens
        # Deterministic, ties included.
        assert cuts(trace, method, num_segments, min_tokens, max_tokens) == found


@pytest.mark.parametrize("method", sorted(SEGMENTERS))
def test_optional_cuts_keep_their_distance_from_forced_ones(method):
    rng = random.Random(method)
    for _ in range(30):
        trace = random_trace(rng, forced=True)
        if not trace.response_mask.any():
            continue
        min_tokens = rng.randint(2, 6)
        places = cuts(trace, method, 8, min_tokens)
        forced = set(cuts(trace, method, 3, min_tokens=10**6))
        for a, b in zip(places, places[1:], strict=False):
            if a not in forced or b not in forced:
                assert written(trace, a, b) >= min_tokens


@pytest.mark.parametrize("method", sorted(SEGMENTERS))
def test_answer_and_end_of_thinking_are_cut_where_the_budget_allows(method):
    trace = make_trace(30, newlines=(4, 9), keywords=(3, 15), uncertainty=[1.0] * 30, answer_start=27, think_end=20)
    # min_tokens does not apply to them.
    assert cuts(trace, method, 3, min_tokens=25) == [0, 20, 27, 30]
    # With room for one only, it is the answer.
    assert cuts(trace, method, 2, min_tokens=25) == [0, 27, 30]
    assert cuts(trace, method, 1) == [0, 30]


def test_a_forced_cut_inside_an_observation_moves_to_the_models_next_token():
    trace = make_trace(12, holes=(4, 5, 6), answer_start=5)
    assert cuts(trace, "newline", 4, min_tokens=100) == [0, 7, 12]
    # Nothing of the model's stands after it: no cut.
    assert cuts(make_trace(8, holes=(6, 7), answer_start=6), "newline", 4, min_tokens=100) == [0, 8]


@pytest.mark.parametrize("holes", [(), (0, 1), (2,)])
def test_an_answer_at_the_very_start_needs_no_cut(holes):
    trace = make_trace(6, holes=holes, answer_start=0)
    assert cuts(trace, "newline", 4, min_tokens=100) == [0, 6]
    # The end of thinking is still cut.
    trace = make_trace(6, holes=holes, answer_start=0, think_end=4)
    assert cuts(trace, "newline", 4, min_tokens=100) == [0, 4, 6]


def test_keyword_entropy_keeps_the_most_uncertain_candidates():
    # Candidates: 3 and 7 (after newlines), 5 (keyword). Token 1 is the most uncertain of all, but no candidate.
    trace = make_trace(10, newlines=(2, 6), keywords=(5,), uncertainty=[0, 9, 0, 2.0, 0, 1.0, 0, 3.0, 0, 0])
    assert cuts(trace, "keyword_entropy", 2) == [0, 7, 10]
    assert cuts(trace, "keyword_entropy", 3) == [0, 3, 7, 10]
    assert cuts(trace, "keyword_entropy", 8) == [0, 3, 5, 7, 10]
    # 3 and 7 are four tokens from each other and 7 is three from the end.
    assert cuts(trace, "keyword_entropy", 8, min_tokens=3) == [0, 3, 7, 10]
    assert cuts(trace, "keyword_entropy", 8, min_tokens=4) == [0, 5, 10]


def test_entropy_takes_the_most_uncertain_tokens_and_the_earliest_of_equals():
    trace = make_trace(8, uncertainty=[9, 1, 5, 1, 5, 5, 0, 2])
    assert cuts(trace, "entropy", 3) == [0, 2, 4, 8]
    assert cuts(trace, "entropy", 3, min_tokens=3) == [0, 4, 8]


def test_the_model_resuming_after_an_observation_is_a_candidate():
    trace = make_trace(12, holes=(3, 4, 8), uncertainty=[0.0] * 12)
    assert cuts(trace, "keyword_entropy", 8) == [0, 5, 9, 12]
    assert cuts(trace, "newline", 8) == [0, 5, 9, 12]


@pytest.mark.parametrize("method", ["newline", "keyword"])
def test_unranked_rules_are_thinned_evenly(method):
    every = tuple(range(0, 40))
    trace = make_trace(40, newlines=every, keywords=every)
    assert cuts(trace, method, 4) == [0, 10, 20, 30, 40]
    # Candidates crowd at the start; the ones nearest to 10, 20, 30 win.
    places = (1, 2, 3, 4, 5, 9, 22, 31)
    trace = make_trace(40, newlines=tuple(p - 1 for p in places), keywords=places)
    assert cuts(trace, method, 4) == [0, 9, 22, 31, 40]
    # Ideal cuts 13.3 and 26.7: 35 is the best there is for the second, and goes before a second-best for the first.
    trace = make_trace(40, newlines=(11, 12, 13, 34), keywords=(12, 13, 14, 35))
    assert cuts(trace, method, 3) == [0, 13, 35, 40]


@pytest.mark.parametrize("length, num_segments, expected", [(12, 4, [0, 3, 6, 9, 12]), (10, 4, [0, 2, 5, 7, 10])])
def test_fixed_gives_equal_lengths(length, num_segments, expected):
    assert cuts(make_trace(length), "fixed", num_segments) == expected


def test_fixed_counts_the_models_own_tokens():
    # Written tokens: 0-3 and 8-11; half of them lie on each side of offset 8.
    assert cuts(make_trace(12, holes=(4, 5, 6, 7)), "fixed", 2) == [0, 8, 12]


def test_fixed_sizes_differ_by_at_most_one():
    for length in range(1, 40):
        for num_segments in range(1, 12):
            found = cuts(make_trace(length), "fixed", num_segments)
            sizes = torch.tensor(found).diff()
            assert len(sizes) == min(length, num_segments)
            assert int(sizes.max() - sizes.min()) <= 1


def test_max_tokens_cuts_the_longest_segment_at_its_most_uncertain_token():
    trace = make_trace(12, newlines=(2,), uncertainty=[0, 0, 0, 0, 0, 0, 0, 4, 0, 5, 0, 0])
    assert cuts(trace, "newline", 8, min_tokens=1) == [0, 3, 12]
    # The segment 3..12 has nine tokens; the most uncertain one is 9, then 7 in 3..9.
    assert cuts(trace, "newline", 8, 1, max_tokens=6) == [0, 3, 9, 12]
    assert cuts(trace, "newline", 8, 1, max_tokens=5) == [0, 3, 7, 9, 12]
    # The budget ends it; and min_tokens keeps 9 from being cut off.
    assert cuts(trace, "newline", 2, 1, max_tokens=2) == [0, 3, 12]
    assert cuts(trace, "newline", 8, 4, max_tokens=8) == [0, 7, 12]


def test_max_tokens_holds_where_the_budget_is_large():
    rng = random.Random(7)
    for _ in range(30):
        trace = random_trace(rng, forced=False)
        found = cuts(trace, "entropy", 64, 2, max_tokens=4)
        assert max(written(trace, a, b) for a, b in zip(found, found[1:], strict=False)) <= 4


@pytest.mark.parametrize("method", sorted(SEGMENTERS))
def test_empty_and_one_token_responses(method):
    assert cuts(make_trace(0), method, 4) == [0]
    assert cuts(make_trace(1), method, 4) == [0, 1]


@pytest.mark.parametrize("method", sorted(SEGMENTERS))
def test_a_response_of_observations_only_is_one_segment(method):
    assert cuts(make_trace(4, holes=(0, 1, 2, 3)), method, 3) == [0, 4]


def every_other(trace: Trace, num_segments: int) -> torch.Tensor:
    """A user's segmenter, for the tests below."""
    priority = torch.full(trace.response_mask.shape, NEVER)
    priority[::2] = 1.0
    return priority


def test_a_users_segmenter_by_name_and_by_path(monkeypatch):
    monkeypatch.setattr(segmentation, "SEGMENTERS", dict(SEGMENTERS))
    assert register_segmenter("every_other")(every_other) is every_other
    register_segmenter("every_other")(every_other)
    assert get_segmenter("every_other") is every_other
    by_path = get_segmenter(f"{__name__}:every_other")
    assert segment(make_trace(6), by_path, 8).tolist() == [0, 2, 4, 6]
    with pytest.raises(ValueError, match="'fixed' is already registered"):
        register_segmenter("fixed")(every_other)


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
    "priority", [torch.zeros(5), torch.zeros(6, 1), torch.tensor([0, 1, float("nan"), 0, 0, 0])], ids=str
)
def test_faulty_priorities_are_refused(priority):
    with pytest.raises(ValueError, match=r"expected \(6,\) without NaN"):
        segment(make_trace(6), lambda trace, num_segments: priority, 3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float64])
def test_priorities_of_other_types_are_converted(dtype):
    priority = torch.tensor([0, 0, 1, 0, 1, 0]).to(dtype)
    # Every position is a candidate; 2 and 4 come first.
    assert segment(make_trace(6), lambda trace, num_segments: priority, 3).tolist() == [0, 2, 4, 6]
    assert segment(make_trace(6), lambda trace, num_segments: priority, 4).tolist() == [0, 1, 2, 4, 6]


def test_segmenting_changes_nothing_in_the_trace():
    trace = make_trace(20, holes=(4, 5), newlines=(2, 9), keywords=(7,), uncertainty=[float(i % 5) for i in range(20)])
    before = [t.clone() for t in (trace.response_mask, trace.uncertainty, trace.newline, trace.keyword)]
    for method in SEGMENTERS:
        cuts(trace, method, 6, 2, 5)
    after = (trace.response_mask, trace.uncertainty, trace.newline, trace.keyword)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
