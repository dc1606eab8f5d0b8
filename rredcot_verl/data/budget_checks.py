"""Does an answer fit: the elicitation and a reference answer against the response budget and the probe limits."""

from collections.abc import Iterable, Sequence
from typing import Any

from rredcot_verl.answers.grammar import AnswerFormat, canonical_form, reference_answers
from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.data.findings import CheckReport, Finding, Tally
from rredcot_verl.data.lengths import NotRenderable, render

_PLACEHOLDER = "2"
"""Stands for an answer where no reference is known."""
MAX_ROWS = 256


def check_budget(
    settings: RREDCoTConfig,
    tokenizer: Any,
    references: Sequence[Any],
    max_response_length: int,
    prompt: Sequence[Any] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> CheckReport:
    """Check that a response can hold an elicited answer, and that references can be probed.

    Args:
        settings: The `algorithm.rredcot` block.
        tokenizer: The policy's tokenizer, with a chat template.
        references: Entries of some rows under `self_value.reference_key`; the first `MAX_ROWS` are looked at.
        max_response_length: Verl's response budget, in tokens.
        prompt: A prompt of the data: a chat template may open a thinking block, which a probe closes first.
        template_kwargs: What the chat template is given.
    """
    from rredcot_verl.probes.elicitation import Elicitation, JoinError, Proposal
    from rredcot_verl.probes.vocabulary import Vocabulary

    report = CheckReport()
    try:
        elicitation = Elicitation(Vocabulary(tokenizer), settings)
    except (JoinError, ValueError) as error:
        report.errors.append(Finding("elicitation", 0, (), str(error)))
        return report
    try:
        text = "" if prompt is None else render(tokenizer, prompt, template_kwargs)
    except NotRenderable:
        # The check of the rows says so.
        text = ""
    prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    form = canonical_form(settings.elicitation)
    answers = [reference_answers(entry, form)[: settings.self_value.max_proposals] for entry in references[:MAX_ROWS]]
    short, long, unwritable = Tally(), Tally(), Tally()
    num_lost = num_answers = 0
    for number, of_row in enumerate(answers or [[_PLACEHOLDER]]):
        kept = 0
        for answer in of_row:
            num_answers += 1
            name = elicitation.format_for(None)
            if not elicitation.can_append(answer, name):
                unwritable.add(f"sampled row {number}", answer)
                continue
            (probe, *_) = elicitation.probes(prompt_ids, [], [0, 0], [Proposal(answer, 1.0)], name, -1)
            num_tokens = len(probe.token_ids) - probe.answer_from
            num_needed = _shortest_response(elicitation.formats.values(), tokenizer, answer)
            if num_needed > max_response_length:
                short.add(f"sampled row {number}", f"{num_needed} tokens: {answer}")
            if num_tokens > settings.self_value.max_answer_tokens:
                long.add(f"sampled row {number}", f"{num_tokens} tokens: {answer}")
            else:
                kept += 1
        num_lost += bool(of_row) and not kept
    _report(report, settings, (short, long, unwritable), num_answers, num_lost, len(answers), max_response_length)
    return report


def _shortest_response(formats: Iterable[AnswerFormat], tokenizer: Any, answer: str) -> int:
    """Tokens of a response that is nothing but the answer, in the shortest of the formats, and what ends it."""
    texts = [answer_format.marker + answer_format.lead + answer for answer_format in formats]
    return 1 + min(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def _report(
    report: CheckReport,
    settings: RREDCoTConfig,
    tallies: tuple[Tally, Tally, Tally],
    num_answers: int,
    num_lost: int,
    num_rows: int,
    max_response_length: int,
) -> None:
    short, long, unwritable = tallies
    if short.count:
        text = (
            f"data.max_response_length={max_response_length} tokens cannot hold an answer and what opens and ends it "
            f"({short.count} of {num_answers} answers looked at)"
        )
        if short.count == num_answers:
            report.errors.append(short.finding("response_budget_too_short", f"{text}: no response could be right"))
        else:
            report.warnings.append(short.finding("response_budget_too_short", text))
    if long.count:
        limit = settings.self_value.max_answer_tokens
        text = (
            f"longer than algorithm.rredcot.self_value.max_answer_tokens={limit}, so never probed ({long.count} of "
            f"{num_answers} answers looked at)"
        )
        report.warnings.append(long.finding("reference_too_long_to_probe", text))
    if unwritable.count:
        text = "the tokenizer cannot append these answers to a prefix without changing them: never probed"
        report.warnings.append(unwritable.finding("reference_cannot_be_appended", text))
    if num_rows and num_lost == num_rows and settings.self_value.proposals == "reference":
        text = (
            f"none of the {num_rows} rows looked at has a reference answer that can be probed: with "
            "self_value.proposals=reference RREDCoT would be GRPO; raise self_value.max_answer_tokens"
        )
        report.errors.append(Finding("nothing_to_probe", num_rows, (), text))
