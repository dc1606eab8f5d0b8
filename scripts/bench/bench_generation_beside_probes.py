"""How much probes slow the generation beside them, on a real vLLM engine (CPU) of a tiny model.

Owner: the core maintainers. Makes the tables of docs/results/rollout_scoring.md. Last run: 2026-11-29.

    PYTHONPATH=. python scripts/bench/bench_generation_beside_probes.py [--rows 64 256 --tokens 64 --repeats 3]

So many rows generate so many tokens each: alone, beside the probes of `--traces` traces that are read again and again as
our server reads them (`ours`), and as it would without a rule (`unbounded`: generation with text, all traces at once,
a quarter of `max_num_seqs` for requests of probes). The ways take turns. Seconds are wall clock and the CPU's, of this
process and of the engine's; ratios to generation alone of the same repeat. The probes are the same for all.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
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


async def keep_reading(server: LocalServer, trace: list[int], read: list[int]) -> None:
    """The probes of a trace, for ever."""
    probes = [
        {"position": at, "token_ids": OPENING + answer, "scored_from": len(OPENING), "closing_token_ids": CLOSING}
        for at in range(NUM_PROMPT, NUM_TRACE, 32)
        for answer in ANSWERS
    ]
    while True:
        output = await server.generate(trace, {"read_probes": probes}, f"read-{random.random()}")
        read[0] += len(output.extra_fields["probe_log_probs"])


async def measure(server: LocalServer, way: str, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """One way, once."""
    kind = Unbounded if way == "unbounded" else ProbeQueue
    server.probe_queue = kind(server.config.max_num_seqs // 4)
    chosen, read = random.Random(0), [0]
    traces = [[chosen.randrange(3, 100) for _ in range(NUM_TRACE)] for _ in range(args.traces)]
    readers = [asyncio.create_task(keep_reading(server, trace, read)) for trace in traces if way != "alone"]
    started, cpu = time.perf_counter(), cpu_seconds()
    await generate(server, rows, args.tokens, with_text=way in ("unbounded", "alone, text"))
    wall, cpu, num_read = time.perf_counter() - started, cpu_seconds() - cpu, read[0]
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    await server.engine.wait_for_requests_to_drain()
    return {"way": way, "rows": rows, "wall": wall, "cpu": cpu, "probes": num_read, "tokens": rows * args.tokens}


async def bench(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run everything."""
    results = []
    folder = Path(tempfile.mkdtemp())
    make_model(folder)
    async with serve(folder, max_num_seqs=320, max_num_batched_tokens=4096, num_gpu_blocks_override=6000) as server:
        for rows in args.rows:
            for repeat in range(args.repeats + 1):
                for way in ("alone", "ours", "unbounded"):
                    found = await measure(server, way, rows, args)
                    results += [found] if repeat else []
                    report({**found, "repeat": repeat, "load": os.getloadavg()[0]})
            for way in ("ours", "unbounded"):
                pairs = [
                    (mine, alone)
                    for mine, alone in zip(
                        [each for each in results if (each["way"], each["rows"]) == (way, rows)],
                        [each for each in results if (each["way"], each["rows"]) == ("alone", rows)],
                        strict=True,
                    )
                ]
                report(
                    {"rows": rows, "way": way}
                    | {
                        key: statistics.median(mine[key] / alone[key] for mine, alone in pairs)
                        for key in ("wall", "cpu")
                    }
                )
    return results


def report(line: dict[str, Any]) -> None:
    """One line of results."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Read the arguments, run, and write the results."""
    arguments = parser(__doc__, repeats=3, tokens=64, traces=16)
    arguments.add_argument("--rows", type=int, nargs="+", default=[64, 256])
    args = arguments.parse_args()
    report({"vllm": vllm.__version__, "machine": str(machine())})
    save(args.json, asyncio.run(bench(args)))


if __name__ == "__main__":
    main()
