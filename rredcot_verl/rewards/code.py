"""Verifier for programs: runs them in isolation against tests. verl's `compute_score` signature, as a coroutine.

    reward.custom_reward_function.path=pkg://rredcot_verl.rewards.code
    reward.custom_reward_function.name=compute_score

The program is found where the probes find it (`answers.grammar`, format `code`). What holds it, and what does not:
docs/sandbox.md.
"""

import asyncio
import functools
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from rredcot_verl.answers.grammar import AnswerFormat, find_answer, formats_of
from rredcot_verl.answers.thinking import Thinking
from rredcot_verl.config.blocks import ElicitationConfig
from rredcot_verl.rewards.code_tests import CodeTests, parse_tests
from rredcot_verl.rewards.sandbox.client import SandboxError
from rredcot_verl.rewards.sandbox.fusion import judge_by_service
from rredcot_verl.rewards.sandbox.judge import Verdict, judge
from rredcot_verl.rewards.sandbox.options import Options
from rredcot_verl.rewards.verl_arguments import VERL_ARGUMENTS

__all__ = ["CodeTests", "SandboxError", "Verdict", "compute_score", "run_program", "run_program_sync", "why_unusable"]

_REWARDS = ("all", "fraction")


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | Mapping[str, Any],
    extra_info: Mapping[str, Any] | None = None,
    *,
    reward: str = "all",
    think_open: str = "<think>",
    think_close: str = "</think>",
    prompt_opens_thinking: bool = False,
    **options: Any,
) -> dict[str, float | str]:
    """Verify the program of a response.

    Args:
        data_source: Not used.
        solution_str: The response, decoded.
        ground_truth: The tests, see `code_tests.parse_tests`.
        extra_info: Not used.
        reward: `all`: 1 if every test passes, else 0. `fraction`: tests passed / tests.
        think_open: `elicitation.think_open`; a program inside the thinking block is not final.
        think_close: `elicitation.think_close`.
        prompt_opens_thinking: The chat template ends its prompt with `think_open`: a response without `think_close` has
            then not finished thinking and holds no program.
        **options: Keyword arguments of `run_program`, from `reward.custom_reward_function.reward_kwargs`.

    Returns:
        `score`: the reward. `acc`: 1.0 if every test passes. `fraction`: tests passed / tests. `num_tests`. `pred`: the
        program, "" without one. `answer_start`: character offset of its opening, -1.0 without one. `timed_out`: 1.0 if
        a test took too long.

    Raises:
        ValueError: An option is not allowed, or the ground truth holds no tests.
        SandboxError: Programs cannot be run safely here, or the sandbox itself failed.
    """
    if reward not in _REWARDS:
        raise ValueError(f"reward_kwargs.reward={reward!r} is not allowed; allowed: {list(_REWARDS)}")
    options = {name: option for name, option in options.items() if name not in VERL_ARGUMENTS}
    judge_program = _judge_of(Options.of(options))
    tests = _parse_text(ground_truth) if isinstance(ground_truth, str) else parse_tests(ground_truth)
    found = find_answer(solution_str, _formats(), Thinking(think_open, think_close, prompt_opens_thinking))
    if found is None:
        num_tests = judge_program.tests_used(tests).num_tests
        return _result(Verdict(0, num_tests, False, "no program"), reward, "", -1.0)
    verdict = await judge_program.run(found.text, tests)
    return _result(verdict, reward, found.text, float(found.start))


async def run_program(program: str, tests: CodeTests, **options: Any) -> Verdict:
    """Run a program against tests, without blocking the event loop.

    Args:
        program: Python source. It is not trusted.
        tests: Its tests.
        **options: The fields of `sandbox.options.Options`; all may be left out.

    Raises:
        ValueError: An option is not allowed.
        SandboxError: Programs cannot be run safely here, or the sandbox itself failed.
    """
    return await _judge_of(Options.of(options)).run(program, tests)


def run_program_sync(program: str, tests: CodeTests, **options: Any) -> Verdict:
    """`run_program` for callers without an event loop: blocks until the verdict is there."""
    return _judge_of(Options.of(options)).submit(program, tests).result()


def why_unusable(ground_truth: str | Mapping[str, Any]) -> str | None:
    """Why the verifier cannot use a ground truth; None if it can."""
    try:
        parse_tests(ground_truth)
    except ValueError as error:
        return str(error)
    return None


class _ProgramJudge:
    """Judges programs with one set of options, a bounded number at a time, each in a thread that waits for it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._threads = ThreadPoolExecutor(options.concurrency(), thread_name_prefix="program-judge")
        if options.sandbox_fusion_url is None:
            self._judge = functools.partial(judge, **options.judge_settings())
        else:
            self._judge = functools.partial(judge_by_service, **options.fusion_settings())

    def tests_used(self, tests: CodeTests) -> CodeTests:
        own = tests.float_tolerance
        tolerance = self.options.float_tolerance if own is None else own
        return replace(tests.first(self.options.max_tests), float_tolerance=tolerance)

    def submit(self, program: str, tests: CodeTests) -> "Future[Verdict]":
        # As a source of its own, that may start with `from __future__`; what the prelude has of those holds for it too.
        source = f"{self.options.prelude}\nexec({program!r})" if self.options.prelude else program
        return self._threads.submit(self._judge, source, self.tests_used(tests))

    async def run(self, program: str, tests: CodeTests) -> Verdict:
        return await asyncio.wrap_future(self.submit(program, tests))


@functools.lru_cache
def _judge_of(options: Options) -> _ProgramJudge:
    return _ProgramJudge(options)


@functools.lru_cache
def _formats() -> dict[str, AnswerFormat]:
    return formats_of(ElicitationConfig(format="code"))


# A group of responses has one ground truth, and reading it compiles every test.
_parse_text = functools.lru_cache(maxsize=64)(parse_tests)


def _result(verdict: Verdict, reward: str, program: str, start: float) -> dict[str, float | str]:
    fraction = verdict.num_passed / verdict.num_tests
    acc = float(verdict.num_passed == verdict.num_tests)
    return {
        "score": fraction if reward == "fraction" else acc,
        "acc": acc,
        "fraction": fraction,
        "num_tests": float(verdict.num_tests),
        "pred": program,
        "answer_start": start,
        "timed_out": float(verdict.timed_out),
    }
