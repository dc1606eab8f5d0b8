"""The quickstart's tokenizer: words of the task are one token each, all else is single bytes."""

import re
import string

from transformers import PreTrainedTokenizerFast

from recipes.common import policy
from recipes.quickstart.task import ANSWER_PREFIX, OPENERS, VERBS, WORDS


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer.

    One token each: a number below 100, a signed digit (``+5``), ``Answer:``, the newline, the blank and the words of
    a line's wording, with the blanks that belong to them. A word is never
    joined with what follows it, so a text cut at a line boundary or after ``Answer:`` has the same tokens as the whole.
    """
    numbers = [str(number) for number in range(10, 100)]
    operations = [sign + digit for sign in "+-" for digit in string.digits]
    # A two-digit operand must not become a signed digit and a digit: "12+34" is 12, +, 34.
    words = [*OPENERS, *VERBS[1:], *(f" {word}" for word in WORDS)]
    # A blank starts a word only where the whole word follows: " me" is not the start of " more".
    wording = "|".join(rf"{re.escape(word)}(?![a-z])" for word in sorted(words, key=len, reverse=True))
    pattern = rf"{ANSWER_PREFIX}|{wording}|[+-][0-9](?![0-9])|[1-9][0-9]|[\s\S]"
    return policy.build_tokenizer([ANSWER_PREFIX, *words, *operations, *numbers], pattern)
