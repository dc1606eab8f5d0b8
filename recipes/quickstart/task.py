"""The quickstart's task: a chain of operations under made-up rules, one checkable line per operation.

A problem is an expression such as ``13+9-5-6-3``; the expected response works from left to right::

    13+9=22
    22-5=17
    Then 17-6 makes 13. let me see
    13-3=10
    Answer: 22 17 13 10

In some places a number counts for another one: above, ``-6`` as the third operation counts for ``-4``. These rules are
fixed (`counts_for`), and the prompt does not give them away: the warm-started policy has seen, for every such place,
both numbers, the right one in three of ten cases, and only outcomes tell which is right. Few responses are right at
first, as where a real policy learns what it cannot do yet: most groups are all wrong, and most wrong responses hold
right lines. The rules have more in common than was meant, as similar texts have related checksums: where there are two
numbers the larger one is right, and a positive number has the same rule at every place. So what is learnt at one place
can help at another, and there is less to find than the 56 rules of the default difficulty.

Varied wording and remarks decide nothing; `Difficulty.remark_words`
is their share.

The answer repeats every result (`Difficulty.answer`), as to a question of several parts; one that contradicts the lines
is wrong. So a forced answer shows what the policy thinks of every line, stated or to come. With ``last`` it is the last
result alone: then a forced answer is mental arithmetic over all lines to come, at which a small model is poor, and
hardly tells early lines apart.

Every line can be checked by a program, so the first wrong line of a trace is known, and with it the true value of
every state (`recipes.quickstart.oracle`). That is what makes the task fit to judge reward redistribution.

This file imports the standard library only, and nothing of its own package: verl loads the reward function by its path.
"""

import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

DATA_SOURCE = "rredcot/rules"
ANSWER_PREFIX = "Answer:"

OPENERS = ("So ", "Then ", "Now ", "Next ", "Well ")
VERBS = ("=", " is ", " makes ", " gives ")
WORDS = tuple(
    "let me see that looks fine good one more step here we go on with care this part was easy but not all are clear "
    "enough".split()
)
"""Words of remarks. None of them says anything of the line it stands behind."""
MOST_WORDS = 20
"""Longest remark."""
RULE_SHARE = 2 / 3
"""Share of the places (an operation and its number in the problem) that have a rule."""

# Bounded digit counts: int() of an endless run of digits is slow, and above 4300 digits it raises.
_EXPRESSION = re.compile(r"([0-9]{1,6})((?:\s*[+-]\s*[0-9]{1,6})*)")
_OPERATION = re.compile(r"([+-])\s*([0-9]{1,6})")
_CALCULATION = re.compile(
    rf"(?:{'|'.join(OPENERS)})?(-?[0-9]{{1,6}})([+-])([0-9]{{1,6}})(?:{'|'.join(VERBS)})(-?[0-9]{{1,6}})"
    rf"(?:\.(?: (?:{'|'.join(WORDS)}))*)?"
)
_ANSWER = re.compile(rf"{ANSWER_PREFIX}[ \t]*(-?[0-9]{{1,6}}(?:[ \t]+-?[0-9]{{1,6}}){{0,63}})[ \t]*")


@dataclass(frozen=True)
class Difficulty:
    """How hard the problems are, and how much of a trace decides nothing.

    Attributes:
        min_operations: Fewest operations of a problem (count); each costs one line of the trace.
        max_operations: Most operations of a problem (count).
        max_operand: Largest number added or subtracted; the smallest is 1.
        max_value: Every true intermediate result lies in [0, max_value].
        remark_words: Mean number of words after a line that decide nothing; 0: none, and all lines in one wording.
        answer: What the answer states, ``all`` results or the ``last`` one.
        max_without_rule: Most places of a problem that have no rule (count).
    """

    min_operations: int = 5
    max_operations: int = 5
    max_operand: int = 9
    max_value: int = 29
    remark_words: float = 3.0
    answer: str = "all"
    max_without_rule: int = 64

    def __post_init__(self):
        if not 1 <= self.min_operations <= self.max_operations:
            raise ValueError(
                f"need 1 <= min_operations <= max_operations, got {self.min_operations} and {self.max_operations}"
            )
        if not 1 <= self.max_operand <= self.max_value:
            raise ValueError(f"need 1 <= max_operand <= max_value, got {self.max_operand} and {self.max_value}")
        if self.remark_words < 0:
            raise ValueError(f"need remark_words >= 0, got {self.remark_words}")
        if self.answer not in ("all", "last"):
            raise ValueError(f"answer must be 'all' or 'last', got {self.answer!r}")
        if self.max_without_rule < 0:
            raise ValueError(f"need max_without_rule >= 0, got {self.max_without_rule}")


@dataclass(frozen=True)
class Rule:
    """What is known of one place.

    Attributes:
        as_written: The number as it stands.
        other: The other number it may count for; the same where there is no rule.
        counts: Which of the two it counts for.
    """

    as_written: int
    other: int
    counts: int


def rule(position: int, operand: int) -> Rule:
    """The rule of an operation (its signed number) at its place among the operations, from 0."""

    def draw(what: str) -> float:
        return zlib.crc32(f"{what} {position} {operand}".encode()) / 2**32

    if draw("rule") >= RULE_SHARE:
        return Rule(operand, operand, operand)
    shift = (-5, -4, -3, -2, -1, 1, 2, 3, 4, 5)[int(10 * draw("shift"))]
    return Rule(operand, operand + shift, operand + shift if draw("right") < 0.5 else operand)


def counts_for(position: int, operand: int) -> int:
    """What an operation truly adds."""
    return rule(position, operand).counts


@dataclass(frozen=True)
class Problem:
    """A start number and the signed operands applied to it from left to right.

    Attributes:
        start, operands: The numbers.
        answer_parts: What the answer states, see `Difficulty.answer`; no part of the expression.
    """

    start: int
    operands: tuple[int, ...]
    answer_parts: str = field(default="all", compare=False)

    @property
    def expression(self) -> str:
        """The text of the user message, e.g. ``7+5-3``."""
        return f"{self.start}" + "".join(f"{operand:+d}" for operand in self.operands)

    @property
    def results(self) -> tuple[int, ...]:
        """The right result of every line."""
        current, results = self.start, []
        for position, operand in enumerate(self.operands):
            current += counts_for(position, operand)
            results.append(current)
        return tuple(results)

    @property
    def answer(self) -> str:
        """The right answer."""
        return self.answer_of(self.results)

    def answer_of(self, results: Sequence[int]) -> str:
        """The answer of a trace that states these results."""
        results = results or (self.start,)
        return " ".join(map(str, results if self.answer_parts == "all" else results[-1:]))


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
    """Draws one problem with enough rules whose true intermediate results all stay in [0, max_value].

    Raises:
        ValueError: When there is hardly any such problem.
    """
    difficulty = difficulty or Difficulty()
    for _ in range(100_000):
        num_operations = rng.randint(difficulty.min_operations, difficulty.max_operations)
        signed = [rng.choice((1, -1)) * rng.randint(1, difficulty.max_operand) for _ in range(num_operations)]
        problem = Problem(rng.randint(0, difficulty.max_value), tuple(signed), difficulty.answer)
        bare = sum(place.other == place.as_written for place in map(rule, *zip(*enumerate(signed), strict=True)))
        within = all(0 <= result <= difficulty.max_value for result in problem.results)
        if within and bare <= difficulty.max_without_rule:
            return problem
    raise ValueError(f"found no problem whose results stay in [0, {difficulty.max_value}]: {difficulty}")


def parse_problem(text: str) -> Problem | None:
    """Reads a problem back from the text of its prompt; None when the text is not one."""
    match = _EXPRESSION.fullmatch(text.strip())
    if match is None:
        return None
    operands = tuple(int(sign + digits) for sign, digits in _OPERATION.findall(match.group(2)))
    return Problem(int(match.group(1)), operands)


def calculation_line(
    stated: int, operand: int, result: int, wording: random.Random | None = None, words: float = 0.0
) -> str:
    """One line of a trace, its newline included.

    Args:
        stated: The value the line before it states.
        operand: The signed number of the problem.
        result: What the line states.
        wording: Draws an opener, a verb and a remark; None: one wording.
        words: Mean number of words of the remark.
    """
    if wording is None or words == 0:
        return f"{stated}{operand:+d}={result}\n"
    opener, verb = wording.choice(("", *OPENERS)), wording.choice(VERBS)
    remark = ""
    while remark.count(" ") < MOST_WORDS and wording.random() < words / (words + 1):
        remark += " " + wording.choice(WORDS)
    return f"{opener}{stated}{operand:+d}{verb}{result}{'.' if remark else ''}{remark}\n"


def answer_line(answer: str) -> str:
    """The last line of a trace: no newline, the end-of-sequence token follows."""
    return f"{ANSWER_PREFIX} {answer}"


def solve(problem: Problem) -> str:
    """Returns the right trace in the plain wording."""
    stated = (problem.start, *problem.results)
    lines = [calculation_line(*line) for line in zip(stated, problem.operands, problem.results, strict=False)]
    return "".join(lines) + answer_line(problem.answer)


def read_calculation(line: str) -> tuple[int, int, int] | None:
    """The number a line starts from, its operation and its result; None when it is no calculation."""
    match = _CALCULATION.fullmatch(line)
    return (int(match[1]), int(match[2] + match[3]), int(match[4])) if match else None


def read_answer(line: str) -> list[int] | None:
    """The numbers of an answer line; None when it is none."""
    match = _ANSWER.fullmatch(line)
    return [int(number) for number in match[1].split()] if match else None


@dataclass(frozen=True)
class Reader:
    """How a form of the task is read: the three functions of this module that have these names, or another form's."""

    parse_problem: Callable[[str], Problem | None] = parse_problem
    read_calculation: Callable[[str], tuple[int, int, int] | None] = read_calculation
    read_answer: Callable[[str], list[int] | None] = read_answer


def check_lines(problem: Problem | str, response_text: str, reader: Reader | None = None) -> list[LineCheck]:
    """Checks each line of a response.

    Line i must apply operation i of the problem to the value stated by the line before it, and state the right result.
    An answer line is right when it states all results (or the last): of the lines as stated, and of the operations that
    remain, so an answer forced early can be right. Lines after a wrong one are judged against the values as stated.

    Args:
        problem: The problem or the text of its prompt.
        response_text: Any text.
        reader: Of another form of the task.

    Returns:
        One entry per line; joined, the spans [start, end) give the whole text.
    """
    reader = reader or Reader()
    if isinstance(problem, str):
        problem = reader.parse_problem(problem)
    operands = problem.operands if problem else ()
    results = [problem.start] if problem else []
    position, checks, start, answered = 0, [], 0, False
    for line in re.findall(r"[^\n]*\n|[^\n]+", response_text):
        body, end = line.removesuffix("\n"), start + len(line)
        calculation, states = reader.read_calculation(body), reader.read_answer(body)
        kind, ok = "other", False
        if calculation:
            kind, (left, operand, result) = "calculation", calculation
            follows = not answered and results[-1:] == [left] and operands[position : position + 1] == (operand,)
            ok = follows and result == left + counts_for(position, operand)
            results.append(result)
        elif states is not None:
            kind = "answer"
            whole = list(results)
            for place in range(position, len(operands)):
                whole.append(whole[-1] + counts_for(place, operands[place]))
            ok = not answered and bool(whole) and states in (whole[1:], whole[-1:])
            answered = True
        if kind != "answer":
            position += 1
        checks.append(LineCheck(start, end, ok, kind))
        start = end
    return checks


def extract_answer(response_text: str) -> str | None:
    """The numbers after the last ``Answer:`` of the text, without leading zeros; None when there are none."""
    before, found, tail = response_text.rpartition(ANSWER_PREFIX)
    match = _ANSWER.fullmatch(found + tail.split("\n", 1)[0]) if found else None
    return " ".join(str(int(number)) for number in match.group(1).split()) if match else None


def stated_results(response_text: str) -> list[int]:
    """What the lines of a response state, the answer left out."""
    lines = map(read_calculation, response_text.split("\n"))
    return [line[2] for line in lines if line]


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None, **kwargs
) -> dict[str, float]:
    """Verifier in verl's signature.

    Args:
        data_source: Not used.
        solution_str: The response, special tokens removed.
        ground_truth: The right answer.
        extra_info: With the key ``expression`` the lines are checked too.
        **kwargs: Not used.

    Returns:
        The same keys for every row: ``score`` = ``acc`` (1.0 iff the last answer equals the ground truth and repeats
        what the lines state: no answer makes a wrong line good by leaving it aside), ``answered`` and ``well_formed``
        (0.0 or 1.0), ``num_lines`` (count) and ``first_wrong_line`` (index, -1.0 when every line is right or the
        expression is not known).
    """
    answer = extract_answer(solution_str)
    solved = answer is not None and answer == str(ground_truth).strip()
    if answer is not None and solved:
        numbers = [int(number) for number in answer.split()]
        solved = stated_results(solution_str)[-len(numbers) :] == numbers
    expression = (extra_info or {}).get("expression")
    checks = check_lines(expression or "", solution_str)
    wrong = [i for i, check in enumerate(checks) if not check.ok] if expression else []
    kinds = [check.kind for check in checks]
    well_formed = kinds[-1:] == ["answer"] and set(kinds[:-1]) <= {"calculation"}
    return {
        "score": float(solved),
        "acc": float(solved),
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
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"split": split, "index": index, "expression": problem.expression},
    }
