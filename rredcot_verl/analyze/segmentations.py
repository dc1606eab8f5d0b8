"""Ways to cut a trace into segments (*cuttings*) that the bench compares, by names such as `keyword_entropy-8`."""

from collections.abc import Sequence

import torch

from rredcot_verl.config.blocks import SegmentationConfig
from rredcot_verl.config.schema import RREDCoTConfig, parse
from rredcot_verl.core.segmentation import Trace, get_segmenter, segment
from rredcot_verl.probes.elicitation import Elicitation

DEFAULT_ABLATION = (
    "fixed-8",
    "newline-8",
    "keyword-8",
    "entropy-8",
    "keyword_entropy-4",
    "keyword_entropy-8",
    "keyword_entropy-16",
)


def parse_segmentations(names: Sequence[str] | None, settings: RREDCoTConfig) -> dict[str, SegmentationConfig]:
    """The segmentations of some names, lengths and keywords being the run's; the first one is the main one.

    Args:
        names: `METHOD-NUM_SEGMENTS` each; None for the settings' own and the usual ablation after it.
        settings: The `algorithm.rredcot` block.

    Raises:
        ValueError: A name is malformed, or its method or number is not one that `segmentation` takes.
    """
    if names is None:
        own = f"{settings.segmentation.method}-{settings.segmentation.num_segments}"
        names = [own, *DEFAULT_ABLATION]
    found = {}
    for name in dict.fromkeys(names):
        method, _, number = name.rpartition("-")
        if not method or not number.isdecimal():
            raise ValueError(f"--cuttings {name!r}: expected METHOD-NUM_SEGMENTS, e.g. keyword_entropy-8")
        block = settings.model_dump()
        block["segmentation"] |= {"method": method, "num_segments": int(number)}
        try:
            rule = parse(block).segmentation
            get_segmenter(rule.method)
        except ValueError as error:
            raise ValueError(f"--cuttings {name!r}: {error}") from error
        found[name] = rule
    return found


def cut(
    rule: SegmentationConfig,
    elicitation: Elicitation,
    response_ids: Sequence[int],
    log_probs: Sequence[float],
    answer_start: int | None,
) -> list[int]:
    """Boundaries of a response, offsets from 0 to its length: those the plugin would choose in training.

    Args:
        rule: How.
        elicitation: Knows the vocabulary and the thinking block.
        response_ids: Tokens of the response, all written by the model.
        log_probs: Their log-probabilities, nats.
        answer_start: Offset of the final answer's opening, None without an answer.
    """
    ids = torch.tensor(response_ids, dtype=torch.int64)
    surprisal = -torch.tensor(list(log_probs))
    trace = Trace(
        response_mask=torch.ones(len(ids), dtype=torch.bool),
        uncertainty=surprisal.nan_to_num(nan=0.0, posinf=1e4, neginf=0.0),
        newline=elicitation.vocabulary.newlines(ids),
        keyword=elicitation.vocabulary.keyword_starts(ids),
        answer_start=len(ids) if answer_start is None else answer_start,
        think_end=elicitation.think_end(response_ids),
    )
    method = get_segmenter(rule.method)
    boundaries: list[int] = segment(trace, method, rule.num_segments, rule.min_tokens, rule.max_tokens).tolist()
    return boundaries
