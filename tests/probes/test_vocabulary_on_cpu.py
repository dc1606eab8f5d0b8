"""Vocabulary tables on tokenizers made on the spot and on those of real models, against decoding token by token."""

import logging
import random

import pytest
import torch

from rredcot_verl.probes.vocabulary import Vocabulary
from tests.probes.real_tokenizers import ALL, vocabulary
from tests.probes.tiny_tokenizers import KINDS, TEXTS, byte_level, encode, sentencepiece_like, token

TEXT = "First, 12 + 3 = 15.\n\nWait, let me see, but so 3.\nSo the answer is \\boxed{15}.\n"


@pytest.mark.parametrize("kind", ALL)
def test_newlines(kind):
    tokenizer = ALL[kind]()
    ids = encode(tokenizer, TEXT)
    expected = ["\n" in tokenizer.decode([i]) for i in ids]
    assert sum(expected) >= 3
    assert vocabulary(kind).newlines(torch.tensor(ids)).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_ids_beyond_the_tokenizers_own_mean_nothing(kind):
    """Models pad their vocabulary; a policy may sample such an id."""
    tokenizer = KINDS[kind]()
    vocabulary = Vocabulary(tokenizer, ["wait"])
    ids = torch.tensor([len(tokenizer), len(tokenizer) + 50, 10**6])
    assert not vocabulary.newlines(ids).any() and not vocabulary.keyword_spans(ids)
    assert not vocabulary.sentence_ends(ids).any() and not vocabulary.endings(ids.tolist(), "Answer:")


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "text, expected",
    [
        ("so let me see.", True),
        ("not so!", True),
        ("Why?", True),
        ("(so see.)", True),
        ("is \\boxed{15}.", True),
        ("is \\frac{1}{2}$.", True),
        # What is written must do: these may go on.
        ("is 3.", False),
        ("is 3.5", False),
        ("so e.g.", False),
        ("so i.e.", False),
        ("let me see...", False),
        ("let a vs.", False),
        ("see Fig.", False),
        ("is 5!", False),
        ("so x.", False),
        ("1.", False),
        ("so,", False),
        ("let me", False),
    ],
)
def test_sentence_ends(kind, text, expected):
    tokenizer = ALL[kind]()
    ids = encode(tokenizer, "Wait, " + text)
    assert vocabulary(kind).sentence_ends(torch.tensor(ids)).tolist()[-1] == expected


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("marker", ["\\boxed{", "Answer:", "####"])
def test_endings(kind, marker):
    tokenizer = ALL[kind]()
    ids = encode(tokenizer, "".join(TEXTS[:4]) + "Answer: Answer 4 \\boxed{\\frac{1}{2}} {4}")
    written = [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
    expected = [n for n, text in enumerate(written) if text.endswith(marker)]
    assert vocabulary(kind).endings(ids, marker) == expected and expected


def test_keywords_of_one_token_and_of_several():
    tokenizer = byte_level()
    ids = encode(tokenizer, "So, let me see. Wait, not so.\nLet me see")
    vocabulary = Vocabulary(tokenizer, ["so", "wait", "let me"])
    starts = [start for start, _ in vocabulary.keyword_spans(torch.tensor(ids))]
    assert [tokenizer.decode(ids[s:]).strip().split()[0].strip(",.") for s in starts] == [
        "So",
        "let",
        "Wait",
        "so",
        "Let",
    ]
    # A phrase needs all its words.
    assert not vocabulary.keyword_spans(torch.tensor(encode(tokenizer, " let us")))
    assert not vocabulary.keyword_spans(torch.tensor(encode(tokenizer, " let")))


@pytest.mark.parametrize(
    "text, found",
    [
        (" so 3", True),
        (" so, let", True),
        (" so\n", True),
        # It may go on.
        (" so", False),
        (" solve", False),
        ("solve", False),
        ("So 3", True),
        ("Solve", False),
        (" let me.", True),
        (" let melt", False),
        (" let me let", True),
    ],
)
def test_a_keyword_that_goes_on_is_none(text, found):
    """ " so" + "l" + "v" + "e" is another word."""
    tokenizer = byte_level()
    assert [tokenizer.decode([i]) for i in encode(tokenizer, " solve")][:2] == [" so", "l"]
    spans = Vocabulary(tokenizer, ["so", "let me"]).keyword_spans(torch.tensor(encode(tokenizer, text)))
    assert [start for start, _ in spans] == [0] * found


def sentencepiece_starts(text: str, keywords: list[str]) -> list[str]:
    """The word at each keyword start."""
    tokenizer = sentencepiece_like()
    ids = encode(tokenizer, text)
    starts = dict(Vocabulary(tokenizer, keywords).keyword_spans(torch.tensor(ids)))
    return [tokenizer.decode(ids[s:]).split()[0].strip(",.") for s in starts]


def test_keywords_of_a_sentencepiece_like_tokenizer():
    assert sentencepiece_starts("First, let 3, let me, see", ["let", "let me"]) == ["let", "let"]
    assert sentencepiece_starts("First, let 3, let me, see", ["let me"]) == ["let"]
    assert set(sentencepiece_starts("First, but 3, let me, see", ["but", "let me"])) == {"but", "let"}
    assert sentencepiece_starts("3, button", ["but"]) == []


def test_keywords_before_another_word_of_a_sentencepiece_like_tokenizer():
    assert sentencepiece_starts("First, let me see", ["let me"]) == ["let"]


def test_a_keyword_ends_once():
    ids = encode(sentencepiece_like(), "First, but 3")
    spans = Vocabulary(sentencepiece_like(), ["but"]).keyword_spans(torch.tensor(ids))
    assert len({end for _, end in spans}) == 1


@pytest.mark.parametrize("text", ["3.\nbut 4", "3.\nlet 4", "but 4"])
def test_keywords_after_a_newline_of_a_sentencepiece_like_tokenizer(text):
    assert sentencepiece_starts(text, ["but", "let"])[0] in ("but", "let")


def test_without_keywords_none_starts():
    ids = torch.tensor(encode(byte_level(), TEXT))
    assert not Vocabulary(byte_level()).keyword_spans(ids)


def test_a_keyword_that_cannot_be_written_is_reported_once_and_left_out(caplog):
    with caplog.at_level(logging.WARNING):
        vocabulary = Vocabulary(sentencepiece_like(), ["日本", "but", "語"])
    assert len(caplog.records) == 1
    assert "日本" in caplog.text and "語" in caplog.text and "but" not in caplog.text
    assert vocabulary.keyword_spans(torch.tensor(encode(sentencepiece_like(), "3, but 4")))


@pytest.mark.parametrize("kind", ALL)
def test_offset_of_is_the_first_token_that_reaches_past_a_character(kind):
    tokenizer = ALL[kind]()
    tables = vocabulary(kind)
    texts = [TEXT, *set(TEXTS)]
    if kind != "sentencepiece_like":
        # Four bytes to sentencepiece, shown as four characters until all are there.
        texts += ["é 日本 \N{GRINNING FACE} \\boxed{1}", "\N{DODO}\n\N{DODO}\\boxed{1\N{DODO}}"]
    for text in texts:
        ids = [*encode(tokenizer, text), tokenizer.eos_token_id]
        decoded = tables.decode(ids)
        ends = [len(tables.decode(ids[: n + 1])) for n in range(len(ids))]
        for character in range(len(decoded)):
            by_force = next(n for n in range(len(ends)) if min(ends[n:]) > character)
            assert tables.offset_of(ids, decoded, character) == by_force
        assert tables.offset_of(ids, decoded, len(decoded)) == len(ids)


@pytest.mark.parametrize("kind", ALL)
def test_offset_of_in_long_and_odd_responses(kind):
    """Ids as a policy may sample them: special tokens anywhere, spaces that decoding drops, halves of characters."""
    tokenizer = ALL[kind]()
    tables = vocabulary(kind)
    rng = random.Random(0)
    letters = [i for i, text in enumerate(tables.texts) if "\ufffd" not in text]
    halves = encode(tokenizer, "but" if kind == "sentencepiece_like" else "é日本\N{DODO}")
    broken = [*letters, *halves, tokenizer.eos_token_id]
    for pool in (letters, broken):
        for _ in range(10):
            ids = rng.choices(pool, k=rng.randint(1, 80)) + rng.randint(0, 3) * [tokenizer.eos_token_id]
            decoded = tables.decode(ids)
            ends = [len(tables.decode(ids[: n + 1])) for n in range(len(ids))]
            for character in rng.sample(range(len(decoded)), min(20, len(decoded))):
                by_force = next(n for n in range(len(ends)) if min(ends[n:]) > character)
                assert tables.offset_of(ids, decoded, character) == by_force
            assert tables.offset_of(ids, decoded, len(decoded)) == len(ids)
    assert tables.offset_of([], "", 0) == 0


def test_offset_of_with_special_tokens_between():
    tokenizer = byte_level()
    vocabulary = Vocabulary(tokenizer)
    rng = random.Random(0)
    ids = encode(tokenizer, TEXT)
    for _ in range(5):
        ids.insert(rng.randrange(len(ids)), tokenizer.eos_token_id)
    text = vocabulary.decode(ids)
    at = vocabulary.offset_of(ids, text, text.index("\\boxed"))
    assert vocabulary.decode(ids[: at + 1]).endswith("\\") and "\\" not in vocabulary.decode(ids[:at])


@pytest.mark.parametrize("kind", ALL)
def test_starting_with_and_special_ids(kind):
    tokenizer = ALL[kind]()
    tables = vocabulary(kind)
    before = encode(tokenizer, "so")
    texts = [text.removeprefix("so") for text in tokenizer.batch_decode([[*before, i] for i in range(len(tokenizer))])]
    for starts in (("}", "\n"), ("}",), ("}}", "}."), ("}", "}}"), (" le", " l"), ("never",), ()):
        expected = [i for i, text in enumerate(texts) if text.startswith(starts)]
        assert sorted(tables.starting_with(starts)) == expected
    if kind in KINDS:
        assert tables.special_id("</think>") == token(tokenizer, "</think>")
    assert tables.special_id("<reasoning>") is None
    assert tokenizer.eos_token_id in tables.end_of_sequence_ids()


def test_all_known_ends_of_a_turn():
    tokenizer = byte_level()
    ends = {tokenizer.decode([i]) for i in Vocabulary(tokenizer).end_of_sequence_ids()}
    assert ends == {"<|im_end|>", "<|endoftext|>"}
