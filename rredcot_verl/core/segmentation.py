"""Cutting a response into segments, on token ids.

The paper's rule is a hybrid: cut at newlines and keywords, then merge by entropy down to a target number of segments,
keeping the uncertain "exit points". Keyword list, counts, lengths and the uncertainty of a boundary (that of the first
token after it) are ours.

A segmenter gives every position a priority; one selection then applies the number and the lengths of segments for all.
"""

import bisect
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = float("-inf")
KEY = "algorithm.rredcot.segmentation.method"


@dataclass(frozen=True)
class Trace:
    """What a segmenter sees of one response of T tokens.

    Attributes:
        response_mask: `(T,)` bool, True for tokens the model wrote, False for observations.
        uncertainty: `(T,)` float32, nats: the rollout's surprisal of each token, or its entropy where known.
        newline: `(T,)` bool, True where the token's text holds a newline.
        keyword: `(T,)` bool, True where a keyword starts.
        answer_start: Offset of the first token of the final answer; T where there is none.
        think_end: Offset of the first token after the end of the thinking block; T where there is none.
    """

    response_mask: Tensor
    uncertainty: Tensor
    newline: Tensor
    keyword: Tensor
    answer_start: int
    think_end: int


Segmenter = Callable[[Trace, int], Tensor]
"""`(trace, num_segments) -> priority (T,) float32`; -inf where no segment may start, else higher is kept first."""

SEGMENTERS: dict[str, Segmenter] = {}


def register_segmenter(name: str) -> Callable[[Segmenter], Segmenter]:
    """Register a segmenter under a name for `segmentation.method`.

    Raises:
        ValueError: The name is taken by another function.
    """

    def decorator(function: Segmenter) -> Segmenter:
        if SEGMENTERS.get(name, function) is not function:
            raise ValueError(f"segmenter {name!r} is already registered to {SEGMENTERS[name]}")
        SEGMENTERS[name] = function
        return function

    return decorator


def get_segmenter(method: str) -> Segmenter:
    """Return the segmenter of a registered name or of a dotted `package.module:function`.

    Raises:
        ValueError: Neither a known name nor an importable function.
    """
    if method in SEGMENTERS:
        return SEGMENTERS[method]
    module_name, _, function_name = method.partition(":")
    if not function_name:
        raise ValueError(f"{KEY}={method!r}: expected one of {sorted(SEGMENTERS)} or 'package.module:function'")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{KEY}={method!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"{KEY}={method!r} is {type(function).__name__}, expected a function")
    return function  # type: ignore[no-any-return]


def segment(
    trace: Trace, segmenter: Segmenter, num_segments: int, min_tokens: int = 1, max_tokens: int | None = None
) -> Tensor:
    """Cut a response into at most `num_segments` segments.

    The final answer and the end of the thinking block start a segment of their own whatever the segmenter says (ours);
    no segment starts inside an observation.

    Args:
        trace: One response.
        segmenter: Gives the priority of every position.
        num_segments: Most segments, at least 1.
        min_tokens: Shortest segment in model-written tokens (not applied to the two forced cuts).
        max_tokens: Longest segment in model-written tokens, cut further while `num_segments` allows.

    Returns:
        `segment_boundaries`: `(num_segments + 1,)` int64, from 0 to T, strictly increasing; `[0]` when T is 0.

    Raises:
        ValueError: The segmenter's priorities do not have shape `(T,)` or hold NaN.
    """
    length = trace.response_mask.numel()
    if length == 0:
        return torch.zeros(1, dtype=torch.int64)
    priority = segmenter(trace, num_segments).float()
    if priority.shape != (length,) or bool(priority.isnan().any()):
        raise ValueError(f"segmenter gave {tuple(priority.shape)} priorities, expected ({length},) without NaN")
    inside = trace.response_mask.clone()
    inside[0] = False
    priority = priority.masked_fill(~inside, NEVER)
    # Lengths are counted in tokens the model wrote: tokens_before[b] of them stand before offset b.
    written = trace.response_mask.long().cumsum(0)
    tokens_before = torch.cat([written.new_zeros(1), written])

    cuts = _forced_cuts(trace, inside)[: num_segments - 1]
    cuts = _choose(priority, tokens_before, cuts, num_segments - 1, min_tokens)
    if max_tokens is not None:
        cuts = _split_long(trace, inside, tokens_before, cuts, num_segments - 1, min_tokens, max_tokens)
    return torch.tensor([0, *cuts, length], dtype=torch.int64)


def _forced_cuts(trace: Trace, inside: Tensor) -> list[int]:
    length = inside.numel()
    cuts = []
    for offset in (trace.answer_start, trace.think_end):
        # A response that starts with its answer needs no cut there.
        if offset == 0:
            continue
        # An observation may stand at the offset: the segment then starts at the model's next token.
        after = inside[offset:].nonzero()
        if offset < length and after.numel():
            cuts.append(offset + int(after[0]))
    return list(dict.fromkeys(cuts))


def _choose(priority: Tensor, tokens_before: Tensor, cuts: list[int], budget: int, min_tokens: int) -> list[int]:
    """Add the highest priorities first, skipping what is closer than `min_tokens` to a cut or to an end."""
    before = tokens_before.tolist()
    places = sorted([0, *cuts, priority.numel()])
    candidates = (priority > NEVER).nonzero().flatten()
    order = candidates[priority[candidates].argsort(descending=True, stable=True)]
    for offset in order.tolist():
        if len(places) - 2 >= budget:
            break
        at = bisect.bisect_left(places, offset)
        if (
            places[at] != offset
            and before[offset] - before[places[at - 1]] >= min_tokens
            and before[places[at]] - before[offset] >= min_tokens
        ):
            places.insert(at, offset)
    return places[1:-1]


def _split_long(
    trace: Trace,
    inside: Tensor,
    tokens_before: Tensor,
    cuts: list[int],
    budget: int,
    min_tokens: int,
    max_tokens: int,
) -> list[int]:
    """Cut the longest segment at its most uncertain token until none is too long or the budget is spent."""
    length = inside.numel()
    while len(cuts) < budget:
        places = torch.tensor([0, *cuts, length])
        sizes = tokens_before[places].diff()
        longest = int(sizes.argmax())
        if int(sizes[longest]) <= max_tokens:
            break
        start, end = int(places[longest]), int(places[longest + 1])
        room = inside.clone()
        room[tokens_before[:-1] < tokens_before[start] + min_tokens] = False
        room[tokens_before[:-1] > tokens_before[end] - min_tokens] = False
        if not bool(room.any()):
            break
        cuts = sorted([*cuts, int(trace.uncertainty.masked_fill(~room, NEVER).argmax())])
    return cuts


def _turn_starts(trace: Trace) -> Tensor:
    """True where the model resumes after an observation: the observation belongs to the segment that asked for it."""
    starts = torch.zeros_like(trace.response_mask)
    starts[1:] = trace.response_mask[1:] & ~trace.response_mask[:-1]
    return starts


def _after_newline(trace: Trace) -> Tensor:
    after = torch.zeros_like(trace.newline)
    after[1:] = trace.newline[:-1]
    return after


def _nearest_to_even(candidates: Tensor, num_segments: int) -> Tensor:
    """Priority that keeps the candidates nearest to equal-length cuts: an unranked rule must thin without a bias."""
    priority = torch.full(candidates.shape, NEVER)
    offsets = candidates.nonzero().flatten()
    length = candidates.numel()
    ideal = torch.arange(1, num_segments, dtype=torch.float32) * (length / num_segments)
    if offsets.numel() == 0 or ideal.numel() == 0:
        return priority
    distance = (offsets[:, None] - ideal[None, :]).abs()
    # The best candidate of each ideal cut goes before any second-best one.
    rank = distance.min(dim=1).values + length
    winners = distance.argmin(dim=0)
    rank[winners] -= length
    priority[offsets] = -rank.float()
    return priority


@register_segmenter("fixed")
def fixed(trace: Trace, num_segments: int) -> Tensor:
    """Segments of equal length, in tokens the model wrote."""
    written = trace.response_mask.long().cumsum(0)
    priority = torch.full(written.shape, NEVER)
    total = int(written[-1])
    if total == 0:
        return priority
    # Rank of the first token of each segment: evenly spaced, 1-based because `written` counts the token itself.
    ranks = (torch.arange(1, num_segments) * total / num_segments).floor().long() + 1
    priority[torch.searchsorted(written, ranks.clamp(max=total))] = 0.0
    return priority


@register_segmenter("newline")
def newline(trace: Trace, num_segments: int) -> Tensor:
    """A segment starts after a newline, or where the model resumes after an observation."""
    return _nearest_to_even(_after_newline(trace) | _turn_starts(trace), num_segments)


@register_segmenter("keyword")
def keyword(trace: Trace, num_segments: int) -> Tensor:
    """A segment starts at a keyword, or where the model resumes after an observation."""
    return _nearest_to_even(trace.keyword | _turn_starts(trace), num_segments)


@register_segmenter("entropy")
def entropy(trace: Trace, num_segments: int) -> Tensor:
    """A segment starts at the most uncertain tokens."""
    del num_segments
    return trace.uncertainty.float()


@register_segmenter("keyword_entropy")
def keyword_entropy(trace: Trace, num_segments: int) -> Tensor:
    """The paper's hybrid: candidates at newlines and keywords, the most uncertain ones kept."""
    del num_segments
    candidates = _after_newline(trace) | trace.keyword | _turn_starts(trace)
    return trace.uncertainty.float().masked_fill(~candidates, NEVER)
