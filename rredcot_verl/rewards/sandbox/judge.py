"""Which tests a program passes. Runs in the trainer's process; what a program says is data here, never a verdict."""

import json
import logging
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from rredcot_verl.rewards.code_tests import CodeTests
from rredcot_verl.rewards.line_reader import LineReader
from rredcot_verl.rewards.sandbox.client import (
    Limits,
    SandboxConfig,
    SandboxError,
    closed_with,
    get_server,
    pipe_on,
    sealed_file,
)
from rredcot_verl.rewards.sandbox.compare import first_difference, outputs_match

logger = logging.getLogger(__name__)

_MIB = 2**20
_MAX_DETAIL = 500
# One report has at most some 3 kB; more without a newline is no report.
_MAX_REPORT_BYTES = 65536
# Timed-out tests after which the others are not tried.
_MAX_TIMEOUTS = 3
# For other programs to end and give back what they use.
_RETRY_PAUSE_S = 0.2


_DEFAULT_SANDBOX, _DEFAULT_LIMITS = SandboxConfig(), Limits()


@dataclass(frozen=True)
class Verdict:
    """What a program's tests say.

    Attributes:
        num_passed: Tests it passed.
        num_tests: Tests there were; those not reached count as failed.
        timed_out: Whether a test, or the whole, took too long.
        detail: Why the first failed test failed, for people.
        passed: For each test whether it passed.
    """

    num_passed: int
    num_tests: int
    timed_out: bool
    detail: str
    passed: tuple[bool, ...] = ()


def judge(
    program: str,
    tests: CodeTests,
    sandbox: SandboxConfig = _DEFAULT_SANDBOX,
    limits: Limits = _DEFAULT_LIMITS,
    total_time_limit_s: float = 60.0,
) -> Verdict:
    """Run a program's tests. Blocks.

    Args:
        program: Python source. It is not trusted.
        tests: Its tests.
        sandbox: What it runs with.
        limits: Limits of a test; a problem's own limits replace time and memory.
        total_time_limit_s: Seconds for all tests together.

    Raises:
        SandboxError: Programs cannot be run safely here, or the sandbox itself failed.
    """
    try:
        return _Session(program, tests, sandbox, limits, total_time_limit_s).run()
    except (SandboxError, OSError) as error:
        # Once more: a process or file the kernel had no room for is no reason to stop a training run.
        logger.warning("A program is judged again: %s", error)
    time.sleep(_RETRY_PAUSE_S)
    try:
        return _Session(program, tests, sandbox, limits, total_time_limit_s).run()
    except OSError as error:
        raise SandboxError(f"the sandbox could not run a program: {error}") from error


class _Session:
    """The tests of one program."""

    def __init__(
        self, program: str, tests: CodeTests, sandbox: SandboxConfig, limits: Limits, total_time_limit_s: float
    ) -> None:
        self.program = program
        self.tests = tests
        # The problem's own limits, where it has them.
        self.limits = replace(
            limits,
            time_limit_s=tests.time_limit_s or limits.time_limit_s,
            memory_mb=tests.memory_limit_mb or limits.memory_mb,
        )
        self.server = get_server(sandbox)
        self.deadline = time.monotonic() + total_time_limit_s
        self.timeouts_left = _MAX_TIMEOUTS
        self.timed_out = False
        self.passed = [False] * tests.num_tests
        self.detail = ""

    def run(self) -> Verdict:
        if self.tests.kind == "stdin":
            self.run_stdin_tests()
        else:
            self.run_call_tests()
        return Verdict(sum(self.passed), len(self.passed), self.timed_out, self.detail, tuple(self.passed))

    def fail(self, number: int, why: str, timed_out: bool = False) -> None:
        """Note why a test failed, if it is the first."""
        if not self.detail:
            self.detail = f"test {number}: {why}"[:_MAX_DETAIL]
        if timed_out:
            self.timed_out = True
            self.timeouts_left -= 1

    def seconds_left(self, number: int) -> float:
        """Seconds a test may take now; 0 if it is not to be tried."""
        left = self.deadline - time.monotonic()
        if self.timeouts_left <= 0 or left <= 0:
            if left <= 0:
                self.fail(number, "no time left for it", timed_out=True)
            return 0.0
        return min(left, self.limits.time_limit_s)

    def run_stdin_tests(self) -> None:
        for number, (given, expected) in enumerate(zip(self.tests.inputs, self.tests.outputs, strict=True)):
            seconds = self.seconds_left(number)
            if not seconds:
                return
            self.passed[number] = self._run_stdin_test(number, given, expected, seconds)

    def _run_stdin_test(self, number: int, given: str, expected: str, seconds: float) -> bool:
        with ExitStack() as stack:
            stdin = closed_with(stack, sealed_file(given.encode("utf-8", "replace")))
            stdout = closed_with(stack, os.memfd_create("stdout"))
            stderr = closed_with(stack, os.memfd_create("stderr"))
            limits = replace(self.limits, time_limit_s=seconds)
            with self.server.start("main", {"source": self.program}, limits, [stdin, stdout, stderr]) as cell:
                ending = cell.wait()
            if ending.timed_out:
                self.fail(number, f"more than {seconds:.3g} s", timed_out=True)
                return False
            if ending.exit != 0:
                self.fail(number, f"exit status {ending.exit}: {_last_line(stderr)}")
                return False
            size = os.fstat(stdout).st_size
            if size >= limits.output_mb * _MIB:
                self.fail(number, f"more than {limits.output_mb} MiB of output")
                return False
            actual = os.pread(stdout, size, 0).decode("utf-8", "replace").replace("\r\n", "\n")
        expected = expected.replace("\r\n", "\n")
        if outputs_match(actual, expected, self.tests.tolerance):
            return True
        self.fail(number, first_difference(actual, expected, self.tests.tolerance))
        return False

    def run_call_tests(self) -> None:
        number: int | None = 0
        while number is not None and number < len(self.passed) and self.seconds_left(number):
            number = self._run_call_tests_from(number)

    def _run_call_tests_from(self, first: int) -> int | None:
        """Run tests with one process of the program, until it is gone.

        Returns:
            The first test that was not decided; None if the others need not be tried.
        """
        limits = replace(self.limits, time_limit_s=max(0.1, self.deadline - time.monotonic()))
        payload = {
            "entry_point": self.tests.entry_point,
            "setup": self.tests.setup,
            "float_tolerance": self.tests.tolerance,
            "tests": self.tests.tests[first:],
            "first": first,
        }
        with ExitStack() as stack:
            reports = self._start_pair(stack, payload, limits)
            return self._follow(first, LineReader(reports, _MAX_REPORT_BYTES))

    def _start_pair(self, stack: ExitStack, payload: dict[str, Any], limits: Limits) -> int:
        """Start the program and its checker, joined by two pipes; the checker's reports, a file descriptor."""
        null = closed_with(stack, os.open(os.devnull, os.O_RDWR))
        reports_out, reports_in = os.pipe()
        closed_with(stack, reports_out)
        # All ends but that must be the cells' alone, or neither would see the other's end.
        with ExitStack() as theirs:
            closed_with(theirs, reports_in)
            questions_out, questions_in = pipe_on(theirs)
            answers_out, answers_in = pipe_on(theirs)
            program_files = [null, null, null, questions_out, answers_in]
            checker_files = [null, null, null, answers_out, questions_in, reports_in]
            stack.enter_context(self.server.start("serve", {"source": self.program}, limits, program_files))
            stack.enter_context(self.server.start("check", payload, limits, checker_files))
        return reports_out

    def _follow(self, first: int, reports: LineReader) -> int | None:
        try:
            loaded = _next_report(reports, self.limits.time_limit_s)
        except TimeoutError:
            self.fail(first, f"did not load within {self.limits.time_limit_s:.3g} s", timed_out=True)
            return None
        if loaded is None or not loaded["loaded"]:
            self.fail(first, "did not load" if loaded is None else f"did not load: {loaded['detail']}")
            return None
        for number in range(first, len(self.passed)):
            seconds = self.seconds_left(number)
            if not seconds:
                return None
            try:
                report = _next_report(reports, seconds)
            except TimeoutError:
                self.fail(number, f"more than {seconds:.3g} s", timed_out=True)
                return number + 1
            if report is None:
                self.fail(number, "the checker ended")
                return number + 1
            self.passed[number] = report["passed"] and not report["gone"]
            if not self.passed[number]:
                self.fail(number, report["detail"])
            if report["gone"]:
                return number + 1
        return None


def _next_report(reports: LineReader, seconds: float) -> dict[str, Any] | None:
    """The checker's next report; None if it is gone. Raises TimeoutError."""
    try:
        fields: dict[str, Any] = json.loads(reports.read_line(time.monotonic() + seconds))
    except EOFError:
        return None
    return fields


def _last_line(file: int) -> str:
    size = os.fstat(file).st_size
    lines = os.pread(file, 4096, max(0, size - 4096)).decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""
