"""The options of the code verifier: what `reward.custom_reward_function.reward_kwargs` may hold."""

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rredcot_verl.rewards.code_tests import TOLERANCES, is_tolerance
from rredcot_verl.rewards.sandbox.client import Limits, SandboxConfig


@dataclass(frozen=True)
class Options:
    """How programs are run.

    Attributes:
        time_limit_s: Seconds by the clock a test may take, loading the program included; a problem's own replaces it.
        memory_limit_mb: MiB of address space; a problem's own replaces it.
        total_time_limit_s: Seconds for all tests of a program; tests not reached fail.
        max_tests: Use a problem's first so many tests; None: all.
        max_concurrency: Programs that run at one time in this reward worker; None: one a processor core.
        max_processes: 1: programs cannot start processes. More: they can, up to so many.
        disk_limit_mb: MiB in the working folder, which lives in memory.
        output_limit_mb: MiB of output and of any file.
        packages: Installed packages that programs may import; all others are hidden from them.
        python: Interpreter for the programs; None: this one.
        prelude: Source run before each program, e.g. "from typing import *".
        float_tolerance: By how much, absolute or relative, a float of the program's may differ from the right one; a
            problem's own replaces it. None: 1e-6 where output is compared, not at all where a test calls the program.
        sandbox_fusion_url: Run programs on this Sandbox Fusion service instead; None: here.
        sandbox_fusion_timeout_s: Seconds a test may take there; None: `time_limit_s`.
        sandbox_fusion_memory_limit_mb: MiB there; None: `memory_limit_mb`.
        sandbox_fusion_max_concurrent: Requests under way at one time, of this reward worker.
    """

    time_limit_s: float = 10.0
    memory_limit_mb: int = 1024
    total_time_limit_s: float = 60.0
    max_tests: int | None = None
    max_concurrency: int | None = None
    max_processes: int = 1
    disk_limit_mb: int = 16
    output_limit_mb: int = 16
    packages: tuple[str, ...] = ("numpy", "sortedcontainers")
    python: str | None = None
    prelude: str = ""
    float_tolerance: float | None = None
    sandbox_fusion_url: str | None = None
    sandbox_fusion_timeout_s: float | None = None
    sandbox_fusion_memory_limit_mb: int | None = None
    sandbox_fusion_max_concurrent: int = 64

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Options":
        """Check what was given.

        Raises:
            ValueError: An option is unknown or out of range; the message says which and what is allowed.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"reward_kwargs: unknown options {unknown}; allowed: {['reward', *known]}")
        values = dict(given)
        if "packages" in values:
            values["packages"] = _names(values["packages"])
        options = cls(**values)
        options._check()
        return options

    def _check(self) -> None:
        for name in ("time_limit_s", "total_time_limit_s", "sandbox_fusion_timeout_s"):
            _check_number(name, getattr(self, name), (int, float), may_be_none=name.startswith("sandbox"))
        for name in ("memory_limit_mb", "max_processes", "disk_limit_mb", "output_limit_mb"):
            _check_number(name, getattr(self, name), int)
        for name in ("max_tests", "max_concurrency", "sandbox_fusion_memory_limit_mb"):
            _check_number(name, getattr(self, name), int, may_be_none=True)
        _check_number("sandbox_fusion_max_concurrent", self.sandbox_fusion_max_concurrent, int)
        for name in ("python", "sandbox_fusion_url"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ValueError(f"reward_kwargs.{name}={getattr(self, name)!r}; allowed: a text, or null")
        if not isinstance(self.prelude, str):
            raise ValueError(f"reward_kwargs.prelude={self.prelude!r}; allowed: Python source")
        try:
            compile(self.prelude, "prelude", "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"reward_kwargs.prelude={self.prelude!r} is not Python source: {error}") from error
        if not is_tolerance(self.float_tolerance):
            raise ValueError(f"reward_kwargs.float_tolerance={self.float_tolerance!r}; allowed: {TOLERANCES}")

    def concurrency(self) -> int:
        """Programs that may be judged at one time."""
        if self.max_concurrency is not None:
            return self.max_concurrency
        if self.sandbox_fusion_url is not None:
            return self.sandbox_fusion_max_concurrent
        return len(os.sched_getaffinity(0))

    def judge_settings(self) -> dict[str, Any]:
        """Settings of the local sandbox: keyword arguments of `judge.judge`."""
        return {
            "sandbox": SandboxConfig(python=self.python or sys.executable, packages=self.packages),
            "limits": Limits(
                time_limit_s=self.time_limit_s,
                memory_mb=self.memory_limit_mb,
                output_mb=self.output_limit_mb,
                disk_mb=self.disk_limit_mb,
                max_processes=self.max_processes,
                max_threads=max(64, self.max_processes),
            ),
            "total_time_limit_s": self.total_time_limit_s,
        }

    def fusion_settings(self) -> dict[str, Any]:
        """Settings of the service: keyword arguments of `fusion.judge_by_service`."""
        return {
            "url": self.sandbox_fusion_url,
            "timeout_s": self.sandbox_fusion_timeout_s or self.time_limit_s,
            "memory_limit_mb": self.sandbox_fusion_memory_limit_mb or self.memory_limit_mb,
            "slots": threading.Semaphore(self.sandbox_fusion_max_concurrent),
        }


def _names(given: object) -> tuple[str, ...]:
    # Hydra gives a list of its own kind.
    names = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else None
    if names is None or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise ValueError(f"reward_kwargs.packages={given!r}; allowed: a list of top-level module names")
    return names


def _check_number(name: str, value: Any, kinds: Any, may_be_none: bool = False) -> None:
    if value is None and may_be_none:
        return
    if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
        kind = "a whole number" if kinds is int else "a number"
        raise ValueError(f"reward_kwargs.{name}={value!r}; allowed: {kind} above 0" + (", or null" * may_be_none))
