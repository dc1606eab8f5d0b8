"""Processes that judge answers under a time limit that holds: late ones are killed, old ones are replaced.

multiprocessing and what is built on it (pebble, concurrent.futures) import the parent's main module in every process
they start. In a reward worker that is Ray's, so each would import ray, and each replacement again. Hence plain
subprocesses of one light module, each driven by a thread that waits for it: nothing blocks the caller's event loop, and
any loop, or none, may call.
"""

import asyncio
import atexit
import concurrent.futures
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

from rredcot_verl.rewards.line_reader import LineReader

# Seconds that a new process has to import the parser; a loaded machine is slow.
START_TIMEOUT_S = 120.0
# sympy's caches grow with every answer.
MAX_CALLS = 500


class LateOrDeadError(RuntimeError):
    """The process took too long over a request, or ended while it worked on it."""


class _Process:
    """One subprocess that answers JSON lines with JSON lines."""

    def __init__(self, module: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.num_calls = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self.process_id = self._process.pid
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._lines = LineReader(self._replies.fileno())
        try:
            self._read_line(START_TIMEOUT_S)
        except LateOrDeadError as error:
            self.close()
            raise RuntimeError(
                f"verifier: `{sys.executable} -m {module}` did not start; is math-verify[antlr4_9_3] installed in this "
                "environment?"
            ) from error

    def call(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        self.num_calls += 1
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        except BrokenPipeError as error:
            raise LateOrDeadError("the process ended") from error
        reply: dict[str, Any] = json.loads(self._read_line(timeout_s))
        return reply

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._replies.close()
        # What was not delivered is of no use any more.
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()

    def _read_line(self, timeout_s: float) -> bytes:
        try:
            return self._lines.read_line(time.monotonic() + timeout_s)
        except TimeoutError as error:
            raise LateOrDeadError(f"no answer within {timeout_s} s") from error
        except EOFError as error:
            raise LateOrDeadError("the process ended") from error


class VerifierProcesses:
    """A fixed number of processes, started when first needed.

    Args:
        module: Module that is run in each; it writes a line when it is ready, then one line for every line it reads.
        num_processes: How many requests are judged at once; further ones wait their turn.

    Raises:
        ValueError: `num_processes` is not a positive integer.
    """

    def __init__(self, module: str, num_processes: int) -> None:
        if not isinstance(num_processes, int) or isinstance(num_processes, bool) or num_processes < 1:
            raise ValueError(f"reward_kwargs.num_processes={num_processes!r} must be a positive integer")
        self._module = module
        self._threads = concurrent.futures.ThreadPoolExecutor(num_processes, thread_name_prefix="verifier")
        # One process a thread: the kernel ties a process to the thread that started it.
        self._local = threading.local()
        self._processes: set[_Process] = set()
        atexit.register(self.close)

    async def call(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Judge a request without blocking the event loop.

        Args:
            request: What the module reads, as JSON.
            timeout_s: Seconds from when a process takes the request up; waiting for its turn does not count.

        Raises:
            LateOrDeadError: Too late, or the process ended. The next request finds a new process.
            RuntimeError: A process could not be started.
        """
        return await asyncio.wrap_future(self._threads.submit(self._call, request, timeout_s))

    def call_and_wait(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """`call` for code without an event loop."""
        return self._threads.submit(self._call, request, timeout_s).result()

    def close(self) -> None:
        """Kill the processes."""
        atexit.unregister(self.close)
        for process in list(self._processes):
            process.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def process_ids(self) -> list[int]:
        """The ids of the processes that run."""
        return [process.process_id for process in list(self._processes)]

    def _call(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        process: _Process | None = getattr(self._local, "process", None)
        if process is not None and process.num_calls >= MAX_CALLS:
            self._drop(process)
            process = None
        if process is None:
            process = self._local.process = _Process(self._module)
            self._processes.add(process)
        try:
            return process.call(request, timeout_s)
        except LateOrDeadError:
            self._drop(process)
            raise

    def _drop(self, process: _Process) -> None:
        self._local.process = None
        self._processes.discard(process)
        process.close()
