"""Probes: known answers, forced after every prefix of a trace.

A probe closes the thinking block if one is open, opens the answer, gives the answer, and asks whether it ends there.
The trace's own tokens are never re-encoded; only what is appended is encoded.
"""

import dataclasses
import functools
import itertools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rredcot_verl.answers.grammar import AnswerFormat, find_answer, formats_of
from rredcot_verl.answers.program import open_fence
from rredcot_verl.answers.thinking import Thinking
from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.probes.proposals import Proposal
from rredcot_verl.probes.vocabulary import Vocabulary

JOIN_ANCHOR = "1 + 1 = 2"


@dataclass(frozen=True)
class Probe:
    """One probe: the trace up to `position`, then `token_ids`, then any of `closing_token_ids`.

    An answer may have two probes at a boundary: one that ends after its last token, and one whose closing tokens hold
    its last token too ("}}" ends both \\frac{1}{2} and the box around it). Their probabilities add up, as those of all
    probes of a boundary do: no sequence of tokens is part of two of them.

    Attributes:
        state: Index k of the boundary.
        proposal: Index of the answer.
        position: Length of the prefix, in tokens of prompt and response.
        token_ids: What is forced after the prefix.
        answer_from: Index in `token_ids` where the answer starts, after its opening.
        scored_from: Index in `token_ids` from which log-probabilities count; what comes before is given.
        closing_token_ids: Tokens that end the answer, the ones seen most often first.
    """

    state: int
    proposal: int
    position: int
    token_ids: tuple[int, ...]
    answer_from: int
    scored_from: int
    closing_token_ids: tuple[int, ...]


class JoinError(ValueError):
    """A text that the tokenizer cannot append to a prefix without changing it."""


@dataclass(frozen=True)
class _Suffix:
    """The tokens of an answer and its opening, and the tokens that end the answer together with its last one."""

    token_ids: tuple[int, ...]
    answer_from: int
    scored_from: int
    merged_closing_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class _Situation:
    """What decides how an answer is opened at a prefix.

    Attributes:
        thinking: A thinking block is open.
        new_line: The prefix ends a line.
        at_answer: An answer of the response's own is replaced.
        fence: The fence that closes an open block; "": none is open.
    """

    thinking: bool
    new_line: bool
    at_answer: bool
    fence: str


@dataclass(frozen=True)
class ReadAnswer:
    """The final answer of a response in tokens.

    Attributes:
        format: Name of its format.
        text: Its text.
        start: Offset of the first token of its opening.
        closing_token_id: The token that ended it; None where the response ended first.
    """

    format: str
    text: str
    start: int
    closing_token_id: int | None = None


class Elicitation:
    """Finds answers in responses and builds the tokens that ask for one.

    Args:
        vocabulary: Tables of the policy's tokenizer.
        config: The `algorithm.rredcot` block.

    Raises:
        JoinError: The tokenizer cannot append an opening to a prefix without changing the text.
        ValueError: No token of the vocabulary could end an answer.
    """

    def __init__(self, vocabulary: Vocabulary, config: RREDCoTConfig) -> None:
        self.vocabulary = vocabulary
        self.config = config
        self.formats = formats_of(config.elicitation)
        self._think_open = vocabulary.special_id(config.elicitation.think_open)
        self._think_close = vocabulary.special_id(config.elicitation.think_close)
        self._closings = {name: self._closing_ids(answer_format) for name, answer_format in self.formats.items()}
        self._seen_closings: dict[str, Counter[int]] = {name: Counter() for name in self.formats}
        self._seen_formats: Counter[str] = Counter()
        self._anchor = self._encode(JOIN_ANCHOR)
        self._suffix = functools.lru_cache(maxsize=4096)(self._build_suffix)
        can_think = self._think_open is not None and self._think_close is not None
        yes_and_no = (False, True)
        self._situations = {
            name: [
                _Situation(*facts)
                for facts in itertools.product(
                    yes_and_no if can_think else (False,),
                    yes_and_no,
                    yes_and_no,
                    ("", answer_format.fence) if answer_format.fence else ("",),
                )
            ]
            for name, answer_format in self.formats.items()
        }
        for name in self.formats:
            for situation in self._situations[name]:
                self._suffix(name, "2", situation)

    def read(self, response_ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> ReadAnswer | None:
        """Find the final answer of a response."""
        text = self.vocabulary.decode(response_ids)
        found = find_answer(text, self.formats, self.thinking_after(prompt_ids))
        if found is None:
            return None
        start, end = (self.vocabulary.offset_of(response_ids, text, place) for place in (found.start, found.end))
        closing = response_ids[end] if end < len(response_ids) else None
        return ReadAnswer(found.format, found.text, start, closing)

    def remember(self, answer: ReadAnswer | None) -> None:
        """Count an answer's format and the token that ended it, for the probes of other responses.

        Never before the response's own probes are planned: how it ends must not enter the values along it.
        """
        if answer is None:
            return
        self._seen_formats[answer.format] += 1
        if answer.closing_token_id is not None:
            self._seen_closings[answer.format][answer.closing_token_id] += 1

    def thinking_after(self, prompt_ids: Sequence[int]) -> Thinking:
        """How a response to this prompt marks what it only thinks."""
        tags = self.config.elicitation
        return Thinking(tags.think_open, tags.think_close, self._in_thinking(prompt_ids, ()))

    def landmarks(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Places of the tokens that open an answer outside a thinking block, and of those that close such a block."""
        thinking = self._in_thinking(prompt_ids, ())
        opens = {
            place for form in self.formats.values() for place in self.vocabulary.endings(response_ids, form.marker)
        }
        tags = [tag for tag in (self._think_open, self._think_close) if tag is not None]
        marks = torch.isin(torch.tensor(response_ids, dtype=torch.int64), torch.tensor(tags, dtype=torch.int64))
        opened, closed = [], []
        for place in sorted(opens.union(marks.nonzero().flatten().tolist())):
            if response_ids[place] in tags:
                thinking = response_ids[place] == self._think_open
                if not thinking:
                    closed.append(place)
            elif not thinking:
                opened.append(place)
        return opened, closed

    def usual_format(self) -> str:
        """The format remembered most often, of equals the first."""
        return max(self.formats, key=lambda name: self._seen_formats[name])

    def probes(
        self,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        boundaries: Sequence[int],
        proposals: Sequence[Proposal],
        format_name: str,
        replaced: int = -1,
    ) -> list[Probe]:
        """Probes of every answer at every boundary but the last, whose value is the outcome itself.

        Args:
            prompt_ids: Prompt tokens.
            response_ids: Response tokens.
            boundaries: `num_segments + 1` offsets in the response.
            proposals: Answers to force.
            format_name: Format to ask in, where the prefix has not opened an answer in another.
            replaced: Offset of an answer opening of the response's own, in place of which a probe answers; -1: none. It
                tells how the response goes on: not for values.

        Returns:
            At most two probes for each boundary and proposal, boundary by boundary; none where all that they would
            count is counted by a proposal before.

        Raises:
            JoinError: An answer cannot be appended; see `can_append`.
        """
        result = []
        fences = self._open_fences(response_ids, boundaries, format_name)
        opened_in = {
            1 + place: name
            for name in (*self.formats, format_name)
            for place in self.vocabulary.endings(response_ids, self.formats[name].marker)
        }
        answers = tuple(proposal.text for proposal in proposals)
        branches_of = functools.cache(self._branches)
        for state, boundary in enumerate(boundaries[:-1]):
            situation = _Situation(
                thinking=self._in_thinking(prompt_ids, response_ids[:boundary]),
                # A response starts where the chat template has put what separates it from the prompt.
                new_line=boundary == 0 or self.vocabulary.ends_line(response_ids[boundary - 1]),
                at_answer=boundary == replaced,
                # Where the response opens its answer inside a block, it has given that one up itself.
                fence="" if boundary == replaced else fences[state],
            )
            opened = None if situation.thinking else opened_in.get(boundary)
            branches = () if opened is None else branches_of(opened, answers, None)
            for branch in branches or branches_of(format_name, answers, situation):
                result.append(dataclasses.replace(branch, state=state, position=len(prompt_ids) + boundary))
        return result

    def _branches(self, format_name: str, answers: tuple[str, ...], situation: _Situation | None) -> tuple[Probe, ...]:
        """Probes of some answers at one boundary, for state and position 0.

        Args:
            format_name: Format to ask in.
            answers: What is forced.
            situation: How an answer is opened; None: the prefix has done so. Then all or none are forced after that
                opening, as probabilities after two openings do not add up: none where one cannot be written.
        """
        try:
            suffixes = [
                self._opened_suffix(format_name, answer)
                if situation is None
                else self._suffix(format_name, answer, situation)
                for answer in answers
            ]
        except JoinError:
            if situation is None:
                return ()
            raise
        closing_ids = self._rank(self._closings[format_name], format_name)
        branches: list[Probe] = []
        for number, suffix in enumerate(suffixes):
            scored_from = 0 if self.config.self_value.score_opening else suffix.scored_from
            merged = self._rank(suffix.merged_closing_token_ids, format_name)
            for token_ids, ends in ((suffix.token_ids, closing_ids), (suffix.token_ids[:-1], merged)):
                counted_once = _uncounted(branches, token_ids, ends)
                if counted_once:
                    branches.append(Probe(0, number, 0, token_ids, suffix.answer_from, scored_from, counted_once))
        return tuple(branches)

    def can_append(self, answer: str, format_name: str) -> bool:
        """Whether the tokenizer can write an answer after every opening it may need without changing it."""
        try:
            for situation in self._situations[format_name]:
                self._suffix(format_name, answer, situation)
        except JoinError:
            return False
        return True

    def _opening(self, answer_format: AnswerFormat, situation: _Situation) -> str:
        opening = answer_format.opening
        if situation.thinking:
            opening = "\n" + self.config.elicitation.think_close + "\n\n" + opening.lstrip("\n")
        elif situation.at_answer:
            # Here the response itself opened its answer: so does the probe, in as many words.
            opening = answer_format.marker
        if situation.fence:
            opening = "\n" + situation.fence + "\n\n" + opening.lstrip("\n")
        return opening.lstrip("\n") if situation.new_line else opening

    def _build_suffix(self, format_name: str, answer: str, situation: _Situation) -> _Suffix:
        answer_format = self.formats[format_name]
        opening = self._opening(answer_format, situation)
        given = self._continue_text(opening)
        token_ids = self._continue_text(opening + answer_format.lead + answer)
        # Where the opening's last token merges with the answer's first, the merged token is the answer's.
        shared = len(os.path.commonprefix([given, token_ids]))
        scored_from = min(shared, self._num_settled(opening + answer_format.lead, given))
        return _Suffix(tuple(token_ids), shared, scored_from, self._merged(answer_format, token_ids, shared))

    def _num_settled(self, text: str, token_ids: list[int]) -> int:
        """How many tokens of an opening are the same whatever answer follows.

        Its last ones are not where a token holds them and more: before "\\frac" a model writes "{\\", not the "{" of
        "\\boxed{", and forcing that would rule the fraction out.
        """
        settled = next(place for place in range(len(text) + 1) if self.vocabulary.goes_on(text[place:]))
        return sum(len(self._decode_after_anchor(token_ids[:end])) <= settled for end in range(1, len(token_ids) + 1))

    def _merged(self, answer_format: AnswerFormat, token_ids: Sequence[int], answer_from: int) -> tuple[int, ...]:
        """The tokens that hold an answer's last token and its end."""
        if len(token_ids) == answer_from:
            return ()
        last = self.vocabulary.texts[token_ids[-1]]
        return tuple(self.vocabulary.starting_with([last + text for text in answer_format.closing]))

    def _opened_suffix(self, format_name: str, answer: str) -> _Suffix:
        """The answer alone, after an opening, token by token as a model that has written that has to go on."""
        answer_format = self.formats[format_name]
        opening = self._continue_text(answer_format.marker)
        token_ids = self._continue_text(answer_format.marker + answer_format.lead + answer)
        if token_ids[: len(opening)] == opening:
            token_ids = token_ids[len(opening) :]
        else:
            token_ids = self._continue_text(answer_format.lead + answer)
        return _Suffix(tuple(token_ids), 0, 0, self._merged(answer_format, token_ids, 0))

    def _continue_text(self, text: str) -> list[int]:
        """Encode text that continues a prefix, and check the join: some tokenizers put a space before a text."""
        token_ids = self._encode(text)
        if self._joins(token_ids, text):
            return token_ids
        anchored = self._encode(JOIN_ANCHOR + text)
        token_ids = anchored[len(self._anchor) :]
        if anchored[: len(self._anchor)] != self._anchor or not self._joins(token_ids, text):
            raise JoinError(
                f"elicitation: this tokenizer cannot continue a prefix with {text!r} without changing the text; set "
                "algorithm.rredcot.elicitation.format=custom with an opening that starts a new line"
            )
        return token_ids

    def _joins(self, token_ids: list[int], text: str) -> bool:
        return self._decode_after_anchor(token_ids) == text

    def _decode_after_anchor(self, token_ids: list[int]) -> str:
        return str(self.vocabulary.tokenizer.decode(self._anchor + token_ids)).removeprefix(JOIN_ANCHOR)

    def _encode(self, text: str) -> list[int]:
        return list(self.vocabulary.tokenizer.encode(text, add_special_tokens=False))

    def _closing_ids(self, answer_format: AnswerFormat) -> list[int]:
        ids = self.vocabulary.starting_with(answer_format.closing)
        if answer_format.ends_at_eos:
            ids = [*self.vocabulary.end_of_sequence_ids(), *ids]
        # Short texts first: what a model writes most often stands first until responses show otherwise.
        ids.sort(key=lambda token_id: len(self.vocabulary.texts[token_id]))
        if not ids:
            raise ValueError(
                f"elicitation.format={answer_format.name}: no token of this tokenizer starts with one of "
                f"{list(answer_format.closing)}, so no answer could end"
            )
        return list(dict.fromkeys(ids))

    def _rank(self, closing_ids: Sequence[int], format_name: str) -> tuple[int, ...]:
        """The tokens that responses ended their answers with most often first."""
        seen = self._seen_closings[format_name]
        return tuple(sorted(closing_ids, key=lambda token_id: -seen[token_id]))

    def _open_fences(self, response_ids: Sequence[int], boundaries: Sequence[int], format_name: str) -> list[str]:
        """The fence that closes the block open at each boundary but the last, "" where none is."""
        if not self.formats[format_name].fence:
            return [""] * (len(boundaries) - 1)
        # Decoded segment by segment: decoding is what costs on a long response.
        segments = [
            self.vocabulary.decode(response_ids[start:end]) for start, end in itertools.pairwise((0, *boundaries[:-1]))
        ]
        think_close = self.config.elicitation.think_close
        return [open_fence(text, think_close) for text in itertools.accumulate(segments)]

    def _in_thinking(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> bool:
        if self._think_open is None or self._think_close is None:
            return False
        for token_id in (*reversed(response_ids), *reversed(prompt_ids)):
            if token_id in (self._think_open, self._think_close):
                return token_id == self._think_open
        return False


def _uncounted(counted: Sequence[Probe], token_ids: tuple[int, ...], closing_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Those of an answer's closing tokens with which it is part of no probe of the same boundary so far."""
    for probe in counted:
        length = len(os.path.commonprefix([probe.token_ids, token_ids]))
        if length < min(len(probe.token_ids), len(token_ids)):
            continue
        if len(token_ids) > length and token_ids[length] in probe.closing_token_ids:
            # It would go on behind the end of the other.
            return ()
        if len(token_ids) == length:
            taken = probe.token_ids[length : length + 1] or probe.closing_token_ids
            if not set(taken).isdisjoint(closing_ids):
                closing_ids = tuple(token_id for token_id in closing_ids if token_id not in taken)
    return closing_ids
