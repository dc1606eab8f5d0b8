"""Final answers in text: where they start, their canonical form, and the formats they are written in."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rredcot_verl.answers.boxed import find_box, find_boxes_in_a_row
from rredcot_verl.answers.program import FENCE, canonical_program, find_program, without_margin
from rredcot_verl.answers.separators import join_thousands
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
        dropped: Regular expression of what may stand between an answer and its closing without being the answer's.
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
    dropped: str = ""
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


# What `canonical` drops from an answer's end, and what is no part of a line's answer.
_DROPPED, _DROPPED_IN_LINE = "[ $.]*", "[ $.]*[ \\t*`]*"
BOXED = AnswerFormat(
    "boxed",
    "\n\nThe final answer is \\boxed{",
    "\\boxed{",
    "",
    ("}",),
    False,
    find_boxes_in_a_row,
    dropped=_DROPPED,
)
_AFTER_HASHES = re.compile(r"(?<!#)(?P<opening>####)(?!#)(?=[ \t*`:]*(?P<answer>[^\s*`:]))")
# "####" also makes headings: numbered ones, and words before any number or command.
_HEADING = re.compile(
    r"\d+(?:[.)]\s+\S|(?:st|nd|rd|th)\b)|"
    r"(?![-+−–±~.,(\[{$€£¥\s]*(?:\d|\\[A-Za-z({\[]))(?=.*?(?<![\\A-Za-z])[A-Za-z]{3})"
)
# Displayed mathematics may be spread over several lines.
_AFTER_ANSWER = re.compile(
    r"(?<![A-Za-z])(?P<opening>[Aa](?:nswers?(?:[ \t]+(?:is|are))?|NSWERS?)[ \t*_`]{0,4}[:：])(?=[\s*`]{0,16}"
    r"(?P<answer>\$\$[^$]{1,400}\$\$|\\\[(?:(?!\\\])[\s\S]){1,400}\\\]|[^\s*`#]))"
)
_BEFORE_ANSWER = re.compile(r"[^\w\n]*(?:(?:so|thus|the|my|our|final|correct)[\s,]+){0,4}", re.IGNORECASE)
# "Answer: it depends on x" and "Answer: see above" name none.
_NO_ANSWER = re.compile(
    r"(?:it|this|that|there|we|you|they|depends|let|see)\s+(?!is\b|are\b|was\b|equals\b)[a-z]{2}|"
    r"(?:as|the)\s+(?:above|boxed|given|shown|stated)\b",
    re.IGNORECASE,
)
# What is said after a number: a reason, or words that hold no other number. Each run of blanks is tried once.
_REASON = re.compile(r"(?:[,.]|(?<!\s))\s+\(?(?:because|since|which|as)\b")
_WORDS = re.compile(r"[.!]\s+(?=[A-Z])|(?<!\s)\s+(?=\([^()]*[A-Za-z]{4})")
_MATHEMATICAL = "0123456789\\$="


def _names_none(match: re.Match[str], line: str) -> bool:
    """Whether words about an answer follow, or another line though the opening does not have its own to itself."""
    if _NO_ANSWER.match(line):
        return True
    text, start = match.string, match.start("opening")
    is_next_line = "\n" in text[match.end("opening") : match.start("answer")]
    return is_next_line and not _BEFORE_ANSWER.fullmatch(text, text.rfind("\n", 0, start) + 1, start)


def _is_heading(match: re.Match[str], line: str) -> bool:
    return _HEADING.match(line) is not None


def _find_line(
    pattern: re.Pattern[str], is_none: Callable[[re.Match[str], str], bool]
) -> Callable[[str], tuple[int, int, int] | None]:
    """The last match that names an answer, which ends with its line or where a remark follows."""

    def find(text: str) -> tuple[int, int, int] | None:
        for match in reversed(list(pattern.finditer(text))):
            start = match.start("answer")
            end = text.find("\n", match.end("answer"))
            line = text[start:] if end < 0 else text[start:end]
            if is_none(match, line):
                continue
            words_from = max(map(line.rfind, _MATHEMATICAL)) + 1
            remarks = [found.start() for found in (_REASON.search(line), _WORDS.search(line, words_from)) if found]
            if remarks and re.search(r"\d", line[: min(remarks)]):
                line = line[: min(remarks)]
            return match.start("opening"), start, start + len(line.rstrip(" \t*`"))
        return None

    return find


_ANSWER_TAGS = re.compile(r"<answer>((?:(?!</?answer>)[\s\S])*)</answer>")


def _find_tags(text: str) -> tuple[int, int, int] | None:
    """The last complete `<answer>...</answer>`."""
    matches = list(_ANSWER_TAGS.finditer(text))
    if not matches:
        return None
    inner = matches[-1].group(1)
    answer_start = matches[-1].start(1) + len(inner) - len(inner.lstrip())
    return matches[-1].start(), answer_start, answer_start + len(inner.strip())


HASH = AnswerFormat(
    "hash",
    "\n####",
    "####",
    " ",
    ("\n",),
    True,
    _find_line(_AFTER_HASHES, _is_heading),
    dropped=_DROPPED_IN_LINE,
)
PLAIN = AnswerFormat(
    "plain",
    "\nAnswer:",
    "Answer:",
    " ",
    ("\n",),
    True,
    _find_line(_AFTER_ANSWER, _names_none),
    dropped=_DROPPED_IN_LINE,
)
# As R1-Zero's prompt asks for it.
TAGS = AnswerFormat(
    "answer", "\n<answer>", "<answer>", "", ("</answer>",), False, _find_tags, dropped=f"{_DROPPED}\\s*"
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
# The more exact first: "Answer: \boxed{4}" is a boxed answer.
BUILT_IN = {answer_format.name: answer_format for answer_format in (BOXED, HASH, PLAIN)}
NAMED = BUILT_IN | {answer_format.name: answer_format for answer_format in (TAGS, PROGRAM)}


def formats_of(config: ElicitationConfig) -> dict[str, AnswerFormat]:
    """The formats in which answers are looked for, the more exact first.

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
            "custom",
            opening,
            opening.lstrip("\n"),
            lead,
            config.closing or ("\n",),
            True,
            _find_pattern(pattern),
            dropped=_DROPPED_IN_LINE,
        )
    }


DEFAULT_TAGS = Thinking()


def find_answer(text: str, formats: dict[str, AnswerFormat], thinking: Thinking = DEFAULT_TAGS) -> FoundAnswer | None:
    """Find the final answer of a response, None where there is none.

    The rule: **the last answer in a format that was asked for**. A run that names its format (`elicitation.format`, the
    verifier's `answer_format`) looks for that one only. Among several formats the one that stands last in the text
    counts; where one holds the other ("Answer: \\boxed{4}") the first in `formats`.
    Verifiers, probes and data preparation ask here, so they mean the same part of a text.

    Args:
        text: The response.
        formats: Formats to look for, the more exact first; see `formats_of`.
        thinking: The tags of the thinking block; an answer inside it is not final.
    """
    offset = final_part_start(text, thinking)
    if offset is None:
        return None
    final_part, found = text[offset:], None
    for name, answer_format in formats.items():
        span = answer_format.find(final_part)
        if span is None or not final_part[span[1] : span[2]].strip():
            continue
        start, answer_start, end = (offset + place for place in span)
        # One that begins before the end of another cannot replace it.
        if found is None or start >= found.end:
            found = FoundAnswer(answer_format.clean(text[answer_start:end]), start, answer_start, end, name)
    return found


def canonical(answer: str) -> str:
    """A form in which equal answers are equal strings: spaces, $ signs, outer \\text{}, a final dot, thousands.

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
        text = join_thousands(text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")).replace("\\!", "")
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
