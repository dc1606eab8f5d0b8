"""Probes: known answers, forced after every prefix of a trace.

A probe closes the thinking block if one is open, opens the answer, gives the answer, and asks whether it ends there.
The trace's own tokens are never re-encoded; only what is appended is encoded.
"""

import bisect
import dataclasses
import functools
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from rredcot_verl.answers.grammar import AnswerFormat, find_answer, formats_of
from rredcot_verl.answers.program import open_fence
from rredcot_verl.answers.thinking import Thinking
from rredcot_verl.config.blocks import ElicitationConfig
from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.probes.probe import Probe
from rredcot_verl.probes.proposals import Proposal
from rredcot_verl.probes.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

JOIN_ANCHOR = "1 + 1 = 2"
_CHANNEL = "<|channel|>"


class JoinError(ValueError):
    """A text that the tokenizer cannot append to a prefix without changing it."""


@dataclass(frozen=True)
class _Suffix:
    """The tokens of an answer and its opening, and how it may end other than by one token after them.

    Attributes:
        token_ids: Opening and answer.
        answer_from: Where the answer starts.
        scored_from: From where log-probabilities count, see `Probe`.
        merged_closing_token_ids: Tokens that end the answer together with its last one.
        written_out: Opening, answer and all but the last token of an end of several, and tokens that complete it.
    """

    token_ids: tuple[int, ...]
    answer_from: int
    scored_from: int
    merged_closing_token_ids: tuple[int, ...]
    written_out: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True)
class _Situation:
    """What decides how an answer is opened at a prefix.

    Attributes:
        thinking: A thinking block is open.
        new_line: The prefix ends a line.
        fence: The fence that closes an open block; "": none is open.
        skips: Nothing is written, and that nothing is thought has to be said.
    """

    thinking: bool
    new_line: bool
    fence: str
    skips: bool = False


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
        ValueError: No token of the vocabulary could end an answer, or the tokenizer cannot write a tag or closing that
            is configured.
    """

    def __init__(self, vocabulary: Vocabulary, config: RREDCoTConfig) -> None:
        self.vocabulary = vocabulary
        self.config = config
        self.formats = formats_of(config.elicitation)
        self._words = vocabulary.read_with(config.elicitation)
        self._can_think = self._can_write_tags()
        if vocabulary.special_id(_CHANNEL) is not None and _CHANNEL not in config.elicitation.think_open:
            logger.warning(
                "rredcot: the tokenizer has %s, and elicitation.think_open=%r names no channel: what a model only "
                "thinks there counts as said; for harmony's channels see docs/method.md",
                _CHANNEL,
                config.elicitation.think_open,
            )
        self._skip = skipped_thinking(vocabulary.tokenizer, config.elicitation) if self._can_think else ""
        self._closings = {name: self._closing_ids(answer_format) for name, answer_format in self.formats.items()}
        self._seen_closings: dict[str, Counter[int]] = {name: Counter() for name in self.formats}
        self._seen_formats: Counter[str] = Counter()
        self._anchor = self._encode(JOIN_ANCHOR)
        self._suffix = functools.lru_cache(maxsize=4096)(self._build_suffix)
        yes_and_no = (False, True)
        self._situations = {
            name: [
                _Situation(*facts)
                for facts in itertools.product(
                    yes_and_no if self._can_think else (False,),
                    yes_and_no,
                    ("", answer_format.fence) if answer_format.fence else ("",),
                )
            ]
            for name, answer_format in self.formats.items()
        }
        for name in self.formats:
            if self._skip:
                self._situations[name].append(_Situation(False, True, "", skips=True))
            for situation in self._situations[name]:
                self._suffix(name, "2", situation)

    def read(
        self,
        response_ids: Sequence[int],
        prompt_ids: Sequence[int] = (),
        response_mask: Sequence[int] | None = None,
    ) -> ReadAnswer | None:
        """Find the final answer of a response, in what the model wrote: all of it where there is no mask."""
        words = self.written(response_ids, response_mask)
        text = self.vocabulary.decode(words)
        found = find_answer(text, self.formats, self.thinking_after(prompt_ids))
        if found is None:
            return None
        start, end = (self.vocabulary.offset_of(words, text, place) for place in (found.start, found.end))
        closing = words[end] if end < len(words) else None
        return ReadAnswer(found.format, found.text, start, closing)

    def written(self, response_ids: Sequence[int], response_mask: Sequence[int] | None) -> list[int]:
        """See `Words.written`: as long as the response, and nothing in it that the model did not write."""
        return self._words.written(response_ids, response_mask)

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
        return Thinking(tags.think_open, tags.think_close, self._words.last_tag(prompt_ids) or False)

    def landmarks(
        self,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        response_mask: Sequence[int] | None = None,
    ) -> tuple[list[int], list[int]]:
        """Places of the tokens that open an answer outside a thinking block, and of those that close such a block."""
        words = self.written(response_ids, response_mask)
        tags = self._thinking_tags(prompt_ids, words)
        opens = {place for form in self.formats.values() for place in self.vocabulary.endings(words, form.marker)}
        opened = [place for place in sorted(opens) if not _is_open(tags, place)]
        return opened, [place for place, opens_block in tags[1:] if not opens_block]

    def _thinking_tags(self, prompt_ids: Sequence[int], words: Sequence[int]) -> list[tuple[int, bool]]:
        """Places of the tokens that complete a tag of thinking, and whether it opens a block; first what was open."""
        if not self._can_think:
            return [(-1, False)]
        tags = self.config.elicitation
        places = ((place, True) for place in self.vocabulary.completions(words, tags.think_open))
        closes = ((place, False) for place in self.vocabulary.completions(words, tags.think_close))
        return [(-1, self._words.last_tag(prompt_ids) or False), *sorted(itertools.chain(places, closes))]

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
        response_mask: Sequence[int] | None = None,
    ) -> list[Probe]:
        """Probes of every answer at every boundary but the last, whose value is the outcome itself.

        Args:
            prompt_ids: Prompt tokens.
            response_ids: Response tokens.
            boundaries: `num_segments + 1` offsets in the response.
            proposals: Answers to force.
            format_name: Format to ask in, where the prefix has not opened an answer in another.
            response_mask: 1 for tokens the model wrote; None where it wrote all.

        Returns:
            At least one probe for each boundary and proposal, boundary by boundary; none where all that it would count
            is counted by a proposal before.

        Raises:
            JoinError: An answer cannot be appended; see `can_append`.
        """
        result = []
        words = self.written(response_ids, response_mask)
        tags = self._thinking_tags(prompt_ids, words)
        skips = bool(self._skip) and self._words.last_tag(prompt_ids) is None
        fences = self._open_fences(words, boundaries, format_name)
        opened_in = {
            1 + place: name
            for name in (*self.formats, format_name)
            for place in self.vocabulary.endings(words, self.formats[name].marker)
        }
        answers = tuple(proposal.text for proposal in proposals)
        branches_of = functools.cache(self._branches)
        for state, boundary in enumerate(boundaries[:-1]):
            situation = _Situation(
                thinking=_is_open(tags, boundary),
                # A response starts where the chat template has put what separates it from the prompt.
                new_line=boundary == 0 or self.vocabulary.ends_line(response_ids[boundary - 1]),
                fence=fences[state],
                skips=skips and boundary == 0,
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
            written_out = ((way, self._rank(ends, format_name)) for way, ends in suffix.written_out)
            endings = ((suffix.token_ids, closing_ids), (suffix.token_ids[:-1], merged), *written_out)
            for token_ids, ends in endings:
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
            opening = self.config.elicitation.leave_thinking + opening.lstrip("\n")
        elif situation.skips:
            opening = self._skip + opening.lstrip("\n")
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
        merged = self._merged(answer_format, token_ids[shared:])
        written_out = self._written_out(answer_format, opening + answer_format.lead + answer, token_ids, shared)
        return _Suffix(tuple(token_ids), shared, scored_from, merged, written_out)

    def _num_settled(self, text: str, token_ids: list[int]) -> int:
        """How many tokens of an opening are the same whatever answer follows.

        Its last ones are not where a token holds them and more: before "\\frac" a model writes "{\\", not the "{" of
        "\\boxed{", and forcing that would rule the fraction out.
        """
        settled = next(place for place in range(len(text) + 1) if self.vocabulary.goes_on(text[place:]))
        return sum(len(self._decode_after_anchor(token_ids[:end])) <= settled for end in range(1, len(token_ids) + 1))

    def _merged(self, answer_format: AnswerFormat, answer_ids: Sequence[int]) -> tuple[int, ...]:
        """The tokens that hold an answer's last token and its end."""
        if not answer_ids:
            return ()
        last = self.vocabulary.texts[answer_ids[-1]]
        return tuple(self.vocabulary.starting_with(answer_format.closing, last, answer_format.dropped))

    def _written_out(
        self, answer_format: AnswerFormat, text: str, token_ids: list[int], given: int
    ) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """A text with each end of several tokens, encoded apart and together: "a)" and "</answer>", or ")</" in one."""
        ways: dict[tuple[int, ...], tuple[int, ...]] = {}
        for closing in answer_format.closing:
            if not self.vocabulary.starting_with([closing]):
                together = self._continue_text(text + closing)
                for way in (token_ids + self._continue_text(closing), together):
                    if way[:given] == token_ids[:given]:
                        ends = self.vocabulary.starting_with([self.vocabulary.texts[way[-1]]])
                        ways[tuple(way[:-1])] = tuple(ends or way[-1:])
        return tuple(ways.items())

    def _opened_suffix(self, format_name: str, answer: str) -> _Suffix:
        """The answer alone, after an opening, token by token as a model that has written that has to go on."""
        answer_format = self.formats[format_name]
        opening, alone = self._continue_text(answer_format.marker), answer_format.lead + answer
        text, given = answer_format.marker + alone, len(opening)
        token_ids = self._continue_text(text)
        if token_ids[:given] != opening:
            text, given, token_ids = alone, 0, self._continue_text(alone)
        written_out = tuple(
            (way[given:], ends) for way, ends in self._written_out(answer_format, text, token_ids, given)
        )
        own = tuple(token_ids[given:])
        return _Suffix(own, 0, 0, self._merged(answer_format, own), written_out)

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

    def _can_write_tags(self) -> bool:
        """Whether the policy can mark its thinking at all; the tags by default need not be writable."""
        tags, fields = self.config.elicitation, ElicitationConfig.model_fields
        texts = {key: getattr(tags, key) for key in ("think_open", "think_close", "think_exit", "think_skip")}
        unwritable = [key for key, text in texts.items() if text and not self._can_write(text)]
        for key in unwritable:
            if texts[key] != fields[key].default:
                raise ValueError(
                    f"elicitation.{key}={texts[key]!r}: this tokenizer cannot write it, so the policy never will; set "
                    f"the text with which the model itself marks its thinking, or leave {fields[key].default!r}"
                )
        return not unwritable

    def _can_write(self, text: str) -> bool:
        # Some tokenizers drop a blank at the start of a text.
        return text in self.vocabulary.tokenizer.decode(self._encode(JOIN_ANCHOR + text))

    def _closing_ids(self, answer_format: AnswerFormat) -> list[int]:
        ids = self.vocabulary.starting_with(answer_format.closing, dropped=answer_format.dropped)
        if answer_format.ends_at_eos:
            ids = [*self.vocabulary.end_of_sequence_ids(), *ids]
        # Short texts first: what a model writes most often stands first until responses show otherwise.
        ids.sort(key=lambda token_id: len(self.vocabulary.texts[token_id]))
        unwritable = [text for text in answer_format.closing if not self._can_write(text)]
        if unwritable and (set(unwritable) & set(self.config.elicitation.closing) or not ids):
            raise ValueError(
                f"elicitation.format={answer_format.name}: this tokenizer cannot write {unwritable}, so no answer "
                "could end in it; name the texts that end an answer in elicitation.closing, with format=custom"
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


def skipped_thinking(tokenizer: Any, tags: ElicitationConfig) -> str:
    """Text with which a response begins that is not to think, "" where nothing is written: as its template writes it.

    Args:
        tokenizer: The policy's, with its chat template.
        tags: The tags, and the text itself where it is set.
    """
    if tags.think_skip is not None or not getattr(tokenizer, "chat_template", None):
        return tags.think_skip or ""
    try:
        thinks, skips = (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
            for thinking in (True, False)
        )
    except TemplateError:
        return ""
    block = re.search(f"{re.escape(tags.think_open)}\\s*{re.escape(tags.think_close)}\\s*$", skips)
    return "" if block is None or thinks.endswith(block[0]) else block[0]


def _is_open(tags: Sequence[tuple[int, bool]], place: int) -> bool:
    """Whether a thinking block is open before the token at a place."""
    return tags[bisect.bisect_left(tags, (place, False)) - 1][1]


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
