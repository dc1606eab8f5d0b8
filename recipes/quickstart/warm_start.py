"""Makes the quickstart's policy: a small model trained from random weights on imperfect traces.

``python -m recipes.quickstart.warm_start --out DIR`` writes ``DIR/model``, ``DIR/train.parquet``, ``DIR/val.parquet``.

The corpus has two parts, made from the same traces:

- *Traces* that draw, wherever a rule is, one of the two numbers it may count for, without knowing which is right
  (`task`). The lines after a wrong one continue from the wrong value.
- *Answers elicited* after every line, also after wrong ones: that of a continuation from the value stated last. Only
  the answer's own tokens are trained, so the policy does not learn to stop early. A model that was pretrained can
  answer when forced, this one has to be taught; without it a forced answer carries no information about a prefix.

Both are trained in one pass: the elicited answers are probes that hang off the trace at its line boundaries.
"""

import random
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerFast

from recipes.common.policy import encode_prompt
from recipes.common.warm_start import Example, RandomStartConfig, make_folder, pack_example, read_options
from recipes.quickstart import task
from recipes.quickstart.tokens import build_tokenizer


class Mistakes(Protocol):
    """How often a corpus is wrong; the attributes are those of `WarmStartConfig`."""

    right_share: float
    lean: float
    slip_rate: float


@dataclass(frozen=True)
class WarmStartConfig(RandomStartConfig):
    """Settings of the warm start.

    Attributes:
        num_updates: See `TrainingConfig`.
        right_share, lean: A trace draws the right number of a rule with a probability between right_share - lean and
            right_share + lean, which differs from rule to rule.
        slip_rate: Probability of a result that is off by one where there is no rule.
        without_rule: Most places without a rule in a problem of the parquet files (count); the corpus has all kinds.
        difficulty: How hard the problems are.
    """

    num_updates: int = 900
    right_share: float = 0.3
    lean: float = 0.2
    slip_rate: float = 0.02
    without_rule: int = 1
    difficulty: task.Difficulty = field(default_factory=task.Difficulty)

    def __post_init__(self):
        check_shares(self)


def check_shares(config: Mistakes) -> None:
    """Raises `ValueError` where a share of right numbers is no share."""
    if not 0 <= config.lean <= min(config.right_share, 1 - config.right_share):
        raise ValueError(f"need right_share +- lean within [0, 1], got {config.right_share} +- {config.lean}")


def right_rate(position: int, operand: int, config: Mistakes) -> float:
    """Probability with which the corpus states the right result of a line."""
    rule = task.rule(position, operand)
    if rule.other == rule.as_written:
        return 1 - config.slip_rate
    return config.right_share + config.lean * (2 * zlib.crc32(f"lean {position} {operand}".encode()) / 2**32 - 1)


def draw_results(rng: random.Random, stated: int, operands: tuple[int, ...], first: int, config: Mistakes) -> list[int]:
    """Draws the results that an imperfect trace states, one per operation from operation `first` on.

    No line of the corpus states a negative number: such a draw is made again.
    """
    while True:
        current, results = stated, []
        for position, operand in enumerate(operands[first:], start=first):
            rule = task.rule(position, operand)
            if rng.random() < right_rate(position, operand, config):
                current += rule.counts
            elif rule.other == rule.as_written:
                current += operand + rng.choice((-1, 1))
            else:
                current += rule.as_written + rule.other - rule.counts
            results.append(current)
        if min(results) >= 0:
            return results


def make_example(
    rng: random.Random, problem: task.Problem, config: WarmStartConfig, tokenizer: PreTrainedTokenizerFast
) -> Example:
    """Builds one trace with an answer elicited before every line but the last."""
    results = draw_results(rng, problem.start, problem.operands, 0, config)
    stated, words = [problem.start, *results], config.difficulty.remark_words
    lines, elicited = [], []
    for position, operand in enumerate(problem.operands):
        to_come = draw_results(rng, stated[position], problem.operands, position, config)
        elicited_answer = problem.answer_of(results[:position] + to_come)
        forced = [*tokenizer.encode(task.answer_line(elicited_answer)), tokenizer.eos_token_id]
        # Its first token, "Answer:", is given.
        elicited.append((sum(map(len, lines)), 1, forced))
        line = task.calculation_line(stated[position], operand, results[position], rng, words)
        lines.append(tokenizer.encode(line))
    answer = [*tokenizer.encode(task.answer_line(problem.answer_of(results))), tokenizer.eos_token_id]
    return pack_example(encode_prompt(tokenizer, problem.expression), sum(lines, []) + answer, elicited)


def warm_start(out: str | Path, config: WarmStartConfig | None = None) -> Path:
    """Makes the model and the parquet files, unless they are there already; returns the model's folder."""
    config = config or WarmStartConfig()
    rows = replace(config.difficulty, max_without_rule=config.without_rule)
    return make_folder(out, config, task, lambda: config.random_policy(build_tokenizer()), make_example, rows)


if __name__ == "__main__":
    warm_start(*read_options("Make the quickstart's model and data.", WarmStartConfig))
