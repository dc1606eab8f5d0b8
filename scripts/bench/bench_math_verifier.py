#!/usr/bin/env python
"""Answers per second of the math verifier: by exact rules in the caller's process, and by math-verify in its own.

Owner: the core maintainers. Makes the table of throughput in docs/results/math_verifier.md. Last run: 2026-11-21.

    python scripts/bench/bench_math_verifier.py [--answers 400] [--processes 1 2] [--json OUT.json]
"""

import asyncio
import statistics
import sys
import time
from collections.abc import Sequence

from plumbing import machine, parser, save

from rredcot_verl.rewards.math import compute_score

# Ground truth and answer with a number put in; what exact rules decide, and what the library must.
PLAIN = [("{k}", "{k}"), ("\\frac{{{k}}}{{7}}", "{k}/7"), ("{k} km", "{k}000 m"), ("{k}", "{k}.5"), ("B", "(C)")]
PARSED = [
    ("x^2+{k}x", "x(x+{k})"),
    ("{k}\\sqrt{{2}}", "\\frac{{{k}}}{{2}}\\sqrt{{8}}"),
    ("({k}, 3)", "({k}, 3.0)"),
    ("x = {k}, y = 2", "y = 2, x = {k}"),
    ("(-\\infty, {k}]", "(-\\infty, {k})"),
    ("\\frac{{{k}\\pi}}{{3}}", "{k}\\pi / 3 + 1"),
]


def rows(pairs: Sequence[tuple[str, str]], num_answers: int) -> list[tuple[str, str]]:
    """Ground truths and responses, no two alike; a response has the length of a short reasoning trace."""
    thinking = "First we add, then we divide, and so on. " * 100
    filled = ((pairs[k % len(pairs)], k + 2) for k in range(num_answers))
    return [(gold.format(k=k), thinking + f"So \\boxed{{{answer.format(k=k)}}}.") for (gold, answer), k in filled]


async def measure(batch: Sequence[tuple[str, str]], num_processes: int) -> tuple[float, list[float]]:
    """Seconds for the batch with all of it asked for at once, and the longest pauses of the event loop, seconds."""
    pauses: list[float] = []

    async def watch() -> None:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(0)
            pauses.append(time.perf_counter() - started)
            await asyncio.sleep(0.005)

    watcher = asyncio.ensure_future(watch())
    started = time.perf_counter()
    await asyncio.gather(
        *(compute_score("bench", text, gold, timeout_s=60, num_processes=num_processes) for gold, text in batch)
    )
    seconds = time.perf_counter() - started
    watcher.cancel()
    return seconds, pauses


def main() -> None:
    """Command line."""
    arguments = parser(__doc__, answers=400, repeats=3)
    arguments.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    options = arguments.parse_args()
    rates = {}
    settings = [("exact rules", PLAIN, 1), *(("math-verify", PARSED, number) for number in options.processes)]
    for name, pairs, num_processes in settings:
        batch = rows(pairs, options.answers)
        # All processes start, and read their tables, before anything is measured.
        asyncio.run(measure(rows(pairs, 8 * num_processes), num_processes))
        seconds, pauses = [], []
        for _ in range(options.repeats):
            took, waited = asyncio.run(measure(batch, num_processes))
            seconds.append(took)
            pauses += waited
        rate = options.answers / statistics.median(seconds)
        processes = "in the caller" if name == "exact rules" else f"{num_processes} process(es)"
        pause = f", longest pause of the event loop {1000 * max(pauses):.0f} ms" if pauses else ""
        sys.stdout.write(f"{name}, {processes}: {rate:.0f} answers/s{pause}\n")
        rates[f"{name}, {processes}"] = rate
    save(options.json, {"machine": machine(), "answers_per_second": rates})


if __name__ == "__main__":
    main()
