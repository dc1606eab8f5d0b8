"""Cutting a response into segments, online: whether one starts at a token is decided by what stands before it.

The value at a cut is the baseline of the tokens after it. If the cut depended on the token it stands before, or on how
the response goes on, the baseline would depend on the action, and credit would be biased even with exact values. So a
cut is a stopping time (ours): a function of the tokens before it, of the settings, and of the most tokens a response
may have, which is known in advance; never of the response's own length.

The paper's rule is a hybrid: candidates at newlines and keywords, merged by entropy down to a target number. Ours has
the same ingredients, read off what is written: ends of lines and sentences, sentences that began with a keyword, those
in which the model was uncertain. A segmenter says for every offset how long a segment must be to end there; one walk
over the response then applies lengths and number for all.
"""

import bisect
import dataclasses
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = float("inf")
KEY = "algorithm.rredcot.segmentation.method"


@dataclass(frozen=True)
class Trace:
    """What a segmenter sees of one response of T tokens: entry t of every field is known once token t is written.

    Attributes:
        response_mask: `(T,)` bool, True for tokens the model wrote, False for observations. Who writes a token is known
            before it is written.
        surprisal: `(T,)` float32, nats: the rollout's, of each token; 0 where it gave none. Its mean given what stands
            before is the entropy of the distribution, which rollout servers do not report.
        line_end: `(T,)` bool, True where the token's text holds a newline.
        sentence_end: `(T,)` bool, True where a sentence ends, as far as can be told from what is written.
        keyword: `(T,)` bool, True at the token after a keyword with which a line or sentence began.
        answer_open: `(T,)` bool, True at the last token of the opening of an answer, outside a thinking block.
        think_end: `(T,)` bool, True at the token that closes a thinking block.
    """

    response_mask: Tensor
    surprisal: Tensor
    line_end: Tensor
    sentence_end: Tensor
    keyword: Tensor
    answer_open: Tensor
    think_end: Tensor


Segmenter = Callable[[Trace], Tensor]
"""`trace -> wait (T,)`: how long a segment must be for the next one to start at offset t, in units of the spacing: 1 as
soon as allowed (less counts as 1), 2 at twice that, inf never.

Entry t may depend on what the trace holds of the tokens *before* t, and on `response_mask[t]`; not on token t, what
comes after, or T. A rule that looks ahead biases the credit of every run that uses it; `check_online` finds it out."""


def get_segmenter(method: str) -> Segmenter:
    """Return the segmenter of a name in `SEGMENTERS` or of a dotted `package.module:function`.

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


def spacing_of(num_segments: int, budget: int, min_tokens: int) -> float:
    """Tokens from one cut to the next where the text allows; inf where there is room for forced cuts only."""
    return max(min_tokens, math.ceil(budget / (num_segments - 2))) if num_segments > 2 else NEVER


def segment(
    trace: Trace,
    segmenter: Segmenter,
    num_segments: int,
    budget: int,
    min_tokens: int = 1,
    max_tokens: int | None = None,
) -> Tensor:
    """Cut a response into at most `num_segments` segments, from its start to its end.

    A segment starts at the first offset that its segmenter allows. The spacing is the budget over the number of
    segments, `min_tokens` at least, so that a response of any length is cut evenly and the number suffices for the
    longest. Two segments are kept for the first opening of an answer and the first end of thinking, where one starts
    after `min_tokens` whatever the segmenter says (ours). None starts inside an observation.

    Args:
        trace: One response.
        segmenter: Says how long a segment must be to end at an offset.
        num_segments: Most segments, at least 1. With 1 nothing is cut, with 2 only where an answer opens.
        budget: Most tokens a response may have.
        min_tokens: Shortest segment in tokens the model wrote, the last one excepted.
        max_tokens: Longest segment in the same, cut anywhere; less than the spacing counts as the spacing.

    Returns:
        `segment_boundaries`: `(num_segments + 1,)` int64, from 0 to T, strictly increasing; `[0]` when T is 0.

    Raises:
        ValueError: The segmenter's output does not have shape `(T,)` or holds NaN.
    """
    length = trace.response_mask.numel()
    if length == 0:
        return torch.zeros(1, dtype=torch.int64)
    wait = segmenter(trace).float()
    if wait.shape != (length,) or bool(wait.isnan().any()):
        raise ValueError(f"segmenter gave {tuple(wait.shape)} entries, expected ({length},) without NaN")
    spacing = spacing_of(num_segments, budget, min_tokens)
    needed = wait.clamp(min=1) * spacing
    for opens in (trace.answer_open, trace.think_end)[: num_segments - 1]:
        needed[_after(opens & (opens.cumsum(0) == 1))] = min_tokens
    longest = max(max_tokens, spacing) if max_tokens is not None else NEVER
    needed.clamp_(max=longest).masked_fill_(~trace.response_mask, NEVER)

    cuts = [0]
    # Lengths are counted in tokens the model wrote: before[t] of them stand before offset t.
    before = trace.response_mask.long().cumsum(0) - trace.response_mask.long()
    places = needed.isfinite().nonzero().flatten()
    last = 0
    for place, least, count in zip(*(x.tolist() for x in (places, needed[places], before[places])), strict=True):
        if len(cuts) == num_segments:
            break
        if count - last >= least:
            cuts.append(place)
            last = count
    return torch.tensor([*cuts, length], dtype=torch.int64)


def check_online(segmenter: Segmenter, trace: Trace) -> None:
    """Check on a trace that a segmenter does not look ahead: its tokens from t on are changed and cut off, for every t.

    Raises:
        ValueError: Entry t or an earlier one has changed.
    """
    whole = segmenter(trace)
    for t in range(whole.numel()):
        fields = {field.name: getattr(trace, field.name)[: t + 1].clone() for field in dataclasses.fields(Trace)}
        for name, column in fields.items():
            if name != "response_mask":
                column[t] = ~column[t] if column.dtype == torch.bool else column[t] + 1
        if not torch.equal(segmenter(Trace(**fields)), whole[: t + 1]):
            raise ValueError(
                f"the segmenter looks ahead: what it says up to offset {t} depends on the tokens from {t} on"
            )


def _after(marks: Tensor) -> Tensor:
    """True at the offset after each marked token."""
    return torch.cat([torch.zeros_like(marks[:1]), marks[:-1]])


def _ends(trace: Trace) -> Tensor:
    """True where a line or sentence is over, or the model resumes: an observation belongs to what asked for it."""
    resumes = trace.response_mask & _after(~trace.response_mask)
    return _after(trace.line_end | trace.sentence_end) | resumes


def _prefer(trace: Trace, preferred: Tensor) -> Tensor:
    """Some ends as soon as the spacing allows, the others at twice the spacing."""
    ends = _ends(trace)
    wait = torch.full(ends.shape, NEVER)
    wait[ends] = 2.0
    wait[ends & (preferred | _after(~trace.response_mask))] = 1.0
    return wait


def _after_keyword(trace: Trace) -> Tensor:
    """True where a sentence is over that began with a keyword.

    The cut stands after the sentence and not before the keyword: whether a keyword comes is the model's choice.
    """
    seen = torch.cat([torch.zeros(1, dtype=torch.int64), trace.keyword.long().cumsum(0)])
    ends = _ends(trace).nonzero().flatten()
    starts = torch.cat([torch.zeros(min(1, ends.numel()), dtype=torch.int64), ends[:-1]])
    after = torch.zeros_like(trace.keyword)
    after[ends] = seen[ends] > seen[starts]
    return after


def _after_uncertain(trace: Trace) -> Tensor:
    """True where a sentence is over whose tokens were on average more surprising than the median one's so far."""
    total = torch.cat([torch.zeros(1, dtype=torch.float64), (trace.surprisal * trace.response_mask).double().cumsum(0)])
    number = torch.cat([torch.zeros(1, dtype=torch.int64), trace.response_mask.long().cumsum(0)])
    after = torch.zeros_like(trace.response_mask)
    ends = _ends(trace).nonzero().flatten()
    so_far: list[float] = []
    start_total, start_number = 0.0, 0
    for end, own_total, own_number in zip(*(x.tolist() for x in (ends, total[ends], number[ends])), strict=True):
        if own_number == start_number:
            continue
        mean = (own_total - start_total) / (own_number - start_number)
        after[end] = bool(so_far) and mean > so_far[len(so_far) // 2]
        bisect.insort(so_far, mean)
        start_total, start_number = own_total, own_number
    return after


def fixed(trace: Trace) -> Tensor:
    """Segments of equal length, wherever they end."""
    return torch.ones(trace.response_mask.shape)


def newline(trace: Trace) -> Tensor:
    """A segment ends with a line; with a sentence where no line ends within twice the spacing."""
    return _prefer(trace, _after(trace.line_end))


def keyword(trace: Trace) -> Tensor:
    """A segment ends with a sentence that began with a keyword; with any where none does within twice the spacing."""
    return _prefer(trace, _after_keyword(trace))


def entropy(trace: Trace) -> Tensor:
    """A segment ends with a sentence in which the model was uncertain; with any after twice the spacing."""
    return _prefer(trace, _after_uncertain(trace))


def keyword_entropy(trace: Trace) -> Tensor:
    """The paper's ingredients, online: a line, a sentence begun with a keyword, or one of much uncertainty ends one."""
    return _prefer(trace, _after(trace.line_end) | _after_keyword(trace) | _after_uncertain(trace))


SEGMENTERS: dict[str, Segmenter] = {
    "fixed": fixed,
    "newline": newline,
    "keyword": keyword,
    "entropy": entropy,
    "keyword_entropy": keyword_entropy,
}
