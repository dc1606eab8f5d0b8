"""Problems of the CPU recipes: the two sides of the split, and the parquet files.

A recipe's `task` is a module with ``make_problem(rng, difficulty)``, whose problems have an ``expression`` (the text of
the prompt), and ``make_row(problem, split, index)``, one row of verl's dataset schema.
"""

import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

_VALIDATION_BUCKETS = 10


def is_validation(problem: Any) -> bool:
    """Whether a problem belongs to the validation side (one in ten).

    It depends on the expression alone, so warm start, RL training and validation stay disjoint without a shared list.
    """
    return zlib.crc32(problem.expression.encode()) % _VALIDATION_BUCKETS == 0


def iter_problems(task: Any, rng: random.Random, difficulty: Any = None, split: str = "train") -> Iterator[Any]:
    """Yields problems of one side of the split (``"train"`` or ``"validation"``), without end; repeats can occur."""
    if split not in ("train", "validation"):
        raise ValueError(f"split must be 'train' or 'validation', got {split!r}")
    while True:
        problem = task.make_problem(rng, difficulty)
        if is_validation(problem) == (split == "validation"):
            yield problem


def distinct(problems: Iterator[Any], num_problems: int, or_fewer: bool = False) -> list[Any]:
    """Draws problems with different expressions.

    Raises:
        ValueError: When the difficulty does not offer that many, and fewer will not do.
    """
    found: dict[str, Any] = {}
    for tries, problem in enumerate(problems):
        if len(found) == num_problems:
            break
        if tries > 100 * num_problems + 1000:
            if or_fewer:
                break
            raise ValueError(f"found only {len(found)} distinct problems of {num_problems} asked for")
        found[problem.expression] = problem
    return list(found.values())


def write_parquet(
    path: str | Path, task: Any, num_rows: int, split: str, seed: int = 0, difficulty: Any = None
) -> None:
    """Writes distinct problems of one side of the split as a parquet file.

    Args:
        path: Target file; its folder is made.
        task: The recipe's task.
        num_rows: Number of distinct problems.
        split: ``"train"`` or ``"validation"``.
        seed: Seed of the draw.
        difficulty: How hard the problems are.

    Raises:
        ValueError: When the difficulty does not offer that many distinct problems.
    """
    problems = distinct(iter_problems(task, random.Random(f"{seed}/{split}"), difficulty, split), num_rows)
    rows = [task.make_row(problem, split, index) for index, problem in enumerate(problems)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(path)
