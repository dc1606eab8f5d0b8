"""Speed and memory of the driver's and the agent loop's own work, beside verl's GRPO on the same batch.

Owner: the core maintainers. Makes the first table of docs/results/bench.md. Last run: 2026-11-28.

    python scripts/bench/bench_core.py [--responses 16384 --tokens 8192 --segments 64 --repeats 5 --json OUT.json]

Segmentation runs in the agent loop workers, one response at a time, and is measured on the first 1024; the rest runs
in the trainer, on the whole batch. Rewards, lengths and log-probabilities are random (seeded). Figures are medians over
the repeats, after one that is not counted.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from plumbing import machine, parser, save
from torch import Tensor
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from rredcot_verl.config.blocks import ReadoutConfig
from rredcot_verl.core.credit import CreditRule
from rredcot_verl.core.groups import leave_one_out_means
from rredcot_verl.core.redistribution import SegmentBatch, redistribute
from rredcot_verl.core.segmentation import Trace, get_segmenter, segment
from rredcot_verl.probes.values import values_of_log_probs
from rredcot_verl.readout.features import build_features
from rredcot_verl.readout.readout import Readout, States
from rredcot_verl.trainer.estimator import Segmented, compute_rredcot_advantage, with_segments

ANSWER = 5
"""Log-probabilities of a probe: four tokens of an answer, and its end."""


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
        "log_probs": -torch.rand(256 * ANSWER, generator=generator),
    }


def cut(batch: dict[str, Any], segments: int, responses: int) -> list[list[int]]:
    """Segment the first responses, as the agent loop workers do."""
    segmenter = get_segmenter("keyword_entropy")
    budget = batch["mask"].shape[1]
    boundaries = []
    for row, length in enumerate(batch["lengths"][:responses]):
        nowhere = torch.zeros(length, dtype=torch.bool)
        trace = Trace(
            response_mask=batch["mask"][row, :length].bool(),
            surprisal=batch["surprisal"][row, :length],
            line_end=batch["newline"][row, :length],
            sentence_end=batch["newline"][row, :length].roll(9),
            keyword=nowhere,
            answer_open=nowhere.index_fill(0, torch.tensor([length - 20]), True),
            think_end=nowhere,
        )
        boundaries.append(segment(trace, segmenter, segments, budget, min_tokens=32).tolist())
    return boundaries


def even_cuts(length: int, segments: int) -> list[int]:
    """Boundaries of equal segments."""
    return [length * k // segments for k in range(segments + 1)]


def probed(batch: dict[str, Any], boundaries: list[list[int]]) -> list[list[float]]:
    """Values of an answer of four tokens and its end at each boundary, one response at a time."""
    values = []
    for cuts in boundaries:
        places = np.array([number for state in range(len(cuts) - 1) for number in (state, 0, ANSWER)]).reshape(-1, 3)
        log_probs = batch["log_probs"][: len(places) * ANSWER].tolist()
        values.append(values_of_log_probs("joint", places, log_probs, [1.0]).tolist())
    return values


def calibrated(batch: dict[str, Any], values: list[list[float]], group: int, readout: Readout) -> list[list[float]]:
    """The values regressed on an earlier step's outcomes."""
    counts = torch.tensor([len(own) for own in values])
    row = torch.arange(len(values)).repeat_interleave(counts)
    means, _ = leave_one_out_means(batch["outcomes"], batch["index"].tolist(), torch.arange(len(values)))
    features, blocks = build_features(probe_values=torch.tensor([value for own in values for value in own]).double())
    states = States(
        features=features,
        group_means=means[row],
        outcomes=batch["outcomes"][row],
        groups=[f"{number // group}" for number in row.tolist()],
        rows=row,
        counts=torch.ones(len(row), dtype=torch.bool),
        blocks=blocks,
    )
    return [own.tolist() for own in torch.split(readout.fit_predict(states, step=2), counts.tolist())]


def credit(batch: dict[str, Any], boundaries: list[list[int]], values: list[list[float]]) -> Tensor:
    """From the agent loop's lists to advantages."""
    segments = SegmentBatch.from_rows(boundaries, values, batch["outcomes"], batch["lengths"])
    rewards = redistribute(segments, batch["mask"])
    with with_segments(Segmented(segments, torch.arange(len(values)), CreditRule(form="critic"))):
        advantages, _ = compute_rredcot_advantage(rewards, batch["mask"], batch["index"])
    return advantages


def measure(function: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def resident_mib() -> float:
    """Most resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    """Measure and report."""
    options = parser(__doc__, responses=16384, tokens=8192, segments=64, group=16, repeats=5).parse_args()
    batch = make_batch(options.responses, options.tokens, options.group)
    boundaries = [even_cuts(length, options.segments) for length in batch["lengths"]]
    values = probed(batch, boundaries)
    readout = Readout(ReadoutConfig())
    calibrated(batch, values[:1024], options.group, readout)
    num_cut = min(1024, options.responses)
    calls = {
        "grpo (verl)": lambda: compute_grpo_outcome_advantage(batch["rewards"], batch["mask"], batch["index"]),
        "values of probes": lambda: probed(batch, boundaries),
        "calibration": lambda: calibrated(batch, values, options.group, readout),
        "redistribution, credit, advantages": lambda: credit(batch, boundaries, values),
        "segmentation": lambda: cut(batch, options.segments, num_cut),
    }
    tokens = dict.fromkeys(calls, sum(batch["lengths"])) | {"segmentation": sum(batch["lengths"][:num_cut])}
    base, seconds, peak = resident_mib(), {}, {}
    for name, call in calls.items():
        seconds[name] = measure(call, 1 if name == "segmentation" else options.repeats) * 1e6 / tokens[name]
        peak[name] = resident_mib() - base
    report = {
        "machine": f"{machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "batch": {name: value for name, value in vars(options).items() if name != "json"}
        | {"valid_tokens_in_millions": sum(batch["lengths"]) / 1e6},
        "seconds_per_million_tokens": seconds,
        "ratio_to_grpo": {name: value / seconds["grpo (verl)"] for name, value in seconds.items()},
        "peak_mib_above_batch_so_far": peak,
        "batch_memory_mib": sum(v.nbytes for v in batch.values() if isinstance(v, Tensor)) / 2**20,
    }
    save(options.json, report)
    sys.stdout.write(
        f"{report['machine']}; {options.responses} responses, {sum(batch['lengths']) / 1e6:.1f} M tokens\n"
    )
    for name, value in seconds.items():
        sys.stdout.write(
            f"{name:36s} {value:7.4f} s per million tokens {report['ratio_to_grpo'][name]:7.2f} x GRPO  "
            f"peak so far {peak[name]:.0f} MiB above the batch\n"
        )
    sys.stdout.write(f"batch: {report['batch_memory_mib']:.0f} MiB\n")


if __name__ == "__main__":
    main()
