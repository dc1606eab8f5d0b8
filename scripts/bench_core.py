"""Speed and memory of the driver's and the agent loop's own work, beside verl's GRPO on the same batch.

    python scripts/bench_core.py [--responses 1024 --tokens 8192 --segments 16 --repeats 5 --json OUT.json]

Segmentation runs in the agent loop workers, one response at a time; redistribution and advantages in the trainer, on
the whole batch. Rewards, lengths and log-probabilities are random (seeded). Figures are medians over the repeats,
after one that is not counted.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from rredcot_verl.config.blocks import CreditConfig
from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.core.redistribution import SegmentBatch, redistribute
from rredcot_verl.core.segmentation import Trace, get_segmenter, segment
from rredcot_verl.trainer.estimator import (
    SegmentContext,
    compute_credit,
    compute_rredcot_advantage,
    segment_context,
)


def make_batch(responses: int, tokens: int, group: int) -> dict[str, Any]:
    """Random responses of half to full length, `group` to a prompt, half of them solved."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(tokens // 2, tokens + 1, (responses,), generator=generator)
    mask = (torch.arange(tokens) < lengths.unsqueeze(1)).long()
    outcomes = torch.randint(0, 2, (responses,), generator=generator).double()
    rewards = torch.zeros(responses, tokens)
    rewards[torch.arange(responses), lengths - 1] = outcomes.float()
    index = np.array([f"prompt{row // group}" for row in range(responses)], dtype=object)
    surprisal = torch.rand(responses, tokens, generator=generator)
    newline = torch.rand(responses, tokens, generator=generator) < 0.05
    return {
        "mask": mask,
        "rewards": rewards,
        "outcomes": outcomes,
        "index": index,
        "lengths": lengths.tolist(),
        "surprisal": surprisal,
        "newline": newline,
    }


def cut(batch: dict[str, Any], segments: int) -> list[list[int]]:
    """Segment every response, as the agent loop workers do."""
    segmenter = get_segmenter("keyword_entropy")
    boundaries = []
    for row, length in enumerate(batch["lengths"]):
        trace = Trace(
            response_mask=batch["mask"][row, :length].bool(),
            uncertainty=batch["surprisal"][row, :length],
            newline=batch["newline"][row, :length],
            keyword=torch.zeros(length, dtype=torch.bool),
            answer_start=length - 20,
            think_end=length,
        )
        boundaries.append(segment(trace, segmenter, segments, min_tokens=8).tolist())
    return boundaries


def credit(batch: dict[str, Any], boundaries: list[list[int]], values: list[list[float]], form: str) -> Tensor:
    """Everything the trainer does to one batch, from the agent loop's lists to advantages."""
    segments = SegmentBatch.from_rows(boundaries, values, batch["outcomes"], batch["lengths"])
    rewards = redistribute(segments, batch["mask"])
    algorithm = {"norm_adv_by_std_in_grpo": True}
    found = compute_credit(
        segments,
        torch.arange(len(values)),
        batch["index"],
        batch["mask"],
        algorithm,
        RREDCoTConfig(credit=CreditConfig(form=form)),
    )
    with segment_context(SegmentContext(segments, found.segment_advantages)):
        advantages, _ = compute_rredcot_advantage(rewards, batch["mask"], batch["index"], algorithm)
    return advantages


def measure(function: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("responses", 1024), ("tokens", 8192), ("segments", 16), ("group", 8), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    batch = make_batch(options.responses, options.tokens, options.group)
    boundaries = cut(batch, options.segments)
    values = [torch.rand(len(row) - 1).tolist() for row in boundaries]

    def grpo() -> object:
        return compute_grpo_outcome_advantage(batch["rewards"], batch["mask"], batch["index"])

    millions = sum(batch["lengths"]) / 1e6
    base_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = {"grpo (verl)": measure(grpo, options.repeats)}
    grpo_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - base_bytes
    seconds["segmentation"] = measure(lambda: cut(batch, options.segments), 1)
    seconds["redistribution + reweight"] = measure(
        lambda: credit(batch, boundaries, values, "reweight"), options.repeats
    )
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - base_bytes
    report = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads",
        "batch": vars(options) | {"valid_tokens_in_millions": millions},
        "seconds": seconds,
        "seconds_per_million_tokens": {name: value / millions for name, value in seconds.items()},
        "tokens_per_second": {name: millions * 1e6 / value for name, value in seconds.items()},
        "ratio_to_grpo": {name: value / seconds["grpo (verl)"] for name, value in seconds.items()},
        "peak_memory_above_batch_mib": {"grpo (verl)": grpo_bytes / 2**20, "all": peak_bytes / 2**20},
        "batch_memory_mib": sum(v.nbytes for v in batch.values() if isinstance(v, Tensor)) / 2**20,
    }
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(f"{report['machine']}; {options.responses} responses, {millions:.2f} million tokens\n")
    for name, value in seconds.items():
        sys.stdout.write(
            f"{name:28s} {value:8.3f} s  {value / millions:7.4f} s per million tokens  "
            f"{value / seconds['grpo (verl)']:6.2f} x GRPO\n"
        )
    sys.stdout.write(
        f"peak memory above the batch ({report['batch_memory_mib']:.0f} MiB): GRPO {grpo_bytes / 2**20:.0f} MiB, "
        f"all {peak_bytes / 2**20:.0f} MiB\n"
    )


if __name__ == "__main__":
    main()
