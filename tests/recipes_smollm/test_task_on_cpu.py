"""The task in English: its text and what reads it, the corpus, and the oracle."""

import asyncio
import random
from types import SimpleNamespace

import pytest

from recipes.common.problems import is_validation
from recipes.quickstart import task as quickstart
from recipes.quickstart.warm_start import draw_results
from recipes.smollm import oracle, task, warm_start
from rredcot_verl.rewards.math import close_processes, compute_score

GARBAGE = [
    "",
    "\n\n",
    r"\boxed{",
    r"\boxed{}",
    r"\boxed{x}",
    "+" * 500,
    "9" * 9_000 + "+1=2.\n",
    "١+٢=٣.",
    "+1 +1 1+1=2.",
]
# +5 counts for 7 as the first operation, and +8 for 12 as the third.
PROBLEM = task.Problem(7, (5, -3, 8), "last")
RIGHT = (
    "+5 counts as +7: 7+7=14.\nHere -3 means -3, so 14-3=11. Let me go on.\nNow +8 stands for +12, and that makes "
    "11+12=23.\nThe final answer is \\boxed{23}"
)


def problems(count: int = 40, **settings) -> list[task.Problem]:
    rng = random.Random(0)
    return [task.make_problem(rng, task.Difficulty(**settings)) for _ in range(count)]


def first_wrong_line(problem: task.Problem | str, text: str) -> int | None:
    verdicts = [check.ok for check in task.check_lines(problem, text)]
    return verdicts.index(False) if False in verdicts else None


def imperfect(problem: task.Problem, rng: random.Random) -> tuple[str, list[int]]:
    config = warm_start.WarmStartConfig(right_share=0.5)
    results = draw_results(rng, problem.start, problem.operands, 0, config)
    lines = zip((problem.start, *results), problem.operands, results, strict=False)
    text = "".join(task.calculation_line(*line, rng, 2.0) for line in lines)
    return text + task.answer_line(problem.answer_of(results), rng), results


def scores(texts: list[str], answers: list[str]) -> list[float]:
    async def run() -> list[float]:
        calls = zip(texts, answers, strict=True)
        return [(await compute_score("", *call, answer_format="boxed", num_processes=1))["score"] for call in calls]

    try:
        return asyncio.run(run())
    finally:
        close_processes()


def test_the_text_of_a_problem_holds_it():
    drawn = problems(200)
    for problem in drawn:
        assert task.parse_problem(problem.expression) == problem
        assert (
            task.parse_problem(f"<|im_start|>user\n{problem.expression}<|im_end|>\n<|im_start|>assistant\n") == problem
        )
    texts = [problem.expression for problem in drawn]
    for word in (*task.STARTS, "add", *task.SUBTRACT, *task.TASKS):
        assert any(word in text for text in texts), word
    # The split goes by the text, which the numbers decide.
    assert 5 < sum(map(is_validation, drawn)) < 40
    assert task.parse_problem("Take a walk, add 5.") is None


def test_a_right_trace_is_right_in_every_wording():
    rng, seen = random.Random(1), ""
    for problem in problems(60):
        for text in (task.solve(problem), task.solve(problem, rng, 2.0)):
            assert first_wrong_line(problem, text) is None
            assert [check.kind for check in task.check_lines(problem, text)] == ["calculation"] * 4 + ["answer"]
            seen += text
    for remark in task.REMARKS:
        assert remark in seen
    for wording in (*task.LINES, *task.ANSWERS):
        words = wording.split("{operand}")[0].split("{answer}")[0].replace("{{", "{")
        assert words in seen


def test_golden_trace():
    assert first_wrong_line(PROBLEM.expression, RIGHT) is None
    assert [check.kind for check in task.check_lines(PROBLEM, RIGHT)] == ["calculation"] * 3 + ["answer"]


@pytest.mark.parametrize(
    ("old", "new", "line", "why"),
    [
        ("+7: 7+7=14", "+5: 7+5=12", 0, "the number as it stands, where a rule is"),
        ("14-3=11", "14-3=12", 1, "the calculation is wrong"),
        ("14-3=11", "15-3=11", 1, "does not continue from the stated value"),
        ("Here -3", "Here +3", 1, "another operation"),
        ("11+12=23.", "11+12=23", 2, "cut off: 23 may be the start of 230"),
        ("\\boxed{23}", "\\boxed{24}", 3, "differs from what is stated"),
        ("\\boxed{23}", "\\boxed{?}", 3, "no number"),
    ],
)
def test_a_wrong_line_is_found(old, new, line, why):
    assert old in RIGHT
    assert first_wrong_line(PROBLEM, RIGHT.replace(old, new)) == line, why


@pytest.mark.parametrize("text", GARBAGE)
def test_garbage_never_raises_and_spans_cover_the_text(text):
    for problem in (PROBLEM, "", text):
        checks = task.check_lines(problem, text)
        assert "".join(text[check.start : check.end] for check in checks) == text
        assert not any(check.ok for check in checks)


@pytest.mark.parametrize("answer", ["all", "last"])
def test_the_math_verifier_agrees_with_the_lines(answer):
    rng, drawn = random.Random(2), problems(60, answer=answer)
    traces = [imperfect(problem, rng) for problem in drawn]
    right = [tuple(results) == problem.results for problem, (_, results) in zip(drawn, traces, strict=True)]
    assert right == [first_wrong_line(problem, text) is None for problem, (text, _) in zip(drawn, traces, strict=True)]
    solved = scores([text for text, _ in traces], [problem.answer for problem in drawn])
    assert solved == list(map(float, right)) and 2 < sum(right) < 40


def test_errors_do_not_cancel_in_the_last_result():
    places = [(place, operand) for place in range(4) for operand in [*range(-9, 0), *range(1, 10)]]
    rules = [quickstart.rule(*place) for place in places]
    assert all(rule.counts == max(rule.as_written, rule.other) for rule in rules)


def test_both_numbers_of_a_rule_are_stated_and_the_rest_is_right():
    rng, shares = random.Random(3), {True: 0, False: 0}
    # With room for what is wrong: a trace that would be negative is drawn again.
    for problem in problems(60, max_operand=9, max_value=29):
        text, _ = imperfect(problem, rng)
        for place, (check, operand) in enumerate(zip(task.check_lines(problem, text), problem.operands, strict=False)):
            rule = quickstart.rule(place, operand)
            left, read, result = task.read_calculation(text[check.start : check.end].removesuffix("\n"))
            assert read == operand and result - left in (rule.as_written, rule.other)
            if rule.as_written != rule.other:
                shares[check.ok] += 1
    assert 0.35 < shares[True] / sum(shares.values()) < 0.65


def test_too_many_words_are_refused():
    with pytest.raises(ValueError, match="remark_words"):
        task.Difficulty(remark_words=9)
    with pytest.raises(ValueError, match="right_share"):
        warm_start.WarmStartConfig(right_share=0.9)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (0, (True, 0)),
        (RIGHT.index("14.") + 2, (True, 0)),
        (RIGHT.index("\n"), (True, 1)),
        (RIGHT.index("Let me"), (True, 2)),
        (len(RIGHT), (True, 3)),
    ],
)
def test_the_state_of_a_prefix(end, expected):
    assert oracle.Chances().state_of(PROBLEM.expression, RIGHT[:end]) == expected


def test_the_oracle_counts_english_lines_and_finds_the_problem_in_a_prompt():
    chances = oracle.Chances()
    guess = chances(PROBLEM.expression, "")
    assert guess == pytest.approx(chances.of(0, 5) * chances.of(1, -3) * chances.of(2, 8))
    assert chances(PROBLEM.expression, "+5 counts as +5: 7+5=12.\n") == 0.0
    for _ in range(200):
        chances.learn(PROBLEM.expression, RIGHT.replace("+7: 7+7=14", "+5: 7+5=12").replace("14-3=11", "12-3=9"))
    assert chances.of(0, 5) < 0.02 and chances.of(1, -3) > 0.98

    source = object.__new__(oracle.Oracle)
    texts = {(1, 2, 3): f"system\nuser\n{PROBLEM.expression}"}
    vocabulary = SimpleNamespace(decode=lambda ids: texts[tuple(ids)])
    source.tools = SimpleNamespace(elicitation=SimpleNamespace(vocabulary=vocabulary))
    assert task.parse_problem(source.expression_of([1, 2, 3])) == PROBLEM
    assert isinstance(source.chances_class(), oracle.Chances)
