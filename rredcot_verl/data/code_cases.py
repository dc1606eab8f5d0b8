"""Test cases of code data sets as tests of `rredcot_verl.rewards.code_tests`: JSON texts of both kinds."""

import ast
import base64
import binascii
import builtins
import io
import json
import pickle
import re
import zlib
from collections.abc import Sequence
from typing import Any

from rredcot_verl.data.rows import Unusable
from rredcot_verl.rewards.code_tests import CodeTests


def stdin_tests(inputs: Sequence[Any], outputs: Sequence[Any], **limits: Any) -> str:
    """Tests that run the program once for each standard input (contest style); a list of lines is joined.

    The limits are `time_limit_s` and `memory_limit_mb`.
    """
    _same_length(inputs, outputs)
    return CodeTests("stdin", tuple(map(_lines, inputs)), tuple(map(_lines, outputs)), **limits).to_json()


def call_tests(entry_point: str | None, setup: str, tests: Sequence[str], **limits: Any) -> str:
    """Tests that are pieces of Python source, run after `setup` and the program (HumanEval and MBPP style)."""
    if not tests:
        raise Unusable("no tests")
    return CodeTests("call", entry_point=entry_point, setup=setup, tests=tuple(tests), **limits).to_json()


def call_cases(name: str, arguments: Sequence[Sequence[Any]], outputs: Sequence[Any]) -> list[str]:
    """Tests that call a function, or the method of that name of a class `Solution` (LeetCode style).

    A tuple counts as the list it should be, and the only entry of an expected list as the list: the data sets that use
    this form compare so.
    """
    _same_length(arguments, outputs)
    if not name.isidentifier():
        raise Unusable("the function's name is no identifier")
    return [
        f"_f = Solution().{name} if 'Solution' in globals() else {name}\n"
        f"_got = _f({', '.join(map(repr, values))})\n"
        "_got = list(_got) if isinstance(_got, tuple) else _got\n"
        f"assert _got in {_accepted(output)!r}"
        for values, output in zip(arguments, outputs, strict=True)
    ]


def _accepted(output: Any) -> list[Any]:
    return [output, output[0]] if isinstance(output, list) and len(output) == 1 else [output]


def _same_length(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    if not inputs:
        raise Unusable("no tests")
    if len(inputs) != len(outputs):
        raise Unusable("as many inputs as outputs expected")


def _lines(entry: Any) -> str:
    return "\n".join(map(str, entry)) if isinstance(entry, list | tuple) else str(entry)


def split_check(test: str, entry_point: str) -> tuple[str, list[str]]:
    """Split HumanEval's `check(candidate)` into one test for each statement that asserts.

    Statements without an assert (a helper, a prepared input) stand before every later test. The function is kept whole
    where a later statement needs what an asserting one has set, so that no test changes its meaning. Asserts of a
    constant, as `assert True`, test nothing and are left out.

    Returns:
        Source that all tests need, and the tests.

    Raises:
        Unusable: The source cannot be parsed, or has no `check` function.
    """
    try:
        module = ast.parse(test)
    except (SyntaxError, ValueError):
        raise Unusable("the tests are not valid Python") from None
    checks = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    if len(checks) != 1 or len(checks[0].args.args) != 1:
        raise Unusable("the tests have no function check(candidate)")
    setup = "\n".join(ast.unparse(node) for node in module.body if node is not checks[0])
    candidate = f"{checks[0].args.args[0].arg} = {entry_point}"
    tests, context = [], [candidate]
    prepared: set[str] = set()
    changed: set[str] = set()
    for statement in checks[0].body:
        asserts = any(isinstance(node, ast.Assert) for node in ast.walk(statement))
        if _loads(statement) & changed or isinstance(statement, ast.Return) or (asserts and _defines(statement)):
            return setup, [f"{ast.unparse(checks[0])}\ncheck({entry_point})"]
        if not asserts:
            context.append(ast.unparse(statement))
            prepared |= _stores(statement)
        elif not _is_vacuous(statement):
            tests.append("\n".join([*context, ast.unparse(statement)]))
            # A loop may change what was prepared, too.
            changed |= _stores(statement) | (
                set() if isinstance(statement, ast.Assert) else _loads(statement) & prepared
            )
    return setup, tests


def _defines(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def _is_vacuous(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Constant) and bool(statement.test.value)


def _stores(statement: ast.stmt) -> set[str]:
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _loads(statement: ast.stmt) -> set[str]:
    loads = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    # A loop that sets its own variable before it reads it needs nothing from before.
    return loads - (_stores(statement) if isinstance(statement, ast.For) else set())


def preamble(prompt: str, entry_point: str) -> str:
    """What stands before a function in the code to start from: imports and helpers that a program may leave out."""
    before = []
    for node in _parsed(prompt).body:
        if isinstance(node, ast.FunctionDef) and node.name == entry_point:
            break
        before.append(ast.unparse(node))
    return "\n".join(before)


def called_name(test: str, programs: Sequence[str] = ()) -> str | None:
    """The function that a test calls, None where it cannot be told.

    Of the names it calls, the first that a reference program defines, else the first that is not Python's own. A test
    without any other name than Python's own is of use only where the program defines one of them, as `sum`.

    Raises:
        Unusable: Only functions of Python's own are called, and more than one.
    """
    tree = _parsed(test)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    calls = list(dict.fromkeys(name.id for name in names if id(name) in called))
    defined = set().union(*map(_defined_names, programs))
    foreign = [name for name in calls if not hasattr(builtins, name)]
    for known in ([name for name in calls if name in defined], foreign):
        if known:
            return known[0]
    if not calls or any(not hasattr(builtins, name.id) for name in names):
        return None
    if len(calls) > 1:
        raise Unusable("the tests call functions of Python's own names only; say which is the program's: entry_point")
    return calls[0]


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def _defined_names(program: str) -> set[str]:
    """Names that a program defines at its top."""
    body = _parsed(program).body
    assigned = (_stores(node) for node in body if isinstance(node, ast.Assign))
    defined = (node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef))
    return {node.name for node in defined}.union(*assigned)


def with_typing(source: str) -> str:
    """Source with the import that its type hints need: the judges of some data sets have it in place."""
    names = ("Any", "Callable", "Deque", "Dict", "Iterable", "List", "Optional", "Set", "Tuple", "Union")
    used = [name for name in names if re.search(rf"(?::|->)[^\n]*\b{name}\b", source)]
    if "typing" in source or not used:
        return source
    # Python wants `from __future__` first.
    futures = list(re.finditer(r"^from __future__ import (?:\([^)]*\)|[^\n(]+)\n?", source, re.MULTILINE))
    start = futures[-1].end() if futures else 0
    return f"{source[:start]}from typing import {', '.join(used)}\n\n{source[start:]}"


class _PlainUnpickler(pickle.Unpickler):
    """Builds text, numbers and containers; refuses every name that a pickle would import and call."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"the tests hold {module}.{name}, and only plain data is read")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("the tests hold a persistent id, and only plain data is read")


MAX_DECODED_BYTES = 256 * 2**20
"""Largest size of one row's tests after decompression."""


def decode_private_tests(text: str) -> list[dict[str, Any]]:
    """LiveCodeBench's private tests: JSON, or JSON that was pickled, compressed and written in base64.

    Raises:
        Unusable: Neither form, a pickle that holds anything but plain data, or more than `MAX_DECODED_BYTES`.
    """
    try:
        return _test_list(json.loads(text))
    except json.JSONDecodeError:
        pass
    try:
        inflate = zlib.decompressobj()
        pickled = inflate.decompress(base64.b64decode(text), MAX_DECODED_BYTES)
        if inflate.unconsumed_tail:
            raise Unusable("private tests larger than 256 MiB")
        return _test_list(json.loads(_PlainUnpickler(io.BytesIO(pickled)).load()))
    except pickle.UnpicklingError as error:
        raise Unusable(f"private tests: {error}") from None
    except (binascii.Error, zlib.error, EOFError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        if isinstance(error, Unusable):
            raise
        raise Unusable("private tests in an unknown encoding") from None


def _test_list(tests: Any) -> list[dict[str, Any]]:
    if not isinstance(tests, list) or not all(isinstance(test, dict) for test in tests):
        raise Unusable("private tests are not a list of tests")
    return tests
