"""`joint` against the true value of policies that can be enumerated: finite trees of tokens, also of real models'."""

import functools
import math
import random
from collections.abc import Mapping, Sequence

import pytest

from rredcot_verl.answers.grammar import canonical, find_answer
from rredcot_verl.config.schema import parse
from rredcot_verl.probes.elicitation import Elicitation
from rredcot_verl.probes.proposals import Proposal
from rredcot_verl.probes.values import ProbeScore, self_values
from tests.probes.real_tokenizers import REAL, tables
from tests.probes.tiny_tokenizers import byte_level, encode, sentencepiece_like

# As in Qwen's vocabulary: "{\\" and "{-" are single tokens.
LIKE_QWEN = byte_level(texts=("so \\boxed{-3}.\n", "is \\boxed{\\frac{1}{2}}\n", ":\n", "####\n", "\n\n\n"))
TOKENIZERS = {
    "like_qwen": lambda: LIKE_QWEN,
    "sentencepiece_like": sentencepiece_like,
    **REAL,
}
BOXED = "\n\nThe final answer is \\boxed{"


class TreePolicy:
    """A policy that writes one of finitely many sequences after a prefix, each with a probability."""

    def __init__(self, weights: Mapping[tuple[int, ...], float]) -> None:
        self.weights = weights
        self._mass: dict[tuple[int, ...], float] = {}
        for sequence, weight in weights.items():
            for end in range(len(sequence) + 1):
                self._mass[sequence[:end]] = self._mass.get(sequence[:end], 0.0) + weight

    def log_prob(self, written: Sequence[int], token_ids: Sequence[int]) -> float:
        """That one of some tokens comes next."""
        mass = sum(self._mass.get((*written, token_id), 0.0) for token_id in token_ids)
        return math.log(mass / self._mass[tuple(written)]) if mass else -math.inf

    def value(self, asked: Elicitation, prefix: Sequence[int], answers: Mapping[str, float], name: str) -> float:
        """What probes of answers with their utilities say of the end of a prefix."""
        proposals = [Proposal(text, utility) for text, utility in answers.items()]
        probes = asked.probes([], prefix, [len(prefix), len(prefix) + 1], proposals, name)
        scores = []
        for probe in probes:
            read = [self.log_prob(probe.token_ids[:n], [probe.token_ids[n]]) for n in range(len(probe.token_ids))]
            scores.append(ProbeScore(read, self.log_prob(probe.token_ids, probe.closing_token_ids), 0))
        return self_values("joint", probes, scores, list(answers.values())).item()

    def true_value(self, asked: Elicitation, opening: str, utilities: Mapping[str, float]) -> float:
        """The expected utility of the answer it writes, given that its text starts with an opening."""
        texts = {sequence: asked.vocabulary.tokenizer.decode(sequence) for sequence in self.weights}
        opened = {sequence: text for sequence, text in texts.items() if text.startswith(opening)}
        total = 0.0
        for sequence in opened:
            found = find_answer(asked.vocabulary.decode(sequence), asked.formats)
            total += self.weights[sequence] * (utilities.get(canonical(found.text), 0.0) if found else 0.0)
        return total / sum(self.weights[sequence] for sequence in opened)


def elicitation(tokenizer, name: str) -> Elicitation:
    return Elicitation(tables(tokenizer), parse({"elicitation": {"format": name}}))


ANCHOR = "1 + 1 = 2"


def continued(tokenizer, text: str) -> list[int]:
    """The tokens of a text that goes on after another."""
    anchored, whole = encode(tokenizer, ANCHOR), encode(tokenizer, ANCHOR + text)
    assert whole[: len(anchored)] == anchored
    return whole[len(anchored) :]


def naturally(weights: Mapping[str, float], tokenizer=LIKE_QWEN) -> TreePolicy:
    """A policy that writes texts as the tokenizer does."""
    return TreePolicy({tuple(continued(tokenizer, text)): weight for text, weight in weights.items()})


HALF = "\\frac{1}{2}"


@pytest.mark.parametrize("kind", ["like_qwen", "qwen"])
def test_the_tokens_that_hold_the_openings_end_and_more_are_there(kind):
    texts = tables(TOKENIZERS[kind]()).texts
    assert {"{\\", "{-", "}}", "}.\n", ":\n"} <= set(texts)


@pytest.mark.parametrize("other", [HALF, "-3"])
def test_the_opening_gives_nothing_of_an_answer_away(other):
    """Nine times of ten the model goes on with "{\\" or "{-": given "{", nothing but 15 would be left."""
    policy, asked = naturally({BOXED + "15}": 0.1, BOXED + other + "}": 0.9}), elicitation(LIKE_QWEN, "boxed")
    prefix = encode(LIKE_QWEN, "so 3.")
    assert policy.value(asked, prefix, {"15": 1.0}, "boxed") == pytest.approx(0.1)
    assert policy.value(asked, prefix, {other: 1.0}, "boxed") == pytest.approx(0.9)
    assert policy.value(asked, prefix, {"15": 1.0, other: 0.5}, "boxed") == pytest.approx(0.55)


def test_where_the_response_opened_its_box_no_other_box_is_asked_for():
    opened = encode(LIKE_QWEN, "so 3 \\boxed{")
    # Two openings, and after each an answer that is sure or nearly so.
    policy = naturally({"15}": 0.6, "7}": 0.4 - 1e-6, BOXED + HALF + "}": 1e-6})
    asked = elicitation(LIKE_QWEN, "boxed")
    assert policy.value(asked, opened, {"15": 1.0, HALF: 1.0}, "boxed") == pytest.approx(0.6)


@pytest.mark.parametrize("closing", ["}", "}.\n", "}}"])
def test_spellings_of_an_answer_add_up_to_the_true_value(closing):
    spellings = {"\\frac{1}{2}": 0.3, "\\dfrac{1}{2}": 0.2, "0.5": 0.1, "$0.5$": 0.05, "0.5.": 0.05}
    policy = naturally({BOXED + text + closing: p for text, p in (spellings | {"0.55": 0.2, "-3": 0.1}).items()})
    found = policy.value(
        elicitation(LIKE_QWEN, "boxed"), encode(LIKE_QWEN, "so 3."), dict.fromkeys(spellings, 1.0), "boxed"
    )
    assert found == pytest.approx(0.7)


ANSWERS = ("15", "1", "155", HALF, "-3", "\\dfrac{1}{2}", "{x}", "$15$", "15.", "a, b")
ENDS = {
    "boxed": ("}", "}.\n", "}}", "}\n\n"),
    "hash": ("\n", ".\n", "\n\n", ""),
    "plain": ("\n", " \n", "\n\n", ""),
    "answer": ("</answer>", " </answer>", "</answer>\n", "\n</answer>"),
}
NO_ANSWERS = {
    "boxed": ("}", "{}"),
    "hash": ("\n", "# 15\n", "##15\n"),
    "plain": ("\n", ":\n", ": 15\n"),
    "answer": ("</answer>", "15</answer >", "15</ answer>", "15< /answer>"),
}


class Pieces:
    """What the tokens of a vocabulary write after other words."""

    def __init__(self, tokenizer) -> None:
        self.ids: dict[str, list[int]] = {}
        anchored = encode(tokenizer, ANCHOR)
        texts = tokenizer.batch_decode([[*anchored, i] for i in range(len(tokenizer))])
        for i, text in enumerate(texts):
            self.ids.setdefault(text.removeprefix(ANCHOR), []).append(i)
        self.ids.pop("", None)
        self.beginnings = {text[:end] for text in self.ids for end in range(1, len(text))}
        self.longest = max(map(len, self.ids))

    def first_of(self, text: str) -> list[tuple[int, str]]:
        """The tokens with which a text may begin, and what each writes."""
        starts = (text[:end] for end in range(1, min(self.longest, len(text)) + 1))
        return [(i, start) for start in starts for i in self.ids.get(start, ())]


pieces = functools.cache(Pieces)


def random_policy(rng: random.Random, tokenizer, opening: str, name: str) -> TreePolicy:
    """Writes an opening as the tokenizer does, up to where a token could hold its end and more; then anything.

    Half of its sequences go on in any tokens that make up the text, some with other words.
    """
    anchored, known = encode(tokenizer, ANCHOR), pieces(tokenizer)

    def text_of(token_ids: list[int]) -> str:
        return tokenizer.decode(anchored + token_ids).removeprefix(ANCHOR)

    starts = [place for place in range(len(opening)) if opening[place:] in known.beginnings]
    sure = continued(tokenizer, opening)
    while len(text_of(sure)) > min(starts, default=len(opening)):
        sure.pop()
    left = opening[len(text_of(sure)) :]
    weights: dict[tuple[int, ...], float] = {}
    for _ in range(24):
        body = rng.choice([answer + rng.choice(ENDS[name]) for answer in ANSWERS] + list(NO_ANSWERS[name]))
        if rng.random() < 0.5:
            sequence = continued(tokenizer, opening + body)
        else:
            sequence, rest = sure, "x." if rng.random() < 0.1 else left + body
            while rest:
                token_id, text = rng.choice(known.first_of(rest))
                sequence, rest = [*sequence, token_id], rest[len(text) :]
        weights[(*sequence, tokenizer.eos_token_id)] = rng.random() ** 6
    return TreePolicy(weights)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", ["boxed", "hash", "plain", "answer"])
@pytest.mark.parametrize("response", ["so 3.", "so 3.\n", "<think>so 3"])
def test_never_above_the_true_value(kind, name, response):
    tokenizer, rng = TOKENIZERS[kind](), random.Random(f"{name}{response}")
    asked = elicitation(tokenizer, name)
    form, prefix = asked.formats[name], encode(tokenizer, response)
    opening = form.opening + form.lead
    if response.startswith("<think>"):
        opening = "\n</think>\n\n" + opening.lstrip("\n")
    if response.endswith("\n"):
        opening = opening.lstrip("\n")
    most, positive = 0.0, 0
    for _ in range(40):
        policy = random_policy(rng, tokenizer, opening, name)
        answers = {text: rng.choice([0.3, 1.0]) for text in rng.sample(ANSWERS, 6)}
        # Spellings of one answer have its utility.
        utilities = {canonical(text): utility for text, utility in answers.items()}
        probed = {text: utilities[canonical(text)] for text in answers}
        value = policy.value(asked, prefix, probed, name)
        true = policy.true_value(asked, opening, utilities)
        assert value <= true + 1e-6
        most, positive = max(most, value), positive + (value > 0.01)
    assert most > 0.3 and positive > 20


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", ["boxed", "hash", "plain", "answer"])
def test_of_texts_as_the_tokenizer_writes_them_it_is_the_true_value(kind, name):
    tokenizer, rng = TOKENIZERS[kind](), random.Random(name)
    asked = elicitation(tokenizer, name)
    form, answers = asked.formats[name], {"15": 1.0, HALF: 1.0, "$15$": 1.0, "-3": 0.5, "155": 0.0}
    for _ in range(20):
        texts = [form.opening + form.lead + text + rng.choice([ENDS[name][0], ENDS[name][2]]) for text in answers]
        policy = naturally({text: rng.random() for text in texts}, tokenizer)
        value = policy.value(asked, encode(tokenizer, "so 3."), answers, name)
        utilities = {canonical(text): utility for text, utility in answers.items()}
        assert value == pytest.approx(policy.true_value(asked, form.opening, utilities))
