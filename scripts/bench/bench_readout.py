"""The readout on simulated traces whose true values are known: none, logistic, hidden and both.

Owner: the core maintainers. Makes the tables of docs/results/readout.md. Last run: 2026-11-28.

    python scripts/bench/bench_readout.py [--seeds 10 --parts fits methods noise selection drift seconds]

The world. A prompt's ability a is normal; a response adds independent normal steps to it, and is right if the sum ends
above 0. So the true value of a state, P(right | a, steps so far), is known in closed form and is a martingale. The
probe is a lower bound of it that vanishes early and with the length of the answer; the hidden state is a random mixture
of a noisy reading of the sum so far, of the position and of things about the prompt that do not matter, plus noise.
Nothing here is fitted to a real model: it says whether the statistics are right, not how good the features are.
"""

import argparse
import functools
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rredcot_verl.config.blocks import ReadoutConfig
from rredcot_verl.core.groups import leave_one_out_means
from rredcot_verl.readout.features import HIDDEN_BLOCK, build_features, others_differ
from rredcot_verl.readout.readout import Readout, States

NUISANCES = 6
DRIFTS = {"none": {}, "slow": {"turn": 0.1, "rise": 0.05}, "fast": {"turn": 0.4, "rise": 0.1}}
MEMORIES: tuple[tuple[int, float | None], ...] = ((1, None), (2, None), (4, None), (8, None), (8, 1.0), (8, 2.0))
DRIFT_STEPS = 8


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
        finals = torch.arange(len(self.prompts))
        means, others = leave_one_out_means(self.outcomes, self.prompts, finals)
        rows = finals.repeat_interleave(num_states)
        return States(
            features=features,
            group_means=means[rows],
            outcomes=self.outcomes[rows],
            groups=[self.prompts[row] for row in rows.tolist()],
            rows=rows,
            counts=others_differ(self.outcomes, self.prompts, finals)[rows],
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
    """How far values `(num_states_in_all,)` are from the truth, and what credit they give, where others differ."""
    credited = others_differ(batch.outcomes, batch.prompts, torch.arange(len(batch.prompts)))
    found, truth = values.reshape(batch.truth.shape)[credited], batch.truth[credited]
    outcomes, values = batch.outcomes[credited], found.flatten()
    outcome = outcomes.unsqueeze(1)
    falls = [torch.cat([tensor, outcome], dim=1).diff(dim=1).argmin(dim=1) for tensor in (found, truth)]
    bins = (values * 10).long().clamp(max=9)
    error = torch.zeros(10, dtype=torch.float64).index_add_(0, bins, values - truth.flatten())
    return {
        "squared error": float((found - truth).square().mean()),
        "of v_0": float((found[:, 0] - truth[:, 0]).square().mean()),
        "calibration error": float(error.abs().sum()) / len(values),
        "Spearman of v": _spearman(found, truth),
        "Spearman of d": _spearman(found.diff(dim=1), truth.diff(dim=1)),
        "largest fall found": float((falls[0] == falls[1])[outcomes == 0].double().mean()),
    }


def _spearman(left: Tensor, right: Tensor) -> float:
    """Rank correlation; values that are equal share their mean rank."""
    ranks = []
    for tensor in (left, right):
        _, places, counts = torch.unique(tensor, return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum(0) - (counts - 1) / 2)[places.flatten()])
    return float(torch.corrcoef(torch.stack(ranks))[0, 1].nan_to_num(0.0))


def methods(seed: int, num_prompts: int, **world: Any) -> dict[str, dict[str, float]]:
    """All methods on one step, after another of as many prompts."""
    source = World(seed, **world)
    first, batch = source.batch(0, num_prompts), source.batch(1, num_prompts)
    values = {"group mean": batch.states("logistic").group_means, "none": batch.probe.flatten()}
    for kind in ("logistic", "hidden", "both"):
        readout = Readout(ReadoutConfig())
        readout.fit_predict(mixed(first, first.states(kind))[0], 0)
        values[kind] = readout.fit_predict(batch.states(kind), 1)
    return {name: measure(tensor, batch) for name, tensor in values.items()}


def noise(seed: int) -> dict[str, dict[str, float]]:
    """Hidden states that know nothing, no position: how far the values are from the leave-one-out means."""
    found = {}
    for num_prompts in (16, 64, 128):
        source, readout = World(seed, signal=0.0), Readout(ReadoutConfig())
        for step in range(2):
            states = source.batch(step, num_prompts).states("hidden")
            states = replace(states, features=states.features[:, states.blocks == HIDDEN_BLOCK], blocks=None)
            moved = (readout.fit_predict(states, step) - states.group_means).abs()
        found[f"{num_prompts} prompts"] = {
            "equal": float((moved == 0).double().mean()),
            "mean distance": float(moved.mean()),
            "gain": readout.report["readout_gain/mean"],
        }
    return found


def mixed(batch: Batch, states: States) -> tuple[States, Tensor]:
    """The states of groups that are neither all right nor all wrong, as in training with probes, and their numbers."""
    right = batch.outcomes.reshape(len(set(batch.prompts)), -1).mean(dim=1)
    places = ((right > 0) & (right < 1)).repeat_interleave(len(states.groups) // len(right)).nonzero().flatten()
    names = ("features", "group_means", "outcomes", "rows", "counts", "num_others")
    groups = [states.groups[number] for number in places.tolist()]
    return replace(states, groups=groups, **{name: getattr(states, name)[places] for name in names}), places


def selection(seed: int) -> dict[str, dict[str, float]]:
    """Hard prompts, 8 steps of 64, `logistic`, uniform groups left out: which rows are fitted to, and which are judged.

    Bias and squared error over the rows of mixed groups whose others differ, and bias over those whose others agree.
    """
    source = World(seed, level=-2.3)
    names = ("every measured row", "others differ", "uniform groups measured too, every row")
    fits = {name: Readout(ReadoutConfig()) for name in names}
    errors: dict[str, list[Tensor]] = {name: [] for name in ("group mean", *fits)}
    judged = []
    for step in range(8):
        batch = source.batch(step, 64)
        everything = batch.states("logistic")
        states, places = mixed(batch, everything)
        truth = batch.truth.flatten()[places]
        given = [replace(each, counts=torch.ones_like(each.counts)) for each in (states, everything)]
        given.insert(1, states)
        values = {name: fits[name].fit_predict(each, step) for name, each in zip(names, given, strict=True)}
        values[names[2]] = values[names[2]][places]
        if step:
            judged.append(states.counts)
            for name, value in {"group mean": states.group_means, **values}.items():
                errors[name].append(value - truth)
    counts = torch.cat(judged)
    return {
        name: {
            "squared error": float(error[counts].square().mean()),
            "bias": float(error[counts].mean()),
            "bias, others agree": float(error[~counts].mean()),
        }
        for name, error in ((name, torch.cat(parts)) for name, parts in errors.items())
    }


def fits(seed: int, num_prompts: int, kind: str, num_steps: int = 8, **world: Any) -> dict[str, dict[str, float]]:
    """A run with uniform groups left out, over rows whose others differ.

    *leak*: covariance of a value's error with what the outcome still adds to the true value, (v - V)(R - V): 0 for a
    value that depends on nothing after its state.
    """
    source = World(seed, **world)
    batches = [source.batch(step, num_prompts) for step in range(num_steps)]
    found: dict[str, dict[str, float]] = {}
    for name in ("group mean", kind):
        readout = None if name == "group mean" else Readout(ReadoutConfig())
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        started = time.process_time()
        for step, batch in enumerate(batches):
            states, places = mixed(batch, batch.states(kind))
            values = states.group_means if readout is None else readout.fit_predict(states, step)
            truth = batch.truth.flatten()[places]
            parts.append(tuple(each[states.counts] for each in (values, truth, states.outcomes)))  # type: ignore[arg-type]
        seconds = (time.process_time() - started) / num_steps
        errors = [float((value - truth).square().mean()) for value, truth, _ in parts]
        value, truth, outcome = (torch.cat(each) for each in zip(*parts[1:], strict=True))
        rises = ((value.reshape(-1, source.num_states).diff()), truth.reshape(-1, source.num_states).diff())
        found[name] = {
            "step 1": errors[0],
            "step 2": errors[1],
            "steps 3, 4": statistics.mean(errors[2:4]),
            "later": statistics.mean(errors[4:]),
            "Spearman of d": _spearman(*rises),
            "bias": float((value - truth).mean()),
            "leak": float(((value - truth) * (outcome - truth)).mean()),
            "seconds": seconds,
        }
    return found


def drift(seed: int) -> dict[str, dict[str, float]]:
    """Squared error of `hidden` in the second half of a run of small batches, for each drift and each memory."""
    found: dict[str, dict[str, float]] = {}
    for name, world in DRIFTS.items():
        source = World(seed, num_states=4, dim=16, **world)
        batches = [source.batch(step, 16) for step in range(DRIFT_STEPS)]
        for window, half_life in MEMORIES:
            readout = Readout(ReadoutConfig(window=window, half_life=half_life))
            errors = []
            for step, batch in enumerate(batches):
                states, places = mixed(batch, batch.states("hidden"))
                error = readout.fit_predict(states, step) - batch.truth.flatten()[places]
                errors.append(float(error[states.counts].square().mean()))
            label = f"window {window}" + (f", half-life {half_life:g}" if half_life else "")
            found.setdefault(label, {})[name] = statistics.mean(errors[DRIFT_STEPS // 2 :])
    return found


def seconds(seed: int) -> dict[str, dict[str, float]]:
    """Processor seconds to value 1024 responses of 8 states by earlier steps of as many: one, and a full buffer."""
    found: dict[str, dict[str, float]] = {}
    for kind in ("logistic", "hidden", "both"):
        source, readout = World(seed), Readout(ReadoutConfig())
        for step in range(4):
            states = source.batch(step, 128).states(kind)
            started = time.process_time()
            readout.fit_predict(states, step)
            rows = {1: "one step", 3: "full buffer"}
            if step in rows:
                found.setdefault(kind, {})[rows[step]] = time.process_time() - started
    return found


PARTS = {
    "fits": {
        f"{kind}, {num_prompts} prompts a step, drift {name}": functools.partial(
            fits, num_prompts=num_prompts, kind=kind, **drifts
        )
        for kind in ("logistic", "both")
        for num_prompts in (16, 64)
        for name, drifts in DRIFTS.items()
        if num_prompts == 16 or name != "slow"
    },
    "methods": {
        **{f"{number} prompts": lambda seed, number=number: methods(seed, number) for number in (16, 64, 128)},
        "64 prompts, poor hidden state": lambda seed: methods(seed, 64, reading_noise=3.0),
    },
    "noise": {"features that know nothing": noise},
    "selection": {"64 hard prompts, uniform groups left out": selection},
    "drift": {"drift, 16 prompts a step": drift},
    "seconds": {"processor seconds": seconds},
}


def table(measured: list[dict[str, dict[str, float]]]) -> str:
    """Markdown: means over seeds and half-widths of 95 % intervals."""
    columns = list(next(iter(measured[0].values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in measured[0]:
        cells = []
        for column in columns:
            values = [one[row][column] for one in measured]
            half = 1.96 * statistics.stdev(values) / len(values) ** 0.5
            cells.append(f"{statistics.mean(values):.4f} ± {half:.4f}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="at least 2")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts:
        for title, measured in PARTS[part].items():
            sys.stdout.write(f"\n{title}\n\n{table([measured(seed) for seed in range(options.seeds)])}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
