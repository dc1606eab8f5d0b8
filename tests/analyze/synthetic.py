"""Measurements with known truth.

A trace of prompt g is a chain of K segments. While no segment was wrong, each is right with probability q_g; after the
first wrong one the trace still succeeds with probability `GUESS`. So v_k = q^(K-k) + (1 - q^(K-k)) * GUESS before the
first wrong segment and `GUESS` after it: a martingale that ends in the outcome.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rredcot_verl.analyze.records import (
    HIDDEN_FOLDER,
    RUN_FILE,
    CostRecord,
    CuttingRecord,
    Measurements,
    ProbeRecord,
    RolloutRecord,
    TraceRecord,
    TruthRecord,
    WeightRecord,
    append,
    load,
)

GUESS = 0.04
TOKENS = 5
CUTTING = "keyword_entropy-6"
DIM, LAYERS = 8, (-2, -1)


@dataclass(frozen=True)
class World:
    """What is written, and the truth behind it: `values` `[trace][state]`, `wrong` first wrong segment or None."""

    folder: Path
    values: list[list[float]]
    wrong: list[int | None]

    def load(self) -> Measurements:
        return load(self.folder)


def write(
    folder: Path,
    *,
    num_groups: int = 20,
    group_size: int = 4,
    num_segments: tuple[int, int] = (4, 6),
    num_rollouts: int = 24,
    seed: int = 0,
    lines: bool = True,
    probes: bool = True,
    probe_noise: float = 0.6,
    hidden: bool = True,
    weights: bool = True,
    coarse: bool = True,
    always_solved: bool = False,
    truth: bool = False,
) -> World:
    """Draw traces and measure them: probes are the true values, blunted and with noise on the logit."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    run = {"model": "synthetic <model>", "main_cutting": CUTTING, "command": "none", "seed": seed}
    (folder / RUN_FILE).write_text(json.dumps(run), encoding="utf-8")
    values, wrongs, states = [], [], []
    for number in range(num_groups * group_size):
        group = number // group_size
        quality = np.random.default_rng([seed, group]).uniform(0.75, 0.97)
        num = int(rng.integers(num_segments[0], num_segments[1] + 1))
        right = rng.random(num) < (1.0 if always_solved else quality)
        wrong = None if right.all() else int(np.argmin(right))
        alive = [wrong is None or k <= wrong for k in range(num)]
        value = [quality ** (num - k) * (1 - GUESS) + GUESS if alive[k] else GUESS for k in range(num)]
        reward = float(wrong is None or rng.random() < GUESS)
        _trace(folder, number, group, num, wrong if lines else None, reward, lines)
        cuts = [TOKENS * k for k in range(num + 1)]
        _cut(folder, number, CUTTING, cuts)
        if coarse:
            _cut(folder, number, "fixed-2", [0, cuts[2], cuts[-1]])
        for offset, v in zip(cuts, value, strict=False):
            rewards = (rng.random(num_rollouts) < v).astype(float).tolist()
            append(folder, RolloutRecord(number, offset, rewards, 0.01 * num_rollouts, 10 * num_rollouts))
        if probes:
            noise = probe_noise * rng.normal(size=num)
            _probe(folder, number, CUTTING, np.array(value), noise)
            if coarse:
                _probe(folder, number, "fixed-2", np.array([value[0], value[2]]), noise[:2])
        if truth:
            append(folder, TruthRecord(number, CUTTING, value))
        if weights:
            for method in ("attention_attribution", "leave_one_out"):
                append(folder, WeightRecord(number, CUTTING, method, rng.random(num).tolist(), 0.02, 60))
        for what, seconds in (("generate", 0.5), ("log_prob", 0.05), ("hidden", 0.001)):
            append(folder, CostRecord(number, what, seconds, TOKENS * num))
        values.append(value)
        wrongs.append(wrong)
        states += [(number, k, v, alive[k]) for k, v in enumerate(value)]
    if hidden:
        _hidden(folder, states, rng)
    return World(folder, values, wrongs)


def _trace(folder: Path, number: int, group: int, num: int, wrong: int | None, reward: float, lines: bool) -> None:
    text = "".join(f"line {k} <b>\n" for k in range(num))
    where = (None, None) if wrong is None else (len("line 0 <b>\n") * wrong, len("line 0 <b>\n") * (wrong + 1))
    append(
        folder,
        TraceRecord(
            number, f"prompt-{group}", f"What is {group} & <i>?", text, [1, 2], list(range(TOKENS * num)), [], reward,
            "42", None, *where, lines,
        ),
    )  # fmt: skip


def _cut(folder: Path, number: int, cutting: str, cuts: list[int]) -> None:
    characters = [len("line 0 <b>\n") * cut // TOKENS for cut in cuts]
    append(folder, CuttingRecord(number, cutting, cuts, characters))


def _probe(folder: Path, number: int, cutting: str, value: np.ndarray, noise: np.ndarray) -> None:
    value = np.clip(value, 0.01, 0.99)
    logit = 0.7 * np.log(value / (1 - value)) - 1.0 + noise
    right = 1 / (1 + np.exp(-logit))
    log_probs = np.stack([np.log(right), np.log(0.8 * (1 - right))], axis=1)
    rows: list[list[float | None]] = log_probs.tolist()
    rows[0][1] = None
    append(
        folder,
        ProbeRecord(
            number, cutting, ["42", "41"], [1.0, 0.0], [True, False], [False, True], rows,
            [[3, 2]] * len(rows), 0.002, 5 * len(rows),
        ),
    )  # fmt: skip


def _hidden(folder: Path, states: list[tuple[int, int, float, bool]], rng: np.random.Generator) -> None:
    (folder / HIDDEN_FOLDER).mkdir()
    arrays = {}
    for layer in LAYERS:
        vectors = rng.normal(size=(len(states), DIM)).astype(np.float32)
        # The last layer knows more than the one before.
        vectors[:, 0] += [(3.0 if layer == -1 else 1.0) * alive for *_, alive in states]
        arrays[f"layer_{layer}"] = vectors
    np.savez(
        folder / HIDDEN_FOLDER / f"{CUTTING}.npz",
        traces=np.array([state[0] for state in states]),
        states=np.array([state[1] for state in states]),
        **arrays,
    )
