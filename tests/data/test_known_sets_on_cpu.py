"""The table of known data sets: every mapping on a row as the data set has it."""

import base64
import json
import pickle
import zlib

import pytest

from rredcot_verl.data import code_cases
from rredcot_verl.data.code_cases import called_name, decode_private_tests, split_check, with_typing
from rredcot_verl.data.known_sets import SOURCES, by_hub_id, known_names
from rredcot_verl.data.math_columns import from_columns
from rredcot_verl.data.rows import Unusable
from rredcot_verl.rewards.code_tests import parse_tests

DAPO_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is 1+1?\n\nRemember to put your "
    'answer on its own line after "Answer:".'
)
MATH_ROWS = {
    "gsm8k": ({"question": "Q?", "answer": "2*500=<<2*500=1000>>1000\n#### 1,000"}, "1000"),
    "math": (
        {"problem": "Q?", "level": "Level 1", "type": "Algebra", "solution": "So $\\boxed{\\frac12}$."},
        "\\frac12",
    ),
    "math500": (
        {"problem": "Q?", "solution": "s", "answer": "(3, \\frac{\\pi}{2})", "unique_id": "test/precalculus/807.json"},
        "(3, \\frac{\\pi}{2})",
    ),
    "numina-cot": (
        {"source": "cn_k12", "problem": "Q?", "solution": "\\boxed{1} or \\boxed{2}", "messages": []},
        "1, 2",
    ),
    "open-rs": ({"problem": "Q?", "solution": "s", "answer": "7", "level": "Hard"}, "7"),
    "deepscaler": ({"problem": "Q?", "answer": "-\\frac{2}{3}", "solution": "s"}, "-\\frac{2}{3}"),
    "dapo-17k": (
        {
            "data_source": "math_dapo",
            "prompt": [{"content": DAPO_PROMPT, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4"},
        },
        "2",
    ),
    "aime24": ({"id": 60, "problem": "Q?", "solution": "s", "answer": "204", "url": "u", "year": "2024"}, "204"),
    "aime25": ({"problem": "Q?", "answer": "70", "id": "0"}, "70"),
}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    """Add."""\n',
    "canonical_solution": "    return a + b\n",
    "test": "METADATA = {}\ndef check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(0, 0) == 0\n",
    "entry_point": "add",
}
LCB_TESTS = [{"input": "[1, 2]\n3", "output": "[3]", "testtype": "functional"}]


def _lcb(private: str, **changed) -> dict:
    row = {
        "question_title": "t",
        "question_content": "Return the list.",
        "question_id": "1",
        "starter_code": "class Solution:\n    def pick(self, a: List[int], b: int) -> List[int]:\n        ",
        "public_test_cases": json.dumps(LCB_TESTS),
        "private_test_cases": private,
        "metadata": json.dumps({"func_name": "pick"}),
    }
    return row | changed


def _packed(entry: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(entry))).decode()


CODE_ROWS = {
    "humaneval": HUMANEVAL,
    "mbpp": {
        "task_id": 11,
        "text": "Write a function to double.",
        "code": "def double(x):\r\n  return 2 * x",
        "test_list": ["assert double(1) == 2", "assert double(2) == 4"],
        "test_setup_code": "",
        "challenge_test_list": ["assert double(0) == 0"],
    },
    "mbpp-sanitized": {
        "source_file": "f",
        "task_id": 2,
        "prompt": "Write a function to find shared elements.",
        "code": "def shared(a, b):\n    return tuple(set(a) & set(b))",
        "test_imports": ["import math"],
        "test_list": ["assert set(shared((1, 2), (2, 3))) == set((2,))"],
    },
    "apps": {
        "problem_id": 4,
        "question": "Reverse.",
        "solutions": json.dumps(["def rev(s):\n    return s[::-1]"]),
        "input_output": json.dumps({"fn_name": "rev", "inputs": [["ab"], [[1, 2]]], "outputs": [["ba"], [[2, 1]]]}),
        "starter_code": "\ndef rev(s):\n\t",
    },
    "code-contests": {
        "name": "1_A. Sum",
        "description": "Sum.",
        "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
        "private_tests": {"input": [], "output": []},
        "generated_tests": {"input": ["4 5\n"], "output": ["9\n"]},
        "solutions": {
            "language": [2, 3, 1],
            "solution": ["int main", "print(sum(map(int, input().split())))", "print x"],
        },
        "time_limit": {"seconds": 1, "nanos": 500000000},
        "memory_limit_bytes": 64000000,
        "input_file": "",
        "output_file": "",
    },
    "livecodebench": _lcb(_packed(json.dumps(LCB_TESTS))),
}


def test_every_known_data_set_has_a_row_here():
    assert set(MATH_ROWS) == set(known_names("math")) and set(CODE_ROWS) == set(known_names("code"))


@pytest.mark.parametrize("name", MATH_ROWS)
def test_math_rows(name):
    row, answer = MATH_ROWS[name]
    assert set(SOURCES[name].columns) <= set(row)
    problem = SOURCES[name].to_problem(row)
    assert problem.answer == answer
    assert problem.question == ("What is 1+1?" if name == "dapo-17k" else "Q?")
    assert "<<" not in problem.solution


@pytest.mark.parametrize(
    "solution, answer",
    [
        ("So \\fbox{3}.", "3"),
        ("So $\\boxed 3$.", "3"),
        ("\\boxed{3} and \\boxed{5}", "3, 5"),
        ("At first \\boxed{3}.\n**Answer**: 13", "13"),
        ("We add.\n#### 1,234", "1,234"),
        ("Answer:\n(1,234)", "(1,234)"),
        ("3 or 5", "3 or 5"),
    ],
)
def test_a_column_of_solutions_gives_what_the_verifier_would_find(solution, answer):
    assert from_columns("q", "a")({"q": "Q?", "a": solution}).answer == answer


@pytest.mark.parametrize("name", CODE_ROWS)
def test_code_rows_have_tests_that_the_verifier_reads(name):
    row = CODE_ROWS[name]
    assert set(SOURCES[name].columns) <= set(row)
    problem = SOURCES[name].to_problem(row)
    tests = parse_tests(problem.ground_truth)
    assert tests.num_tests == {"mbpp": 3, "mbpp-sanitized": 1}.get(name, 2)
    assert problem.reads_stdin == (tests.kind == "stdin") == (name == "code-contests")
    assert len(problem.solutions) == (0 if name == "livecodebench" else 1)
    if tests.entry_point:
        assert tests.entry_point in problem.question
    assert "\r" not in "".join(problem.solutions)


def test_limits_of_a_contest_are_taken_over_with_room_for_python():
    tests = parse_tests(SOURCES["code-contests"].to_problem(CODE_ROWS["code-contests"]).ground_truth)
    assert tests.time_limit_s == 4.5 and tests.memory_limit_mb == 256


@pytest.mark.parametrize(
    "name, changed, reason",
    [
        ("gsm8k", {"answer": "no mark"}, "####"),
        ("math", {"solution": "a proof"}, "boxed"),
        ("numina-cot", {"solution": None}, "boxed"),
        ("open-rs", {"answer": None}, "empty answer"),
        ("open-rs", {"answer": {"value": "7", "unit": "m"}}, "an object with the keys value, unit; name one of them"),
        ("open-rs", {"answer": ["7"]}, "of type list; expected text or a number"),
        ("aime24", {"problem": {"text": "Q?"}}, "the question is an object with the keys text"),
        (
            "dapo-17k",
            {"reward_model": {"ground_truth": {"target": 24}}},
            "the answer is an object with the keys t",
        ),
        ("aime24", {"problem": " "}, "empty question"),
        ("humaneval", {"test": "def check(candidate:"}, "not valid Python"),
        ("humaneval", {"test": "x = 1"}, "no function check"),
        ("mbpp", {"test_list": []}, "no tests"),
        ("apps", {"input_output": ""}, "not JSON"),
        ("apps", {"input_output": '{"inputs": ["1"], "outputs": []}'}, "as many inputs as outputs"),
        ("code-contests", {"input_file": "input.txt"}, "a file"),
        ("code-contests", {"public_tests": {}, "generated_tests": {}}, "no tests"),
        ("livecodebench", {"metadata": "{}"}, "no func_name"),
        ("livecodebench", {"public_test_cases": '[{"input": "", "output": "", "testtype": "other"}]'}, "unknown kind"),
    ],
)
def test_a_row_that_is_no_problem_is_refused_with_a_reason(name, changed, reason):
    row = MATH_ROWS[name][0] if name in MATH_ROWS else CODE_ROWS[name]
    with pytest.raises(Unusable, match=reason):
        SOURCES[name].to_problem(row | changed)


class _Evil:
    def __reduce__(self):
        return (open, ("evil.txt", "w"))


@pytest.mark.parametrize(
    "private, reason",
    [
        (_packed(_Evil()), "only plain data"),
        (_packed(print), "only plain data"),
        (_packed(5), "unknown encoding"),
        ("no base64!", "unknown encoding"),
        (base64.b64encode(b"not zlib").decode(), "unknown encoding"),
        (base64.b64encode(zlib.compress(b"not a pickle")).decode(), "plain data|unknown encoding|private tests"),
        (_packed(json.dumps({"a": 1})), "not a list of tests"),
    ],
)
def test_private_tests_that_are_not_plain_data_are_refused(private, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Unusable, match=reason):
        decode_private_tests(private)
    assert not list(tmp_path.iterdir())


def test_private_tests_as_json_and_packed_are_the_same(monkeypatch):
    assert decode_private_tests(json.dumps(LCB_TESTS)) == decode_private_tests(_packed(json.dumps(LCB_TESTS)))
    monkeypatch.setattr(code_cases, "MAX_DECODED_BYTES", 10)
    with pytest.raises(Unusable, match="256 MiB"):
        decode_private_tests(_packed(json.dumps(LCB_TESTS)))


@pytest.mark.parametrize(
    "body, tests",
    [
        ("    assert candidate(1) == 2\n    assert candidate(2) == 3\n", ["candidate(1)", "candidate(2)"]),
        # Vacuous asserts, which HumanEval has, are not tests.
        ("    assert True, 'prints'\n    assert candidate(1) == 2\n", ["candidate(1)"]),
        # What is prepared stands before every later test.
        ("    x = 1\n    assert candidate(x) == 2\n    assert candidate(3) == 4\n", ["x = 1", "x = 1"]),
        (
            "    for i in range(3):\n        assert candidate(i) == i + 1\n    assert candidate(5) == 6\n",
            ["for", "(5)"],
        ),
        # Kept whole: a later statement needs what an asserting one set or changed.
        ("    for i in range(3):\n        assert candidate(i)\n    assert candidate(i) == 3\n", ["def check"]),
        (
            "    x = []\n    for i in range(3):\n        x.append(i)\n        assert candidate(i)\n    assert x\n",
            ["def check"],
        ),
        ("    def helper(y):\n        assert candidate(y)\n    helper(1)\n", ["def check"]),
    ],
)
def test_check_is_split_where_its_body_allows(body, tests):
    setup, found = split_check(f"LIMIT = 3\ndef check(candidate):\n{body}", "f")
    assert setup == "LIMIT = 3"
    assert len(found) == len(tests)
    for test, part in zip(found, tests, strict=True):
        assert part in test
        parse_tests(json.dumps({"kind": "call", "entry_point": "f", "setup": setup, "tests": [test]}))


def _runs(tests: str, program: str) -> list[bool]:
    """Outcome of every test with a program, run in this process: the programs are ours."""
    parsed = parse_tests(tests)
    outcomes = []
    for test in parsed.tests:
        namespace: dict = {}
        exec(program + "\n" + parsed.setup, namespace)
        try:
            exec(test, namespace)
            outcomes.append(True)
        except Exception:
            outcomes.append(False)
    return outcomes


def test_split_tests_pass_and_fail_as_the_whole_check_does():
    problem = SOURCES["humaneval"].to_problem(HUMANEVAL)
    assert _runs(problem.ground_truth, problem.solutions[0]) == [True, True]
    assert _runs(problem.ground_truth, "def add(a, b):\n    return 3") == [True, False]


@pytest.mark.parametrize(
    ("test", "programs", "name"),
    [
        ("assert set(shared((1, 2), (2, 3))) == set((2,))", [], "shared"),
        ("assert list(zip(pairs([1]), [2])) == []", [], "pairs"),
        # Named like one of Python's own.
        ("assert sum(10, 15) == 6", ["def sum(a, b):\n    return 6"], "sum"),
        ("assert round(max([1.04]), 1) == 1.0", ["x = 1", "max = lambda xs: xs[0]"], "max"),
        ("assert sorted(filter([1])) == [1]", ["async def filter(xs): pass"], "filter"),
        ("assert isclose(list([1]), 2)", ["class list: pass"], "list"),
        ("assert sum([1, 2]) == 3", [], "sum"),
        ("assert len(K) == 3", [], None),
        ("assert K == 3", ["K = 3"], None),
        ("assert f(", ["def f(): pass"], None),
        ("assert f(1)", ["no python"], "f"),
    ],
)
def test_the_function_that_a_test_calls(test, programs, name):
    assert called_name(test, programs) == name


def test_a_function_among_pythons_own_that_cannot_be_told_is_asked_for():
    with pytest.raises(Unusable, match="say which is the program's: entry_point"):
        called_name("assert sorted(set([1])) == [1]")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(x: List[int]): pass", "from typing import List\n\ndef f(x: List[int]): pass"),
        (
            "from __future__ import division\nfrom __future__ import (\n    annotations)\n\ndef f(x: Any): pass",
            "from __future__ import division\nfrom __future__ import (\n    annotations)\nfrom typing import Any\n\n"
            "\ndef f(x: Any): pass",
        ),
        ("import typing\ndef f(x: Any): pass", "import typing\ndef f(x: Any): pass"),
    ],
)
def test_hints_get_their_import_where_python_allows_it(source, expected):
    assert with_typing(source) == expected
    compile(expected, "program.py", "exec")


@pytest.mark.parametrize(
    "program, passes",
    [
        ("def rev(s):\n    return s[::-1]", [True, True]),
        ("class Solution:\n    def rev(self, s):\n        return s[::-1]", [True, True]),
        # A tuple counts as the list it should be, a wrong one does not.
        ("def rev(s):\n    return tuple(s[::-1]) if isinstance(s, list) else s", [False, True]),
        ("def rev(s):\n    return s", [False, False]),
    ],
)
def test_cases_of_a_named_function(program, passes):
    assert _runs(SOURCES["apps"].to_problem(CODE_ROWS["apps"]).ground_truth, program) == passes


def test_hub_ids_are_known_in_any_case():
    assert by_hub_id("OPENAI/GSM8K") is SOURCES["gsm8k"] and by_hub_id("a/b") is None
