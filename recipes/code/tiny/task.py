"""The tiny code task: work out a list of operations line by line, then write them as a Python function.

A prompt is a list of operations, ``odd: add 8+7; all: take 3+4``; the expected response is a plan and a program::

    odd: add 8+7=15
    all: take 3+4=7
    ```python
    def f(x):
        if x % 2 == 1: x = x + 15
        x = x - 7
        return x
    ```

The program is run on six inputs by the project's code verifier. A wrong line on a condition fails only the inputs that
meet it, so the fraction of tests passed takes many values. Every line of plan and program can be checked by itself, so
the first wrong line of a response is known: the place where the blame belongs has a ground truth.
"""

import json
import random
import re
from dataclasses import dataclass

from recipes.code.tiny import language
from recipes.code.tiny.language import Effect, Operation
from recipes.quickstart.task import LineCheck

DATA_SOURCE = "rredcot/tiny_code"
INPUTS = (0, 7, 14, 19, 26, 33)
"""The arguments of the tests: odd and even, below and above the threshold of ``big``."""

TIME_LIMIT_S = 5.0
"""Seconds a program may run: it needs microseconds, a loaded machine needs patience."""


@dataclass(frozen=True)
class Difficulty:
    """How hard the problems are.

    Attributes:
        min_operations: Fewest operations of a problem (count); each costs a line of the plan and one of the program.
        max_operations: Most operations of a problem (count).
        always_share: Probability that an operation has no condition.
    """

    min_operations: int = 5
    max_operations: int = 5
    always_share: float = 0.1

    def __post_init__(self):
        if not 1 <= self.min_operations <= self.max_operations <= 12:
            raise ValueError(
                f"need 1 <= min_operations <= max_operations <= 12, got {self.min_operations} and {self.max_operations}"
            )
        if not 0 <= self.always_share <= 1:
            raise ValueError(f"need 0 <= always_share <= 1, got {self.always_share}")


@dataclass(frozen=True)
class Problem:
    """The operations to apply to the argument of f, in order."""

    operations: tuple[Operation, ...]

    @property
    def expression(self) -> str:
        """The text of the user message."""
        return "; ".join(operation.text for operation in self.operations)

    @property
    def solution(self) -> str:
        """The reference program."""
        return "".join(language.program_lines([operation.effect for operation in self.operations]))

    def value(self, x: int) -> int:
        """What f(x) has to be."""
        for operation in self.operations:
            x = operation.effect.apply(x)
        return x

    @property
    def tests(self) -> str:
        """Ground truth of the row: the tests as the code verifier reads them."""
        asserts = [f"assert f({x}) == {self.value(x)}" for x in INPUTS]
        tests = {"kind": "call", "entry_point": "f", "setup": "", "tests": asserts, "time_limit_s": TIME_LIMIT_S}
        return json.dumps(tests)


def make_problem(rng: random.Random, difficulty: Difficulty | None = None) -> Problem:
    """Draws one problem."""
    difficulty = difficulty or Difficulty()
    operations = []
    for _ in range(rng.randint(difficulty.min_operations, difficulty.max_operations)):
        always = rng.random() < difficulty.always_share
        condition = language.ALWAYS if always else rng.choice(list(language.CONDITIONS))
        verb = rng.choice(list(language.STATEMENTS))
        operations.append(Operation(condition, verb, rng.randint(1, 9), rng.randint(1, 9)))
    return Problem(tuple(operations))


def parse_problem(text: str) -> Problem | None:
    """Reads a problem back from the text of its prompt; None when the text is not one."""
    operations = [language.parse_operation(part) for part in text.strip().split("; ")]
    return Problem(tuple(operations)) if None not in operations else None  # type: ignore[arg-type]


def solve(problem: Problem) -> str:
    """Returns the right response in the reference solution's writing; the end-of-sequence token follows."""
    plan = "".join(operation.plan_line(operation.left + operation.right) for operation in problem.operations)
    return plan + language.FENCE_LINE + problem.solution + language.FENCE


class _Reader:
    """Judges the lines of a response one after the other."""

    def __init__(self, problem: Problem | None):
        self.operations = problem.operations if problem else ()
        self.planned: list[Effect] = []
        self.num_effects = 0
        self.place = "plan"

    def judge(self, line: str) -> tuple[bool, str]:
        """Verdict and kind of the next line."""
        if line == language.FENCE_LINE:
            ok, self.place = self.place == "plan" and self._all_planned(), "def"
            self.num_effects = 0
            return ok, "fence"
        if line.rstrip("\n") == language.FENCE:
            ok, self.place = self.place == "close", "end"
            return ok, "fence"
        return (self._plan(line), "plan") if language.parse_plan_line(line) else self._program(line)

    def _plan(self, line: str) -> bool:
        parsed = language.parse_plan_line(line)
        assert parsed is not None
        operation, stated = parsed
        expected = self.operations[len(self.planned) : len(self.planned) + 1]
        right = self.place == "plan" and expected == (operation,) and stated == operation.left + operation.right
        self.planned.append(operation.effect_of(stated))
        return right

    def _program(self, line: str) -> tuple[bool, str]:
        effect = language.parse_program_line(line)
        if effect is not None:
            expected = self._expected()[self.num_effects : self.num_effects + 1]
            self.num_effects += 1
            return self.place == "body" and expected == [effect], "program"
        if line == language.DEF_LINE:
            ok, self.place = self.place == "def", "body"
            return ok, "program"
        if line == language.RETURN_LINE:
            ok = self.place == "body" and self.num_effects == len(self.operations) > 0
            self.place = "close"
            return ok, "program"
        return False, "other"

    def _all_planned(self) -> bool:
        return len(self.planned) == len(self.operations) > 0

    def _expected(self) -> list[Effect]:
        """A program has to do what the plan states, and what the prompt asks for where there is no plan."""
        unplanned = self.operations[len(self.planned) :]
        return self.planned + [operation.effect for operation in unplanned]


def check_lines(problem: Problem | str, response_text: str) -> list[LineCheck]:
    """Checks each line of a response, plan and program.

    Line i of the plan must be operation i with the right sum. Line i of the program must do what line i of the plan
    states, in any known writing: a program that follows a wrong plan is right line by line, and the wrong line is the
    plan's. The opening fence is right after a whole plan, ``return x`` after as many lines as there are operations.

    Args:
        problem: The problem or the text of its prompt.
        response_text: Any text.

    Returns:
        One entry per line; joined, the spans [start, end) give the whole text. The kind is ``"plan"``, ``"fence"``,
        ``"program"`` or ``"other"`` (a line of none of these forms).
    """
    reader = _Reader(parse_problem(problem) if isinstance(problem, str) else problem)
    checks, start = [], 0
    for line in re.findall(r"[^\n]*\n|[^\n]+", response_text):
        end = start + len(line)
        checks.append(LineCheck(start, end, *reader.judge(line)))
        start = end
    return checks


def make_row(problem: Problem, split: str, index: int) -> dict:
    """One row of verl's dataset schema: the ground truth is the tests, the reference program stands beside it."""
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": problem.expression}],
        "ability": "code",
        "reward_model": {"style": "rule", "ground_truth": problem.tests},
        "extra_info": {"split": split, "index": index, "solutions": [problem.solution]},
    }
