"""Makes the recipe's policy: a small model trained from random weights on imperfect responses.

``python -m recipes.code.tiny.warm_start --out DIR`` writes ``DIR/model``, ``DIR/train.parquet``, ``DIR/val.parquet``.

The corpus has two parts, made from the same responses:

- *Responses* with mistakes on purpose: sums that are off in the plan, and program lines that mix up condition or verb.
  The right line stays the most likely one, but at temperature 1 wrong ones are sampled too, so groups are mixed and
  reinforcement has something to remove. Each line of a program is written in a way drawn at random.
- *Programs elicited* at line boundaries of plan and program, also after wrong lines, as the probes of
  ``elicitation.format=code`` ask for them: what the plan and the program written so far lead to, with the mistakes
  still to come drawn anew, and the writing of every line drawn anew. Only the program's own tokens and the fence after
  it are trained, so the policy does not learn to stop early.

Both are trained in one pass: the elicited programs are probes that hang off the response, as in the quickstart.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from recipes.code.tiny import language, task
from recipes.code.tiny.language import Effect, Operation
from recipes.code.tiny.tokens import build_tokenizer
from recipes.common.policy import encode_prompt
from recipes.common.warm_start import Example, RandomStartConfig, make_folder, pack_example, read_options


@dataclass(frozen=True)
class WarmStartConfig(RandomStartConfig):
    """Settings of the warm start.

    Attributes:
        num_elicited: Programs elicited per response, at boundaries drawn at random (count).
        hard_error_rate: Probability of a wrong sum in the plan where there is a carry.
        easy_error_rate: Probability of a wrong sum in the plan elsewhere.
        program_error_rate: Probability that a program line mixes up its condition, or its verb where it has none.
        difficulty: How hard the problems are.
    """

    num_updates: int = 300
    batch_size: int = 24
    num_layers: int = 4
    num_elicited: int = 2
    hard_error_rate: float = 0.3
    easy_error_rate: float = 0.04
    program_error_rate: float = 0.06
    difficulty: task.Difficulty = field(default_factory=task.Difficulty)


def state_sum(rng: random.Random, operation: Operation, config: WarmStartConfig) -> int:
    """Draws the sum that an imperfect plan states; a wrong one is off by one, or by a forgotten carry."""
    right = operation.left + operation.right
    shifts = [shift for shift in ((-1, 1, -10) if operation.is_hard else (-1, 1)) if right + shift > 0]
    error_rate = config.hard_error_rate if operation.is_hard else config.easy_error_rate
    return right + rng.choice(shifts) if rng.random() < error_rate else right


def write_effect(rng: random.Random, planned: Effect, config: WarmStartConfig) -> Effect:
    """Draws what an imperfect program does where the plan asks for `planned`."""
    if rng.random() >= config.program_error_rate:
        return planned
    if planned.condition == language.ALWAYS:
        return Effect(planned.condition, language.OPPOSITE[planned.verb], planned.amount)
    return Effect(language.OPPOSITE[planned.condition], planned.verb, planned.amount)


def _draw_styles(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(language.NUM_STYLES**2) for _ in range(count)]


class Draft:
    """An imperfect response, and the programs it leads to from any of its line boundaries."""

    def __init__(self, rng: random.Random, problem: task.Problem, config: WarmStartConfig):
        self.rng, self.config = rng, config
        self.operations = problem.operations
        self.stated = [state_sum(rng, operation, config) for operation in self.operations]
        self.effects = self._effects(self.stated, [])

    def lines(self) -> list[str]:
        """The lines of plan and program, the fences around the program among them."""
        plan = [operation.plan_line(stated) for operation, stated in zip(self.operations, self.stated, strict=True)]
        return [*plan, language.FENCE_LINE, *self._program(self.effects), language.FENCE]

    def elicited(self, num_lines: int) -> tuple[str, str] | None:
        """What a probe after `num_lines` lines opens with, and a program that this prefix leads to.

        None where the response opens its program itself, or has just done so: the response teaches that already.
        """
        num_planned = len(self.operations)
        if num_lines < num_planned:
            drawn = [state_sum(self.rng, operation, self.config) for operation in self.operations[num_lines:]]
            effects = self._effects(self.stated[:num_lines] + drawn, [])
            return language.FENCE_LINE, "".join(self._program(effects))
        num_written = num_lines - num_planned - 2
        if num_written < 0:
            return None
        effects = self._effects(self.stated, self.effects[:num_written])
        return f"{language.FENCE}\n\n{language.FENCE_LINE}", "".join(self._program(effects))

    def _effects(self, stated: list[int], written: list[Effect]) -> list[Effect]:
        planned = [operation.effect_of(number) for operation, number in zip(self.operations, stated, strict=True)]
        return written + [write_effect(self.rng, effect, self.config) for effect in planned[len(written) :]]

    def _program(self, effects: list[Effect]) -> list[str]:
        return list(language.program_lines(effects, _draw_styles(self.rng, len(effects))))


def make_example(
    rng: random.Random, problem: task.Problem, config: WarmStartConfig, tokenizer: PreTrainedTokenizerFast
) -> Example:
    """Builds one response with its elicited programs."""
    draft = Draft(rng, problem, config)
    lines = [tokenizer.encode(line) for line in draft.lines()]
    # The last line is the closing fence: after it there is nothing left to ask.
    places = [(number, probe) for number in range(len(lines)) if (probe := draft.elicited(number))]
    elicited = []
    for num_lines, (opening, program) in rng.sample(places, min(config.num_elicited, len(places))):
        given = tokenizer.encode(opening)
        forced = given + tokenizer.encode(program + language.FENCE)
        elicited.append((sum(map(len, lines[:num_lines])), len(given), forced))
    response = sum(lines, []) + [tokenizer.eos_token_id]
    return pack_example(encode_prompt(tokenizer, problem.expression), response, elicited)


def warm_start(out: str | Path, config: WarmStartConfig | None = None) -> Path:
    """Makes the model and the parquet files, unless they are there already; returns the model's folder."""
    config = config or WarmStartConfig()
    return make_folder(out, config, task, lambda: config.random_policy(build_tokenizer()), make_example)


if __name__ == "__main__":
    warm_start(*read_options("Make the model and the data of the tiny code recipe.", WarmStartConfig))
