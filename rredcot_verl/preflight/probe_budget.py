"""Reference answers and probes in tokens: do they fit a run's limits, and what may the probes cost? Estimates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rredcot_verl.answers.grammar import AnswerFormat, canonical_form, formats_of, reference_answers
from rredcot_verl.config.schema import PREFIX, RREDCoTConfig
from rredcot_verl.data.lengths import NotRenderable, render
from rredcot_verl.data.tally import Tally
from rredcot_verl.preflight.findings import Findings

TRAINING_PASSES = 5
"""Forward passes' worth of work on a response in a step: old_log_prob 1, forward 1, recomputed 1, backward 2."""
MAX_ROWS = 256
"""Rows whose references are looked at."""
_PLACEHOLDER = "2"
"""Stands for an answer where no reference is known."""


def check_budget(
    settings: RREDCoTConfig,
    tokenizer: Any,
    references: Sequence[Any],
    max_response_length: int,
    prompt: Sequence[Any] | None,
    template_kwargs: Mapping[str, Any],
    findings: Findings,
) -> None:
    """Check that a response can hold an elicited answer, and that references can be probed.

    Args:
        settings: The `algorithm.rredcot` block.
        tokenizer: The policy's tokenizer, with a chat template.
        references: Entries of some rows under `self_value.reference_key`; the first `MAX_ROWS` are looked at.
        max_response_length: Verl's response budget, in tokens.
        prompt: A prompt of the data: a chat template may open a thinking block, which a probe closes first.
        template_kwargs: What the chat template is given.
        findings: Gets what was found.
    """
    from rredcot_verl.probes.elicitation import Elicitation, JoinError
    from rredcot_verl.probes.proposals import Proposal
    from rredcot_verl.probes.vocabulary import Vocabulary

    value = settings.self_value
    try:
        elicitation = Elicitation(Vocabulary(tokenizer), settings)
    except (JoinError, ValueError) as error:
        findings.fault("elicitation", str(error))
        return
    try:
        text = "" if prompt is None else render(tokenizer, prompt, template_kwargs)
    except NotRenderable:
        # The check of the rows says so.
        text = ""
    prompt_ids, name = _encode(tokenizer, text), elicitation.usual_format()
    form = canonical_form(settings.elicitation)
    answers = [reference_answers(entry, form)[: value.max_proposals] for entry in references[:MAX_ROWS]]
    short, long, unwritable, probed = Tally(), Tally(), Tally(), set()
    for number, of_row in enumerate(answers or [[_PLACEHOLDER]]):
        where = f"sampled row {number}"
        for answer in of_row:
            if not elicitation.can_append(answer, name):
                unwritable.add(where, answer)
                continue
            (probe, *_) = elicitation.probes(prompt_ids, [], [0, 0], [Proposal(answer, 1.0)], name)
            num_tokens = len(probe.token_ids) - probe.answer_from
            # A response that is nothing but the answer, in the shortest of the formats, and what ends it.
            texts = [found.marker + found.lead + answer for found in elicitation.formats.values()]
            num_needed = 1 + min(len(_encode(tokenizer, text)) for text in texts)
            if num_needed > max_response_length:
                short.add(where, f"{num_needed} tokens: {answer}")
            if num_tokens > value.max_answer_tokens:
                long.add(where, f"{num_tokens} tokens: {answer}")
            else:
                probed.add(number)
    num_answers = sum(map(len, answers)) or 1
    of_all = f"of {num_answers} answers looked at)"
    text = f"data.max_response_length={max_response_length} tokens cannot hold an answer and what opens and ends it"
    text += f" ({short.count} {of_all}"
    if short.count == num_answers:
        findings.fault("response_budget_too_short", f"{text}: no response could be right", short)
    else:
        findings.warn("response_budget_too_short", text, short)
    text = f"longer than {PREFIX}.self_value.max_answer_tokens={value.max_answer_tokens}, so never probed"
    findings.warn("reference_too_long_to_probe", f"{text} ({long.count} {of_all}", long)
    text = "the tokenizer cannot append these answers to a prefix without changing them: never probed"
    findings.warn("reference_cannot_be_appended", text, unwritable)
    if answers and all(answers) and not probed and value.proposals == "reference":
        text = (
            f"none of the {len(answers)} rows looked at has a reference answer that can be probed: with "
            "self_value.proposals=reference RREDCoT would be GRPO; raise self_value.max_answer_tokens"
        )
        findings.fault("nothing_to_probe", text, Tally(len(answers)))


@dataclass(frozen=True)
class ProbeBudget:
    """Probes of one response, in tokens.

    Attributes:
        opening: Tokens that ask for an answer.
        most: Upper bound: every boundary, every proposal, the longest answers.
        typical: With the references' median number and length; None without references.
        answer_tokens: Median length of a reference, None without references.
        prefix_passes: Forward passes over the whole trace that are added, at most: by separate sequences, or 1 where
            probes are read in a pass of their own; 0 in verl's pass, and where the rollout server reads the probes.
    """

    opening: int
    most: int
    typical: int | None
    answer_tokens: int | None
    prefix_passes: float

    def share_of_training(self, tokens: int, num_tokens: int) -> float:
        """Extra work for a trace of so many tokens, as a share of a step's training passes. Attention is left out."""
        return (tokens / num_tokens + self.prefix_passes) / TRAINING_PASSES


def probe_budget(
    settings: RREDCoTConfig,
    tokenizer: Any,
    references: Sequence[object],
    *,
    shared: bool,
    separate: bool,
    alone: bool = False,
) -> ProbeBudget:
    """Bound the probes of a response.

    K = `num_segments` boundaries (the end of the trace is not probed), m = `max_proposals`, a =
    `max_answer_tokens`, o = tokens of the opening. At most K m (o + a) tokens; probes of a boundary that begin
    alike share the opening where prefixes are shared: K (o + m a). An end of several tokens is forced too, in two
    ways. Elsewhere an answer that may end in one token with what closes it ("}}") is probed twice, which is not
    counted. Separate sequences recompute every prefix, on average half of the trace, for each answer and closing
    token: K / 2 m c forward passes.

    Args:
        settings: The run's.
        tokenizer: The policy's.
        references: Some rows' entries under `self_value.reference_key`.
        shared: The training engine shares prefixes.
        separate: It scores every probe in a sequence of its own.
        alone: It shares prefixes in a pass of its own.
    """
    value = settings.self_value
    boundaries, proposals = settings.segmentation.num_segments, value.max_proposals
    formats = formats_of(settings.elicitation).values()
    opening = max(_opening_tokens(tokenizer, settings, form) for form in formats)
    # A single character that ends an answer is forced by no probe.
    ends = [len(_encode(tokenizer, text)) for form in formats for text in form.closing if len(text) > 1]
    num_ends = max(ends, default=1) - 1

    def tokens(num_answers: int, length: int) -> int:
        if num_ends:
            num_answers, length = 2 * num_answers, length + num_ends
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
    return ProbeBudget(
        opening=opening,
        most=tokens(proposals, value.max_answer_tokens),
        typical=typical,
        answer_tokens=answer_tokens,
        prefix_passes=boundaries / 2 * proposals * value.max_closing_tokens if separate else float(alone),
    )


def _opening_tokens(tokenizer: Any, settings: RREDCoTConfig, form: AnswerFormat) -> int:
    """Where most has to be written: a fenced block and a thinking block are open."""
    text = settings.elicitation.leave_thinking + form.opening.lstrip("\n") + form.lead
    if form.fence:
        text = f"\n{form.fence}\n\n" + text.lstrip("\n")
    return len(_encode(tokenizer, text))


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
