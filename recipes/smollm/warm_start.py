"""Makes the recipe's policy: SmolLM2-135M after a short supervised start on imperfect traces.

``python -m recipes.smollm.warm_start --out DIR`` writes ``DIR/model``, ``DIR/train.parquet``, ``DIR/val.parquet``.

As in the quickstart a trace draws, wherever a rule is, one of the two numbers it may count for, without knowing which
is right; what it calculates from there is right. No answer is elicited: a probe asks a model that was pretrained, and
was never taught to answer before it has finished.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedTokenizerFast

from recipes.common.policy import encode_prompt
from recipes.common.warm_start import Example, Policy, TrainingConfig, make_folder, pack_example, read_options
from recipes.quickstart.warm_start import check_shares, draw_results
from recipes.smollm import model, task


@dataclass(frozen=True)
class WarmStartConfig(TrainingConfig):
    """Settings of the warm start.

    Attributes:
        num_updates, learning_rate, dtype: See `TrainingConfig`.
        batch_size: Problems per update.
        num_traces: Traces of a problem; they share its prompt, which is nearly half of what there is to compute.
        right_share, lean, without_rule: As in `recipes.quickstart.warm_start.WarmStartConfig`.
        difficulty: How hard the problems are.
        slip_rate: Where there is no rule nothing is wrong.
    """

    num_updates: int = 140
    batch_size: int = 2
    num_traces: int = 4
    learning_rate: float = 5e-4
    dtype: str = "float32"
    right_share: float = 0.6
    lean: float = 0.2
    without_rule: int = 1
    difficulty: task.Difficulty = field(default_factory=task.Difficulty)
    slip_rate: ClassVar[float] = 0.0

    def __post_init__(self):
        check_shares(self)
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}")


def make_trace(rng: random.Random, problem: task.Problem, config: WarmStartConfig) -> str:
    """Draws an imperfect trace."""
    results = draw_results(rng, problem.start, problem.operands, 0, config)
    lines = zip((problem.start, *results), problem.operands, results, strict=False)
    text = "".join(task.calculation_line(*line, rng, config.difficulty.remark_words) for line in lines)
    return text + task.answer_line(problem.answer_of(results), rng)


def make_example(
    rng: random.Random, problem: task.Problem, config: WarmStartConfig, tokenizer: PreTrainedTokenizerFast
) -> Example:
    """Builds the traces of a problem."""
    prompt = encode_prompt(tokenizer, problem.expression)
    texts = [make_trace(rng, problem, config) for _ in range(config.num_traces)]
    responses = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    return pack_example(prompt, responses[0], [(-1, 1, [prompt[-1], *response]) for response in responses[1:]])


def warm_start(
    out: str | Path, config: WarmStartConfig | None = None, load_policy: Callable[[], Policy] = model.load
) -> Path:
    """Makes the model and the parquet files, unless they are there already; returns the model's folder."""
    config = config or WarmStartConfig()
    rows = replace(config.difficulty, max_without_rule=config.without_rule)
    return make_folder(out, config, task, load_policy, make_example, rows)


if __name__ == "__main__":
    warm_start(*read_options("Make the recipe's model and data.", WarmStartConfig))
