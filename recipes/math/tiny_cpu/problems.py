"""Problems for the tiny math recipe, as a data set would hold them.

``python -m recipes.math.tiny_cpu.problems --warm-start DIR --out DIR`` writes ``train.jsonl`` and ``val.jsonl`` with
the columns ``problem`` and ``answer``, for ``scripts/prepare_math.py``. Answers stand between dollar signs, as in data
sets written in LaTeX: comparing text would not do.
"""

import argparse
import json
import random
from pathlib import Path

from recipes.common.problems import distinct, iter_problems
from recipes.common.warm_start import MANIFEST
from recipes.quickstart import task


def write_problems(path: Path, num_problems: int, split: str, seed: int, difficulty: task.Difficulty) -> None:
    """Write distinct problems of one side of the split as JSON lines.

    Args:
        path: Target file; its folder is made.
        num_problems: How many; fewer are written if the difficulty offers fewer.
        split: ``"train"`` or ``"validation"``; the warm start has seen the training side alone.
        seed: Seed of the draw.
        difficulty: How hard the problems are.
    """
    drawn = iter_problems(task, random.Random(f"{seed}/{split}/math"), difficulty, split)
    problems = distinct(drawn, num_problems, or_fewer=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for problem in problems:
            file.write(json.dumps({"problem": problem.expression, "answer": f"${problem.answer}$"}) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the problems of the tiny math recipe.")
    parser.add_argument("--warm-start", required=True, type=Path, help="folder of the warm start")
    parser.add_argument("--out", required=True, type=Path, help="target folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--num-train", type=int, default=2048, help="training problems")
    parser.add_argument("--num-val", type=int, default=256, help="validation problems")
    options = parser.parse_args()
    manifest = json.loads((options.warm_start / MANIFEST).read_text(encoding="utf-8"))
    difficulty = task.Difficulty(**manifest["config"]["difficulty"])
    write_problems(options.out / "train.jsonl", options.num_train, "train", options.seed, difficulty)
    write_problems(options.out / "val.jsonl", options.num_val, "validation", options.seed, difficulty)


if __name__ == "__main__":
    main()
