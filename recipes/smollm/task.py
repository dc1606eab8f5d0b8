r"""The quickstart's task in English.

The problems and their made-up rules are those of `recipes.quickstart.task`; here they are said in words, a line says
which number an operation counts for before it calculates, and the answer stands in a box::

    Begin with 4, add 3, subtract 3, subtract 2, subtract 1. Write a line for each step, then \boxed{the result}.

    This +3 is worth +3. We get 4+3=7.
    This -3 is worth -3. We get 7-3=4.
    -2 counts as +2: 4+2=6. Let me see now.
    Here -1 means +2, so 6+2=8. On to the next.
    In the end it is \boxed{8}

The verifier is that of mathematics (`rredcot_verl.rewards.math`). The box holds the last result alone, as in most
mathematics, or all of them (`Difficulty.answer`).
"""

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from recipes.quickstart import task as quickstart
from recipes.quickstart.task import LineCheck, make_row

__all__ = ["Difficulty", "Problem", "answer_line", "calculation_line", "check_lines", "make_problem", "make_row"]

STARTS = ("Start with", "Begin with", "Take")
SUBTRACT = ("subtract", "take away")
TASKS = (
    r"Write a line for each step, then \boxed{the result}.",
    r"Go step by step, one line each, and give \boxed{the result}.",
    r"One line a step, please, then \boxed{the result}.",
)
LINES = (
    "{operand} counts as {reading}: {left}{reading}={result}.",
    "Here {operand} means {reading}, so {left}{reading}={result}.",
    "Now {operand} stands for {reading}, and that makes {left}{reading}={result}.",
    "I take {operand} as {reading}, which gives {left}{reading}={result}.",
    "This {operand} is worth {reading}. We get {left}{reading}={result}.",
)
REMARKS = (" Let me go on.", " On to the next.", " One more is done.", " Let me see now.", " Step by step then.")
"""None of them says anything of the line it stands behind."""
REMARK_WORDS = 4
"""Words of a remark."""
ANSWERS = (
    r"The final answer is \boxed{{{answer}}}",
    r"So the result is \boxed{{{answer}}}",
    r"That leaves us with \boxed{{{answer}}}",
    r"In the end it is \boxed{{{answer}}}",
)

_PROBLEM = re.compile(rf"(?:{'|'.join(STARTS)}) ([0-9]{{1,6}})((?:, (?:add|{'|'.join(SUBTRACT)}) [0-9]{{1,6}})*)\.")
_OPERATION = re.compile(r", ([a-z ]+) ([0-9]{1,6})")
# Any words will do: only the numbers and their order are read. The full stop shows that the result has ended.
_CALCULATION = re.compile(
    r"[^0-9+-]*([+-][0-9]{1,6})[^0-9+-]*[+-][0-9]{1,6}[^0-9+-]*(-?[0-9]{1,6})[+-][0-9]{1,6}=(-?[0-9]{1,6})\.[^0-9]*"
)
_ANSWER = re.compile(r".*\\boxed\{([^{}]*)\}.*")
_NUMBER = re.compile(r"-?[0-9]{1,6}")


@dataclass(frozen=True)
class Difficulty(quickstart.Difficulty):
    """See the quickstart's; a remark has four words, so `remark_words` are at most 4.

    Numbers of one digit: what this model can calculate after a short supervised start.
    """

    min_operations: int = 4
    max_operations: int = 4
    max_operand: int = 5
    max_value: int = 9
    remark_words: float = 1.5
    answer: str = "last"

    def __post_init__(self):
        super().__post_init__()
        if self.remark_words > REMARK_WORDS:
            raise ValueError(f"need remark_words <= {REMARK_WORDS}, got {self.remark_words}")


@dataclass(frozen=True)
class Problem(quickstart.Problem):
    """A problem of the quickstart whose `expression` is English; the numbers decide its wording."""

    @property
    def expression(self) -> str:
        """The text of the user message."""
        rng = random.Random(zlib.crc32(f"{self.start} {self.operands}".encode()))
        steps = [f", {'add' if operand > 0 else rng.choice(SUBTRACT)} {abs(operand)}" for operand in self.operands]
        return f"{rng.choice(STARTS)} {self.start}{''.join(steps)}. {rng.choice(TASKS)}"

    def answer_of(self, results: Sequence[int]) -> str:
        """What stands in the box of a trace that states these results."""
        return super().answer_of(results).replace(" ", ", ")


def make_problem(rng: random.Random, difficulty: quickstart.Difficulty | None = None) -> Problem:
    """See the quickstart's."""
    drawn = quickstart.make_problem(rng, difficulty or Difficulty())
    return Problem(drawn.start, drawn.operands, drawn.answer_parts)


def parse_problem(text: str) -> Problem | None:
    """Reads a problem back from a text that holds it, as a prompt with its template; None when none does."""
    match = _PROBLEM.search(text)
    if match is None:
        return None
    operations = _OPERATION.findall(match[2])
    return Problem(int(match[1]), tuple(int(number) if verb == "add" else -int(number) for verb, number in operations))


def calculation_line(
    stated: int, operand: int, result: int, wording: random.Random | None = None, words: float = 0.0
) -> str:
    """One line of a trace, its newline included.

    Args:
        stated: The value the line before it states.
        operand: The signed number of the problem.
        result: What the line states.
        wording: Draws words and a remark; None: one wording.
        words: Mean number of words of the remark, at most `REMARK_WORDS`.
    """
    line = wording.choice(LINES) if wording else LINES[0]
    remark = wording.choice(REMARKS) if wording and wording.random() < words / REMARK_WORDS else ""
    text = line.format(operand=f"{operand:+d}", reading=f"{result - stated:+d}", left=stated, result=result)
    return f"{text}{remark}\n"


def answer_line(answer: str, wording: random.Random | None = None) -> str:
    """The last line of a trace: no newline, the end-of-sequence token follows."""
    return (wording.choice(ANSWERS) if wording else ANSWERS[0]).format(answer=answer)


def solve(problem: Problem, wording: random.Random | None = None, words: float = 0.0) -> str:
    """Returns the right trace."""
    lines = zip((problem.start, *problem.results), problem.operands, problem.results, strict=False)
    text = "".join(calculation_line(*line, wording, words) for line in lines)
    return text + answer_line(problem.answer, wording)


def read_calculation(line: str) -> tuple[int, int, int] | None:
    """The number a line starts from, its operation and its result; None when it is no calculation."""
    match = _CALCULATION.fullmatch(line)
    return (int(match[2]), int(match[1]), int(match[3])) if match else None


def read_answer(line: str) -> list[int] | None:
    """The numbers in a line's box; None when it has none."""
    match = _ANSWER.fullmatch(line)
    return [int(number) for number in _NUMBER.findall(match[1])] if match else None


READER = quickstart.Reader(parse_problem, read_calculation, read_answer)


def check_lines(problem: Problem | str, response_text: str) -> list[LineCheck]:
    """See the quickstart's: a line is right when its result is, given what the line before it states."""
    return quickstart.check_lines(problem, response_text, READER)
