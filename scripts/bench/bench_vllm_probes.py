"""Milliseconds a probe takes on vLLM against the length of its prefix, for four ways of asking.

Owner: the core maintainers. Makes the tables of docs/results/rollout_scoring.md. Last run: 2026-11-21.

    PYTHONPATH=. python scripts/bench/bench_vllm_probes.py [--prefixes 1024 4096 16000 --repeats 5 --json OUT.json]

Ways: `tree` and `forced`, the two of `rredcot_verl.servers` (one request for each token of the answer and one for its
end; one request that generates the answer, forced by a logits processor); `prompt`, one `prompt_logprobs` request,
which reads a single closing token; `plain`, one request for one token, the least that anything can cost.

A probe is an opening, an answer and its end at a boundary whose prefix is in the cache, all of random tokens (seeded).
No two probes are alike. The ways take turns within a repeat, so that the machine's other load falls on all of them;
figures are medians over the repeats. The model is tiny: what is measured is everything but the model.
"""

import argparse
import asyncio
import functools
import json
import os
import pickle
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import vllm
from plumbing import machine, parser, save
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from rredcot_verl.servers import vllm_forced, vllm_tree
from rredcot_verl.servers.probe_requests import Probe
from rredcot_verl.servers.vllm_requests import ReadPlaces, read_probes
from tests.servers.vllm_server import make_model

NUM_OPENING, NUM_ANSWER, CLOSING = 8, 3, tuple(range(10, 42))
OpeningAndAnswer = tuple[list[int], list[int]]
Way = Callable[[list[int], OpeningAndAnswer], Awaitable[None]]


class Engine:
    """An engine with one way of sending a request, and what it did."""

    def __init__(self, folder: str, args: argparse.Namespace, **settings: Any) -> None:
        self.block_size = args.block_size
        self.num_requests = 0
        self.engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=folder,
                dtype="float32",
                max_model_len=max(args.prefixes) + 256,
                max_num_seqs=128,
                max_num_batched_tokens=4096,
                block_size=args.block_size,
                enforce_eager=True,
                gpu_memory_utilization=0.1,
                disable_log_stats=True,
                **settings,
            )
        )

    async def send(self, prompt_ids: list[int], fields: dict[str, Any]) -> Any:
        """Send a request and wait for its output."""
        self.num_requests += 1
        params = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **fields)
        prompt = TokensPrompt(prompt_token_ids=prompt_ids)
        return [output async for output in self.engine.generate(prompt, params, f"request-{self.num_requests}")][-1]


def ways(stock: Engine, forcing: Engine) -> dict[str, Way]:
    """The ways to score one probe after a prefix."""

    async def ours(engine: Engine, read_places: ReadPlaces, prefix: list[int], parts: OpeningAndAnswer) -> None:
        opening, answer = parts
        probe = Probe(len(prefix), (*opening, *answer), CLOSING, len(opening))
        (result,) = await read_probes(read_places, engine.send, prefix, [probe], 1.0, engine.block_size)
        assert result["num_recomputed_tokens"] == 0

    async def prompt(prefix: list[int], parts: OpeningAndAnswer) -> None:
        opening, answer = parts
        fields = {"max_tokens": 1, "prompt_logprobs": 0, "skip_reading_prefix_cache": False, "detokenize": False}
        await stock.send([*prefix, *opening, *answer, CLOSING[0]], fields)

    async def plain(prefix: list[int], parts: OpeningAndAnswer) -> None:
        await stock.send(prefix + parts[0], {"max_tokens": 1, "detokenize": False})

    return {
        "tree": functools.partial(ours, stock, vllm_tree.read_places),
        "forced": functools.partial(ours, forcing, vllm_forced.read_places),
        "prompt": prompt,
        "plain": plain,
    }


async def measure(way: Way, prefix: list[int], probes: list[OpeningAndAnswer], concurrency: int) -> float:
    """Seconds a probe took, so many at once."""
    slots = asyncio.Semaphore(concurrency)

    async def run(parts: OpeningAndAnswer) -> None:
        async with slots:
            await way(prefix, parts)

    started = time.perf_counter()
    await asyncio.gather(*[run(probe) for probe in probes])
    return (time.perf_counter() - started) / len(probes)


def bytes_sent(length: int, num_probes: int = 32, num_closings: int = 100) -> dict[str, float]:
    """Pickled bytes a probe that go through Ray, for a trace with so many probes spread over eight boundaries."""
    chosen = random.Random(0)

    def ids(number: int) -> list[int]:
        return [chosen.randrange(150_000) for _ in range(number)]

    trace, closings = ids(length), tuple(ids(num_closings))
    probes = [(max(1, length * (index % 8) // 8), ids(NUM_OPENING + NUM_ANSWER)) for index in range(num_probes)]
    probes = [
        {"position": position, "token_ids": forced, "scored_from": NUM_OPENING, "closing_token_ids": closings}
        for position, forced in probes
    ]
    return {
        "one request a trace": len(pickle.dumps((trace, {"read_probes": probes}))) / num_probes,
        "one request a probe": statistics.mean(len(pickle.dumps(trace[:at] + forced)) for at, forced in probes),
    }


def random_probes(chosen: random.Random, number: int) -> list[OpeningAndAnswer]:
    """Distinct openings and answers."""
    return [
        ([chosen.randrange(3, 100) for _ in range(NUM_OPENING)], [chosen.randrange(3, 100) for _ in range(NUM_ANSWER)])
        for _ in range(number)
    ]


async def bench(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run everything."""
    folder = tempfile.mkdtemp()
    make_model(Path(folder), max_position_embeddings=max(args.prefixes) + 512)
    stock = Engine(folder, args, logprobs_mode="processed_logprobs")
    forcing = Engine(folder, args, logprobs_mode="processed_logprobs", logits_processors=[vllm_forced.PROCESSOR])
    chosen, rows = random.Random(args.seed), []
    for length in args.prefixes:
        prefix = [chosen.randrange(3, 100) for _ in range(length)]
        for engine in (stock, forcing):
            await engine.send(prefix, {"max_tokens": 1})
        for concurrency in args.concurrency:
            number = max(16, 3 * concurrency)
            seconds: dict[str, list[float]] = {}
            load = os.getloadavg()[0]
            for repeat in range(args.repeats + 1):
                for name, way in ways(stock, forcing).items():
                    taken = await measure(way, prefix, random_probes(chosen, number), concurrency)
                    if repeat:
                        seconds.setdefault(name, []).append(taken)
            for name, values in seconds.items():
                rows.append(
                    {
                        "way": name,
                        "prefix": length,
                        "concurrency": concurrency,
                        "ms_per_probe": 1e3 * statistics.median(values),
                        "ms_lowest": 1e3 * min(values),
                        "ms_highest": 1e3 * max(values),
                        "load_before": load,
                        "load_after": os.getloadavg()[0],
                    }
                )
                report(json.dumps(rows[-1]))
        report(json.dumps({"prefix": length, "bytes_per_probe": bytes_sent(length)}))
    for engine in (stock, forcing):
        engine.engine.shutdown()
    return rows


def report(line: str) -> None:
    """One line of results."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Read the arguments, run, and write the results."""
    arguments = parser(__doc__, repeats=5, block_size=16, seed=0)
    arguments.add_argument("--prefixes", type=int, nargs="+", default=[1024, 4096, 16000])
    arguments.add_argument("--concurrency", type=int, nargs="+", default=[1, 32])
    args = arguments.parse_args()
    report(f"vllm {vllm.__version__}, {machine()}")
    save(args.json, asyncio.run(bench(args)))


if __name__ == "__main__":
    main()
