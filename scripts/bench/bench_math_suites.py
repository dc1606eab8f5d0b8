#!/usr/bin/env python
"""How often the math verifier agrees with peers' published tests, and verl's own scorers with the cases of ours.

Owner: the core maintainers. Makes the tables of agreement in docs/results/math_verifier.md. Last run: 2026-11-29.

    python scripts/bench/bench_math_suites.py [--checkouts FOLDER]

FOLDER holds checkouts as FOLDER/owner/name, e.g. FOLDER/hendrycks/math; without it only verl's scorers are asked. A
peer's tests run as they are, with this project's verifier under the names of theirs.
"""

import asyncio
import functools
import sys
import types
import unittest
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from plumbing import parser

sys.path.insert(0, str(Path(__file__).parents[2]))
from rredcot_verl.answers.grammar import BUILT_IN, find_answer
from rredcot_verl.answers.separators import join_thousands
from rredcot_verl.rewards.math import close_processes, compute_score
from tests.rewards.math_cases import CASES


def right(gold: Any, response: Any) -> bool:
    """Whether a response is right; one without an answer in any of our formats is taken for the answer."""
    if gold is None or response is None:
        return False
    text = str(response)
    if find_answer(text, dict(BUILT_IN)) is None:
        text = f"\\boxed{{{text}}}"
    return asyncio.run(compute_score("suite", text, str(gold) or "none", timeout_s=60))["score"] == 1.0


def right_swapped(response: Any, gold: Any, **_: Any) -> bool:
    """`right` for those who name the response first."""
    return right(gold, response)


def found(text: str) -> str:
    """The answer of a text, for those who test where theirs is."""
    answer = find_answer(text, dict(BUILT_IN))
    if answer is None:
        raise ValueError("No boxed, No GSM8K final answer")
    return join_thousands(answer.text)


def reward(*, completions: str, answer: str, **_: Any) -> float:
    """AReaL's signature."""
    return float(right(answer, completions))


class _Worker:
    def verify(self, response: str, gold: str) -> float:
        return float(right(gold, response))


@dataclass(frozen=True)
class Suite:
    """A peer's test file: where, the names under which it finds a verifier, and which of its tests judge answers."""

    repository: str
    path: str
    module: str
    names: dict[str, Any]
    select: str = ""


SUITES = (
    Suite(
        "hendrycks/math",
        "modeling/math_equivalence_test.py",
        "hendrycks.math.modeling.math_equivalence",
        {"is_equiv": right},
    ),
    Suite(
        "NVIDIA/NeMo-Skills", "tests/test_math_equal.py", "nemo_skills.evaluation.math_grader", {"math_equal": right}
    ),
    Suite(
        "MARIO-Math-Reasoning/MARIO_EVAL",
        "math_evaluation/tests/test_is_equiv.py",
        "math_evaluation",
        {
            name: lambda gold, answer, verbose=False: right(gold, answer)
            for name in ("is_equiv", "are_equal_under_sympy")
        }
        | {"string_normalize": None},
    ),
    Suite(
        "thinking-machines-lab/tinker-cookbook",
        "tinker_cookbook/recipes/math_rl/math_env_test.py",
        "tinker_cookbook.recipes.math_rl.math_grading",
        {"grade_answer": right_swapped, "extract_boxed": found, "normalize_answer": None, "split_tuple": None}
        | {"_extract_final_int": None, "extract_gsm8k_final_answer": found},
        "TestGradeAnswer or TestExtractBoxed or TestExtractGsm8k",
    ),
    Suite(
        "THUDM/slime",
        "tests/test_rm_math.py",
        "slime.rollout.rm_hub.math_utils",
        {"grade_answer_mathd": right_swapped, "grade_answer_sympy": right_swapped, "grade_answer_verl": right_swapped}
        | {"extract_boxed_answer": found}
        | dict.fromkeys(["_strip_string", "extract_answer", "last_boxed_only_string", "mathd_normalize_answer"])
        | {"remove_boxed": None},
        "grade_answer or extract_boxed_answer",
    ),
    Suite(
        "inclusionAI/AReaL",
        "tests/test_math_verify_reward.py",
        "areal.reward",
        {"geometry3k_reward_fn": reward, "gsm8k_reward_fn": reward, "get_math_verify_worker": _Worker},
    ),
)
# Modules under which tinker-cookbook keeps the rest of what its test imports.
ALIASES = {
    "tinker_cookbook.recipes.math_rl.math_grading": ("math_env", "arithmetic_env"),
}


class _Tally:
    """Counts tests, and of unittest's the single assertions, which then do not end the test."""

    def __init__(self) -> None:
        self.agree, self.differ, self.others = 0, 0, list[str]()
        self._asserted = 0

    def note(self, is_as_expected: bool, name: str) -> None:
        """Count one."""
        self.agree += is_as_expected
        self.differ += not is_as_expected
        self.others += [] if is_as_expected else [name]

    def soft(self, wanted: bool) -> Callable[..., None]:
        """An assertion that is counted."""

        def check(case: unittest.TestCase, given: Any, message: object = None) -> None:
            self._asserted += 1
            self.note(bool(given) is wanted, f"{case.id().rpartition('.')[2]}, assertion {self._asserted}")

        return check

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest."""
        if report.when != "call":
            return
        if not self._asserted:
            self.note(report.passed, report.nodeid.rpartition("::")[2])
        self._asserted = 0


def stand_in(module: str, names: dict[str, Any]) -> None:
    """Put functions of ours under a peer's module."""
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:length]), types.ModuleType(".".join(parts[:length]))).__path__ = []  # type: ignore[attr-defined]
    for target in (module, *(f"{module.rpartition('.')[0]}.{alias}" for alias in ALIASES.get(module, ()))):
        sys.modules[target] = types.ModuleType(target)
        vars(sys.modules[target]).update(names)


def run(suite: Suite, checkouts: Path) -> _Tally:
    """Run one suite."""
    stand_in(suite.module, suite.names)
    tally = _Tally()
    unittest.TestCase.assertTrue, unittest.TestCase.assertFalse = tally.soft(True), tally.soft(False)  # type: ignore[method-assign, assignment]
    file = checkouts / suite.repository / suite.path
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-W", "ignore", "--import-mode=importlib"]
    pytest.main([str(file), *options, "--tb=no", f"--rootdir={checkouts}", "-k", suite.select], [tally])
    return tally


def verls_scorers() -> dict[str, Callable[[str, str], float]]:
    """verl's own scorers of mathematics: response and ground truth to a score."""
    from verl.utils.reward_score import math_dapo, math_reward, math_verify, prime_math

    return {
        "math_reward (MATH, lighteval/MATH)": math_reward.compute_score,
        "math_dapo (AIME, DAPO)": lambda response, gold: math_dapo.compute_score(response, gold)["acc"],
        "prime_math (numina)": lambda response, gold: prime_math.compute_score(response, gold)[0],
        "math_verify": math_verify.compute_score,
    }


def agreement(score: Callable[[str, str], float]) -> tuple[int, int, int]:
    """Of our cases, how many a scorer judges as we do, right ones it misses, wrong ones it takes."""
    counts = {True: 0, False: 0}
    missed = 0
    cases = [case for topic in CASES.values() for case in topic]
    for gold, answer, is_right in cases:
        try:
            given = bool(score(f"So \\boxed{{{answer}}}", gold))
        except Exception:  # Whatever a scorer raises, verl counts no reward.
            given = False
        counts[given is is_right] += 1
        missed += is_right and not given
    return counts[True], missed, counts[False] - missed


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    options = parser(__doc__)
    options.add_argument("--checkouts", type=Path, help="folder of the peers' checkouts")
    given = options.parse_args(arguments)
    say = functools.partial(print, flush=True)
    for suite in SUITES if given.checkouts else ():
        tally = run(suite, given.checkouts)
        say(f"{suite.repository} {suite.path}: {tally.agree} of {tally.agree + tally.differ} agree; {tally.others}")
    num_cases = sum(map(len, CASES.values()))
    for name, score in verls_scorers().items():
        agree, missed, taken = agreement(score)
        say(f"verl {name}: {agree} of our {num_cases} cases; right ones missed {missed}, wrong ones taken {taken}")
    close_processes()


if __name__ == "__main__":
    main()
