"""The segments of a response: its tokens as `core.segmentation` sees them, in training and in the bench alike."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rredcot_verl.config.blocks import SegmentationConfig
from rredcot_verl.core.segmentation import Trace, get_segmenter, segment
from rredcot_verl.probes.elicitation import Elicitation


def cut(
    rule: SegmentationConfig,
    elicitation: Elicitation,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    response_mask: Sequence[int] | None,
    log_probs: Sequence[float] | None,
    budget: int,
) -> list[int]:
    """Segment boundaries of a response: offsets from 0 to its length.

    Args:
        rule: How.
        elicitation: Knows the vocabulary, the openings of answers and the thinking block.
        prompt_ids: Prompt tokens.
        response_ids: Response tokens.
        response_mask: 1 for tokens the model wrote; None where it wrote all.
        log_probs: Their rollout log-probabilities, nats; None where not known.
        budget: Most tokens a response may have.
    """
    trace = make_trace(elicitation, prompt_ids, response_ids, response_mask, log_probs)
    method = get_segmenter(rule.method)
    cuts: list[int] = segment(trace, method, rule.num_segments, budget, rule.min_tokens, rule.max_tokens).tolist()
    return cuts


def make_trace(
    elicitation: Elicitation,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    response_mask: Sequence[int] | None,
    log_probs: Sequence[float] | None,
) -> Trace:
    """What a segmenter sees of a response, see `cut`."""
    vocabulary, ids = elicitation.vocabulary, torch.tensor(response_ids, dtype=torch.int64)
    length = len(ids)
    surprisal = -torch.tensor(log_probs, dtype=torch.float32) if log_probs else torch.zeros(length)
    line_end, sentence_end = vocabulary.newlines(ids), vocabulary.sentence_ends(ids)
    mask = torch.tensor(response_mask, dtype=torch.bool) if response_mask else torch.ones(length, dtype=torch.bool)
    # A sentence starts after another, where the model resumes, and after a token of blanks there.
    starts = torch.ones(length, dtype=torch.bool)
    starts[1:] = line_end[:-1] | sentence_end[:-1] | ~mask[:-1]
    starts[1:] |= starts[:-1] & vocabulary.blanks(ids)[:-1]
    opened, closed = elicitation.landmarks(prompt_ids, response_ids, response_mask)
    return Trace(
        response_mask=mask,
        surprisal=surprisal.nan_to_num(nan=0.0, posinf=1e4, neginf=0.0),
        line_end=line_end,
        sentence_end=sentence_end,
        keyword=_marks(length, [end for start, end in vocabulary.keyword_spans(ids) if starts[start]]),
        answer_open=_marks(length, opened),
        think_end=_marks(length, closed),
    )


def _marks(length: int, places: Sequence[int]) -> Tensor:
    marks = torch.zeros(length, dtype=torch.bool)
    marks[list(places)] = True
    return marks
