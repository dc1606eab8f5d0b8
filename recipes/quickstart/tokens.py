"""The quickstart's tokenizer: words of the task are one token each, all else is single bytes."""

import string

from transformers import PreTrainedTokenizerFast

from recipes.common import policy
from recipes.quickstart.task import ANSWER_PREFIX


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer.

    One token each: a number below 100, a signed digit (``+5``), ``Answer:``, the newline and the blank. A word is never
    joined with what follows it, so a text cut at a line boundary or after ``Answer:`` has the same tokens as the whole.
    """
    numbers = [str(number) for number in range(10, 100)]
    operations = [sign + digit for sign in "+-" for digit in string.digits]
    # A two-digit operand must not become a signed digit and a digit: "12+34" is 12, +, 34.
    pattern = rf"{ANSWER_PREFIX}|[+-][0-9](?![0-9])|[1-9][0-9]|[\s\S]"
    return policy.build_tokenizer([ANSWER_PREFIX, *operations, *numbers], pattern)
