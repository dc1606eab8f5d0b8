"""Cost of self-values beside what a GRPO step computes anyway, in one run, on the same traces and weights.

    python scripts/bench_self_value.py [--model small --lengths 1024 2048 4096 --segments 8 16 32] [--json OUT.json]

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
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from self_value_bench import chart, figures, passes
from self_value_bench.clock import CLOCKS, MEMORY_ON_CPU, MEMORY_ON_CUDA, Measured, run
from self_value_bench.work import SHAPES, Work, build_model, forward_tokens, make_traces, make_work
from transformers import PreTrainedModel


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
        self.dtype = getattr(torch, options.dtype)
        self.model: PreTrainedModel = build_model(options.model, self.device, self.dtype, options.seed)
        if options.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
            # Checkpoints are kept in training mode only; the model has no dropout.
            self.model.train()
        self.order = random.Random(options.seed)
        self.measured: dict[tuple[str, int | None], Measured] = {}
        self.differences = {"probes": 0.0, "traces": 0.0, "spread": float("inf")}

    def works(self, length: int) -> dict[int, Work]:
        """The work of one length by number of segments, all on the same traces."""
        o, vocab_size = self.options, SHAPES[self.options.model]["vocab_size"]
        traces = make_traces(o.num_traces, o.prompt_tokens + length, vocab_size, o.seed)
        return {
            number: make_work(
                traces, o.prompt_tokens, number, o.proposals, o.opening_tokens, o.answer_tokens, vocab_size, o.seed
            )
            for number in o.segments
        }

    def jobs(self, works: dict[int, Work], length: int) -> list[Job]:
        """What runs at one length."""
        o, model = self.options, self.model
        traces = next(iter(works.values())).traces
        empty: list[list[Any]] = [[] for _ in traces]
        jobs = [
            Job("plain", None, lambda: passes.plain(model, traces)),
            Job("packed", None, lambda: passes.shared(model, traces, empty, o.pack_tokens, True)[0]),
            Job("update", None, lambda: passes.update(model, traces), once=True),
        ]
        for number, work in works.items():
            jobs += self._probe_jobs(number, work, slow=length <= o.slow_up_to)
        return [job for job in jobs if job.name not in o.skip]

    def _probe_jobs(self, number: int, work: Work, slow: bool) -> list[Job]:
        o, model = self.options, self.model

        def in_shared_pass(own: bool) -> Any:
            return passes.shared(model, work.traces, work.probes, o.pack_tokens, own)

        jobs = [
            Job("shared", number, lambda: in_shared_pass(False)),
            Job("fused", number, lambda: in_shared_pass(True)),
        ]
        if slow and o.server == "cpu":
            jobs.append(Job("server", number, lambda: passes.server(model, work, o.pack_tokens), once=True))
        if slow:
            some = work.at_boundaries(o.naive_boundaries)
            scale = forward_tokens(work, 0)["naive"] / forward_tokens(some, 0)["naive"]
            note = "" if scale == 1 else f"from {o.naive_boundaries} boundaries, evenly chosen, by forward tokens"
            jobs.append(Job("naive", number, lambda: passes.naive(model, some), True, scale, note))
        return jobs

    def measure(self, length: int) -> dict[int, Work]:
        """Run all variants at one length and note their figures."""
        works = self.works(length)
        jobs = self.jobs(works, length)
        self.measured = {(job.name, job.segments): Measured(extrapolated=job.extrapolated) for job in jobs}
        started = time.perf_counter()
        for number in range(self.options.repeats):
            if number and time.perf_counter() - started > self.options.seconds_per_length:
                break
            due = [job for job in jobs if not (number and job.once)]
            self.order.shuffle(due)
            for job in due:
                run(self.measured[job.name, job.segments], number, job.call, self.device, self.options.clock, job.scale)
        self._sample(works, length)
        self._compare(works)
        return works

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
        for number, work in works.items():
            if "monte_carlo" in o.skip or length > o.slow_up_to:
                continue
            some = work.at_boundaries(o.mc_boundaries).boundaries[0]
            # In the middle of a rollout its context is of mean length.
            contexts = [o.prompt_tokens + (boundary + length) // 2 for boundary in some]
            seconds = statistics.mean(self._seconds_per_token(o.rollouts, context) for context in contexts)
            total = seconds * sum(length - boundary for own in work.boundaries for boundary in own)
            note = f"from {o.decode_tokens} tokens of {o.rollouts} rollouts at {len(some)} boundaries, no prefill"
            self.measured["monte_carlo", number] = Measured({0: total}, extrapolated=note)

    def _seconds_per_token(self, batch: int, context: int) -> float:
        """Seconds to sample one token in every sequence of a batch."""
        decode = passes.Decoder(self.model, batch, context)
        decode(1)
        found = Measured()
        run(found, 0, lambda: decode(self.options.decode_tokens), self.device, self.options.clock)
        return found.seconds[0] / self.options.decode_tokens

    def _compare(self, works: dict[int, Work]) -> None:
        """Note how far the variants' log-probabilities are apart."""
        plain = self.measured["plain", None].result
        own = [self.measured[name, number].result for name, number in self.measured if name == "packed"]
        for number, work in works.items():
            shared = self.measured["shared", number].result[1]
            values = torch.tensor([score for row in shared for score in row])
            self.differences["spread"] = min(self.differences["spread"], values.std().item())
            kept = {probe.state for probe in work.at_boundaries(self.options.naive_boundaries).probes[0]}
            for name in ("fused", "server", "naive"):
                if (name, number) not in self.measured:
                    continue
                result = self.measured[name, number].result
                if name == "fused":
                    own.append(result[0])
                    result = result[1]
                states = kept if name == "naive" else set(range(number))
                self._note("probes", torch.tensor(result), _at_states(work, shared, states))
        for log_probs in own:
            for one, other in zip(plain, log_probs, strict=True):
                # The last token's label is not its own.
                self._note("traces", one[:-1], other[:-1])

    def _note(self, kind: str, one: torch.Tensor, other: torch.Tensor) -> None:
        difference = (one - other).abs().max().item()
        # A NaN is a difference too.
        if not difference <= self.differences[kind]:
            self.differences[kind] = difference if difference == difference else float("inf")

    def cells(self, length: int, works: dict[int, Work]) -> tuple[list[figures.Cell], list[dict[str, Any]]]:
        """Figures of every number of segments at one length, and how they grow with it."""
        per_trace = {name: self.measured[name, None] for name in figures.PER_TRACE if (name, None) in self.measured}
        by_segments = {
            number: {name: found for (name, segments), found in self.measured.items() if segments == number}
            for number in works
        }
        cells = []
        for number, work in works.items():
            found = per_trace | by_segments[number]
            steps = figures.step_figures(found, self.options.generation_share)
            shares = figures.step_shares(found, steps)
            tokens = forward_tokens(work, self.options.rollouts)
            variants = figures.variant_figures(found, tokens, shares)
            cells.append({"length": length, "segments": number, "steps": steps, "variants": variants})
        return cells, figures.growth_figures(by_segments, length)


def _at_states(work: Work, scores: passes.ProbeScores, states: set[int]) -> torch.Tensor:
    """The scores of the probes at some boundaries, trace by trace."""
    rows = []
    for own, probes in zip(scores, work.probes, strict=True):
        values = iter(own)
        of_probes = [[next(values) for _ in range(len(b.token_ids) - b.scored_from + 1)] for b in probes]
        pairs = zip(probes, of_probes, strict=True)
        rows.append([value for probe, found in pairs if probe.state in states for value in found])
    return torch.tensor(rows)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    on_gpu = device.type == "cuda"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "memory": MEMORY_ON_CUDA if on_gpu else MEMORY_ON_CPU,
        "load_average_at_start": os.getloadavg(),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
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
    add(
        "--pack-tokens",
        type=int,
        default=16384,
        help="most trace tokens of a shared pass, and tokens of a server batch",
    )
    add("--skip", nargs="*", default=[], choices=["packed", "update", "naive", "generation", "monte_carlo"])
    add("--slow-up-to", type=int, default=4096, help="longest response for naive, server and seconds of Monte Carlo")
    add("--naive-boundaries", type=int, default=4, help="boundaries that naive computes, the rest extrapolated; 0: all")
    add("--server", choices=["cpu", "none"], default="none")
    add("--rollouts", type=int, default=8, help="Monte Carlo rollouts from a boundary")
    add("--mc-boundaries", type=int, default=1, help="boundaries that Monte Carlo rollouts are sampled from")
    add("--decode-tokens", type=int, default=32, help="tokens sampled to extrapolate from")
    add("--decode-batch", type=int, default=8, help="sequences sampled together in generation")
    add("--generation-share", type=float, default=0.6, help="generation's share of a step where it is assumed")
    add("--gradient-checkpointing", action="store_true", help="in `update`")
    add("--tolerance", type=float, help="largest difference in nats; default: 1e-3 in float32, else 0.1")
    add("--clock", choices=CLOCKS, default="wall", help="process: computing time of all threads, for a loaded machine")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--target-at", type=int, nargs=2, default=[4096, 16], help="tokens and segments of the cell with targets")
    add("--seed", type=int, default=0)
    add("--json", help="write everything to this file")
    add("--plot", help="write a chart to this SVG file")
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    if options.tolerance is None:
        options.tolerance = 1e-3 if options.dtype == "float32" else 0.1
    if options.clock == "process" and options.device != "cpu":
        parser.error("--clock process does not see a GPU's work")
    if options.server == "cpu" and options.device != "cpu":
        parser.error("--server cpu runs with --device cpu")
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
        "growth": [],
    }
    for length in options.lengths:
        if length == options.lengths[0] or bench.device.type == "cuda":
            bench.warm_up(length)
        works = bench.measure(length)
        cells, growth = bench.cells(length, works)
        report["cells"] += cells
        report["growth"] += growth
        sys.stderr.write(f"{length} tokens done, load {os.getloadavg()[0]:.1f}\n")
    report["machine"]["load_average_at_end"] = os.getloadavg()
    report["targets"] = figures.targets(report["cells"], report["growth"], *options.target_at)
    found = bench.differences
    report["equivalence"] = found | {"tolerance": options.tolerance}
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        Path(options.plot).write_text(chart.draw(report["cells"]), encoding="utf-8")
    about = report["machine"]
    sys.stdout.write(
        f"{about['gpu'] or about['cpu']}, {about['threads']} threads, torch {about['torch']}, {options.model} "
        f"({num_parameters / 1e6:.0f} million parameters), {options.dtype}, {options.num_traces} traces, "
        f"{options.proposals} answers\n\n{figures.markdown(report)}"
    )
    if max(found["probes"], found["traces"]) <= options.tolerance:
        return 0
    sys.stderr.write("the variants' log-probabilities differ: the figures compare different things\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
