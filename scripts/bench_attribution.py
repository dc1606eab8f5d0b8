"""Cost of attribution beside the log-probability pass that a GRPO step computes anyway.

    python scripts/bench_attribution.py [--model mini --lengths 512 1024 --segments 8 --rounds 3] [--json OUT.json]

`mini` has 9 million parameters; the other shapes are those of bench_self_value.py. One trace of random tokens at a
time; its last `--answer-tokens` tokens are the answer, what stands between prompt and answer is cut into segments of
equal length.

    plain                 log-probabilities and entropies of the trace, as for `old_log_prob`; stock attention (sdpa)
    attention, all        attention of the answer's rows, mean over all layers
    attention, last       the same of the last layer
    input x gradient      one forward and one backward pass
    integrated gradients  `--num-steps` of each
    leave one out         the trace, and the trace without each segment, one sequence a pass

Variants of a round run in random order; ratios are medians over rounds of the quotient within a round. The clock counts
the seconds that the process computes (`--clock wall`: that pass), so that other load matters little.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from self_value_bench import work
from self_value_bench.clock import CLOCKS, Measured, run
from self_value_bench.passes import plain
from self_value_bench.work import build_model, make_traces
from transformers import PreTrainedModel

from rredcot_verl.passes.attribution import attention_attribution, gradient_attribution, leave_one_out_attribution
from rredcot_verl.passes.attribution_task import AttributionTask

# Half as wide as `small`, with a quarter of its vocabulary: for a machine that others use too.
work.SHAPES["mini"] = work.SHAPES["small"] | {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 8192}


def make_task(trace: list[int], num_prompt_tokens: int, num_segments: int, num_answer_tokens: int) -> AttributionTask:
    """A trace whose answer is its end."""
    answer_from = len(trace) - num_answer_tokens
    length = answer_from - num_prompt_tokens
    boundaries = [num_prompt_tokens + length * k // num_segments for k in range(num_segments + 1)]
    return AttributionTask(trace, boundaries, answer_from, len(trace))


def make_variants(model: PreTrainedModel, task: AttributionTask, num_steps: int) -> dict[str, Callable[[], Any]]:
    """Name -> the work."""
    integrated = {"method": "integrated_gradients", "num_steps": num_steps}
    return {
        "plain": lambda: plain(model, [list(task.token_ids)]),
        "attention, all": lambda: attention_attribution(model, [task]),
        "attention, last": lambda: attention_attribution(model, [task], layers="last"),
        "input x gradient": lambda: gradient_attribution(model, [task]),
        "integrated gradients": lambda: gradient_attribution(model, [task], **integrated),
        "leave one out": lambda: leave_one_out_attribution(model, [task], max_tokens=1),
    }


def measure(options: argparse.Namespace, model: PreTrainedModel, length: int) -> list[dict[str, Any]]:
    """A row for each variant at one length."""
    order = random.Random(options.seed)
    (trace,) = make_traces(1, options.prompt_tokens + length, work.SHAPES[options.model]["vocab_size"], options.seed)
    task = make_task(trace, options.prompt_tokens, options.segments, options.answer_tokens)
    variants = make_variants(model, task, options.num_steps)
    measured = {name: Measured() for name in variants}
    # What is compiled or allocated once is no part of the cost.
    make_variants(model, make_task(trace[:64], 8, 2, 4), 1)["input x gradient"]()
    for round_number in range(options.rounds):
        for name in order.sample(list(variants), len(variants)):
            run(measured[name], round_number, variants[name], torch.device("cpu"), options.clock)
    rows = []
    for name, own in measured.items():
        ratios = [own.seconds[number] / measured["plain"].seconds[number] for number in own.seconds]
        rows.append(
            {
                "length": length,
                "variant": name,
                "seconds": statistics.median(own.seconds.values()),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "peak_mib": None if own.peak_bytes is None else own.peak_bytes / 2**20,
            }
        )
    return rows


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", choices=sorted(work.SHAPES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024], help="tokens of a response")
    for name, default in (
        ("segments", 8),
        ("rounds", 3),
        ("prompt-tokens", 128),
        ("answer-tokens", 4),
        ("num-steps", 8),
        ("threads", 1),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--clock", default="process", choices=sorted(CLOCKS))
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build_model(options.model, torch.device("cpu"), torch.float32, options.seed)
    rows = [row for length in options.lengths for row in measure(options, model, length)]
    machine = (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{options.threads} threads, load {os.getloadavg()[0]:.1f}"
    )
    if options.json:
        report = {"machine": machine, "options": vars(options), "rows": rows}
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    sys.stdout.write(f"{machine}; {num_parameters / 1e6:.1f} million parameters, float32\n\n")
    sys.stdout.write("| tokens | variant | seconds | x plain (lowest to highest) | peak MiB |\n|---|---|---|---|---|\n")
    for row in rows:
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        ratio = f"{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
        sys.stdout.write(f"| {row['length']} | {row['variant']} | {row['seconds']:.2f} | {ratio} | {peak} |\n")


if __name__ == "__main__":
    main()
