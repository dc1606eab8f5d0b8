"""Lookup tables over a tokenizer's vocabulary, built once: segmentation and probing never decode token by token."""

import bisect
import itertools
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rredcot_verl.config.blocks import ElicitationConfig
from rredcot_verl.probes.words import Words

logger = logging.getLogger(__name__)

_CLOSERS = r"[\"'”’)\]}*_$」』）]*\s*$"
_MAY_END = re.compile(r"(?:[.!?。！？]|^(?=\S))" + _CLOSERS)
# What is written must do: "3." may go on as 3.5, "e." as e.g., and an ellipsis in any way.
_SENTENCE_END = re.compile(r"(?:(?:[^\W\d_]{2}|[^\w\s.!?])(?:\.|[!?]+)|[。！？])" + _CLOSERS)
_ABBREVIATION = re.compile(r"\b(?:etc|vs|cf|eqs?|figs?|nos?|dr|mrs?|approx|resp)\." + _CLOSERS, re.IGNORECASE)
_TAIL_CHARACTERS = 24
_UNKNOWN = "\ufffd"
"""What decoding shows for the bytes of a character that are not all there."""
_ENDS_OF_TURNS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>", "<|end|>", "<|return|>")


def ends_of(*configs: Any) -> list[int]:
    """The tokens that end a sequence by a model's configs, each of which names one, several or none."""
    found = [getattr(config, "eos_token_id", None) for config in configs]
    return sorted({i for ids in found if ids is not None for i in ([ids] if isinstance(ids, int) else ids)})


def _texts_in_a_sequence(tokenizer: Any) -> list[str]:
    """The text that each token adds to one before it: alone, it loses its leading blank in some vocabularies."""
    before = tokenizer.encode("a", add_special_tokens=False)[-1:]
    known = tokenizer.decode(before)
    return [text.removeprefix(known) for text in tokenizer.batch_decode([[*before, i] for i in range(len(tokenizer))])]


class Vocabulary:
    """What each token of a vocabulary means to segmentation and elicitation.

    Args:
        tokenizer: A transformers tokenizer.
        keywords: Words with which a sentence may begin; matched as the token sequences they encode to, in lower and
            capitalised form, with and without a space before. One that the tokenizer cannot write is reported once and
            left out.
        ends: Tokens that end a sequence of the model, beside the tokenizer's own; see `ends_of`.
    """

    def __init__(self, tokenizer: Any, keywords: Iterable[str] = (), ends: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._ends = tuple(ends)
        self.texts = _texts_in_a_sequence(tokenizer)
        """What each token writes after others."""
        self._newline = torch.tensor(["\n" in text for text in self.texts])
        self._last_character: dict[str, Tensor] = {}
        self._holds_character: dict[str, Tensor] = {}
        self._may_end_sentence = torch.tensor([bool(_MAY_END.search(text)) for text in self.texts])
        self._continues_word = torch.tensor([text[:1].isalpha() for text in self.texts])
        self._blank = torch.tensor([not text.strip() for text in self.texts])
        self._in_order = sorted(self.texts)
        self.read_with(ElicitationConfig())
        self._by_first_character: dict[str, list[int]] = {}
        for token_id, text in enumerate(self.texts):
            self._by_first_character.setdefault(text[:1], []).append(token_id)
        sequences = self._keyword_sequences(keywords)
        self._keyword = torch.zeros(len(self.texts), dtype=torch.bool)
        self._keyword[[ids[0] for ids in sequences if len(ids) == 1]] = True
        self._phrases: dict[int, list[tuple[int, ...]]] = {}
        for ids in sequences:
            if len(ids) > 1:
                self._phrases.setdefault(ids[0], []).append(ids)
        self._phrase_start = torch.zeros(len(self.texts), dtype=torch.bool)
        self._phrase_start[list(self._phrases)] = True

    def read_with(self, tags: ElicitationConfig) -> Words:
        """Decode from now on so that these tags of thinking stand in the text."""
        self.words = Words(self.tokenizer, tags)
        self._lengths = [0 if i in self.words.dropped_ids else len(text) for i, text in enumerate(self.texts)]
        return self.words

    def _keyword_sequences(self, keywords: Iterable[str]) -> list[tuple[int, ...]]:
        sequences: dict[tuple[int, ...], None] = {}
        missing = []
        for word in keywords:
            variants = []
            for form in dict.fromkeys([word, word.capitalize()]):
                variants += [self._encode(form), self._encode(" " + form)]
                # Tokenizers with a dummy prefix write a word at the start of a line in a third way.
                anchored, anchor = self._encode("\n" + form), self._encode("\n")
                variants += [anchored[len(anchor) :]] if anchored[: len(anchor)] == anchor else []
            known = [ids for ids in variants if ids and self.tokenizer.unk_token_id not in ids]
            sequences.update(dict.fromkeys(known))
            if not known:
                missing.append(word)
        if missing:
            logger.warning("rredcot: the tokenizer cannot write the keywords %s; they are left out", missing)
        return list(sequences)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def newlines(self, token_ids: Tensor) -> Tensor:
        """`(T,)` bool: tokens whose text holds a newline; ids beyond the tokenizer's own (padded ones) have none."""
        return self._look_up(self._newline, token_ids)

    def blanks(self, token_ids: Tensor) -> Tensor:
        """`(T,)` bool: tokens whose text holds nothing but blanks."""
        return self._look_up(self._blank, token_ids)

    @staticmethod
    def _look_up(table: Tensor, token_ids: Tensor) -> Tensor:
        known = token_ids < table.numel()
        return table[token_ids.where(known, torch.zeros_like(token_ids))] & known

    def sentence_ends(self, token_ids: Tensor) -> Tensor:
        """`(T,)` bool: tokens after which a sentence is over, as far as the tokens up to there can tell.

        A full stop after a number or a single letter is none, as the number or abbreviation may go on.
        """
        ids = token_ids.tolist()
        ends = torch.zeros(len(ids), dtype=torch.bool)
        for place in self._look_up(self._may_end_sentence, token_ids).nonzero().flatten().tolist():
            tail = self._tail(ids, place, _TAIL_CHARACTERS)
            ends[place] = bool(_SENTENCE_END.search(tail)) and not _ABBREVIATION.search(tail)
        return ends

    def endings(self, token_ids: Sequence[int], text: str) -> list[int]:
        """Places of the tokens with which the text written so far ends in `text`."""
        if text[-1] not in self._last_character:
            self._last_character[text[-1]] = torch.tensor([known.endswith(text[-1]) for known in self.texts])
        places = self._look_up(self._last_character[text[-1]], torch.tensor(token_ids, dtype=torch.int64)).nonzero()
        return [place for place in places.flatten().tolist() if self._tail(token_ids, place, len(text)).endswith(text)]

    def completions(self, token_ids: Sequence[int], text: str) -> list[int]:
        """Places of the tokens that hold the last character of each `text` in what is written, whatever follows it."""
        if text[-1] not in self._holds_character:
            # A letter may be spread over tokens that show none of it.
            shown = (text[-1],) if text.isascii() else (text[-1], _UNKNOWN)
            self._holds_character[text[-1]] = torch.tensor([any(s in known for s in shown) for known in self.texts])
        ids = torch.tensor(token_ids, dtype=torch.int64)
        places = self._look_up(self._holds_character[text[-1]], ids).nonzero().flatten().tolist()
        width = len(text.encode())

        def holds(place: int) -> bool:
            own = self.texts[token_ids[place]]
            if text in own:
                return True
            tail = self._tail(token_ids, place, len(text) + len(own))
            if text not in tail and _UNKNOWN not in tail:
                return False
            start = max(0, place - width)
            before, with_it = (self.decode(token_ids[start:end]).count(text) for end in (place, place + 1))
            return with_it > before

        return [place for place in places if holds(place)]

    def _tail(self, token_ids: Sequence[int], place: int, num_characters: int) -> str:
        """At least the last characters of what is written up to a token."""
        text = ""
        while place >= 0 and len(text) < num_characters:
            text = (self.texts[token_ids[place]] if token_ids[place] < len(self.texts) else "") + text
            place -= 1
        return text

    def keyword_spans(self, token_ids: Tensor) -> list[tuple[int, int]]:
        """Start of each keyword and the place after its end, known once the token there is written.

        "so" in " so" + "lve" is none; neither is one with nothing after it yet.
        """
        follows = self._look_up(self._continues_word, token_ids).tolist()
        ids = tuple(token_ids.tolist())
        single = self._look_up(self._keyword, token_ids).nonzero().flatten().tolist()
        spans = [(place, place + 1) for place in single]
        for place in self._look_up(self._phrase_start, token_ids).nonzero().flatten().tolist():
            lengths = [
                len(phrase) for phrase in self._phrases[ids[place]] if ids[place : place + len(phrase)] == phrase
            ]
            spans += [(place, place + length) for length in lengths]
        return sorted((start, end) for start, end in spans if end < len(ids) and not follows[end])

    def starting_with(self, texts: Sequence[str], last: str = "", dropped: str = "") -> list[int]:
        """Ids of all tokens whose text starts with one of `texts`.

        None does where that, or `last`, holds bytes of a character that are not all there: they may be any.

        Args:
            texts: What is looked for.
            last: What stands before it.
            dropped: Regular expression of what may stand between the two.
        """
        texts = [text for text in texts if _UNKNOWN not in last + text]
        if not texts:
            return []
        # Every token may start with what is dropped.
        firsts = (
            dict.fromkeys((last or text)[:1] for text in texts) if last or not dropped else self._by_first_character
        )
        start = re.compile(f"{re.escape(last)}(?:{dropped})(?:{'|'.join(map(re.escape, texts))})")
        candidates = itertools.chain.from_iterable(self._by_first_character.get(first, ()) for first in firsts)
        return [token_id for token_id in candidates if start.match(self.texts[token_id])]

    def goes_on(self, text: str) -> bool:
        """Whether some token's text starts with `text` and is longer."""
        place = bisect.bisect_right(self._in_order, text)
        return place < len(self._in_order) and self._in_order[place].startswith(text)

    def ends_line(self, token_id: int) -> bool:
        """Whether a token's text ends with a newline."""
        return token_id < len(self.texts) and self.texts[token_id].endswith("\n")

    def special_id(self, text: str) -> int | None:
        """Id of the one token that is `text`, None where the vocabulary has no such token."""
        token_id = self.tokenizer.convert_tokens_to_ids(text)
        return None if token_id is None or token_id == self.tokenizer.unk_token_id else int(token_id)

    def end_of_sequence_ids(self) -> list[int]:
        """Ids that end a turn: the tokenizer's own, the model's, and the usual chat ends it knows."""
        ids = [self.tokenizer.eos_token_id, *self._ends, *map(self.special_id, _ENDS_OF_TURNS)]
        return list(dict.fromkeys(i for i in ids if i is not None))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a response as the reward manager sees it, see `Words.decode`."""
        return self.words.decode(token_ids)

    def offset_of(self, token_ids: Sequence[int], text: str, character: int) -> int:
        """Index of the token that holds a character of `decode(token_ids)`: the first that reaches past it for good.

        The tokens' own lengths give a guess, which decoded prefixes settle for any tokenizer: decoding is what costs on
        a long response.
        """
        if character >= len(text):
            return len(token_ids)

        def reaches(index: int) -> bool:
            # Bytes of a character that is not all there, up to three, may be shown as more characters than it will be.
            for end in range(index + 1, min(index + 4, len(token_ids)) + 1):
                shown = self.decode(token_ids[:end])
                if len(shown) <= character or not shown.endswith(_UNKNOWN):
                    return len(shown) > character
            return True

        known = [self._lengths[i] if i < len(self._lengths) else 0 for i in token_ids]
        guess = min(bisect.bisect_right(list(itertools.accumulate(known)), character), len(token_ids) - 1)
        low, high, stride = guess, guess, 1
        while low >= 0 and reaches(low):
            low, high, stride = low - stride, low, 2 * stride
        low, stride = max(low, -1), 1
        while not reaches(high):
            low, high, stride = high, min(high + stride, len(token_ids) - 1), 2 * stride
        # The answer is in (low, high].
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reaches(middle) else (middle, high)
        return high
