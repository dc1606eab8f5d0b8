"""The recipe's tokenizer: pieces of the plan and of the Python subset are one token each, all else is single bytes."""

import re

from transformers import PreTrainedTokenizerFast

from recipes.code.tiny import language
from recipes.common import policy


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer.

    No piece but the opening fence reaches beyond a newline, and that one starts a line: a text cut at a line boundary,
    or before or after a fence, has the same tokens as the whole.
    """
    # The longest piece first, so that "x = x + " is not read as "x = " and the rest.
    words = sorted(language.words(), key=lambda word: (-len(word), word))
    return policy.build_tokenizer(words, "|".join([*map(re.escape, words), r"[\s\S]"]))
