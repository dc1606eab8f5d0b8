"""Cost of self-values beside what a GRPO step computes anyway, in one run, on the same traces and weights.

Owner: the core maintainers. Makes docs/results/self_value.md, its JSON and its chart. Last run: 2026-11-21.

    PYTHONPATH=. python scripts/bench/bench_self_value.py [--lengths 1024 2048 --segments 8 16 32] [--json OUT.json]

Needs torch and transformers, not verl. `--tiny` is a trial of seconds on a CPU. The GPU's own check is
`scripts/check_gpu.py`.

Traces of random tokens, all of one length; at the start of every segment each of `--proposals` answers is forced.

    plain        log-probabilities and entropies of the traces, what `old_log_prob` costs: one trace at a time, the
                 model's stock attention (sdpa)
    packed       the same through the shared-prefix attention, without probes
    update       forward and backward over the traces, one at a time, no optimiser step
    shared       traces and probes in shared-prefix passes, only the probes read
    fused        the same with the traces' log-probabilities and entropies, in place of `plain`
    naive        every boundary and answer in a sequence of its own, one at a time, only the read rows' logits
    server       scoring on a rollout server: `--server cpu` is the embedded CPU server's scoring function
    generation   sampling the traces with transformers' key-value cache, `--decode-batch` at once
    monte_carlo  `--rollouts` rollouts from every boundary, as VinePPO samples them, all prefixes cached, each as long
                 as what it replaces

A step is generation, plain and update. Two bases: generation extrapolated from a short stretch of sampling, and
generation assumed to be `--generation-share` of the step. Where `--skip update` is given, an update is taken to be
three times plain.

Variants of a round run in random order; ratios are medians over rounds of the quotient within a round. Naive, server,
update and sampling are run once. Exits with 1 where the variants' log-probabilities are not the same.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from self_value_bench import chart, passes
from self_value_bench.clock import CLOCKS, Measured
from self_value_bench.machine import machine
from self_value_bench.work import SHAPES, Work, build_model, evenly, forward_tokens, make_traces, make_work, qwen3
from torch import Tensor

PER_TRACE = ("plain", "packed", "update", "generation")
"""Variants without probes: one measurement serves every number of segments."""

ADDED = {"fused": 1, "shared": 0, "server": 0, "naive": 0, "monte_carlo": 0}
"""Variants that read self-values, and how many of the step's `plain` passes each takes the place of."""


TINY = {
    "model": "tiny",
    "device": "cpu",
    "threads": 1,
    "clock": "process",
    "lengths": [48, 80],
    "segments": [2, 4],
    "num_traces": 2,
    "prompt_tokens": 7,
    "proposals": 3,
    "opening_tokens": 5,
    "answer_tokens": 2,
    "rollouts": 4,
    "repeats": 1,
    "decode_tokens": 2,
    "naive_boundaries": 3,
    "server": "cpu",
}
"""Defaults with `--tiny`."""


@dataclass(frozen=True)
class Job:
    """One variant on one piece of work, with `segments` None where it has no probes.

    Attributes:
        call: Does the work.
        once: Whether it runs in the first round alone.
        scale: Factor from the seconds of the call to those of all the work.
        extrapolated: What the factor assumes; empty where it is 1.
    """

    name: str
    segments: int | None
    call: Callable[[], Any]
    once: bool = False
    scale: float = 1
    extrapolated: str = ""


class Bench:
    """Measures all variants, length by length."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.model = build_model(qwen3(options.model), self.device, getattr(torch, options.dtype), options.seed)
        self.order = random.Random(options.seed)
        self.measured: dict[tuple[str, int | None], Measured] = {}
        self.differences = {"probes": 0.0, "traces": 0.0, "spread": float("inf")}

    def works(self, length: int) -> dict[int, Work]:
        """The work of one length by number of segments, all on the same traces."""
        o, vocab_size = self.options, SHAPES[self.options.model]["vocab_size"]
        traces = make_traces(o.num_traces, o.prompt_tokens + length, vocab_size, o.seed)
        sizes = (o.proposals, o.opening_tokens, o.answer_tokens, vocab_size, o.seed)
        return {number: make_work(traces, o.prompt_tokens, number, *sizes) for number in o.segments}

    def jobs(self, works: dict[int, Work], length: int) -> list[Job]:
        """What runs at one length."""
        o, model = self.options, self.model
        traces = next(iter(works.values())).traces
        empty: list[list[Any]] = [[] for _ in traces]
        jobs = [
            Job("plain", None, lambda: passes.plain(model, traces)),
            Job("packed", None, lambda: passes.shared(model, traces, empty, o.pack_tokens, True)),
            Job("update", None, lambda: passes.update(model, traces), once=True),
        ]
        for number, work in works.items():
            for name, own in (("shared", False), ("fused", True)):
                call = lambda work=work, own=own: passes.shared(model, traces, work.probes, o.pack_tokens, own)  # noqa: E731
                jobs.append(Job(name, number, call))
            if length > o.slow_up_to:
                continue
            if o.server == "cpu":
                jobs.append(Job("server", number, lambda work=work: passes.server(model, work, o.pack_tokens), True))
            some = work.at(evenly(o.naive_boundaries, number))
            scale = forward_tokens(work, 0)["naive"] / forward_tokens(some, 0)["naive"]
            note = "" if scale == 1 else f"from {o.naive_boundaries} boundaries, evenly chosen, by forward tokens"
            call = lambda some=some: passes.naive(model, some.traces, some.probes)  # noqa: E731
            jobs.append(Job("naive", number, call, True, scale, note))
        return [job for job in jobs if job.name not in o.skip]

    def measure(self, length: int) -> list[dict[str, Any]]:
        """Run all variants at one length; the figures of every number of segments."""
        o, works = self.options, self.works(length)
        jobs = self.jobs(works, length)
        self.measured = {(job.name, job.segments): Measured(extrapolated=job.extrapolated) for job in jobs}
        started = time.perf_counter()
        for number in range(o.repeats):
            if number and time.perf_counter() - started > o.seconds_per_length:
                break
            due = [job for job in jobs if not (number and job.once)]
            self.order.shuffle(due)
            for job in due:
                self.measured[job.name, job.segments].run(number, job.call, self.device, o.clock, job.scale)
        self._sample(works, length)
        self._compare()
        return [cell(self.measured, work, length, number, o) for number, work in works.items()]

    def warm_up(self, length: int) -> None:
        """One uncounted round; kernels of a GPU are chosen and compiled by shape, so there it is of the full length."""
        works = self.works(length if self.device.type == "cuda" else min(length, 512))
        for job in self.jobs(works, 0 if self.device.type == "cuda" else length):
            job.call()

    def _sample(self, works: dict[int, Work], length: int) -> None:
        """Extrapolate generation and Monte Carlo rollouts from short stretches of sampling."""
        o = self.options
        if "generation" not in o.skip:
            seconds = self._seconds_per_token(o.decode_batch, o.prompt_tokens + length // 2)
            note = f"from {o.decode_tokens} tokens of {o.decode_batch} sequences at half the length"
            total = seconds * length * o.num_traces / o.decode_batch
            self.measured["generation", None] = Measured({0: total}, extrapolated=note)
        if "monte_carlo" in o.skip or length > o.slow_up_to:
            return
        for number, work in works.items():
            boundary = work.boundaries[0][number // 2]
            # In the middle of a rollout its context is of mean length.
            seconds = self._seconds_per_token(o.rollouts, o.prompt_tokens + (boundary + length) // 2)
            total = seconds * sum(length - boundary for own in work.boundaries for boundary in own)
            note = f"from {o.decode_tokens} tokens of {o.rollouts} rollouts at one boundary, no prefill"
            self.measured["monte_carlo", number] = Measured({0: total}, extrapolated=note)

    def _seconds_per_token(self, batch: int, context: int) -> float:
        """Seconds to sample one token in every sequence of a batch."""
        o, cache = self.options, passes.random_cache(self.model, batch, context)
        passes.decode(self.model, cache, batch, 1)
        found = Measured()
        found.run(0, lambda: passes.decode(self.model, cache, batch, o.decode_tokens), self.device, o.clock)
        return found.seconds[0] / o.decode_tokens

    def _compare(self) -> None:
        """Note how far the variants' log-probabilities are apart."""
        plain = self.measured["plain", None].result
        for (name, number), found in self.measured.items():
            if name in ("packed", "fused"):
                for one, other in zip(plain, found.result[0], strict=True):
                    # The last token's label is not its own.
                    self._note("traces", one[:-1], other[:-1])
            if name in ("fused", "server", "naive"):
                shared = torch.stack(self.measured["shared", number].result[1])
                self.differences["spread"] = min(self.differences["spread"], shared.std().item())
                chosen = evenly(self.options.naive_boundaries, number) if name == "naive" else range(number)
                kept = shared.unflatten(1, (number, -1))[:, list(chosen)].flatten(1)
                self._note("probes", torch.stack(found.result[1] if name == "fused" else found.result), kept)

    def _note(self, kind: str, one: Tensor, other: Tensor) -> None:
        difference = (one - other).abs().max().item()
        # A NaN is a difference too.
        if not difference <= self.differences[kind]:
            self.differences[kind] = difference if difference == difference else float("inf")


def cell(
    measured: Mapping[tuple[str, int | None], Measured], work: Work, length: int, segments: int, o: argparse.Namespace
) -> dict[str, Any]:
    """Figures of one length and number of segments: a step, and every variant; None for what was not run."""
    tokens = forward_tokens(work, o.rollouts)
    found = {name: measured.get((name, None if name in PER_TRACE else segments), Measured()) for name in tokens}
    plain = found["plain"]
    update = found["update"].median or 3 * plain.median
    steps = {"generation assumed": (plain.median + update) / (1 - o.generation_share)}
    if found["generation"].seconds:
        steps["generation measured"] = plain.median + update + found["generation"].median
    variants = {}
    for name, own in found.items():
        ratio = own.over(plain)
        adds = name in ADDED and ratio is not None
        variants[name] = {
            "seconds": own.median,
            "all_seconds": list(own.seconds.values()),
            "extrapolated": own.extrapolated,
            "ratio_to_plain": ratio,
            "forward_tokens": tokens[name],
            "forward_tokens_to_plain": tokens[name] / tokens["plain"],
            "peak_mib": own.peak_mib,
            "added_to_step": {basis: (ratio - ADDED[name]) * plain.median / step for basis, step in steps.items()}
            if adds
            else {},
        }
    parts = {"plain": plain.median, "update": update}
    return {
        "length": length,
        "segments": segments,
        "steps": {
            basis: {"step": step, "generation": step - sum(parts.values())} | parts for basis, step in steps.items()
        },
        "variants": variants,
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The figures as a table for people."""

    def show(value: float | None, pattern: str) -> str:
        return "" if value is None else pattern.format(value)

    bases = sorted(report["cells"][0]["steps"])
    head = ["tokens x segments", "variant", "seconds", "x plain", "forward tokens", "x plain", "peak MiB"]
    head += [f"added to step ({basis})" for basis in bases]
    rows, notes = [head, ["---"] * len(head)], set()
    for own in report["cells"]:
        for name, found in own["variants"].items():
            again = name in PER_TRACE and own["segments"] != report["cells"][0]["segments"]
            if again or (found["seconds"] is None and not name.startswith("monte_carlo")):
                continue
            if found["extrapolated"]:
                notes.add(f"\\* extrapolated, {name}: {found['extrapolated']}")
            rows.append(
                [f"{own['length']}" if name in PER_TRACE else f"{own['length']} x {own['segments']}", name]
                + [show(found["seconds"], "{:.3f}") + ("*" if found["extrapolated"] else "")]
                + [show(found["ratio_to_plain"], "{:.2f}"), f"{found['forward_tokens']:,}"]
                + [f"{found['forward_tokens_to_plain']:.2f}", show(found["peak_mib"], "{:.0f}")]
                + [show(found["added_to_step"].get(basis), "{:.2%}") for basis in bases]
            )
    equal = report["equivalence"]
    same = (
        f"Same numbers: largest difference of an answer's log-probability {equal['probes']:.1e} nats, of a trace's "
        f"{equal['traces']:.1e}; allowed {equal['tolerance']:.1e}. Log-probabilities of answers differ by a standard "
        f"deviation of {equal['spread']:.1e} among themselves."
    )
    table = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*table, "", *sorted(notes), "", same]) + "\n"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tiny", action="store_true", help="other defaults: every variant, in seconds on a CPU")
    add("--model", choices=SHAPES, default="small", help="shape; weights are random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", help="default: bfloat16 on cuda, else float32")
    add("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="tokens of a response")
    add("--segments", type=int, nargs="+", default=[8, 16, 32], help="segments of a response")
    add("--num-traces", type=int, default=1)
    add("--prompt-tokens", type=int, default=128)
    add("--proposals", type=int, default=1, help="answers forced at every boundary; self_value.proposals=reference: 1")
    add("--answer-tokens", type=int, default=3)
    add("--opening-tokens", type=int, default=9)
    add("--repeats", type=int, default=3)
    add("--seconds-per-length", type=float, default=300, help="no new round of a length after this")
    add("--pack-tokens", type=int, default=16384, help="most trace tokens of a shared pass, and of a server batch")
    add("--skip", nargs="*", default=[], choices=["packed", "update", "naive", "generation", "monte_carlo"])
    add("--slow-up-to", type=int, default=4096, help="longest response for naive, server and seconds of Monte Carlo")
    add("--naive-boundaries", type=int, default=4, help="boundaries that naive computes, the rest extrapolated; 0: all")
    add("--server", choices=["cpu", "none"], default="none")
    add("--rollouts", type=int, default=8, help="Monte Carlo rollouts from a boundary")
    add("--decode-tokens", type=int, default=32, help="tokens sampled to extrapolate from")
    add("--decode-batch", type=int, default=8, help="sequences sampled together in generation")
    add("--generation-share", type=float, default=0.6, help="generation's share of a step where it is assumed")
    add("--tolerance", type=float, help="largest difference in nats; default: 1e-3 in float32, else 0.1")
    add("--clock", choices=CLOCKS, default="wall", help="process: computing time of all threads, for a loaded machine")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write everything to this file")
    add("--plot", type=Path, help="write a chart to this SVG file")
    if parser.parse_known_args()[0].tiny:
        parser.set_defaults(**TINY)
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    if options.tolerance is None:
        options.tolerance = 1e-3 if options.dtype == "float32" else 0.1
    if options.device != "cpu" and (options.clock == "process" or options.server == "cpu"):
        parser.error("--clock process and --server cpu want --device cpu")
    return options


def main() -> int:
    """Measure and report."""
    options = parse()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    num_parameters = sum(parameter.numel() for parameter in bench.model.parameters())
    report: dict[str, Any] = {
        "machine": machine(bench.device),
        "options": {name: value for name, value in vars(options).items() if name not in ("json", "plot")},
        "model": SHAPES[options.model] | {"num_parameters": num_parameters},
        "cells": [],
        "equivalence": bench.differences | {"tolerance": options.tolerance},
    }
    for length in options.lengths:
        if length == options.lengths[0] or bench.device.type == "cuda":
            bench.warm_up(length)
        report["cells"] += bench.measure(length)
        sys.stderr.write(f"{length} tokens done, load {os.getloadavg()[0]:.1f}\n")
    about, found = report["machine"], bench.differences
    about["load_average_at_end"] = os.getloadavg()
    report["equivalence"] |= found
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        options.plot.write_text(chart.draw(report["cells"]), encoding="utf-8")
    sys.stdout.write(
        f"{about['gpu'] or about['cpu']}, {about['threads']} threads, torch {about['torch']}, {options.model} "
        f"({num_parameters / 1e6:.0f} million parameters), {options.dtype}, {options.num_traces} traces, "
        f"{options.proposals} answers\n\n{markdown(report)}"
    )
    if max(found["probes"], found["traces"]) <= options.tolerance:
        return 0
    sys.stderr.write("the variants' log-probabilities differ: the figures compare different things\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
