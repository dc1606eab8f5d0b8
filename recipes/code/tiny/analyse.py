"""Are self-values on programs degenerate? Figures of a run's traces, or of responses sampled from a model.

``python -m recipes.code.tiny.analyse run RUN_DIR`` reads the traces of a training run (one value form).
``python -m recipes.code.tiny.analyse sample DATA_DIR`` samples from the warm start's model and scores the same
responses with the forms ``joint``, ``normalized`` and ``geometric``.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from recipes.code.tiny.figures import describe
from recipes.code.tiny.task import check_lines
from rredcot_verl.report import Trace, load_run

COMMON = Path(__file__).with_name("common.yaml")


def analyse_run(folder: str | Path) -> dict[str, Any]:
    """Figures of the first and of the last third of a run's steps, and of all; None where nothing was scored."""
    traces = [trace for trace in load_run(folder).traces if trace.is_scored and len(trace.segments) > 1]
    steps = sorted({trace.step for trace in traces})
    third = max(1, len(steps) // 3)
    periods = {"all": steps, "first third": steps[:third], "last third": steps[-third:]}
    return {
        name: describe([trace for trace in traces if trace.step in chosen], check_lines) if chosen else None
        for name, chosen in periods.items()
    }


def recipe_settings() -> dict[str, Any]:
    """The `algorithm.rredcot` block of the recipe, to be scored outside a run."""
    block = OmegaConf.to_container(OmegaConf.load(COMMON).algorithm.rredcot, resolve=False)
    assert isinstance(block, dict)
    block.pop("traces", None)
    return {str(key): value for key, value in block.items()}


def analyse_samples(
    data: str | Path, num_problems: int, num_samples: int, seed: int, overrides: list[str]
) -> dict[str, Any]:
    """Figures of each value form on the same sampled responses.

    Args:
        data: Folder of the warm start.
        num_problems: Held-out problems.
        num_samples: Responses of each: the group that proposals are taken from.
        seed: Seed of the samples.
        overrides: Settings below `algorithm.rredcot` to change, e.g. `self_value.max_proposals=8`.

    Returns:
        Under `responses` what was sampled, and under each form its figures.
    """
    from recipes.code.tiny.sample import FORMS, Policy, read_rows

    policy = Policy(Path(data) / "model")
    samples = policy.sample(read_rows(Path(data) / "val.parquet", num_problems), num_samples, seed)
    scores = np.array([sample.score["score"] for sample in samples]).reshape(-1, num_samples)
    result: dict[str, Any] = {
        "responses": {
            "num_problems": len(scores),
            "num_samples": num_samples,
            "mean_fraction_passed": float(scores.mean()),
            "all_tests_passed": float((scores == 1).mean()),
            "partial": float(((scores > 0) & (scores < 1)).mean()),
            "mixed_groups": float((scores.std(axis=1) > 0).mean()),
            "tokens_mean": float(np.mean([len(sample.generated.token_ids) for sample in samples])),
        }
    }
    for form in FORMS:
        changes = OmegaConf.from_dotlist([*overrides, f"self_value.form={form}", "self_value.engine=rollout"])
        block = OmegaConf.to_container(OmegaConf.merge(recipe_settings(), changes))
        traces: list[Trace] = policy.credit(samples, num_samples, block)
        result[form] = describe(traces, check_lines)
    return result


def _plain(figures: Any) -> Any:
    """Figures as JSON holds them: null for what is not a number."""
    if isinstance(figures, dict):
        return {key: _plain(value) for key, value in figures.items()}
    if isinstance(figures, list):
        return [_plain(value) for value in figures]
    return None if isinstance(figures, float) and math.isnan(figures) else figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="traces of a training run")
    run.add_argument("folder", type=Path)
    sample = commands.add_parser("sample", help="responses sampled from a model")
    sample.add_argument("folder", type=Path, help="folder of the warm start: model and val.parquet")
    sample.add_argument("--num-problems", type=int, default=48)
    sample.add_argument("--num-samples", type=int, default=8)
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings below algorithm.rredcot")
    options = parser.parse_args()
    if options.command == "run":
        result = analyse_run(options.folder)
    else:
        result = analyse_samples(options.folder, options.num_problems, options.num_samples, options.seed, options.set)
    sys.stdout.write(json.dumps(_plain(result), indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
