"""A step of rollouts and their probes on a simulated vLLM engine: what rules of waiting cost.

Owner: the core maintainers. Makes a table of docs/results/rollout_scoring.md. Last run: 2026-11-29.

    PYTHONPATH=. python scripts/bench/simulate_probing.py [--responses 1024 --median 1500 --longest 8192 --blocks 20000]

Log-normal lengths (sigma 0.8, cut at the longest), eight workers, ten segments a trace, two answers a segment that
share their opening: 30 requests a trace. The engine is `tests/servers/simulated_engine.py`: vLLM's scheduler and prefix
cache over a formula for a step's seconds; the waiting is that of our server and client themselves.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

from plumbing import parser, save

from rredcot_verl.servers.probe_queue import FULL_LOAD, MAX_TRACES, ProbeQueue, Turns
from tests.servers.simulated_engine import Size, Unbounded, lengths_of, simulate

MAX_REQUESTS = 64


def waiting(num_traces: int = MAX_TRACES, newest_first: bool = True) -> ProbeQueue:
    """Our queue with another rule for traces."""
    queue = ProbeQueue(MAX_REQUESTS)
    queue._traces = Turns(lambda: num_traces, newest_first)
    return queue


def ruled(limit: Callable[[int], int]) -> ProbeQueue:
    """A queue with another rule: requests beside so many responses, and no rest."""

    class Ruled(ProbeQueue):
        def _request_limit(self) -> int:
            return limit(self._num_generating) if self._num_generating else self._max_requests

    return Ruled(MAX_REQUESTS)


RULES: dict[str, Callable[[], ProbeQueue] | None] = {
    "no probes": None,
    "ours": lambda: ProbeQueue(MAX_REQUESTS),
    "ours, probes before responses (priority)": lambda: ProbeQueue(MAX_REQUESTS),
    "ours, oldest trace first": lambda: waiting(newest_first=False),
    "ours, one trace": lambda: waiting(1),
    "ours, 32 traces": lambda: waiting(32),
    "ours, without rests": lambda: ruled(lambda generating: min(MAX_REQUESTS, max(1, FULL_LOAD // generating))),
    "one for 16 responses": lambda: ruled(lambda generating: max(1, generating // 16)),
    "four times ours, without rests": lambda: ruled(lambda generating: max(4, 4 * FULL_LOAD // generating)),
    "when generation is over": lambda: ruled(lambda generating: 0),
    "unbounded: 64 requests, all traces": lambda: Unbounded(MAX_REQUESTS),
    "unbounded, priority": lambda: Unbounded(MAX_REQUESTS),
}


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of figures a rule, printed as it is made."""
    lengths = lengths_of(args.responses, args.median, args.longest, args.seed)
    size = Size(num_blocks=args.blocks)
    report({"responses": len(lengths), "tokens": sum(lengths), "tokens in the cache": 16 * args.blocks})
    found = []
    for name, make_queue in RULES.items():
        outcome = simulate(lengths, size, make_queue, timeout_s=1e9, probes_first="priority" in name)
        row = dataclasses.asdict(outcome)
        waits = row.pop("waits") or [0.0]
        found.append({"rule": name, **row, "median_wait": statistics.median(waits), "longest_wait": max(waits)})
        report({key: round(value, 1) if isinstance(value, float) else value for key, value in found[-1].items()})
    return found


def report(line: dict[str, Any]) -> None:
    """One line of results."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Read the arguments, run, and write the results."""
    args = parser(__doc__, responses=1024, median=1500, longest=8192, blocks=20_000, seed=0).parse_args()
    save(args.json, rows(args))


if __name__ == "__main__":
    main()
