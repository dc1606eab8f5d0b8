"""The readout on simulated traces whose true values are known: none, logistic, hidden and both.

    python scripts/bench_readout.py [--seeds 10 --json OUT.json]

The world. A prompt's ability a is normal; a response adds independent normal steps to it, and is right if the sum ends
above 0. So the true value of a state, P(right | a, steps so far), is known in closed form and is a martingale. The
probe is a lower bound of it that vanishes early and with the length of the answer; the hidden state is a random mixture
of a noisy reading of the sum so far, of the position and of things about the prompt that do not matter, plus noise.
Nothing here is fitted to a real model: it says whether the statistics are right, not how good the features are.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rredcot_verl.config.blocks import ReadoutConfig
from rredcot_verl.readout.features import HIDDEN_BLOCK, build_features, leave_one_out_means
from rredcot_verl.readout.readout import Readout, States

NUISANCES = 6
PARTS = ("seconds", "methods", "poor", "noise", "selection", "drift", "reliability")
DRIFTS = {"none": {}, "slow": {"turn": 0.1, "rise": 0.05}, "fast": {"turn": 0.4, "rise": 0.1}}
MEMORIES: tuple[tuple[int, float | None], ...] = ((1, None), (2, None), (4, None), (8, None), (8, 1.0), (8, 2.0))
DRIFT_STEPS, DRIFT_PROMPTS, DRIFT_STATES, DRIFT_DIM = 8, 16, 4, 16

Figures = dict[str, list[float]]
"""Name of a measure to its value for each seed."""


@dataclass(frozen=True)
class Batch:
    """One step's responses; all but `outcomes` and `prompts` are `(num_responses, num_states, ...)`."""

    truth: Tensor
    probe: Tensor
    hidden: Tensor
    positions: Tensor
    outcomes: Tensor
    prompts: list[str]

    def states(self, kind: str) -> States:
        """The states with the features of a method: `logistic`, `hidden` or `both`."""
        num_states = self.truth.size(1)
        features, blocks = build_features(
            probe_values=self.probe.flatten() if kind != "hidden" else None,
            positions=self.positions.flatten(),
            hidden=self.hidden.flatten(0, 1) if kind != "logistic" else None,
        )
        means, others = leave_one_out_means(self.outcomes, self.prompts, torch.arange(len(self.prompts)))
        rows = torch.arange(len(self.prompts)).repeat_interleave(num_states)
        return States(
            features=features,
            group_means=means[rows],
            outcomes=self.outcomes[rows],
            groups=[self.prompts[row] for row in rows.tolist()],
            rows=rows,
            blocks=blocks,
            num_others=others[rows],
        )


@dataclass
class World:
    """Where batches come from.

    Attributes:
        seed: Of everything.
        level: Mean ability of the prompts.
        group: Responses of a prompt.
        num_states: States of a response.
        dim: Dimensions of the hidden state.
        signal: How strongly the hidden state holds the sum so far; 0: it knows nothing.
        reading_noise: Deviation of its reading of the sum.
        turn: Radians by which the direction of the reading turns each step (drift of the representation).
        rise: By how much the mean ability rises each step (drift of the policy).
    """

    seed: int
    level: float = -0.3
    group: int = 8
    num_states: int = 8
    dim: int = 64
    signal: float = 1.0
    reading_noise: float = 0.7
    turn: float = 0.0
    rise: float = 0.0

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self._mixing = torch.linalg.qr(self._normal(self.dim, NUISANCES + 3))[0]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def batch(self, step: int, num_prompts: int) -> Batch:
        """A new batch of new prompts."""
        shape = (num_prompts, self.group, self.num_states)
        sizes = torch.linspace(0.4, 0.9, self.num_states, dtype=torch.float64)
        ability = self._normal(num_prompts, 1, 1) + self.level + self.rise * step
        moves = self._normal(*shape) * sizes
        total = ability + torch.cat([torch.zeros(*shape[:2], 1), moves.cumsum(dim=2)], dim=2)
        left = sizes.square().flip(0).cumsum(0).flip(0).sqrt()
        truth = torch.special.ndtr(total[:, :, :-1] / left)
        outcomes = (total[:, :, -1] > 0).double().flatten()
        positions = (torch.arange(self.num_states, dtype=torch.float64) / self.num_states).expand(shape)
        length = self._normal(num_prompts, 1, 1).abs() * 5.0
        knows = torch.nn.functional.logsigmoid(10.0 * (positions - 0.7) + 1.5 * self._normal(*shape))
        probe = (truth.clamp(min=1e-30).log() + knows - length * (1.0 - positions)).exp()
        return Batch(
            truth=truth.flatten(0, 1),
            probe=probe.flatten(0, 1),
            hidden=self._hidden(total[:, :, :-1], positions, step).flatten(0, 1),
            positions=positions.flatten(0, 1),
            outcomes=outcomes,
            prompts=[f"{step}/{prompt}" for prompt in range(num_prompts) for _ in range(self.group)],
        )

    def _hidden(self, total: Tensor, positions: Tensor, step: int) -> Tensor:
        angle = torch.tensor(self.turn * step)
        direction = self._mixing[:, 0] * angle.cos() + self._mixing[:, 1] * angle.sin()
        reading = total + self.reading_noise * self._normal(*total.shape)
        nuisance = self._normal(total.size(0), 1, 1, NUISANCES) @ self._mixing[:, 3:].T
        noise = self._normal(*total.shape, self.dim) / self.dim**0.5 * 4.0
        mixed = self.signal * reading.unsqueeze(-1) * direction + positions.unsqueeze(-1) * self._mixing[:, 2]
        return mixed + nuisance + noise


def measure(values: Tensor, batch: Batch) -> dict[str, float]:
    """How far values `(num_states_in_all,)` are from the truth, and what credit they give."""
    found, truth, outcome = values.reshape(batch.truth.shape), batch.truth, batch.outcomes.unsqueeze(1)
    pinned = [torch.cat([tensor, outcome], dim=1).diff(dim=1) for tensor in (found, truth)]
    failed = batch.outcomes == 0
    return {
        "squared error": float((found - truth).square().mean()),
        "of v_0": float((found[:, 0] - truth[:, 0]).square().mean()),
        "Brier": float((found - outcome).square().mean()),
        "correlation of v": _correlation(found, truth),
        "correlation of d": _correlation(found.diff(dim=1), truth.diff(dim=1)),
        "largest fall found": float((pinned[0].argmin(1) == pinned[1].argmin(1))[failed].double().mean()),
    }


def _correlation(left: Tensor, right: Tensor) -> float:
    if left.std() < 1e-9:
        return 0.0
    return float(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1])


def fit(batch: Batch, kind: str) -> Tensor:
    """Values of a first batch, without earlier steps."""
    return Readout(ReadoutConfig()).fit_predict(batch.states(kind), 0)


def compare(seeds: int, num_prompts: int, **world: Any) -> dict[str, Figures]:
    """All methods on the same batches, one a seed."""
    found: dict[str, Figures] = {}
    for seed in range(seeds):
        batch = World(seed, **world).batch(0, num_prompts)
        fitted = {kind: fit(batch, kind) for kind in ("logistic", "hidden", "both")}
        values = {
            "group mean": batch.states("logistic").group_means,
            "none": batch.probe.flatten(),
            **fitted,
            "half of none and hidden": (batch.probe.flatten() + fitted["hidden"]) / 2,
        }
        for method, tensor in values.items():
            _add(found.setdefault(method, {}), measure(tensor, batch))
    return found


def _add(figures: Figures, one: dict[str, float]) -> None:
    for name, value in one.items():
        figures.setdefault(name, []).append(value)


def drift(seeds: int) -> dict[str, Figures]:
    """Squared error in the second half of a run, for each drift and each memory."""
    found: dict[str, Figures] = {}
    for name, world in DRIFTS.items():
        for seed in range(seeds):
            source = World(seed, num_states=DRIFT_STATES, dim=DRIFT_DIM, **world)
            batches = [source.batch(step, DRIFT_PROMPTS) for step in range(DRIFT_STEPS)]
            for window, half_life in MEMORIES:
                readout = Readout(ReadoutConfig(window=window, half_life=half_life))
                errors = []
                for step, batch in enumerate(batches):
                    values = readout.fit_predict(batch.states("hidden"), step)
                    errors.append(measure(values, batch)["squared error"])
                label = f"window {window}" + (f", half-life {half_life:g}" if half_life else "")
                _add(found.setdefault(label, {}), {name: statistics.mean(errors[DRIFT_STEPS // 2 :])})
    return found


def choose_rows(states: States, keep: Tensor) -> States:
    """The states with these numbers."""
    tensors = {
        name: getattr(states, name)[keep] for name in ("features", "group_means", "outcomes", "rows", "num_others")
    }
    return replace(states, groups=[states.groups[number] for number in keep.tolist()], **tensors)


def selection(seeds: int, num_prompts: int) -> dict[str, Figures]:
    """Hard prompts, `logistic`: groups of one outcome measured too, or left out; errors over the mixed groups."""
    found: dict[str, Figures] = {}
    for seed in range(seeds):
        batch = World(seed, level=-2.3).batch(0, num_prompts)
        states, truth = batch.states("logistic"), batch.truth.flatten()
        right = batch.outcomes.reshape(num_prompts, -1).mean(dim=1)
        mixed = ((right > 0) & (right < 1)).repeat_interleave(len(truth) // num_prompts).nonzero().flatten()
        values = {
            "group mean": states.group_means[mixed],
            "all groups": Readout(ReadoutConfig()).fit_predict(states, 0)[mixed],
            "mixed groups only": Readout(ReadoutConfig()).fit_predict(choose_rows(states, mixed), 0),
        }
        for name, tensor in values.items():
            error = tensor - truth[mixed]
            figures = {"squared error": float(error.square().mean()), "bias": float(error.mean())}
            _add(found.setdefault(name, {}), figures | {"share of mixed groups": len(mixed) / len(truth)})
    return found


def noise(seeds: int, num_prompts: int) -> Figures:
    """Hidden states that know nothing, no position: how far the values are from the leave-one-out means."""
    found: Figures = {}
    for seed in range(seeds):
        states = World(seed, signal=0.0).batch(0, num_prompts).states("hidden")
        assert states.blocks is not None
        states = replace(states, features=states.features[:, states.blocks == HIDDEN_BLOCK], blocks=None)
        moved = (Readout(ReadoutConfig()).fit_predict(states, 0) - states.group_means).abs()
        _add(found, {"equal": float((moved == 0).double().mean()), "mean distance": float(moved.mean())})
    return found


def reliability(seeds: int, num_prompts: int) -> list[dict[str, float]]:
    """`both` in ten bins of the value: mean value, mean true value, mean outcome, number of states."""
    values, truth, outcomes = [], [], []
    for seed in range(seeds):
        batch = World(seed).batch(0, num_prompts)
        values.append(fit(batch, "both"))
        truth.append(batch.truth.flatten())
        outcomes.append(batch.outcomes.repeat_interleave(batch.truth.size(1)))
    value, true, outcome = torch.cat(values), torch.cat(truth), torch.cat(outcomes)
    bins = (value * 10).long().clamp(max=9)
    rows = []
    for number in range(10):
        inside = bins == number
        means = {"value": value, "truth": true, "outcome": outcome}
        rows.append({name: float(t[inside].mean()) for name, t in means.items()} | {"states": int(inside.sum())})
    return rows


def seconds(repeats: int) -> dict[str, Figures]:
    """One fit of 1024 responses with 8 states, alone and with a full buffer: wall and processor seconds."""
    found: dict[str, Figures] = {}
    for kind in ("logistic", "hidden", "both"):
        for repeat in range(repeats):
            source, readout = World(repeat), Readout(ReadoutConfig())
            for step, label in enumerate(("8192 rows", "16384 rows")):
                states = source.batch(step, 128).states(kind)
                wall, own = time.perf_counter(), time.process_time()
                readout.fit_predict(states, step)
                took = {"wall": time.perf_counter() - wall, "processor": time.process_time() - own}
                _add(found.setdefault(f"{kind}, {label}", {}), took)
    return found


def _cell(values: list[float], digits: int = 4) -> str:
    half = 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"


def table(figures: dict[str, Figures], digits: int = 4) -> Iterable[str]:
    """Lines of a Markdown table: means over seeds and half-widths of 95 % intervals."""
    columns = list(next(iter(figures.values())))
    yield "| | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, row in figures.items():
        yield f"| {name} | " + " | ".join(_cell(row[column], digits) for column in columns) + " |"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts asked for, and write each as soon as it is there."""
    report: dict[str, Any] = {}

    def show(title: str, key: str, figures: dict[str, Figures], digits: int = 4) -> None:
        report[key] = figures
        sys.stdout.write("\n".join([f"\n{title}\n", *table(figures, digits)]) + "\n")
        sys.stdout.flush()

    middle = options.prompts[len(options.prompts) // 2]
    if "seconds" in options.parts:
        show("seconds", "seconds", seconds(options.repeats), 2)
    if "methods" in options.parts:
        for number in options.prompts:
            show(f"{number} prompts", f"prompts {number}", compare(options.seeds, number))
    if "poor" in options.parts:
        show(f"{middle} prompts, poor hidden state", "poor", compare(options.seeds, middle, reading_noise=3.0))
    if "noise" in options.parts:
        show("noise", "noise", {f"{n} prompts": noise(options.seeds, n) for n in options.prompts})
    if "selection" in options.parts:
        show(f"{middle} hard prompts, uniform groups left out", "selection", selection(options.seeds, middle))
    if "drift" in options.parts:
        show(f"drift, {DRIFT_PROMPTS} prompts, squared error", "drift", drift(options.drift_seeds))
    if "reliability" in options.parts:
        report["reliability"] = reliability(options.seeds, middle)
        lines = [f"\nreliability, {middle} prompts\n", "| value | truth | outcome | states |", "|---|---|---|---|"]
        for row in report["reliability"]:
            cells = [*(f"{row[name]:.3f}" for name in ("value", "truth", "outcome")), str(row["states"])]
            lines.append(f"| {' | '.join(cells)} |")
        sys.stdout.write("\n".join(lines) + "\n")
    return report


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 64, 128], help="prompts of a step, 8 responses")
    parser.add_argument("--drift-seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="of the timing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {options.threads} threads"
    sys.stdout.write(f"{machine}, {options.seeds} seeds\n")
    report = {"machine": machine, "options": vars(options)} | run(options)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
