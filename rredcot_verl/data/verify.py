"""Preparation asks the verifiers: can the answer be read, does a reference program pass the tests?"""

import asyncio
import dataclasses
import functools
import importlib
import itertools
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from rredcot_verl.data.preparation import Preparation
from rredcot_verl.data.rows import CodeProblem, Problem

Run = Callable[..., Awaitable[Any]]
"""A program and its tests to a verdict."""


def why_unusable(task: str) -> Callable[[str], str | None]:
    """What a task's verifier, `math` or `code`, says of a ground truth: a reason, or None where it can use it."""
    function: Callable[[str], str | None] = importlib.import_module(f"rredcot_verl.rewards.{task}").why_unusable
    return function


def limit_tests(problem: Problem, max_tests: int) -> Problem:
    """The problem with its first `max_tests` tests; all of them for 0. What is no code problem stays as it is."""
    tests = json.loads(problem.ground_truth) if isinstance(problem, CodeProblem) else None
    if not isinstance(problem, CodeProblem) or not isinstance(tests, dict):
        return problem
    lists = [key for key in ("inputs", "outputs", "tests") if isinstance(tests.get(key), list)]
    if not max_tests or all(len(tests[key]) <= max_tests for key in lists):
        return problem
    tests |= {key: tests[key][:max_tests] for key in lists}
    return dataclasses.replace(problem, ground_truth=json.dumps(tests, ensure_ascii=False))


def run_solutions(
    problems: Sequence[CodeProblem], preparation: Preparation, progress: Callable[[int, int], None]
) -> list[tuple[list[str], str]]:
    """Run the reference programs of every problem in the verifier's sandbox.

    Args:
        problems: Problems with at least one program each; the shortest are run, as short answers can be probed.
        preparation: How many are run and kept, and the verifier's options.
        progress: Called with the number of problems done, and of all.

    Returns:
        For each problem the programs that passed, and what the first one that failed got.

    Raises:
        ValueError: Programs cannot be run safely here, or an option is not one of the verifier's.
    """
    from rredcot_verl.rewards.code import SandboxError, run_program

    num_workers = max(1, preparation.workers)
    # The reward is the training's choice and no option of the run itself.
    options = {name: option for name, option in preparation.verifier_kwargs.items() if name != "reward"}
    run: Run = functools.partial(run_program, **(options | {"max_concurrency": num_workers}))

    async def run_all() -> list[tuple[list[str], str]]:
        turn, done = asyncio.Semaphore(num_workers), itertools.count(1)

        async def try_one(problem: CodeProblem) -> tuple[list[str], str]:
            # In turn, as the tests of a problem may hold megabytes.
            async with turn:
                result = await _try_solutions(problem, preparation, run)
            progress(next(done), len(problems))
            return result

        return await asyncio.gather(*map(try_one, problems))

    try:
        return asyncio.run(run_all())
    except SandboxError as error:
        raise ValueError(f"reference programs cannot be run here: {error}; --no-verify leaves them unrun") from error


async def _try_solutions(problem: CodeProblem, preparation: Preparation, run: Run) -> tuple[list[str], str]:
    from rredcot_verl.rewards.code_tests import parse_tests

    tests = parse_tests(problem.ground_truth)
    passed: list[str] = []
    detail = ""
    for program in order_solutions(problem.solutions)[: preparation.max_tried]:
        verdict = await run(program, tests)
        if verdict.num_passed == verdict.num_tests:
            passed.append(program)
        elif not detail:
            late = ", timed out" if verdict.timed_out else ""
            detail = f"{verdict.num_passed} of {verdict.num_tests} tests passed{late}: {verdict.detail}"
        if len(passed) == preparation.max_solutions:
            break
    return passed, detail


def order_solutions(solutions: Iterable[str]) -> list[str]:
    """Distinct programs, the shortest first."""
    return sorted(dict.fromkeys(solutions), key=lambda program: (len(program), program))


def num_tests(problem: Problem) -> int:
    """Tests of a code problem, 0 for mathematics."""
    if not isinstance(problem, CodeProblem):
        return 0
    tests = json.loads(problem.ground_truth)
    return len(tests.get("tests") or tests.get("inputs") or ()) if isinstance(tests, dict) else 0
