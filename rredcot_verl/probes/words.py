"""Whose words they are: what of a response the model wrote, and the tags of thinking in it, as text."""

import itertools
from collections.abc import Sequence
from typing import Any

from rredcot_verl.config.blocks import ElicitationConfig


class Words:
    """Reads token ids as text in which only what the model wrote stands, and every tag of thinking.

    Args:
        tokenizer: A transformers tokenizer.
        tags: Has the tags.
    """

    def __init__(self, tokenizer: Any, tags: ElicitationConfig) -> None:
        self._tokenizer = tokenizer
        self._tags = (tags.think_open, tags.think_close)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
        self._kept = special.intersection(i for tag in self._tags for i in self._encode(tag))
        self.dropped_ids = special - self._kept
        """Special tokens that are no text."""
        lines = [i for i in self._encode("\n") if "\n" in self.decode([i])]
        self._blanks = [*lines[:1], *(i for i in sorted(self.dropped_ids) if not self.decode([i]))]
        """A newline, then tokens that are nothing in a text; where the tokenizer has them."""

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Any, **_: Any) -> str:
        """Text without special tokens, as verl's reward managers see it, except those that make up a tag.

        It can stand in for a tokenizer's own, whose options it does not need.
        """
        if not self._kept:
            return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else list(token_ids)
        parts = itertools.groupby(ids, key=self._kept.__contains__)
        return "".join(self._tokenizer.decode(list(part), skip_special_tokens=not kept) for kept, part in parts)

    def written(self, response_ids: Sequence[int], response_mask: Sequence[int] | None) -> list[int]:
        """A response, token for token, in which what the model did not write is one newline.

        A tag with which the chat template ends what it puts in stays: it says whether the model thinks from there on.

        Args:
            response_ids: Response tokens.
            response_mask: 1 for tokens the model wrote; None where it wrote all.

        Raises:
            ValueError: The mask has another length.
        """
        words = list(response_ids)
        if response_mask is None:
            return words
        if len(response_mask) != len(words):
            raise ValueError(f"response_mask has {len(response_mask)} entries for {len(words)} response tokens")
        start = 0
        for is_written, run in itertools.groupby(response_mask, key=bool):
            end = start + len(list(run))
            if not is_written:
                blank = end - start - self._tag_at_end(words[start:end])
                words[start : start + blank] = [self._blanks[0], *[self._blanks[-1]] * blank][:blank]
            start = end
        return words

    def _tag_at_end(self, token_ids: list[int]) -> int:
        """Number of tokens of the tag, and the blanks after it, with which a text ends; 0: it ends otherwise."""
        text = self.decode(token_ids).rstrip()
        tag = next((tag for tag in self._tags if text.endswith(tag)), None)
        lengths = range(1, len(token_ids) + 1)
        return 0 if tag is None else next(length for length in lengths if tag in self.decode(token_ids[-length:]))

    def last_tag(self, prompt_ids: Sequence[int]) -> bool | None:
        """Whether the tag that a prompt ends with opens thinking; None where its last turn, still open, has none.

        A turn starts after a special token: what users or instructions say of tags is said before.
        """
        ids = list(prompt_ids)
        start = next((place for place in range(len(ids), 0, -1) if ids[place - 1] in self.dropped_ids), 0)
        text = self.decode(ids[start:])
        opens, closes = (text.rfind(tag) for tag in self._tags)
        return None if opens == closes else opens > closes
