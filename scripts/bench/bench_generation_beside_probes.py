"""How much probes slow the generation beside them, on a real vLLM engine (CPU) of a tiny model.

Owner: the core maintainers. Makes the tables of docs/results/rollout_scoring.md. Last run: 2026-11-29.

    PYTHONPATH=. python scripts/bench/bench_generation_beside_probes.py [--rows 64 256 --tokens 96 --repeats 4]

So many rows generate so many tokens each, in four ways that take turns: `alone` and `ours`, beside the probes of
`--traces` traces that are read again and again as our server reads them; `alone, text` and `unbounded`, the same with
detokenisation and without rules (all traces at once, a quarter of `max_num_seqs` for requests of probes). Seconds are
wall clock and the CPU's, of this process and all that come from it; `ratio` is to generation alone of the same repeat,
the median over repeats. On a busy machine read the CPU's.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import vllm
from plumbing import machine, parser, save

from rredcot_verl.servers.probe_queue import ProbeQueue
from tests.servers.simulated_engine import Unbounded
from tests.servers.vllm_server import LocalServer, make_model, serve

NUM_PROMPT, NUM_TRACE, OPENING, CLOSING = 40, 200, (33, 34, 35), tuple(range(10, 98))
ANSWERS = ((5, 6, 7), (5, 9, 9))


def cpu_seconds() -> float:
    """Of this process and all that come from it, user and system."""
    parents, ticks = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(folder.name)] = int(fields[1])
            ticks[int(folder.name)] = int(fields[11]) + int(fields[12])

    def is_ours(process: int) -> bool:
        return process == os.getpid() or (process in parents and is_ours(parents[process]))

    return sum(ticks[process] for process in ticks if is_ours(process)) / os.sysconf("SC_CLK_TCK")


async def generate(server: LocalServer, rows: int, tokens: int, with_text: bool) -> None:
    """All rows at once."""
    chosen = random.Random(rows)

    async def one(number: int) -> None:
        prompt = [chosen.randrange(3, 100) for _ in range(NUM_PROMPT)]
        params = {"temperature": 1.0, "logprobs": True, "ignore_eos": True, "max_tokens": tokens}
        params |= {"detokenize": True} if with_text else {}
        await server.generate(prompt, params, f"row-{number}-{random.random()}")

    await asyncio.gather(*[one(number) for number in range(rows)])


async def keep_reading(server: LocalServer, trace: list[int]) -> None:
    """The probes of a trace, for ever."""
    probes = [
        {"position": at, "token_ids": OPENING + answer, "scored_from": len(OPENING), "closing_token_ids": CLOSING}
        for at in range(NUM_PROMPT, NUM_TRACE, 32)
        for answer in ANSWERS
    ]
    while True:
        await server.generate(trace, {"read_probes": probes}, f"read-{random.random()}")


async def measure(server: LocalServer, way: str, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """One way, once."""
    kind = Unbounded if way == "unbounded" else ProbeQueue

    class Counting(kind):  # type: ignore[misc, valid-type]
        num_requests = 0

        @contextlib.asynccontextmanager
        async def request(self) -> AsyncIterator[None]:
            async with super().request():
                yield
            self.num_requests += 1

    server.probe_queue = queue = Counting(server.config.max_num_seqs // 4)
    chosen = random.Random(0)
    traces = [[chosen.randrange(3, 100) for _ in range(NUM_TRACE)] for _ in range(args.traces)]
    readers = [asyncio.create_task(keep_reading(server, trace)) for trace in traces if not way.startswith("alone")]
    started, cpu = time.perf_counter(), cpu_seconds()
    await generate(server, rows, args.tokens, with_text=way in ("unbounded", "alone, text"))
    wall, cpu, num_requests = time.perf_counter() - started, cpu_seconds() - cpu, queue.num_requests
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    await server.engine.wait_for_requests_to_drain()
    return {"way": way, "rows": rows, "wall": wall, "cpu": cpu, "requests": num_requests, "tokens": rows * args.tokens}


async def bench(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run everything."""
    results = []
    folder = Path(tempfile.mkdtemp())
    make_model(folder)
    async with serve(folder, max_num_seqs=320, max_num_batched_tokens=4096, num_gpu_blocks_override=6000) as server:
        for rows in args.rows:
            for repeat in range(args.repeats + 1):
                for way in ("alone", "ours", "alone, text", "unbounded"):
                    found = await measure(server, way, rows, args)
                    results += [found] if repeat else []
                    report({**found, "repeat": repeat, "load": os.getloadavg()[0]})
            for way, base in (("ours", "alone"), ("unbounded", "alone, text"), ("alone", "alone, text")):
                mine, alone = (
                    [row for row in results if (row["way"], row["rows"]) == (name, rows)] for name in (way, base)
                )
                ratios = {
                    key: [round(own[key] / other[key], 3) for own, other in zip(mine, alone, strict=True)]
                    for key in ("wall", "cpu")
                }
                medians = {f"{key} ratio": statistics.median(values) for key, values in ratios.items()}
                report({"rows": rows, "way": way, "to": base, **medians, "repeats": ratios})
    return results


def report(line: dict[str, Any]) -> None:
    """One line of results."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Read the arguments, run, and write the results."""
    arguments = parser(__doc__, repeats=4, tokens=96, traces=16)
    arguments.add_argument("--rows", type=int, nargs="+", default=[64, 256])
    args = arguments.parse_args()
    report({"vllm": vllm.__version__, "machine": str(machine())})
    save(args.json, asyncio.run(bench(args)))


if __name__ == "__main__":
    main()
