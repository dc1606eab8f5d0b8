"""Cost of reading hidden states in the pass that computes `old_log_prob`, on traces and weights of random numbers.

    python scripts/bench_hidden.py [--model small --lengths 1024 4096 --segments 16 --dim 64] [--json OUT.json]

    plain    log-probabilities and entropies of the traces, one trace at a time, the model's stock attention (sdpa)
    hidden   the same with one layer's states read at every boundary
    alone    nothing but the states, with one row of logits: what is done where verl makes no such pass (bypass mode)
    hook     the seconds of `hidden` that are spent in the hook itself, projection included

The first three run in random order, round by round; ratios are medians over rounds of the quotient within a round. The
hook is timed inside: at a few parts in a thousand the quotient is mostly noise. Exits with 1 where `hidden` and `plain`
differ in a bit, or `alone` gives other states than `hidden`.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from self_value_bench import passes
from self_value_bench.clock import CLOCKS, Measured, run
from self_value_bench.work import SHAPES, build_model, make_traces
from torch import Tensor
from transformers import PreTrainedModel

from rredcot_verl.passes.hidden_states import HiddenStates, hidden_states


class TimedStates(HiddenStates):
    """Hidden states whose hook notes its own seconds."""

    seconds = 0.0
    clock = staticmethod(time.perf_counter)

    def read(self, layer: Any, args: Any, output: Any) -> None:
        """See `HiddenStates.read`."""
        _synchronize(output)
        started = self.clock()
        super().read(layer, args, output)
        _synchronize(self.collected[-1])
        self.seconds += self.clock() - started


def _synchronize(tensor: Any) -> None:
    if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def boundaries(length: int, num_segments: int) -> Tensor:
    """`(num_segments,)` indices of the last tokens before evenly spaced boundaries."""
    return torch.linspace(0, length - 1, num_segments + 1).long()[:-1]


class Variants:
    """The three ways over the same traces."""

    def __init__(self, model: PreTrainedModel, traces: list[list[int]], options: argparse.Namespace) -> None:
        self.model, self.traces, self.options = model, traces, options
        self.rows = boundaries(len(traces[0]), options.segments)
        self.hook_seconds = 0.0

    def plain(self) -> list[Tensor]:
        """Log-probabilities; the entropies are thrown away."""
        return passes.plain(self.model, self.traces)

    def hidden(self) -> tuple[list[Tensor], Tensor]:
        """Log-probabilities, and `(num_traces * num_segments, dim)` states."""
        states = TimedStates(self.options.dim, self.options.seed, rows=self.rows)
        states.clock = staticmethod(CLOCKS[self.options.clock])  # type: ignore[method-assign]
        layers = self.model.model.layers
        handle = layers[self.options.layer].register_forward_hook(states.read)
        try:
            log_probs = passes.plain(self.model, self.traces)
        finally:
            handle.remove()
        self.hook_seconds = states.seconds
        return log_probs, torch.cat(states.collected)

    @torch.no_grad()
    def alone(self) -> Tensor:
        """The states only."""
        device = self.model.device
        with hidden_states(self.model, self.options.layer, self.options.dim, self.options.seed) as states:
            states.rows = self.rows
            for trace in self.traces:
                one = torch.zeros(1, dtype=torch.int64, device=device)
                self.model(input_ids=torch.tensor([trace], device=device), use_cache=False, logits_to_keep=one)
        return torch.cat(states.collected)


def measure(model: PreTrainedModel, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one length."""
    traces = make_traces(options.num_traces, length, SHAPES[options.model]["vocab_size"], options.seed)
    variants = Variants(model, traces, options)
    calls = {"plain": variants.plain, "hidden": variants.hidden, "alone": variants.alone}
    measured = {name: Measured() for name in calls}
    order, hook = random.Random(options.seed), []
    for call in calls.values():
        call()
    for number in range(options.repeats):
        names = list(calls)
        order.shuffle(names)
        for name in names:
            run(measured[name], number, calls[name], model.device, options.clock)
        hook.append(variants.hook_seconds / measured["plain"].seconds[number])
    log_probs, states = measured["hidden"].result
    plain = measured["plain"].seconds
    same = all(torch.equal(*pair) for pair in zip(log_probs, measured["plain"].result, strict=True))

    def ratio(name: str) -> tuple[float, float, float]:
        quotients = [measured[name].seconds[number] / plain[number] for number in plain]
        return statistics.median(quotients), min(quotients), max(quotients)

    return {
        "length": length,
        "plain_seconds": statistics.median(plain.values()),
        "hidden_to_plain": ratio("hidden"),
        "alone_to_plain": ratio("alone"),
        "hook_to_plain": (statistics.median(hook), min(hook), max(hook)),
        "peak_mib": {name: (each.peak_bytes or 0) / 2**20 for name, each in measured.items()},
        "bytes_a_trace": states.shape[0] // len(traces) * states.shape[1] * states.element_size(),
        "same_log_probs": same,
        "largest_difference_of_states": (states - measured["alone"].result).abs().max().item(),
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--segments", type=int, default=16)
    parser.add_argument("--layer", type=int, default=-2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--num-traces", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="process")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build_model(options.model, torch.device(options.device), getattr(torch, options.dtype), options.seed)
    results = []
    for length in options.lengths:
        results.append(measure(model, length, options))
        sys.stdout.write(json.dumps(results[-1]) + "\n")
    if options.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        options.json.write_text(json.dumps({"options": settings, "results": results}, indent=1))
    fine = all(each["same_log_probs"] and each["largest_difference_of_states"] < 1e-3 for each in results)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
