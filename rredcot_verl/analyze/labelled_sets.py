"""Labelled sets: traces whose first wrong step is known, in the columns in which they are published.

Each is a source of given traces. Steps are joined by an empty line, as ProcessBench joins them, unless a row holds the
response as one text. Traces of one problem are a group.
"""

import bisect
import importlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rredcot_verl.analyze.problems import GivenTrace, Label, Problem, whole_groups
from rredcot_verl.data.load import Row, data_files, load_hub, read_file, require

JOIN = "\n\n"
CHAMP = "champ"
_PARAGRAPH = re.compile(r"(?<=\S)[^\S\n]*\n[^\S\n]*\n\s*")
_HUB = re.compile(r"[\w.-]+/[\w.-]+:[\w.-]+")
_SECTION = re.compile(r"(?:^|\n+)section ?(\d+): ?\n?", re.IGNORECASE)


class RowError(ValueError):
    """What is wrong with a row, said without its place."""


@dataclass(frozen=True)
class Format:
    """Columns of a published set.

    Attributes:
        columns: Those that tell it from the others.
        read: Makes a trace of a row; raises `RowError`.
    """

    columns: tuple[str, ...]
    read: Callable[[Row], GivenTrace]


def read_labelled(source: str, format_name: str, limit: int | None) -> list[GivenTrace]:
    """All traces of a labelled set, a prompt's together.

    Args:
        source: A file or folder, `champ`, or `OWNER/NAME:SPLIT` on the hub.
        format_name: A key of `FORMATS`; `auto`: the one whose columns the first row has.
        limit: Most traces, whole groups first come; None for all.

    Raises:
        ValueError: The set cannot be read; a malformed row is named with its file, its number and the key.
    """
    groups: dict[str, list[GivenTrace]] = {}
    for trace in _champ() if _is_champ(source) else _read(source, format_name):
        groups.setdefault(trace.problem.group, []).append(trace)
    if not groups:
        raise ValueError(f"--labels {source}: no traces")
    return whole_groups(list(groups.values()), limit)


def _is_champ(source: str) -> bool:
    return source == CHAMP and not Path(source).exists()


def _read(source: str, format_name: str) -> Iterator[GivenTrace]:
    for where, row in _rows(source):
        if format_name == "auto":
            format_name = _format_of(row, where)
        try:
            trace = FORMATS[format_name].read(row)
            _check(trace)
        except RowError as error:
            raise ValueError(f"{where}: {error} (format {format_name})") from error
        yield trace


def _rows(source: str) -> Iterator[tuple[str, Row]]:
    """Rows with where each stands, for messages; counted from 1, as lines are."""
    if Path(source).expanduser().exists() or not _HUB.fullmatch(source):
        for file in data_files(source):
            for number, row in enumerate(read_file(file), start=1):
                yield f"--labels {file}: row {number}", row
    else:
        hub_id, _, split = source.partition(":")
        try:
            for number, row in enumerate(load_hub(hub_id, None, split), start=1):
                yield f"--labels {source}: row {number}", row
        except ValueError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"--labels {source}: {reason}; files of it that lie here can be given too") from error


def _format_of(row: Row, where: str) -> str:
    for name, known in FORMATS.items():
        if set(known.columns) <= set(row):
            return name
    listing = "; ".join(f"{name}: {', '.join(known.columns)}" for name, known in FORMATS.items())
    raise ValueError(f"{where}: none of the formats known has the columns {sorted(row)}. Expected of {listing}")


def _check(trace: GivenTrace) -> None:
    """Whether what values are fitted on can be known."""
    if not trace.is_decided and trace.problem.ground_truth in (None, ""):
        raise RowError("neither says whether the final answer is right nor has a reference answer to verify it by")


def _make(
    prompt: str,
    steps: Sequence[str],
    first_wrong: int | None,
    *,
    ground_truth: Any = None,
    final_correct: bool | None = None,
    generator: object = "",
) -> GivenTrace:
    """A trace of its steps, joined."""
    response, ends = "", []
    for number, each in enumerate(steps, start=1):
        response += each + (JOIN if number < len(steps) else "")
        ends.append(len(response))
    label = Label(tuple(ends), first_wrong, final_correct, str(generator or ""))
    return GivenTrace(_problem(prompt, ground_truth), response, label=label)


def _problem(prompt: str, ground_truth: Any, group: str = "") -> Problem:
    row = {"data_source": "", "reward_model": {"style": "rule", "ground_truth": ground_truth}}
    return Problem(group or prompt, prompt, [{"role": "user", "content": prompt}], row)


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{key!r} is {value!r}, expected text")
    return value


def _texts(row: Row, key: str) -> list[str]:
    value = row.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise RowError(f"{key!r} is {value!r}, expected a list of texts, one a step")
    if not "".join(value).strip():
        raise RowError(f"{key!r} holds blanks alone")
    return value


def _index(row: Row, key: str, num_steps: int, *, none: Any = None) -> int | None:
    """Number of a step, from 0."""
    if key not in row:
        raise RowError(f"no {key!r}: expected the number of the first wrong step, from 0, {none!r} where none is wrong")
    value = row[key]
    # pandas writes a column with gaps as floats.
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if value is None or value == none:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_steps:
        raise RowError(f"{key!r} is {value!r}, expected 0 .. {num_steps - 1}, or {none!r} where no step is wrong")
    return value


def _truth(row: Row, key: str) -> bool | None:
    """Yes, no, or None where the row does not say."""
    value = row.get(key)
    known = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    found = value if isinstance(value, bool) else known.get(str(value).lower())
    if found is None and value not in (None, ""):
        raise RowError(f"{key!r} is {value!r}, expected true or false")
    return found


def _own(row: Row) -> GivenTrace:
    """Ours: steps, or the response with the offsets where they end."""
    prompt, ground_truth = _text(row, "prompt"), row.get("ground_truth", row.get("answer"))
    final_correct, generator = _truth(row, "final_correct"), row.get("generator")
    if "steps" in row:
        steps = _texts(row, "steps")
        first_wrong = _index(row, "first_wrong", len(steps))
        return _make(
            prompt, steps, first_wrong, ground_truth=ground_truth, final_correct=final_correct, generator=generator
        )
    response, ends = _text(row, "response"), row.get("step_ends")
    numbers = isinstance(ends, list) and all(isinstance(end, int) for end in ends)
    if not isinstance(ends, list) or not numbers or sorted({0, *ends}) != [0, *ends] or ends[-1:] != [len(response)]:
        raise RowError(
            f"'step_ends' is {ends!r}, expected rising offsets in characters, the last the response's length, "
            f"{len(response)}; or 'steps', a list of texts"
        )
    label = Label(tuple(ends), _index(row, "first_wrong", len(ends)), final_correct, str(generator or ""))
    return GivenTrace(_problem(prompt, ground_truth), response, label=label)


def _process_bench(row: Row) -> GivenTrace:
    """ProcessBench (arXiv 2412.06559). It has no reference answers; a column `answer` or `ground_truth` is read."""
    steps = _texts(row, "steps")
    return _make(
        _text(row, "problem"),
        steps,
        _index(row, "label", len(steps), none=-1),
        ground_truth=row.get("ground_truth", row.get("answer")),
        final_correct=_truth(row, "final_answer_correct"),
        generator=row.get("generator"),
    )


def _big_bench_mistake(row: Row) -> GivenTrace:
    """BIG-Bench-Mistake (arXiv 2311.08516), whose traces PaLM 2 wrote."""
    steps, target = _texts(row, "steps"), _text(row, "target")
    return _make(
        _text(row, "input"),
        steps,
        _index(row, "mistake_index", len(steps)),
        ground_truth=target.strip(),
        final_correct=str(row.get("answer") or "").strip() == target.strip(),
        generator="PaLM 2",
    )


def _delta_bench(row: Row) -> GivenTrace:
    """DeltaBench (arXiv 2502.19361): sections, numbered from 1; one that is of no use is not a wrong one."""
    steps = _sections(row)
    wrong = row.get("reason_error_section_numbers")
    try:
        numbers: Any = json.loads(wrong) if isinstance(wrong, str) else wrong
        first = min((int(number) - 1 for number in numbers), default=None)
    except (TypeError, ValueError) as error:
        raise RowError(f"'reason_error_section_numbers' is {wrong!r}, expected a list of numbers") from error
    if first is not None and not 0 <= first < len(steps):
        raise RowError(f"'reason_error_section_numbers' is {wrong!r}, expected numbers from 1 to {len(steps)}")
    return _make(
        _text(row, "question"),
        steps,
        first,
        ground_truth=row.get("answer"),
        final_correct=_truth(row, "final_correct"),
        generator=row.get("generator"),
    )


def _sections(row: Row) -> list[str]:
    """Of a list of objects, or of one text in which each starts with its number."""
    sections = row.get("sections")
    if isinstance(sections, list) and sections:
        found = [each.get("content", each.get("section")) if isinstance(each, dict) else each for each in sections]
        return _texts({"sections": found}, "sections")
    text = _text(row, "sections_content")
    marks = list(_numbered(text))
    if not marks or text[: marks[0].start()].strip():
        raise RowError(f"'sections_content' is {text[:40]!r}..., expected 'section1: ...', 'section2: ...'")
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return [text[mark.end() : end].strip("\n") for mark, end in zip(marks, ends, strict=True)]


def _numbered(text: str) -> Iterator[re.Match[str]]:
    """The marks that count up from 1: a section may speak of others."""
    following = 1
    for mark in _SECTION.finditer(text):
        if int(mark[1]) == following:
            yield mark
            following += 1


def _champ() -> Iterator[GivenTrace]:
    """CHAMP (arXiv 2401.06961) as the package champ-dataset ships it: solutions with the span of the first mistake.

    Steps are the paragraphs; the wrong one is that in which the span starts. Final answers are sentences, so that no
    program tells if they are right: a solution counts as right where no step is wrong.
    """
    require("champ_dataset", "champ-dataset")
    champ = importlib.import_module("champ_dataset")
    for problem in champ.load("v0").problems.values():
        for name, annotation in problem.fws_annotations.items():
            # The prompt differs from name to name: some are given hints.
            prompt = next(message.text for message in problem.conversations[name].messages if message.role == "User")
            response, start = annotation.text.rstrip(), annotation.start_idx
            ends = [*(mark.end() for mark in _PARAGRAPH.finditer(response)), len(response)]
            label = Label(ends=tuple(ends), first_wrong=None, final_correct=True, generator=name.partition("|")[0])
            if start is not None:
                label = replace(label, first_wrong=bisect.bisect_right(ends, start), final_correct=False)
            given = _problem(prompt, _champ_answers(problem.answer), problem.identifier)
            yield GivenTrace(given, response, label=replace(label, is_assumed=True))


def _champ_answers(answer: str) -> str | list[str]:
    """Spellings of an answer such as `C(10, 5), or equivalently 252`, without remarks such as `(i.e., all values)`."""
    parts = re.split(r",? or (?:equivalently|approximately|an equivalent form such as) ", answer)
    found = [re.sub(r"\s*\(i\.e\..*\)$", "", part).strip() for part in parts]
    return found[0] if len(found) == 1 else found


FORMATS = {
    "rredcot": Format(("prompt", "first_wrong"), _own),
    "processbench": Format(("problem", "steps", "label"), _process_bench),
    "bigbench_mistake": Format(("input", "steps", "mistake_index"), _big_bench_mistake),
    "deltabench": Format(("question", "reason_error_section_numbers"), _delta_bench),
}
"""Columns of the sets known, by name."""
