"""What the probes of a run may cost: an upper bound, and what the data's own references make of it. Estimates."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rredcot_verl.answers.grammar import AnswerFormat, canonical_form, formats_of, reference_answers
from rredcot_verl.config.schema import RREDCoTConfig

TRAINING_PASSES = 5
"""Forward passes' worth of work on a response in a step: old_log_prob 1, forward 1, recomputed 1, backward 2."""


@dataclass(frozen=True)
class ProbeBudget:
    """Probes of one response, in tokens.

    Attributes:
        opening: Tokens that ask for an answer.
        most: Upper bound: every boundary, every proposal, the longest answers.
        typical: With the references' median number and length; None without references.
        answer_tokens: Median length of a reference, None without references.
        prefix_passes: Forward passes over the whole trace that separate sequences add, at most; 0 where prefixes are
            shared or the rollout server reads the probes.
    """

    opening: int
    most: int
    typical: int | None
    answer_tokens: int | None
    prefix_passes: float

    def share_of_old_log_prob(self, tokens: int, num_tokens: int) -> float:
        """Extra work in the pass that computes old_log_prob, for a trace of so many tokens. Attention is left out."""
        return tokens / num_tokens + self.prefix_passes

    def share_of_training(self, tokens: int, num_tokens: int) -> float:
        """The same as a share of all of a step's training passes."""
        return self.share_of_old_log_prob(tokens, num_tokens) / TRAINING_PASSES


def probe_budget(
    settings: RREDCoTConfig, tokenizer: Any, references: Sequence[object], *, shared: bool, separate: bool
) -> ProbeBudget:
    """Bound the probes of a response.

    K = `num_segments` boundaries (the end of the trace is not probed), m = `max_proposals`, a = `max_answer_tokens`,
    o = tokens of the opening. At most K m (o + a) tokens; probes of a boundary that begin alike share the opening where
    prefixes are shared: K (o + m a). Elsewhere an answer that may end in one token with what closes it ("}}") is probed
    twice, which is not counted. Separate sequences recompute every prefix, on average half of the trace, for each
    answer and closing token: K / 2 m c forward passes.

    Args:
        settings: The run's.
        tokenizer: The policy's.
        references: Some rows' entries under `self_value.reference_key`.
        shared: The training engine shares prefixes.
        separate: It scores every probe in a sequence of its own.
    """
    value = settings.self_value
    boundaries, proposals = settings.segmentation.num_segments, value.max_proposals
    opening = max(_opening_tokens(tokenizer, settings, form) for form in formats_of(settings.elicitation).values())

    def tokens(num_answers: int, length: int) -> int:
        return boundaries * ((opening if shared else opening * num_answers) + num_answers * length)

    form = canonical_form(settings.elicitation)
    known = [answers for entry in references if (answers := reference_answers(entry, form))]
    lengths = [len(_encode(tokenizer, answer)) for answers in known for answer in answers]
    lengths = [length for length in lengths if length <= value.max_answer_tokens]
    typical = answer_tokens = None
    if lengths:
        answer_tokens = round(median(lengths))
        # With the group's own answers, say one more than the references.
        others = 0 if value.proposals == "reference" else 1
        num_answers = round(median(len(answers) for answers in known)) * (value.proposals != "group") + others
        typical = tokens(min(proposals, num_answers), answer_tokens)
    closings = value.max_closing_tokens
    return ProbeBudget(
        opening=opening,
        most=tokens(proposals, value.max_answer_tokens),
        typical=typical,
        answer_tokens=answer_tokens,
        prefix_passes=boundaries / 2 * proposals * closings if separate else 0.0,
    )


def _opening_tokens(tokenizer: Any, settings: RREDCoTConfig, form: AnswerFormat) -> int:
    """Where most has to be written: a fenced block and a thinking block are open."""
    text = f"\n{settings.elicitation.think_close}\n\n" + form.opening.lstrip("\n") + form.lead
    if form.fence:
        text = f"\n{form.fence}\n\n" + text.lstrip("\n")
    return len(_encode(tokenizer, text))


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
