"""Rows of mathematics data sets to problems."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rredcot_verl.answers.boxed import boxes_in_a_row
from rredcot_verl.answers.grammar import BOXED, BUILT_IN, HASH, AnswerFormat, find_answer, look_up
from rredcot_verl.answers.separators import join_thousands
from rredcot_verl.data.rows import MathProblem, Row, Unusable, entry_of, text_of

QUESTION_NAMES = ("problem", "question", "query", "prompt", "instruction", "input")
ANSWER_NAMES = ("answer", "final_answer", "ground_truth", "expected_answer", "target", "label", "solution", "output")
_DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
_DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def gsm8k(row: Row) -> MathProblem:
    """GSM8K: the answer stands after #### in the worked solution."""
    solution = str(row["answer"])
    answer = stated_answer(solution, HASH)
    if answer is None:
        raise Unusable("no #### in the answer")
    # Calculator marks such as <<48/2=24>> are no text that a model should write.
    worked = re.sub(r"<<[^<>]*>>", "", solution)
    return _problem(row["question"], join_thousands(answer), worked)


def boxed_solution(row: Row) -> MathProblem:
    """MATH and NuminaMath: the answer is the last box of the worked solution, or those in a row there."""
    solution = str(row["solution"] or "")
    answer = stated_answer(solution, BOXED)
    if answer is None:
        raise Unusable("no \\boxed{} in the solution")
    return _problem(row["problem"], answer, solution, row)


def problem_answer(row: Row) -> MathProblem:
    """MATH-500, AIME, open-rs, DeepScaleR: the answer has a column of its own."""
    return _problem(row["problem"], row["answer"], row.get("solution"), row)


def dapo(row: Row) -> MathProblem:
    """DAPO-Math-17k: verl's schema; the instruction round the question is taken off."""
    messages = list(row["prompt"])
    question = str(messages[-1]["content"]).removeprefix(_DAPO_BEFORE).removesuffix(_DAPO_AFTER)
    return _problem(question, look_up(row, "reward_model.ground_truth"), "", {"id": look_up(row, "extra_info.index")})


def verl_row(row: Row) -> MathProblem:
    """A row in verl's schema: its question, or the last user message as it is."""
    question = look_up(row, "extra_info.question") or _question_of(row["prompt"])
    number = look_up(row, "extra_info.id") or look_up(row, "extra_info.index")
    solution = look_up(row, "extra_info.solution")
    return _problem(question, _first(look_up(row, "reward_model.ground_truth")), solution, {"id": number})


def from_columns(
    question: str, answer: str, solution: str | None = None, id: str | None = None
) -> Callable[[Row], MathProblem]:
    """A mapping of named columns. The answer column may hold the answer, or a worked solution that states it."""

    def to_problem(row: Row) -> MathProblem:
        text = text_of(_first(entry_of(row, answer)), "answer")
        worked = entry_of(row, solution) if solution else ""
        found = stated_answer(text, *BUILT_IN.values())
        if found is not None:
            text, worked = found, worked or text
        return _problem(_question_of(entry_of(row, question)), text, worked, {"id": row.get(id or "id")})

    return to_problem


def stated_answer(text: str, *formats: AnswerFormat) -> str | None:
    """The final answer that a worked solution states, by the rule of `find_answer`; boxes in a row as their list."""
    found = find_answer(text, {answer_format.name: answer_format for answer_format in formats})
    return None if found is None else ", ".join(boxes_in_a_row(found.text))


def _first(entry: Any) -> Any:
    if isinstance(entry, list | tuple):
        if len(entry) != 1:
            raise Unusable("a list of answers that has not one entry")
        return entry[0]
    return entry


def _question_of(entry: Any) -> Any:
    """A question as it stands, or the last user message of a conversation."""
    if isinstance(entry, Sequence) and not isinstance(entry, str):
        users = [message for message in entry if isinstance(message, Mapping) and message.get("role") == "user"]
        return users[-1].get("content") if users else None
    return entry


def _problem(question: Any, answer: Any, solution: Any = "", row: Row | None = None) -> MathProblem:
    question, answer = text_of(question, "question"), text_of(answer, "answer")
    if not question:
        raise Unusable("empty question")
    if not answer:
        raise Unusable("empty answer")
    row = row or {}
    name = next((row[key] for key in ("unique_id", "id") if row.get(key) is not None), "")
    return MathProblem(question, answer, str(solution or "").strip(), str(name))
