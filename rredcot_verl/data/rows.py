"""Problems, and the rows of verl's schema that are made of them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pyarrow as pa

from rredcot_verl.answers.grammar import look_up

MATH_INSTRUCTION = "Let's think step by step and put the final answer within \\boxed{}."
STDIN_INSTRUCTION = (
    "Write a Python 3 program that reads from standard input and writes to standard output. Think step by step, then "
    "give the whole program in ONE final ```python code block."
)
FUNCTION_INSTRUCTION = (
    "Write the Python 3 code. Think step by step, then give the whole code, imports and helper functions included, in "
    "ONE final ```python code block. Do not call the function."
)
_PLACEHOLDER = "{question}"
Row = Mapping[str, Any]


class Unusable(ValueError):
    """A row of a data set that no problem can be made of; the message is the reason, the same text for like rows."""


@dataclass(frozen=True)
class MathProblem:
    """A question with a short final answer.

    Attributes:
        question: Text of the problem, without instructions.
        answer: The final answer as text: what the verifier compares with.
        solution: A worked solution, "" where there is none.
        id: The data set's own name of the problem, "" where there is none.
    """

    question: str
    answer: str
    solution: str = ""
    id: str = ""

    ability = "math"

    @property
    def ground_truth(self) -> str:
        """What the verifier compares with."""
        return self.answer

    @property
    def statement(self) -> str:
        """The text by which repetitions are found."""
        return self.question


@dataclass(frozen=True)
class CodeProblem:
    """A question answered by a program.

    Attributes:
        question: Text of the problem, the code to start from included.
        ground_truth: JSON text of the tests, as `rredcot_verl.rewards.code_tests` reads it.
        solutions: Reference programs, as a response's final code block would hold them.
        id: The data set's own name of the problem, "" where there is none.
        reads_stdin: Whether the program is run as a whole (contest style) or its functions are called.
        own_text: The data set's own text, where `question` has words of ours round it.
    """

    question: str
    ground_truth: str
    solutions: tuple[str, ...] = ()
    id: str = ""
    reads_stdin: bool = False
    own_text: str = ""

    ability = "code"

    @property
    def statement(self) -> str:
        """The text by which repetitions are found."""
        return self.own_text or self.question


Problem = MathProblem | CodeProblem


def entry_of(row: Row, column: str) -> Any:
    """What a row holds in a column, or in an entry of one, `COLUMN.KEY`; None where it holds nothing."""
    return row[column] if column in row else look_up(row, column)


def text_of(entry: Any, role: str) -> str:
    """The text of an entry, "" for None.

    Raises:
        Unusable: It is neither text nor a number; written out it would be no question and no answer.
    """
    if isinstance(entry, Mapping):
        keys = ", ".join(map(str, entry))
        raise Unusable(f"the {role} is an object with the keys {keys}; name one of them: --columns {role}=COLUMN.KEY")
    if not isinstance(entry, str | int | float | Decimal | None):
        raise Unusable(f"the {role} is of type {type(entry).__name__}; expected text or a number")
    return "" if entry is None else str(entry).strip()


@dataclass(frozen=True)
class PromptStyle:
    """How a question becomes a prompt.

    Attributes:
        instruction: Text put after the question, or the whole user message where it holds `{question}`. None: the
            default of the task.
        system: Text of a system message; None: there is none.
    """

    instruction: str | None = None
    system: str | None = None


def default_instruction(problem: Problem) -> str:
    """The instruction of a problem's kind."""
    if isinstance(problem, MathProblem):
        return MATH_INSTRUCTION
    return STDIN_INSTRUCTION if problem.reads_stdin else FUNCTION_INSTRUCTION


def build_prompt(problem: Problem, style: PromptStyle) -> list[dict[str, str]]:
    """Messages of the prompt: an optional system message and one user message."""
    instruction = default_instruction(problem) if style.instruction is None else style.instruction
    if _PLACEHOLDER in instruction:
        content = instruction.replace(_PLACEHOLDER, problem.question)
    else:
        content = f"{problem.question}\n\n{instruction}".rstrip()
    messages = [{"role": "system", "content": style.system}] if style.system else []
    return [*messages, {"role": "user", "content": content}]


def build_row(problem: Problem, style: PromptStyle, data_source: str, split: str, index: int) -> dict[str, Any]:
    """Row `index` of the file of a split (`train`, `val` or `test`); verl groups metrics by `data_source`."""
    extra: dict[str, Any] = {"split": split, "index": index, "id": problem.id, "question": problem.question}
    if isinstance(problem, MathProblem):
        extra["solution"] = problem.solution
    else:
        extra["solutions"] = list(problem.solutions)
    return {
        "data_source": data_source,
        "prompt": build_prompt(problem, style),
        "ability": problem.ability,
        "reward_model": {"style": "rule", "ground_truth": problem.ground_truth},
        "extra_info": extra,
    }


def schema_of(ability: str) -> pa.Schema:
    """Arrow schema of the rows of an ability, `math` or `code`: always the same, so that files can be put together."""
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    own = ("solution", pa.string()) if ability == "math" else ("solutions", pa.list_(pa.string()))
    extra = [("split", pa.string()), ("index", pa.int64()), ("id", pa.string()), ("question", pa.string()), own]
    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(message)),
            ("ability", pa.string()),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
            ("extra_info", pa.struct(extra)),
        ]
    )


_LAYOUT = re.compile(r"\\(?:(?:left|right|displaystyle)(?![a-z])|[,;:! ])")
# two-digit and two digit are the same, x-y and xy are not.
_HYPHEN = re.compile(r"(?<=[a-z]{2})-(?=[a-z]{2})")
_TOKEN = re.compile(r"[0-9]+(?:[.,][0-9]+)*|[^\W\d_]+|[^\w\s$.,;:?'\"`\\]")


def normalise(text: str) -> str:
    """Text for comparison: lower-case words, numbers and signs with one space between.

    Layout, LaTeX spacing, dollar signs, backslashes and punctuation are dropped; signs of arithmetic and brackets are
    not, as 4 - 3 is another problem than 4 + 3.
    """
    return " ".join(_TOKEN.findall(_HYPHEN.sub(" ", _LAYOUT.sub(" ", text.lower()))))
