"""Makes the quickstart's policy: a small model trained from random weights on imperfect traces.

``python -m recipes.quickstart.warm_start --out DIR`` writes ``DIR/model``, ``DIR/train.parquet``, ``DIR/val.parquet``.

The corpus has two parts, made from the same traces:

- *Traces* with wrong results on purpose. The model then knows the right result as the most likely one, but samples
  wrong ones at temperature 1, more often where a carry or a borrow is needed. Groups of samples are mixed, and
  reinforcement has something to remove. The lines after a wrong one continue from the wrong value.
- *Answers elicited* after every line, also after wrong ones: where a continuation from the value stated last ends. Only
  the answer's own tokens are trained, so the policy does not learn to stop early. A model that was pretrained can
  answer when forced, this one has to be taught; without it a forced answer carries no information about a prefix.

Both are trained in one pass: the elicited answers are probes that hang off the trace at its line boundaries.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from recipes.common.policy import encode_prompt
from recipes.common.warm_start import Example, TrainingConfig, make_folder, pack_example, read_options
from recipes.quickstart import task
from recipes.quickstart.tokens import build_tokenizer


@dataclass(frozen=True)
class WarmStartConfig(TrainingConfig):
    """Settings of the warm start.

    Attributes:
        imperfect_share: Share of the elicited answers that end a continuation with errors of its own, as a sampled one
            has; the others end a faultless one. At 1 the probability of a forced answer is the chance that the policy,
            thinking on, reaches it. At 0 the policy answers better when forced than after thinking.
        hard_error_rate: Probability of a wrong result on a line with a carry or a borrow.
        easy_error_rate: Probability of a wrong result on any other line.
        difficulty: How hard the problems are.
    """

    imperfect_share: float = 1.0
    hard_error_rate: float = 0.35
    easy_error_rate: float = 0.04
    difficulty: task.Difficulty = field(default_factory=task.Difficulty)


def is_hard(stated: int, operand: int) -> bool:
    """Whether the line needs a carry or a borrow."""
    return (stated + operand) // 10 != stated // 10


def corrupt(rng: random.Random, problem: task.Problem, config: WarmStartConfig) -> list[int]:
    """Draws the results that an imperfect trace states, one per operation.

    A wrong result on a hard line is mostly the forgotten carry (off by ten), otherwise off by one. Errors that would
    drive a later value below zero are not made, as no line of the corpus states a negative number.
    """
    stated, results = problem.start, []
    for position, operand in enumerate(problem.operands):
        right, later, reach = stated + operand, 0, 0
        for following in problem.operands[position + 1 :]:
            later += following
            reach = min(reach, later)
        hard = is_hard(stated, operand)
        shifts = [-1, 1, 10 if operand < 0 else -10] if hard else [-1, 1]
        shifts = [shift for shift in shifts if right + shift + reach >= 0]
        if shifts and rng.random() < (config.hard_error_rate if hard else config.easy_error_rate):
            right += rng.choice(shifts)
        results.append(right)
        stated = right
    return results


def make_example(
    rng: random.Random, problem: task.Problem, config: WarmStartConfig, tokenizer: PreTrainedTokenizerFast
) -> Example:
    """Builds one trace with an answer elicited before every line but the last."""
    results = corrupt(rng, problem, config)
    stated, lines, elicited = [problem.start, *results], [], []
    for position, operand in enumerate(problem.operands):
        lines.append(tokenizer.encode(task.calculation_line(stated[position], operand, results[position])))
    for position in range(len(problem.operands)):
        rest = task.Problem(stated[position], problem.operands[position:])
        imperfect = rng.random() < config.imperfect_share
        value = corrupt(rng, rest, config)[-1] if imperfect else rest.answer
        forced = [*tokenizer.encode(task.answer_line(value)), tokenizer.eos_token_id]
        # Its first token, "Answer:", is given.
        elicited.append((sum(map(len, lines[:position])), 1, forced))
    answer = [*tokenizer.encode(task.answer_line(results[-1])), tokenizer.eos_token_id]
    return pack_example(encode_prompt(tokenizer, problem.expression), sum(lines, []) + answer, elicited)


def warm_start(out: str | Path, config: WarmStartConfig | None = None) -> Path:
    """Makes the model and the parquet files, unless they are there already; returns the model's folder."""
    return make_folder(out, config or WarmStartConfig(), task, build_tokenizer(), make_example)


if __name__ == "__main__":
    warm_start(*read_options("Make the quickstart's model and data.", WarmStartConfig))
