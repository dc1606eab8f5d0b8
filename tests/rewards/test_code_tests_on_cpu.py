"""Ground truths of code rows: what is read, and what is refused with which words."""

import json
import sys

import numpy as np
import pytest

from rredcot_verl.rewards.code import why_unusable
from rredcot_verl.rewards.code_tests import CodeTests, parse_tests

CALL = {"kind": "call", "entry_point": "f", "setup": "import math\n", "tests": ["assert f(1) == 2"]}
STDIN = {"kind": "stdin", "inputs": ["1\n"], "outputs": ["2\n"], "time_limit_s": 2, "memory_limit_mb": 256}


def test_both_kinds_are_read():
    call = parse_tests(json.dumps(CALL))
    assert call == CodeTests("call", entry_point="f", setup="import math\n", tests=("assert f(1) == 2",))
    assert call.num_tests == 1
    stdin = parse_tests(STDIN)
    assert stdin == CodeTests("stdin", inputs=("1\n",), outputs=("2\n",), time_limit_s=2.0, memory_limit_mb=256)


@pytest.mark.parametrize(
    "fields",
    [CALL, STDIN, {**CALL, "entry_point": None}, {**CALL, "float_tolerance": 0.0}, {**STDIN, "float_tolerance": 1e-3}],
)
def test_text_and_back(fields):
    tests = parse_tests(fields)
    assert parse_tests(tests.to_json()) == tests
    assert why_unusable(tests.to_json()) is None


def test_tests_may_hold_long_numbers_and_the_limit_of_this_process_stays():
    limit = sys.get_int_max_str_digits()
    tests = parse_tests({**CALL, "tests": [f"assert f(1) == {'7' * (limit + 1)}"]})
    assert tests.num_tests == 1 and sys.get_int_max_str_digits() == limit


def test_arrays_of_parquet_are_read():
    tests = parse_tests({**STDIN, "inputs": np.array(["1\n"], dtype=object)})
    assert tests.inputs == ("1\n",)


@pytest.mark.parametrize(
    ("ground_truth", "words"),
    [
        ("", "not JSON"),
        ("4", "JSON object"),
        ("[" * 10**5, "nested too deeply"),
        (None, "JSON object"),
        ({}, "kind=None is not allowed; allowed: 'stdin', 'call'"),
        ({**CALL, "kind": ["call"]}, "allowed"),
        ({**CALL, "inputs": []}, r"unknown keys \['inputs'\]"),
        ({**CALL, "tests": []}, "at least one"),
        ({**CALL, "tests": "assert f(1)"}, "list"),
        ({**CALL, "tests": ["assert f(1) =="]}, r"tests\[0\] is not Python"),
        ({**CALL, "setup": "import"}, "setup is not Python"),
        ({**CALL, "setup": 3}, "setup=3"),
        ({**CALL, "entry_point": "f(x)"}, "not a Python name"),
        ({**STDIN, "outputs": ["1", "2"]}, "1 inputs but 2 outputs"),
        ({**STDIN, "inputs": [1]}, r"inputs\[0\]=1 is not a text"),
        ({**STDIN, "time_limit_s": 0}, "time_limit_s=0; allowed: a number above 0"),
        ({**STDIN, "time_limit_s": True}, "time_limit_s"),
        ({**STDIN, "memory_limit_mb": float("nan")}, "memory_limit_mb"),
        ({**CALL, "float_tolerance": 1}, "float_tolerance=1; allowed: a number from 0 to below 1, or null"),
        ({**STDIN, "float_tolerance": True}, "float_tolerance"),
        ({**CALL, "float_tolerance": "1e-6"}, "float_tolerance"),
        ({**CALL, "float_tolerance": float("nan")}, "float_tolerance"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(ground_truth, words):
    with pytest.raises(ValueError, match=words):
        parse_tests(ground_truth)
    assert why_unusable(ground_truth) is not None
