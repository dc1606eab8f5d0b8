"""The tiny code task: problems, the checks of plan and program, the tokenizer, and the corpus of the warm start."""

import itertools
import json
import random

import pytest
from omegaconf import OmegaConf

from recipes.code.tiny import language, task, warm_start
from recipes.code.tiny.language import Effect, Operation
from recipes.code.tiny.tokens import build_tokenizer
from rredcot_verl.config.schema import parse
from rredcot_verl.probes.elicitation import Elicitation
from rredcot_verl.probes.proposals import Proposal
from rredcot_verl.probes.vocabulary import Vocabulary
from tests.runs import REPOSITORY

DIFFICULTIES = [
    task.Difficulty(),
    task.Difficulty(min_operations=1, max_operations=3, always_share=1.0),
    task.Difficulty(min_operations=6, max_operations=9, always_share=0.0),
]
GARBAGE = [
    "",
    "\n",
    "```",
    "```python\n",
    "```python\n```python\n```\n```",
    "def f(x):\n" * 50,
    "odd: add 8+7=" + "9" * 10_000 + "\n",
    "    x = x + " + "9" * 10_000 + "\n",
    "    if x % 2 == 1: \n    if : x\n    if x: y: z\n",
    "\x00\x7f\r\n\u2028 héé 漢字 ١٢ \ud800",
    "    x = x + ²\nodd: add ²+³=5\n",
]


def problems(count: int = 40):
    rng = random.Random(0)
    return [task.make_problem(rng, difficulty) for difficulty in DIFFICULTIES for _ in range(count)]


def run(program: str, x: int) -> int:
    names: dict = {}
    exec(program, names)
    return names["f"](x)


def verdicts(problem: task.Problem, text: str) -> list[bool]:
    return [check.ok for check in task.check_lines(problem.expression, text)]


def test_expected_response_golden():
    problem = task.parse_problem("odd: add 8+7; all: take 3+4")
    assert task.solve(problem) == (
        "odd: add 8+7=15\nall: take 3+4=7\n"
        "```python\ndef f(x):\n    if x % 2 == 1: x = x + 15\n    x = x - 7\n    return x\n```"
    )
    assert [problem.value(x) for x in (1, 2)] == [9, -5]


def test_every_writing_of_a_line_does_the_same_and_is_read_back():
    conditions = [language.ALWAYS, *language.CONDITIONS]
    for condition, verb, style in itertools.product(conditions, language.STATEMENTS, range(language.NUM_STYLES**2)):
        effect = Effect(condition, verb, 13)
        assert language.parse_program_line(effect.line(style)) == effect
        program = "".join(language.program_lines([effect], [style]))
        assert [run(program, x) for x in range(-30, 60)] == [effect.apply(x) for x in range(-30, 60)]
    lines = {Effect("odd", "add", 13).line(style) for style in range(language.NUM_STYLES**2)}
    assert len(lines) == language.NUM_STYLES**2


@pytest.mark.parametrize("problem", problems(10), ids=lambda problem: problem.expression)
def test_the_reference_program_gives_what_the_tests_expect(problem):
    tests = json.loads(problem.tests)
    assert tests["kind"] == "call" and tests["entry_point"] == "f" and len(tests["tests"]) == len(task.INPUTS)
    names: dict = {}
    exec(problem.solution, names)
    for test in tests["tests"]:
        exec(test, names)
    assert task.parse_problem(problem.expression) == problem
    assert all(verdicts(problem, task.solve(problem)))


def test_a_wrong_line_on_a_condition_fails_only_the_inputs_that_meet_it():
    problem = task.parse_problem("odd: add 8+7; big: take 3+4")
    wrong = problem.solution.replace("x = x - 7", "x = x - 8")
    passed = [run(wrong, x) == problem.value(x) for x in task.INPUTS]
    assert True in passed and False in passed


def test_a_wrong_sum_is_the_plans_and_the_program_that_follows_it_is_right():
    problem = task.parse_problem("odd: add 8+7; all: take 3+4")
    text = task.solve(problem).replace("=15", "=14").replace("x + 15", "x + 14")
    assert verdicts(problem, text) == [False, True, True, True, True, True, True, True]
    # A program that silently corrects the plan does not do what the line before it says.
    assert verdicts(problem, text.replace("x + 14", "x + 15")).index(False) == 0


@pytest.mark.parametrize(
    "old, new, first_wrong",
    [
        ("    x = x - 7\n", "    x = x + 7\n", 5),
        ("if x % 2 == 1: ", "if x % 2 == 0: ", 4),
        ("if x % 2 == 1: ", "", 4),
        ("    x = x - 7\n", "", 5),
        ("    x = x - 7\n", "    x = x - 7\n    x = x - 7\n", 6),
        ("    return x\n", "", 6),
        ("def f(x):\n", "", 3),
        ("all: take 3+4=7\n", "", 1),
        ("all: take 3+4=7\n", "all: take 3+5=8\n", 1),
        ("all: take 3+4=7\n", "so take seven\n", 1),
        ("```python\n", "", 2),
        ("    x = x - 7\n", "    x = 7\n", 5),
    ],
)
def test_the_first_wrong_line_is_found_in_plan_and_program(old, new, first_wrong):
    problem = task.parse_problem("odd: add 8+7; all: take 3+4")
    text = task.solve(problem)
    assert old in text
    assert verdicts(problem, text.replace(old, new, 1)).index(False) == first_wrong


def test_other_writings_are_right():
    problem = task.parse_problem("odd: add 8+7; all: take 3+4")
    text = task.solve(problem).replace("if x % 2 == 1: x = x + 15", "if x % 2: x -= -15")
    assert all(verdicts(problem, text))


@pytest.mark.parametrize("text", GARBAGE)
def test_the_checker_takes_any_text(text):
    for prompt in ("odd: add 8+7", "no problem at all"):
        checks = task.check_lines(prompt, text)
        assert "".join(text[check.start : check.end] for check in checks) == text
        assert not checks or not all(check.ok for check in checks)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_tokenizer_round_trip(tokenizer):
    texts = ["".join(map(chr, range(128))), "héé 漢字 \u2028", *(text for text in GARBAGE if "\ud800" not in text)]
    texts += [task.solve(problem) for problem in problems(5)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert all(len(tokenizer.encode(word)) == 1 for word in language.words())


def test_text_cut_at_a_line_has_the_tokens_of_the_whole(tokenizer):
    rng = random.Random(0)
    for problem in problems(5):
        effects = [operation.effect for operation in problem.operations]
        styles = [rng.randrange(16) for _ in effects]
        text = task.solve(problem).replace(problem.solution, "".join(language.program_lines(effects, styles)))
        cuts = [check.end for check in task.check_lines(problem, text)][:-1]
        for cut in [*cuts, len(text) - len(language.FENCE)]:
            assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) == tokenizer.encode(text)


def test_probes_open_and_close_as_the_warm_start_teaches(tokenizer):
    """What the library forces at a prefix is, token by token, what the elicited programs of the corpus look like."""
    block = OmegaConf.load(REPOSITORY / "recipes/code/tiny/common.yaml").algorithm.rredcot
    del block.traces
    elicitation = Elicitation(Vocabulary(tokenizer), parse(OmegaConf.to_container(block)))
    problem = task.make_problem(random.Random(1))
    draft = warm_start.Draft(random.Random(2), problem, warm_start.WarmStartConfig())
    lines = [tokenizer.encode(line) for line in draft.lines()]
    response = sum(lines, [])
    read = elicitation.read(response)
    assert read is not None and tokenizer.decode(response[read.start :]).startswith("```python\n")
    num_checked = 0
    for number in range(len(lines)):
        probe = draft.elicited(number)
        if probe is None:
            continue
        opening, program = probe
        boundary = len(sum(lines[:number], []))
        boundaries = [boundary, len(response)] if boundary == 0 else [0, boundary, len(response)]
        probes = elicitation.probes([1], response, boundaries, [Proposal(program, 1.0)], "code")
        probe = probes[-1]
        assert tokenizer.decode(probe.token_ids) == opening + program
        assert probe.answer_from == len(tokenizer.encode(opening))
        assert tokenizer.encode(language.FENCE)[0] in probe.closing_token_ids
        num_checked += 1
    assert num_checked == 2 * len(problem.operations) + 2


def test_corpus_errors_are_controlled():
    rng = random.Random(0)
    faultless = warm_start.WarmStartConfig(hard_error_rate=0.0, easy_error_rate=0.0, program_error_rate=0.0)
    faulty = warm_start.WarmStartConfig(hard_error_rate=1.0, easy_error_rate=0.0, program_error_rate=1.0)
    for problem in problems(10):
        text = "".join(warm_start.Draft(rng, problem, faultless).lines())
        assert all(verdicts(problem, text)), text
        for operation in problem.operations:
            right = operation.left + operation.right
            assert (warm_start.state_sum(rng, operation, faulty) != right) == operation.is_hard
        draft = warm_start.Draft(rng, problem, faulty)
        text = "".join(draft.lines())
        checks = task.check_lines(problem, text)
        wrong = [not check.ok for check in checks if check.kind == "plan"]
        assert wrong == [operation.is_hard for operation in problem.operations]
        body = checks[len(problem.operations) + 2 : -2]
        assert len(body) == len(problem.operations) and not any(check.ok for check in body)


def test_elicited_programs_keep_what_is_written_and_plan_the_rest():
    config = warm_start.WarmStartConfig(hard_error_rate=1.0, easy_error_rate=1.0, program_error_rate=1.0)
    problem = task.Problem((Operation("odd", "add", 8, 7), Operation("big", "take", 3, 4)))
    draft = warm_start.Draft(random.Random(0), problem, config)
    # From here on no mistake is made, so that what differs was kept.
    draft.config = warm_start.WarmStartConfig(hard_error_rate=0.0, easy_error_rate=0.0, program_error_rate=0.0)
    planned = [operation.effect_of(stated) for operation, stated in zip(problem.operations, draft.stated, strict=True)]

    def effects(num_lines: int) -> list[Effect]:
        opening, program = draft.elicited(num_lines)
        assert opening == ("```python\n" if num_lines < 2 else "```\n\n```python\n")
        return [language.parse_program_line(line + "\n") for line in program.split("\n")[1:-2]]

    assert effects(0) == [operation.effect for operation in problem.operations]
    assert effects(1) == [planned[0], problem.operations[1].effect]
    assert draft.elicited(2) is None and draft.elicited(3) is None
    assert effects(4) == planned
    assert effects(5) == [draft.effects[0], planned[1]]
    assert effects(6) == effects(7) == draft.effects
