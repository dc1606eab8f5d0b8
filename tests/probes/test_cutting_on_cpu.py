"""From tokens to segments: stopping times on real tokenizers, long traces of sentences, lines, answers, thinking."""

import itertools
import random

import pytest
import torch

from rredcot_verl.config.schema import parse
from rredcot_verl.core.segmentation import SEGMENTERS, check_online
from rredcot_verl.probes.cutting import cut, make_trace
from rredcot_verl.probes.elicitation import Elicitation
from rredcot_verl.probes.vocabulary import Vocabulary
from tests.probes.real_tokenizers import ALL, REAL, vocabulary
from tests.probes.tiny_tokenizers import KINDS, byte_level, encode

PARTS = [
    "So 12 + 3 is 15.",
    "Wait, that is not so!",
    " Let me check.",
    "\n",
    "\n\n",
    " but 3.5 is it",
    "Why?",
    "<think>",
    "</think>",
    "\\boxed{15}",
    "Answer: 15\n",
    "#### 7",
    "e.g. a b",
    "...",
]


def make(kind: str = "byte_level", **rule) -> Elicitation:
    config = parse({"segmentation": rule})
    return Elicitation(Vocabulary(KINDS[kind](), config.segmentation.keywords), config)


def places(asked: Elicitation, ids, mask=None, log_probs=None, prompt=(), budget=1) -> list[int]:
    return cut(asked.config.segmentation, asked, prompt, ids, mask, log_probs, budget)


def random_response(rng: random.Random, kind: str, length: int) -> tuple[list[int], list[int], list[float]]:
    tokenizer = KINDS[kind]()
    ids = encode(tokenizer, "".join(rng.choice(PARTS) for _ in range(length)))[:length]
    for place in range(len(ids)):
        if rng.random() < 0.05:
            ids[place] = rng.randrange(len(tokenizer) + 3)
    mask = [1] * len(ids)
    if rng.random() < 0.5:
        start = rng.randrange(len(ids))
        mask[start : start + 7] = [0] * len(mask[start : start + 7])
    return ids, mask, [-rng.random() for _ in ids]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", sorted(SEGMENTERS))
def test_cuts_are_decided_by_the_tokens_before_them(kind, method):
    """A prefix has the response's own cuts, and tokens changed from t on move no cut at or before t."""
    rng, num_cuts = random.Random(f"{kind}{method}"), 0
    asked = make(kind, method=method, min_tokens=3, num_segments=24, max_tokens=rng.choice([None, 30]))
    prompts = [[], encode(KINDS[kind](), "What?<think>")]
    for _ in range(6):
        ids, mask, log_probs = random_response(rng, kind, 70)
        prompt, budget = rng.choice(prompts), rng.choice([70, 200])
        whole = places(asked, ids, mask, log_probs, prompt, budget)
        num_cuts += len(whole) - 2
        for t in range(1, len(ids)):
            found = places(asked, ids[:t], mask[:t], log_probs[:t], prompt, budget)
            assert found[:-1] == [each for each in whole if each < t]
            others, _, other_log_probs = random_response(rng, kind, rng.randint(1, 20))
            changed = (ids[:t] + others, mask[: t + 1] + [1] * (len(others) - 1), log_probs[:t] + other_log_probs)
            found = places(asked, *changed, prompt, budget)[:-1]
            assert [each for each in found if each <= t] == [each for each in whole[:-1] if each <= t]
    assert num_cuts > 15


def sentences(num_tokens: int, seed: int) -> tuple[list[int], set[int], list[float]]:
    """Sentences of 6 to 40 words in paragraphs; the offsets after a sentence; log-probabilities."""
    rng, tokenizer = random.Random(seed), byte_level()
    words = ["so", "let", "me", "check", "the", "answer", "but", "not", "see", "3", "4.5", "12", "e.g.", "+", "="]
    ids: list[int] = []
    ends: set[int] = set()
    while len(ids) < num_tokens:
        start = rng.choice(["Wait, ", "So ", "Then ", "The ", "It "]) if ids else "First, "
        inner = " ".join(rng.choice(words) for _ in range(rng.randint(5, 39)))
        ids += encode(tokenizer, start + inner + " see" + rng.choice([".", ".", "?", "!"]))
        ends.add(len(ids))
        ids += encode(tokenizer, "\n\n") if rng.random() < 0.15 else encode(tokenizer, " ")
        ends.add(len(ids))
    return ids, ends, [-(rng.random() ** 4) for _ in ids]


@pytest.mark.parametrize("num_tokens, budget", [(9_000, 9_300), (9_000, 32_768), (28_000, 28_300), (28_000, 32_768)])
@pytest.mark.parametrize("method", ["newline", "keyword", "entropy", "keyword_entropy"])
def test_long_traces_are_cut_evenly_and_between_sentences(method, num_tokens, budget):
    asked = make(method=method)
    ids, ends, log_probs = sentences(num_tokens, seed=num_tokens)
    found = places(asked, ids, None, log_probs, (), budget)
    assert set(found[1:-1]) <= ends
    spacing = -(-budget // 62)
    lengths = [b - a for a, b in itertools.pairwise(found)]
    assert min(lengths[:-1]) >= spacing
    longest_sentence = max(b - a for a, b in itertools.pairwise(sorted(ends)))
    assert max(lengths) < 2 * spacing + 2 * longest_sentence
    # The number grows with the length of the response.
    half = len(ids) // 2
    assert abs(len(found) - 2 * len(places(asked, ids[:half], None, log_probs[:half], (), budget))) <= 3


def test_the_default_on_long_traces():
    """One segment in 529 tokens or somewhat more, under a budget of 32k."""
    asked = make()
    for num_tokens, budget, num_segments, share in ((9_000, 32_768, 12, 0.1), (28_000, 32_768, 40, 0.035)):
        ids, _, log_probs = sentences(num_tokens, seed=2)
        found = places(asked, ids, None, log_probs, (), budget)
        assert len(found) - 1 >= num_segments
        assert max(b - a for a, b in itertools.pairwise(found)) / len(ids) < share


@pytest.mark.parametrize("kind", ["byte_level", *REAL])
@pytest.mark.parametrize("method", ["newline", "keyword_entropy"])
def test_short_budgets_are_cut_after_every_line(kind, method):
    text = "7+5=12\n12-3=9\n9+8=17\n17-2=15\nAnswer: 15"
    config = parse({"segmentation": {"method": method, "num_segments": 18, "min_tokens": 4}})
    asked = Elicitation(vocabulary(kind), config)
    ids = encode(ALL[kind](), text)
    texts = [asked.vocabulary.decode(ids[a:b]) for a, b in itertools.pairwise(places(asked, ids, budget=64))]
    assert texts[:4] == ["7+5=12\n", "12-3=9\n", "9+8=17\n", "17-2=15\n"]
    assert "".join(texts[4:]) == "Answer: 15"


def text_cuts(text: str, prompt: str = "", **rule) -> list[str]:
    asked = make(**rule)
    ids = encode(byte_level(), text)
    found = places(asked, ids, prompt=encode(byte_level(), prompt))
    return [asked.vocabulary.decode(ids[a:b]) for a, b in itertools.pairwise(found)]


def test_the_answer_is_cut_off_after_its_opening():
    rule = {"method": "newline", "num_segments": 9, "min_tokens": 2}
    assert text_cuts("so the answer is \\boxed{15} but", **rule) == ["so the answer is \\boxed{", "15} but"]
    # What is only thought is no answer; the prompt may have opened the thinking.
    thought = "is \\boxed{3}</think> so the answer is \\boxed{15}"
    assert text_cuts(thought, "What?<think>", **rule) == [
        "is \\boxed{3}</think>",
        " so the answer is \\boxed{",
        "15}",
    ]
    # Only the first one; then lines and sentences.
    again = "so the answer is \\boxed{15} but then is \\boxed{3}"
    assert text_cuts(again, **rule) == ["so the answer is \\boxed{", "15} but then is \\boxed{3}"]


def test_a_sentence_that_begins_with_a_keyword():
    text = "It is 3 so see. Wait, it is not 4 so see. It is 5 so see. It is 6 so see."
    ids = encode(byte_level(), text)
    trace = make_trace(make(), (), ids, None, None)
    # A keyword counts where a sentence begins, and once what follows it is written.
    (place,) = trace.keyword.nonzero().flatten().tolist()
    assert byte_level().decode(ids[:place]).endswith("see. Wait")
    size = len(encode(byte_level(), "It is 3 so see."))
    rule = {"method": "keyword", "num_segments": 9, "min_tokens": size}
    assert text_cuts(text, **rule)[0] == "It is 3 so see. Wait, it is not 4 so see."


@pytest.mark.parametrize("method", sorted(SEGMENTERS))
def test_segmenters_are_checked_on_what_responses_look_like(method):
    ids, _, log_probs = sentences(150, seed=1)
    check_online(SEGMENTERS[method], make_trace(make(), (), ids, None, log_probs))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
def test_log_probabilities_that_are_no_numbers(bad):
    ids, _, log_probs = sentences(80, seed=1)
    log_probs[5] = bad
    assert torch.isfinite(make_trace(make(), (), ids, None, log_probs).surprisal).all()
    assert not make_trace(make(), (), ids, None, None).surprisal.any()
