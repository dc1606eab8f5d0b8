"""The quickstart's task: a chain of additions and subtractions, one checkable line per operation.

A problem is an expression such as ``7+5-3+8-2``; the expected response works from left to right::

    7+5=12
    12-3=9
    9+8=17
    17-2=15
    Answer: 15

Every line can be checked by a program, so the first wrong line of a trace is known. That is what makes the task fit to
judge reward redistribution: the place where the blame belongs has a ground truth.

This file imports the standard library only, and nothing of its own package: verl loads the reward function by its path.
"""

import random
import re
from dataclasses import dataclass

DATA_SOURCE = "rredcot/arithmetic"
ANSWER_PREFIX = "Answer:"

# Bounded digit counts: int() of an endless run of digits is slow, and above 4300 digits it raises.
_EXPRESSION = re.compile(r"([0-9]{1,6})((?:\s*[+-]\s*[0-9]{1,6})*)")
_OPERATION = re.compile(r"([+-])\s*([0-9]{1,6})")
_CALCULATION = re.compile(r"(-?[0-9]{1,6})([+-])([0-9]{1,6})=(-?[0-9]{1,6})")
_ANSWER = re.compile(rf"{ANSWER_PREFIX}[ \t]*(-?[0-9]{{1,6}})[ \t]*")


@dataclass(frozen=True)
class Difficulty:
    """How hard the problems are.

    Attributes:
        min_operations: Fewest operations of a problem (count); each costs one line of the trace.
        max_operations: Most operations of a problem (count).
        max_operand: Largest number added or subtracted; the smallest is 1.
        max_value: Every true intermediate result lies in [0, max_value].
    """

    min_operations: int = 5
    max_operations: int = 5
    max_operand: int = 9
    max_value: int = 29

    def __post_init__(self):
        if not 1 <= self.min_operations <= self.max_operations:
            raise ValueError(
                f"need 1 <= min_operations <= max_operations, got {self.min_operations} and {self.max_operations}"
            )
        if not 1 <= self.max_operand <= self.max_value:
            raise ValueError(f"need 1 <= max_operand <= max_value, got {self.max_operand} and {self.max_value}")


@dataclass(frozen=True)
class Problem:
    """A start number and the signed operands applied to it from left to right."""

    start: int
    operands: tuple[int, ...]

    @property
    def expression(self) -> str:
        """The text of the user message, e.g. ``7+5-3``."""
        return f"{self.start}" + "".join(f"{operand:+d}" for operand in self.operands)

    @property
    def answer(self) -> int:
        return self.start + sum(self.operands)


@dataclass(frozen=True)
class LineCheck:
    """Verdict on one line of a response.

    Attributes:
        start: Character offset of the line's first character.
        end: Character offset after the line's last character, its newline included.
        ok: Whether the line is right, given the values that the lines before it state.
        kind: Form of the line, here ``"calculation"``, ``"answer"`` or ``"other"`` (a line of neither form).
    """

    start: int
    end: int
    ok: bool
    kind: str


def make_problem(rng: random.Random, difficulty: Difficulty | None = None) -> Problem:
    """Draws one problem whose true intermediate results all stay in [0, max_value]."""
    difficulty = difficulty or Difficulty()
    current = start = rng.randint(1, difficulty.max_operand)
    operands = []
    for _ in range(rng.randint(difficulty.min_operations, difficulty.max_operations)):
        size = rng.randint(1, difficulty.max_operand)
        signs = [sign for sign in (1, -1) if 0 <= current + sign * size <= difficulty.max_value]
        if not signs:  # only where the range is narrower than two operands
            size, signs = 1, [1 if current < difficulty.max_value else -1]
        operands.append(rng.choice(signs) * size)
        current += operands[-1]
    return Problem(start, tuple(operands))


def parse_problem(text: str) -> Problem | None:
    """Reads a problem back from the text of its prompt; None when the text is not one."""
    match = _EXPRESSION.fullmatch(text.strip())
    if match is None:
        return None
    operands = tuple(int(sign + digits) for sign, digits in _OPERATION.findall(match.group(2)))
    return Problem(int(match.group(1)), operands)


def calculation_line(stated: int, operand: int, result: int) -> str:
    """One line of a trace, its newline included."""
    return f"{stated}{operand:+d}={result}\n"


def answer_line(value: int | str) -> str:
    """The last line of a trace: no newline, the end-of-sequence token follows."""
    return f"{ANSWER_PREFIX} {value}"


def solve(problem: Problem) -> str:
    """Returns the right trace."""
    lines, current = [], problem.start
    for operand in problem.operands:
        lines.append(calculation_line(current, operand, current + operand))
        current += operand
    return "".join(lines) + answer_line(current)


def check_lines(problem: Problem | str, response_text: str) -> list[LineCheck]:
    """Checks each line of a response.

    Line i must apply operation i of the problem to the value stated by the line before it, and state the right result.
    An answer line is right when it equals the correct continuation of the last stated value with the operations that
    remain, so an answer forced early can be right. Lines after a wrong one are judged against the values as stated.

    Args:
        problem: The problem or the text of its prompt.
        response_text: Any text.

    Returns:
        One entry per line; joined, the spans [start, end) give the whole text.
    """
    if isinstance(problem, str):
        problem = parse_problem(problem)
    stated, remaining = (problem.start, list(problem.operands)) if problem else (None, [])
    checks, start, answered = [], 0, False
    for line in re.findall(r"[^\n]*\n|[^\n]+", response_text):
        body, end = line.removesuffix("\n"), start + len(line)
        calculation, answer = _CALCULATION.fullmatch(body), _ANSWER.fullmatch(body)
        kind, ok = "other", False
        if calculation:
            left, sign, right, result = calculation.groups()
            kind, operand = "calculation", int(sign + right)
            follows = not answered and stated == int(left) and remaining[:1] == [operand]
            ok = follows and int(result) == int(left) + operand
            stated = int(result)
        elif answer:
            kind = "answer"
            ok = not answered and stated is not None and int(answer.group(1)) == stated + sum(remaining)
            answered = True
        if kind != "answer":
            remaining = remaining[1:]
        checks.append(LineCheck(start, end, ok, kind))
        start = end
    return checks


def extract_answer(response_text: str) -> str | None:
    """The number after the last ``Answer:`` of the text, without leading zeros; None when there is none."""
    before, found, tail = response_text.rpartition(ANSWER_PREFIX)
    match = _ANSWER.fullmatch(found + tail.split("\n", 1)[0]) if found else None
    return str(int(match.group(1))) if match else None


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None, **kwargs
) -> dict[str, float]:
    """Verifier in verl's signature.

    Args:
        data_source: Not used.
        solution_str: The response, special tokens removed.
        ground_truth: The true final value, as text.
        extra_info: With the key ``expression`` the lines are checked too.
        **kwargs: Not used.

    Returns:
        The same keys for every row: ``score`` = ``acc`` (1.0 iff the last answer equals the ground truth),
        ``answered`` and ``well_formed`` (0.0 or 1.0), ``num_lines`` (count) and ``first_wrong_line`` (index, -1.0 when
        every line is right or the expression is not known).
    """
    answer = extract_answer(solution_str)
    solved = float(answer is not None and answer == str(ground_truth).strip())
    expression = (extra_info or {}).get("expression")
    checks = check_lines(expression or "", solution_str)
    wrong = [i for i, check in enumerate(checks) if not check.ok] if expression else []
    kinds = [check.kind for check in checks]
    well_formed = kinds[-1:] == ["answer"] and set(kinds[:-1]) <= {"calculation"}
    return {
        "score": solved,
        "acc": solved,
        "answered": float(answer is not None),
        "well_formed": float(well_formed),
        "num_lines": float(len(checks)),
        "first_wrong_line": float(wrong[0]) if wrong else -1.0,
    }


def make_row(problem: Problem, split: str, index: int) -> dict:
    """One row of verl's dataset schema."""
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": problem.expression}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(problem.answer)},
        "extra_info": {"split": split, "index": index, "expression": problem.expression},
    }
