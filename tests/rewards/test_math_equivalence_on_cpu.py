"""What the math verifier holds equal: the library's published cases, and hard ones of our own."""

import asyncio
import json
import random
import re
from pathlib import Path

import pytest

from rredcot_verl.answers.boxed import boxes_in_a_row
from rredcot_verl.answers.grammar import BUILT_IN, find_answer
from rredcot_verl.rewards.math import compute_score
from rredcot_verl.rewards.math_equivalence import decide_quickly, simplified
from rredcot_verl.rewards.math_library import canonical_text, decide_with_library, parse_answer
from tests.rewards.math_cases import CASES

PUBLISHED = json.loads((Path(__file__).parent / "math_verify_cases.json").read_text(encoding="utf-8"))["cases"]
FLAT = [(topic, *case) for topic, cases in CASES.items() for case in cases]

# Where we judge otherwise than the library's own tests, by what the answer holds.
DEVIATIONS = {
    "$ \n 9 \n $": "an answer may be written over several lines",
    "\\( \n 9 \n \\)": "an answer may be written over several lines",
    "-2 \\\\le x \\\\le 7": "an inequality equals its interval, whichever side it is on",
    "1 + \\frac{1}{\\mathrm{e}}": "1 + 1/e is not 1 - 1/e; the published case has it as right",
    "Soucis : 2,74": "no number is picked out of prose",
    "${35 cm,4}$": "boxes with anything but commas, and, or between them are not one answer",
    "\\text{ for part (a) and }": "as above",
    "3(x + 2)^2 - 2": "as above",
    "papers and": "as above",
}


def _score_all(golds_and_responses):
    """As many at once as there are processes for it."""

    async def run():
        calls = [compute_score("test", response, gold, timeout_s=60) for gold, response in golds_and_responses]
        return await asyncio.gather(*calls)

    return asyncio.run(run())


def _boxed(text):
    """The answer of a published case as a box: its boxes, or its only formula."""
    found = find_answer(text, {"boxed": BUILT_IN["boxed"]})
    if found is not None:
        return text
    formula = re.search(
        r"(?:\$\$?([^$]+)\$\$?|\\\(((?:(?!\\\().)+)\\\)|\\\[((?:(?!\\\[).)+)\\\])\W*(?:is .*)?$", text, re.DOTALL
    )
    is_formula_only = not re.search(r"(?<!\\)\b[A-Za-z]{4,}", text)
    if formula is None or is_formula_only:
        return f"\\boxed{{{text}}}"
    return f"\\boxed{{{next(filter(None, formula.groups()))}}}"


def _gold(text):
    boxed = _boxed(text)
    return ", ".join(boxes_in_a_row(find_answer(boxed, {"boxed": BUILT_IN["boxed"]}).text))


@pytest.mark.parametrize("topic", CASES)
def test_hard_cases(topic):
    wrong = []
    results = _score_all([(gold, f"So \\boxed{{{answer}}}") for gold, answer, _ in CASES[topic]])
    for (gold, answer, is_right), result in zip(CASES[topic], results, strict=True):
        if result["score"] != float(is_right) or result["timed_out"]:
            wrong.append((gold, answer, is_right, result))
    assert not wrong


def test_there_are_enough_hard_cases_of_either_kind():
    right = [case for case in FLAT if case[-1]]
    assert len(FLAT) >= 150 and len(right) >= 60 and len(FLAT) - len(right) >= 60


def test_published_cases_of_math_verify():
    wrong, deviating = [], set()
    results = _score_all([(_gold(case["gold"]), _boxed(case["answer"])) for case in PUBLISHED])
    for case, result in zip(PUBLISHED, results, strict=True):
        if result["score"] != case["expected"]:
            known = [key for key in DEVIATIONS if key in case["answer"] or key in case["gold"]]
            deviating.update(known)
            if not known:
                wrong.append((case["group"], case["gold"], case["answer"][-200:], case["expected"], result))
    assert not wrong
    assert deviating == set(DEVIATIONS)


@pytest.mark.parametrize(
    "answers",
    [
        ["1/2", "0.5", "\\frac{1}{2}", "\\frac12", "\\frac{2}{4}", "$0.50$", "½"],
        ["5", "x = 5", "5 apples", "5.0", "the answer is 5", "+5", "\\text{5}"],
        ["\\sqrt{8}", "2\\sqrt{2}", "2 \\sqrt 2"],
        ["x+1", "1+x", "1 + x"],
        ["(0.5, 3)", "\\left(\\frac{1}{2}, 3\\right)"],
        ["\\{1,2\\}", "\\{2, 1\\}"],
        ["B", "(B)", "b", "\\text{B}", "B) 12"],
        ["1,234", "1234", "1{,}234"],
        ["50\\%", "50 percent", "50 %"],
    ],
    ids=lambda answers: answers[0],
)
def test_equal_answers_have_one_canonical_text(answers):
    results = _score_all([(answers[0], f"\\boxed{{{answer}}}") for answer in answers])
    assert all(result["score"] for result in results)
    # The first is read against itself: by another road.
    another = "12345" if answers[0] != "B" else "C"
    canonical = {result["pred"] for result in _score_all([(another, f"\\boxed{{{answer}}}") for answer in answers])}
    assert len(canonical) == 1, canonical


def test_what_was_judged_before_changes_nothing():
    """The library caches what it parsed, and sympy what it built: neither may be changed by a look at it."""
    for _ in range(2):
        for answer in ("x = 5 + 5 + 1 = 7 = 11", "z = 1 + 1 = 7i = 2i + 3"):
            last = answer.rpartition("=")[2]
            assert decide_with_library([last], [answer]).is_equal
            assert not decide_with_library(["7"], [answer]).is_equal
            canonical_text(parse_answer(answer))


def test_numbers_words_and_choices_need_no_process():
    """Most answers of the usual data sets are decided at once."""
    for gold, answer in [
        ("72", "72"),
        ("1/2", "0.5"),
        ("5 km", "5"),
        ("B", "(C)"),
        ("Evelyn", "Evelyn"),
        ("5", "6 apples"),
    ]:
        assert decide_quickly(gold, answer) is not None, (gold, answer)
    assert decide_quickly("x+1", "1+x") is None


FRAGMENTS = [
    "\\boxed{",
    "}",
    "{",
    "1",
    "12,345",
    "1 000",
    ".",
    "\\frac",
    "\\text{",
    " and ",
    "$",
    "\\(",
    "\\quad",
    " ",
    "\n",
]
FRAGMENTS += [
    ",",
    "%",
    "km",
    "/",
    "^",
    "ab",
    "(",
    ")",
    "[",
    "\\{",
    "\\left",
    "\\!",
    "=",
    "A)",
    "\\\\",
    "-",
    "**",
    "0.",
    "°",
    "½",
    "√",
]
FRAGMENTS += ["the answer is ", "e5", "\\overline{3}", "²", "is "]


def test_the_exact_rules_take_any_text():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice(FRAGMENTS) for _ in range(rng.choice([2, 5, 40])))
        verdict = decide_quickly(text, text)
        assert verdict is not None and verdict.is_equal == bool(simplified(text)), text
