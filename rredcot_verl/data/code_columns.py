"""Rows of code data sets to problems."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from rredcot_verl.answers.grammar import PROGRAM, look_up
from rredcot_verl.answers.program import FENCE
from rredcot_verl.data.code_cases import (
    call_cases,
    call_tests,
    called_name,
    decode_private_tests,
    preamble,
    split_check,
    stdin_tests,
    with_typing,
)
from rredcot_verl.data.rows import CodeProblem, Row, Unusable, entry_of, text_of

QUESTION_NAMES = ("question", "problem", "description", "prompt", "text", "instruction")
TESTS_NAMES = ("tests", "test_list", "ground_truth", "test_cases", "unit_tests")
_PYTHON3 = 3
"""CodeContests numbers languages: 0 unknown, 1 Python 2, 2 C++, 3 Python 3, 4 Java."""


def humaneval(row: Row) -> CodeProblem:
    """HumanEval: complete a function; `check(candidate)` becomes one test for each assert."""
    prompt, entry_point = str(row["prompt"]), str(row["entry_point"])
    setup, tests = split_check(str(row["test"]), entry_point)
    setup = "\n".join(part for part in (preamble(prompt, entry_point), setup) if part)
    question = f"Complete this Python function:\n\n{_fenced(prompt.rstrip())}"
    solution = prompt.rstrip() + "\n" + str(row["canonical_solution"]).rstrip() + "\n"
    ground_truth = call_tests(entry_point, setup, tests)
    return CodeProblem(question, ground_truth, (solution,), str(row["task_id"]), own_text=prompt)


def mbpp(row: Row) -> CodeProblem:
    """MBPP, full or sanitized: write a function; the question shows the first test, which gives its name."""
    tests = [str(test) for test in row["test_list"]]
    if not tests:
        raise Unusable("no tests")
    imports = row.get("test_imports") or []
    setup = "\n".join([*map(str, imports), str(row.get("test_setup_code") or "")]).strip()
    text = str(row.get("text") or row.get("prompt") or "").strip()
    if not text:
        raise Unusable("empty question")
    question = f"{text}\n\nYour code should pass tests such as:\n\n{_fenced(tests[0])}"
    solution = str(row["code"]).replace("\r\n", "\n").strip() + "\n"
    tests += [str(test) for test in row.get("challenge_test_list") or []]
    ground_truth = call_tests(called_name(tests[0], (solution,)), setup, tests)
    return CodeProblem(question, ground_truth, (solution,), str(row["task_id"]), own_text=text)


def apps(row: Row) -> CodeProblem:
    """APPS: standard input, or calls of `fn_name`; tests and solutions are JSON texts."""
    cases = _json(row["input_output"], "input_output")
    solutions = tuple(str(text) for text in _json(row["solutions"] or "[]", "solutions"))
    inputs, outputs = cases.get("inputs") or [], cases.get("outputs") or []
    starter, name = with_typing(str(row["starter_code"] or "").strip("\n")), cases.get("fn_name")
    question = _with_starter(str(row["question"]), starter)
    number = str(row.get("problem_id", row.get("id", "")))
    if name is None:
        return CodeProblem(question, stdin_tests(inputs, outputs), solutions, number, True, str(row["question"]))
    ground_truth = call_tests(str(name), "", call_cases(str(name), inputs, outputs))
    programs = tuple(map(with_typing, solutions))
    return CodeProblem(_naming(question, str(name)), ground_truth, programs, number, False, str(row["question"]))


def code_contests(row: Row) -> CodeProblem:
    """CodeContests: standard input; public tests first, then private and generated ones."""
    if row.get("input_file") or row.get("output_file"):
        raise Unusable("reads or writes a file, not standard input and output")
    inputs: list[str] = []
    outputs: list[str] = []
    for column in ("public_tests", "private_tests", "generated_tests"):
        inputs += (row[column] or {}).get("input") or []
        outputs += (row[column] or {}).get("output") or []
    limits: dict[str, float] = {}
    limit = row.get("time_limit") or {}
    seconds = (limit.get("seconds") or 0) + (limit.get("nanos") or 0) / 1e9
    if seconds > 0:
        # The contest's limit is for compiled programs.
        limits["time_limit_s"] = round(3 * seconds, 3)
    if row.get("memory_limit_bytes"):
        limits["memory_limit_mb"] = max(256, int(row["memory_limit_bytes"]) // 2**20)
    written = row["solutions"] or {}
    pairs = zip(written.get("language") or [], written.get("solution") or [], strict=True)
    solutions = tuple(str(text) for language, text in pairs if language in (_PYTHON3, "PYTHON3"))
    ground_truth = stdin_tests(inputs, outputs, **limits)
    return CodeProblem(str(row["description"]).strip(), ground_truth, solutions, str(row["name"]), reads_stdin=True)


def livecodebench(row: Row) -> CodeProblem:
    """LiveCodeBench: standard input, or calls of `metadata.func_name`; no reference solutions."""
    tests = _json(row["public_test_cases"], "public_test_cases") + decode_private_tests(str(row["private_test_cases"]))
    kinds = {str(test.get("testtype")) for test in tests}
    if len(kinds) != 1 or not kinds <= {"stdin", "functional"}:
        raise Unusable("tests of an unknown kind, or of both kinds")
    inputs, outputs = [test["input"] for test in tests], [test["output"] for test in tests]
    starter = with_typing(str(row["starter_code"] or ""))
    own_text, number = str(row["question_content"]), str(row.get("question_id", ""))
    question = _with_starter(own_text, starter)
    if kinds == {"stdin"}:
        return CodeProblem(question, stdin_tests(inputs, outputs), (), number, True, own_text)
    metadata = row["metadata"]
    name = (_json(metadata, "metadata") if isinstance(metadata, str) else metadata).get("func_name")
    if not name:
        raise Unusable("no func_name in metadata")
    arguments = [[_json(line, "a test's input") for line in text.split("\n") if line.strip()] for text in inputs]
    expected = [_json(text, "a test's output") for text in outputs]
    ground_truth = call_tests(str(name), "", call_cases(str(name), arguments, expected))
    return CodeProblem(_naming(question, str(name)), ground_truth, (), number, False, own_text)


def verl_row(row: Row) -> CodeProblem:
    """A row in verl's schema: its question, or the last user message as it is."""
    users = [message for message in row["prompt"] if message["role"] == "user"]
    plain = {
        "question": look_up(row, "extra_info.question") or (users[-1]["content"] if users else ""),
        "tests": look_up(row, "reward_model.ground_truth"),
        "solutions": look_up(row, "extra_info.solutions"),
        "id": look_up(row, "extra_info.id") or look_up(row, "extra_info.index"),
    }
    return tests_column("question", "tests", "solutions")(plain)


def tests_column(
    question: str, tests: str, solutions: str | None = None, id: str | None = None
) -> Callable[[Row], CodeProblem]:
    """A mapping of named columns. `tests` holds tests as `rewards.code_tests` reads them, or a list of asserts."""

    def to_problem(row: Row) -> CodeProblem:
        given = entry_of(row, tests)
        known = entry_of(row, solutions) if solutions else None
        programs = [known] if isinstance(known, str) else list(map(str, known or ()))
        if isinstance(given, list | tuple):
            asserts = [str(test) for test in given]
            given = call_tests(called_name(asserts[0], programs) if asserts else None, "", asserts)
        elif isinstance(given, Mapping):
            given = json.dumps(given, ensure_ascii=False)
        text = text_of(entry_of(row, question), "question")
        if not text:
            raise Unusable("empty question")
        if not given:
            raise Unusable("no tests")
        kind = _json(given, "tests")
        reads_stdin = isinstance(kind, dict) and kind.get("kind") == "stdin"
        number = row.get(id or "id")
        return CodeProblem(text, str(given), tuple(programs), "" if number is None else str(number), reads_stdin)

    return to_problem


def _json(text: Any, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise Unusable(f"{what}: not JSON that Python reads") from None


def _with_starter(question: str, starter: str) -> str:
    question = question.strip()
    if not question:
        raise Unusable("empty question")
    return f"{question}\n\nStart from this code:\n\n{_fenced(starter.rstrip())}" if starter.strip() else question


def _fenced(source: str) -> str:
    return f"{PROGRAM.marker}{source}\n{FENCE}"


def _naming(question: str, name: str) -> str:
    """A program that does not know the name of its function cannot be right."""
    return question if re.search(rf"\b{re.escape(name)}\b", question) else f"{question}\n\nName the function `{name}`."
