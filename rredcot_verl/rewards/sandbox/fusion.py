"""Running programs on a Sandbox Fusion service, through verl's own client."""

import functools
import json
import math
import secrets
import threading
from importlib.resources import files
from typing import Any

from rredcot_verl.rewards.code_tests import CodeTests
from rredcot_verl.rewards.sandbox.client import SandboxError
from rredcot_verl.rewards.sandbox.compare import first_difference, outputs_match
from rredcot_verl.rewards.sandbox.judge import Verdict

_EMBEDDED = ("literals", "kernel", "program", "checker")
_MAX_DETAIL = 500
# What verl's client calls a failure of the service and not of the program.
_SERVICE_FAILURES = ("api_error", "sandbox_error", "internal_error", "unknown_api_state")
_TIMEOUTS = ("timeout", "compile_timeout")

# Sent with every call test. The service runs it as one script: it starts the program in a process of its own and checks
# it from outside, as the local sandbox does. The tests and the word that stands for "passed" come by standard input,
# which is read before the program starts.
_LOADER = """
import json, os, subprocess, sys, types

SOURCES = json.loads({sources!r})

def load():
    parent = None
    for package in ("rredcot_verl", "rredcot_verl.rewards", "rredcot_verl.rewards.sandbox"):
        parent = sys.modules[package] = types.ModuleType(package)
        parent.__path__ = []
    for name, source in SOURCES.items():
        full = "rredcot_verl.rewards.sandbox." + name
        module = sys.modules[full] = types.ModuleType(full)
        setattr(parent, name, module)
        exec(compile(source, name + ".py", "exec"), module.__dict__)
    return parent
"""
_PROGRAM_SIDE = """
sandbox = load()
source = sys.stdin.read()
sandbox.program.serve(source, int(sys.argv[1]), int(sys.argv[2]))
"""
_CHECKER_SIDE = """
sandbox = load()
given = json.loads(sys.stdin.read())
sandbox.kernel.set_not_dumpable()
questions, ask = os.pipe()
answers, answer = os.pipe()
child = subprocess.Popen(
    [sys.executable, "-c", given["program_side"], str(questions), str(answer)], stdin=subprocess.PIPE,
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(questions, answer), cwd="/", env={},
)
os.close(questions)
os.close(answer)
child.stdin.write(given["program"].encode())
child.stdin.close()
sandbox.literals.allow_long_integers()
peer = sandbox.checker.Peer(sandbox.literals.Channel(answers, ask), given["float_tolerance"])
detail = peer.wait_loaded()
passed = False
if detail is None:
    passed, detail = sandbox.checker.Checker(peer, given["entry_point"], given["setup"]).run(given["test"])
child.kill()
if passed:
    os.write(1, given["word"].encode())
else:
    # Not through a buffer, which would be lost.
    os.write(2, detail.encode("utf-8", "backslashreplace"))
os._exit(0)
"""


def judge_by_service(
    program: str,
    tests: CodeTests,
    *,
    url: str,
    timeout_s: float,
    memory_limit_mb: int,
    slots: threading.Semaphore,
) -> Verdict:
    """Run a program's tests on the service. Blocks.

    Args:
        program: Python source.
        tests: Its tests. A problem's own limits replace those below.
        url: Where the service is, e.g. `http://host:8080/run_code`.
        timeout_s: Seconds for a test, rounded up to whole ones.
        memory_limit_mb: MiB for a test.
        slots: How many requests may be under way at one time.

    Raises:
        SandboxError: The service cannot be reached or failed. Says nothing about the program.
    """
    # verl, and its HTTP client, are imported only where a service is configured.
    from verl.utils.reward_score.sandbox_fusion.utils import check_correctness

    word = secrets.token_hex(16)
    if tests.kind == "stdin":
        script, inputs = program, list(tests.inputs)
    else:
        script = _loader() + _CHECKER_SIDE
        shared: dict[str, Any] = {"program_side": _loader() + _PROGRAM_SIDE, "program": program, "word": word}
        shared |= {"entry_point": tests.entry_point, "setup": tests.setup, "float_tolerance": tests.tolerance}
        inputs = [json.dumps({**shared, "test": test}) for test in tests.tests]
    # An output of None: verl's client only runs; what was written is compared here, by one rule for both sandboxes.
    _, metadata = check_correctness(
        sandbox_fusion_url=url,
        in_outs={"inputs": inputs, "outputs": [None] * len(inputs)},
        generation=script,
        timeout=math.ceil(tests.time_limit_s or timeout_s),
        memory_limit_mb=tests.memory_limit_mb or memory_limit_mb,
        concurrent_semaphore=slots,
    )
    for run in metadata:
        if run["status"] in _SERVICE_FAILURES:
            raise SandboxError(f"sandbox_fusion_url={url!r}: {run['status']}: {run['api_request_error']}")
    if tests.kind == "stdin":
        failures = [
            _stdin_failure(run, output, tests.tolerance) for run, output in zip(metadata, tests.outputs, strict=True)
        ]
    else:
        failures = [_call_failure(run, word) for run in metadata]
    passed = tuple(failure is None for failure in failures)
    first = next((number for number, failure in enumerate(failures) if failure is not None), None)
    detail = "" if first is None else f"test {first}: {failures[first]}"[:_MAX_DETAIL]
    timed_out = any(run["status"] in _TIMEOUTS for run in metadata)
    return Verdict(sum(passed), tests.num_tests, timed_out, detail, passed)


def _stdin_failure(run: dict[str, Any], expected: str, tolerance: float) -> str | None:
    if run["status"] != "success":
        return f"{run['status']}: {(run['stderr'] or '').strip()[-200:]}"
    actual = (run["stdout"] or "").replace("\r\n", "\n")
    wanted = expected.replace("\r\n", "\n")
    return None if outputs_match(actual, wanted, tolerance) else first_difference(actual, wanted, tolerance)


def _call_failure(run: dict[str, Any], word: str) -> str | None:
    if run["status"] == "success" and run["stdout"] == word:
        return None
    return f"{run['status']}: {(run['stderr'] or '').strip()[-200:]}"


@functools.lru_cache
def _loader() -> str:
    folder = files("rredcot_verl.rewards.sandbox")
    sources = {name: folder.joinpath(f"{name}.py").read_text(encoding="utf-8") for name in _EMBEDDED}
    return _LOADER.format(sources=json.dumps(sources))
