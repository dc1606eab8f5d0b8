"""Final answers in text: where they start, their canonical form, and the formats they are written in."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rredcot_verl.answers.boxed import find_box, find_boxes_in_a_row
from rredcot_verl.answers.program import FENCE, canonical_program, find_program, without_margin
from rredcot_verl.answers.thinking import Thinking, final_part_start
from rredcot_verl.config.blocks import ElicitationConfig


@dataclass(frozen=True)
class FoundAnswer:
    """The final answer of a response.

    Attributes:
        text: The answer as written; a program without the indentation of its block.
        start: Character offset where its opening starts (the reasoning ends there).
        answer_start: Character offset of the answer itself.
        end: Character offset after the answer; what stands there ended it.
        format: Name of the format it was found in.
    """

    text: str
    start: int
    answer_start: int
    end: int
    format: str


@dataclass(frozen=True)
class AnswerFormat:
    """How answers are opened, found and ended.

    Attributes:
        name: Its name in `elicitation.format`.
        opening: Text that opens an answer at a prefix; its leading newlines are dropped after a newline.
        marker: The last part of the opening, which a response itself writes right before the answer.
        lead: What stands between opening and answer, written as the answer's own first token would hold it.
        closing: Texts that end an answer; a token that starts with one of them ends it.
        ends_at_eos: Whether an end-of-sequence token ends an answer.
        find: `text -> (opening start, answer start, answer end)` of the last answer, or None.
        clean: What stands there to the answer.
        fence: Text of a line that closes a block; a prefix that stands inside one closes it before it opens the answer.
    """

    name: str
    opening: str
    marker: str
    lead: str
    closing: tuple[str, ...]
    ends_at_eos: bool
    find: Callable[[str], tuple[int, int, int] | None]
    clean: Callable[[str], str] = str
    fence: str = ""


def _find_pattern(pattern: re.Pattern[str]) -> Callable[[str], tuple[int, int, int] | None]:
    def find(text: str) -> tuple[int, int, int] | None:
        matches = [match for match in pattern.finditer(text) if match.group(1) is not None]
        if not matches:
            return None
        # Trailing blanks (and the end of a bold "**Answer: 4**") are not the answer's.
        answer = matches[-1].group(1).rstrip(" \t*")
        return matches[-1].start(), matches[-1].start(1), matches[-1].start(1) + len(answer)

    return find


BOXED = AnswerFormat("boxed", "\n\nThe final answer is \\boxed{", "\\boxed{", "", ("}",), False, find_boxes_in_a_row)
# GSM8K's answers are numbers; "#### Step 1" and "#### 1. Add" are headings.
_GSM8K = re.compile(r"(?<!#)####[ \t]*(-?\$?[0-9]+(?:[.,][0-9]+)*)(?![0-9]|[.)][ \t]*\S)")
HASH = AnswerFormat("hash", "\n####", "####", " ", ("\n",), True, _find_pattern(_GSM8K))
PLAIN = AnswerFormat(
    "plain",
    "\nAnswer:",
    "Answer:",
    " ",
    ("\n",),
    True,
    _find_pattern(re.compile(r"(?<![A-Za-z])[Aa]nswer:[ \t*]*([^\s*][^\n]*)")),
)
PROGRAM = AnswerFormat(
    "code",
    f"\n\n{FENCE}python\n",
    f"{FENCE}python\n",
    "",
    # Some tokenizers write a fence in pieces. No line of Python starts with a backtick.
    ("`",),
    False,
    find_program,
    clean=without_margin,
    fence=FENCE,
)
# In the order in which `auto` looks: "Answer: \boxed{4}" is a boxed answer.
BUILT_IN = {answer_format.name: answer_format for answer_format in (BOXED, HASH, PLAIN)}
NAMED = BUILT_IN | {PROGRAM.name: PROGRAM}


def formats_of(config: ElicitationConfig) -> dict[str, AnswerFormat]:
    """The formats in which answers are looked for, first match first.

    Raises:
        ValueError: `elicitation.pattern` is not a regular expression with one group.
    """
    if config.format == "auto":
        return dict(BUILT_IN)
    if config.format != "custom":
        return {config.format: NAMED[config.format]}
    assert config.pattern is not None and config.opening is not None
    try:
        pattern = re.compile(config.pattern)
    except re.error as error:
        raise ValueError(f"elicitation.pattern={config.pattern!r} is not a regular expression: {error}") from error
    if pattern.groups < 1:
        raise ValueError(f"elicitation.pattern={config.pattern!r} needs the answer in a group, e.g. 'Result: (.+)'")
    opening = config.opening.rstrip(" ")
    lead = config.opening[len(opening) :]
    return {
        "custom": AnswerFormat(
            "custom", opening, opening.lstrip("\n"), lead, config.closing or ("\n",), True, _find_pattern(pattern)
        )
    }


DEFAULT_TAGS = Thinking()


def find_answer(text: str, formats: dict[str, AnswerFormat], thinking: Thinking = DEFAULT_TAGS) -> FoundAnswer | None:
    """Find the final answer of a response, None where there is none.

    Verifiers and probes ask here, so they mean the same part of a response.

    Args:
        text: The response.
        formats: Formats to look for, first match first; see `formats_of`.
        thinking: The tags of the thinking block; an answer inside it is not final.
    """
    offset = final_part_start(text, thinking)
    if offset is None:
        return None
    final_part = text[offset:]
    for name, answer_format in formats.items():
        span = answer_format.find(final_part)
        if span is not None and final_part[span[1] : span[2]].strip():
            start, answer_start, end = (offset + place for place in span)
            return FoundAnswer(answer_format.clean(text[answer_start:end]), start, answer_start, end, name)
    return None


def canonical(answer: str) -> str:
    """A form in which equal answers are equal strings: spaces, $ signs, outer \\text{}, a final dot, 1,234 -> 1234.

    Deliberately small: it only merges probes. Whether an answer is right is the verifier's to say.
    """
    text, before = answer, None
    while text != before:
        before = text
        text = " ".join(text.split()).strip("$ ").rstrip(".").strip()
        wrapped = re.fullmatch(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", text)
        boxed = find_box(text)
        if wrapped:
            text = wrapped.group(1)
        elif boxed is not None and boxed[0] == 0 and boxed[2] == len(text) - 1:
            text = text[boxed[1] : boxed[2]]
        text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\!", "")
        text = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text)
    return text


def look_up(row: Mapping[str, Any], path: str) -> Any:
    """The entry of a data row under a dotted path such as `reward_model.ground_truth`; None where there is none."""
    entry: Any = row
    for key in path.split("."):
        if not isinstance(entry, Mapping):
            return None
        entry = entry.get(key)
    return entry


def canonical_form(config: ElicitationConfig) -> Callable[[str], str]:
    """The function under which equal answers of a run are equal strings."""
    return canonical_program if config.format == PROGRAM.name else canonical


def reference_answers(ground_truth: object, form: Callable[[str], str] = canonical) -> list[str]:
    """The answers a ground truth names: a string or number, or a list of them; nothing for anything else."""
    # Parquet gives numpy scalars and arrays.
    plain = ground_truth.tolist() if hasattr(ground_truth, "tolist") else ground_truth
    entries = plain if isinstance(plain, (list, tuple)) else [plain]
    entries = [entry.item() if hasattr(entry, "item") else entry for entry in entries]
    if any(isinstance(entry, bool) or not isinstance(entry, (str, int, float)) for entry in entries):
        return []
    texts = [form(str(entry)) for entry in entries]
    return [text for text in dict.fromkeys(texts) if text]
