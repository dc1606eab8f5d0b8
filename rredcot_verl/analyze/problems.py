"""What the bench is given: prompts to sample from, or traces that were sampled already."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rredcot_verl.answers.grammar import look_up
from rredcot_verl.data.load import Row, data_files, read_file


@dataclass(frozen=True)
class Problem:
    """A prompt and what its row of the data says.

    Attributes:
        group: Which prompt.
        question: What the user asked last; for a verl dump the whole prompt as text.
        messages: The chat; empty where only the text of the whole prompt is known.
        row: The row, for the verifier and the references.
    """

    group: str
    question: str
    messages: Sequence[Mapping[str, Any]]
    row: Mapping[str, Any]

    @property
    def data_source(self) -> str:
        """`data_source` of the row, empty where it has none."""
        return str(self.row.get("data_source") or "")

    @property
    def ground_truth(self) -> Any:
        """The row's ground truth."""
        return look_up(self.row, "reward_model.ground_truth")

    @property
    def extra_info(self) -> Mapping[str, Any]:
        """`extra_info` of the row."""
        return self.row.get("extra_info") or {}


@dataclass(frozen=True)
class Label:
    """What a labelled set says of a response.

    Attributes:
        ends: Where its steps end, offsets in characters; the last is its length.
        first_wrong: Number of the first wrong step, from 0; None where none is wrong.
        final_correct: Whether its final answer is right; None where it has to be verified.
        generator: Who wrote it; empty where that is not said.
        is_assumed: The set does not say if the final answer is right: it counts as right where no step is wrong.
    """

    ends: tuple[int, ...]
    first_wrong: int | None
    final_correct: bool | None
    generator: str
    is_assumed: bool = False


@dataclass(frozen=True)
class GivenTrace:
    """A response that was sampled elsewhere, as text.

    Attributes:
        problem: Its prompt.
        response: Its text.
        reward: Its reward, None where it has to be verified.
        truncated: Whether it filled its budget; None where that is not known.
        label: Which of its steps is wrong, where a labelled set says so.
    """

    problem: Problem
    response: str
    reward: float | None = None
    truncated: bool | None = None
    label: Label | None = None

    @property
    def is_decided(self) -> bool:
        """Whether a label says if the final answer is right, so that no verifier is asked."""
        return self.label is not None and self.label.final_correct is not None


def read_prompts(path: str, limit: int) -> list[Problem]:
    """The first `limit` prompts of a file: verl's rows, or objects with `prompt` and `ground_truth`.

    Raises:
        ValueError: The file cannot be read, is empty, or a row has no prompt or no ground truth.
    """
    problems = []
    for number, row in enumerate(read_file(path)):
        if number == limit:
            break
        where = f"{path}: row {number}"
        messages = _messages(row.get("prompt"), where)
        row = _with_ground_truth(row)
        if look_up(row, "reward_model.ground_truth") is None:
            raise ValueError(
                f"{where}: no ground truth; expected reward_model.ground_truth (verl's rows) or ground_truth, got the "
                f"columns {sorted(row)}"
            )
        problems.append(Problem(str(number), _question(messages), messages, row))
    if not problems:
        raise ValueError(f"{path}: no rows")
    return problems


def read_traces(paths: Sequence[str], data_source: str, limit: int | None) -> list[GivenTrace]:
    """Traces of rollout dumps, at most `limit` of them; a prompt's traces stand together.

    Three forms are read: verl's `<step>.jsonl` (`input`, `output`, `gts`, `score`), the credited traces of this package
    (`prompt`, `response`, `ground_truth`, `reward`, `uid`), and any file with `prompt` and `response`.

    Args:
        paths: Files or folders.
        data_source: What the verifier is told where a row does not say.
        limit: Most traces, whole groups first come; None for all.

    Raises:
        ValueError: A file cannot be read, or a row has no prompt or no response.
    """
    groups: dict[Any, list[GivenTrace]] = {}
    for file in (file for path in paths for file in _in_order(data_files(path))):
        for number, row in enumerate(read_file(file)):
            trace = _trace(row, f"{file}: row {number}", data_source)
            key = (str(file), trace.problem.group)
            groups.setdefault(key, []).append(trace)
    if not groups:
        raise ValueError(f"{', '.join(paths)}: no traces")
    return whole_groups(list(groups.values()), limit)


def whole_groups(groups: Sequence[Sequence[GivenTrace]], limit: int | None) -> list[GivenTrace]:
    """The traces of the first groups, numbered, at most `limit`: a part of a group would be taken for the group."""
    traces = [
        replace(each, problem=replace(each.problem, group=str(number)))
        for number, group in enumerate(groups)
        for each in group
    ]
    if limit is None:
        return traces
    sizes = [sum(1 for _ in group) for _, group in itertools.groupby(traces, key=lambda each: each.problem.group)]
    ends = list(itertools.accumulate(sizes))
    return traces[: max((end for end in ends if end <= limit), default=limit)]


def _in_order(files: Iterable[Path]) -> list[Path]:
    """Dumps are named by their step: 10 comes after 9."""
    return sorted(files, key=lambda file: (int(file.stem) if file.stem.isdecimal() else -1, str(file)))


def _trace(row: Row, where: str, data_source: str) -> GivenTrace:
    of_verl = "input" in row and "output" in row
    prompt, response = (row.get("input"), row.get("output")) if of_verl else (row.get("prompt"), row.get("response"))
    if not isinstance(response, str) or not response or prompt is None:
        raise ValueError(
            f"{where}: expected 'input' and 'output' (verl's dumps) or 'prompt' and 'response', with text in them; got "
            f"{sorted(row)}"
        )
    # A verl dump holds the prompt with its chat template, without the special tokens.
    messages = [] if of_verl and isinstance(prompt, str) else _messages(prompt, where)
    row = _with_ground_truth({"data_source": data_source, **row})
    question = _question(messages) if messages else str(prompt)
    reward = row.get("score") if of_verl else row.get("reward", row.get("score"))
    # The key of a rollout is {prompt}_{session}_{output}; in traces of this package it is the prompt's own.
    uid = str(row.get("uid") or "")
    group = uid.rsplit("_", 2)[0] if of_verl and uid.count("_") >= 2 else uid
    return GivenTrace(
        Problem(group or question, question, messages, row),
        response,
        float(reward) if isinstance(reward, int | float) and not isinstance(reward, bool) else None,
        row.get("truncated") if isinstance(row.get("truncated"), bool) else None,
    )


def _messages(prompt: Any, where: str) -> list[Mapping[str, Any]]:
    if isinstance(prompt, str) and prompt:
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt):
        if not all(isinstance(message.get("content"), str) for message in prompt):
            raise ValueError(f"{where}: a message's content is not text; the bench takes text only")
        return prompt
    raise ValueError(f"{where}: 'prompt' must be text or a list of messages, got {type(prompt).__name__}")


def _question(messages: Sequence[Mapping[str, Any]]) -> str:
    asked = [str(message["content"]) for message in messages if message["role"] == "user"]
    return asked[-1] if asked else str(messages[-1]["content"])


def _with_ground_truth(row: Row) -> Row:
    """The row with its ground truth where verl's rows have it."""
    if look_up(row, "reward_model.ground_truth") is not None:
        return row
    known = next((row[key] for key in ("ground_truth", "gts", "answer") if row.get(key) is not None), None)
    return {**row, "reward_model": {"style": "rule", "ground_truth": known}}
