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

from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from recipes.quickstart import task
from recipes.quickstart.model import build_tokenizer
from recipes.quickstart.training import IGNORE, TrainingConfig, fit, make_folder, read_options


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
) -> dict[str, list[int]]:
    """Builds one trace with its elicited answers as probes.

    Returns:
        Lists of one length: ``input_ids``; ``labels`` (the token to predict at this place, or -100); ``position_ids``;
        ``probe`` (0 = the trace, b > 0 = the b-th elicited answer); ``fork`` (number of trace tokens a token may see).
    """
    results = corrupt(rng, problem, config)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.expression}], add_generation_prompt=True, return_dict=False
    )
    stated, lines = [problem.start, *results], []
    for position, operand in enumerate(problem.operands):
        lines.append(tokenizer.encode(task.calculation_line(stated[position], operand, results[position])))
    answer = [*tokenizer.encode(task.answer_line(results[-1])), tokenizer.eos_token_id]
    trace = prompt + sum(lines, []) + answer

    labels = [IGNORE] * (len(prompt) - 1) + trace[len(prompt) :]
    example = {
        "input_ids": trace[:-1],
        "labels": labels,
        "position_ids": list(range(len(labels))),
        "probe": [0] * len(labels),
        "fork": [len(labels)] * len(labels),
    }
    boundary = len(prompt)
    for position in range(len(problem.operands)):
        rest = task.Problem(stated[position], problem.operands[position:])
        imperfect = rng.random() < config.imperfect_share
        value = corrupt(rng, rest, config)[-1] if imperfect else rest.answer
        forced = [*tokenizer.encode(task.answer_line(value)), tokenizer.eos_token_id]
        size = len(forced) - 1
        example["input_ids"] += forced[:-1]
        example["labels"] += forced[1:]
        example["position_ids"] += range(boundary, boundary + size)
        example["probe"] += [position + 1] * size
        example["fork"] += [boundary] * size
        boundary += len(lines[position])
    return example


def train(config: WarmStartConfig) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Trains the model; returns it in evaluation mode, and its tokenizer."""
    tokenizer = build_tokenizer()
    rng = random.Random(f"{config.seed}/corpus")
    problems = task.iter_problems(rng, config.difficulty, "train")
    return fit(config, tokenizer, lambda: make_example(rng, next(problems), config, tokenizer)), tokenizer


def warm_start(out: str | Path, config: WarmStartConfig | None = None) -> Path:
    """Makes the model and the parquet files, unless they are there already; returns the model's folder."""
    return make_folder(out, config or WarmStartConfig(), task, train)


def main() -> None:
    """Command line: every setting of the warm start is an option."""
    warm_start(*read_options("Make the quickstart's model and data.", WarmStartConfig, task.Difficulty))


if __name__ == "__main__":
    main()
