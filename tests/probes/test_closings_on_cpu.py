"""What ends an answer: several tokens, tokens with more than the end in them, the ends of turns."""

import asyncio
import math
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken

from rredcot_verl.answers.grammar import canonical, find_answer
from rredcot_verl.config.schema import parse
from rredcot_verl.probes.elicitation import Elicitation, Proposal
from rredcot_verl.probes.values import self_values
from rredcot_verl.probes.vocabulary import Vocabulary, ends_of
from rredcot_verl.servers.client import make_probe_reader
from tests.passes.table_model import FakeServer, TableModel, utilities
from tests.probes.real_tokenizers import REAL, vocabulary
from tests.probes.tiny_tokenizers import KINDS, byte_level, encode, sentencepiece_like, token, with_tags

OPENING = "\n<answer>"


def make(tokenizer, **elicitation) -> Elicitation:
    return Elicitation(Vocabulary(tokenizer), parse({"elicitation": elicitation}))


def read(asked: Elicitation, model: TableModel, ids: list[int], answer: str, form: str = "joint") -> float:
    """The value at the end of a response."""
    proposals = [Proposal(answer, 1.0)]
    name = asked.usual_format()
    probes = asked.probes([1], ids, [len(ids), len(ids) + 1], proposals, name)
    reader = make_probe_reader("rredcot_cpu", FakeServer(model).generate, asked.config.self_value, 1.0)
    scores = asyncio.run(reader.read("request-1", [1, *ids], probes)).scores
    return self_values(form, probes, scores, utilities(proposals)).item()


@pytest.mark.parametrize("kind", [*KINDS, "with_tags"])
@pytest.mark.parametrize("answer", ["15", "(1)", "\\frac{1}{2}"])
def test_an_answer_in_tags_is_worth_what_the_model_gives_it(kind, answer):
    """R1-Zero's format. Whatever the tag is cut into, no answer is given away and none is lost."""
    tokenizer = {**KINDS, "with_tags": with_tags}[kind]()
    asked = make(tokenizer, format="answer")
    natural = continued(tokenizer, OPENING + answer + "</answer>")
    assert tokenizer.decode(encode(tokenizer, "so 3") + natural) == "so 3" + OPENING + answer + "</answer>"
    ids = encode(tokenizer, "so 3")
    # The answer counts from where its tokens may differ from the opening's.
    texts, before, opening = asked.vocabulary.texts, encode(tokenizer, "so 3"), continued(tokenizer, OPENING)
    rests = [OPENING[place:] for place in range(len(OPENING) + 1)]
    place = next(n for n, rest in enumerate(rests) if any(text.startswith(rest) and text != rest for text in texts))
    lengths = [len(tokenizer.decode(before + opening[:end])) - len("so 3") for end in range(1, len(opening) + 1)]
    given = sum(length <= place for length in lengths)
    model = TableModel(len(tokenizer), habit=natural)
    true = math.exp(sum(model.sequence([1, *ids], natural)[given:]))
    # The model all but always writes on what the tokenizer writes.
    assert true > 0.5
    value = read(asked, model, ids, answer)
    whole = written(model, asked.vocabulary.texts, [1, *ids, *natural[:given]], asked, natural[given:])
    assert true - 1e-6 <= value <= whole + 1e-6
    # One that has a habit of going on has given no answer.
    longer = continued(tokenizer, OPENING + answer + "9")
    assert read(asked, TableModel(len(tokenizer), habit=longer), ids, answer) < 1e-3


def written(model: TableModel, texts: list[str], prefix: list[int], asked: Elicitation, natural: list[int]) -> float:
    """The probability of a text in whatever tokens, the last of which may go on."""
    tokenizer = asked.vocabulary.tokenizer
    text = tokenizer.decode([*prefix, *natural])[len(tokenizer.decode(prefix)) :]

    def of(prefix: list[int], text: str) -> float:
        found, probabilities = 0.0, model.log_probs(prefix).exp().tolist()
        for i, known in enumerate(texts):
            if not known or probabilities[i] < 1e-7:
                continue
            if known.startswith(text):
                found += probabilities[i]
            elif text.startswith(known):
                found += probabilities[i] * of([*prefix, i], text[len(known) :])
        return found

    return of(prefix, text)


def continued(tokenizer, text: str) -> list[int]:
    """The tokens of a text that goes on after a word."""
    before = encode(tokenizer, "so 3")
    whole = encode(tokenizer, "so 3" + text)
    assert whole[: len(before)] == before
    return whole[len(before) :]


def test_no_way_to_write_an_answer_counts_twice():
    tokenizer = with_tags()
    asked = make(tokenizer, format="answer")
    assert len(encode(tokenizer, "</answer>")) > 1
    assert {"</", ")</"} <= set(asked.vocabulary.texts)
    probes = asked.probes([1], [], [0, 9], [Proposal("(1)", 1.0)], "answer")
    ways = [(*probe.token_ids, end) for probe in probes for end in probe.closing_token_ids]
    assert len(set(ways)) == len(ways) and len(probes) == 2
    for way in ways:
        written = tokenizer.decode(way)
        assert canonical(find_answer(written, asked.formats).text) == "(1)"
    # None is the beginning of another: each ends the answer with its last token, and not before.
    assert not any(a != b and b[: len(a)] == a for a in ways for b in ways)


def test_answers_in_tags_are_found():
    asked = make(with_tags(), format="answer")
    tokenizer = asked.vocabulary.tokenizer
    for text, answer in [
        ("<think>so <answer>1</answer></think>\n<answer> 15 </answer>\n", "15"),
        ("<answer>14</answer> Wait, <answer>\n15\n</answer>", "15"),
        ("<answer>14 <answer>15</answer>", "15"),
        ("<answer>\\boxed{15}</answer>", "\\boxed{15}"),
        ("<answer>15", None),
        ("<answer> </answer>", None),
        ("\\boxed{15}", None),
    ]:
        found = asked.read(encode(tokenizer, text))
        assert (found and found.text) == answer
        if answer is not None:
            assert tokenizer.decode(encode(tokenizer, text)[: found.start + 3]).rpartition("<")[0] in text


@pytest.mark.parametrize("kind, name", [("byte_level", "plain"), ("sentencepiece_like", "hash")])
@pytest.mark.parametrize("end", [".\n\n", " \n", "$\n", "**\n"])
def test_what_models_write_between_an_answer_and_the_end_of_its_line_ends_it(kind, name, end):
    tokenizer = KINDS[kind].__wrapped__()
    tokenizer.add_tokens([AddedToken(end, normalized=False)])
    asked = make(tokenizer, format=name)
    (probe, *_) = asked.probes([1], [], [0, 9], [Proposal("15", 1.0)], name)
    assert token(tokenizer, end) in probe.closing_token_ids


@pytest.mark.parametrize("kind", REAL)
def test_the_ends_of_lines_that_real_vocabularies_hold_in_one_token(kind):
    asked = Elicitation(vocabulary(kind), parse({"elicitation": {"format": "plain"}}))
    (probe, *_) = asked.probes([1], [], [0, 9], [Proposal("15", 1.0)], "plain")
    found = {asked.vocabulary.texts[i] for i in probe.closing_token_ids}
    # A newline is a byte to sentencepiece: it is part of no other token.
    ends = {"\n"} if kind == "sentencepiece" else {"\n", "\n\n", ".\n", ".\n\n", "$\n", "**\n", "**\n\n"}
    assert ends <= found
    assert not {"5\n", ")\n", "}\n"} & found


def test_an_end_in_bytes_is_no_other_ones():
    """The dodo is four bytes to Mistral's sentencepiece; the last of another character ends nothing."""
    dodo = "\N{DODO}"
    custom = {"format": "custom", "opening": "\nx: ", "pattern": f"x: (.+?){dodo}", "closing": [dodo]}
    asked = Elicitation(vocabulary("sentencepiece"), parse({"elicitation": custom}))
    last = encode(asked.vocabulary.tokenizer, dodo)[-1]
    probes = asked.probes([1], [], [0, 9], [Proposal("15", 1.0)], "custom")
    written_out = [probe for probe in probes if len(probe.token_ids) > min(len(each.token_ids) for each in probes)]
    assert written_out and all(probe.closing_token_ids == (last,) for probe in written_out)


def test_a_box_may_end_with_what_is_no_part_of_its_answer():
    tokenizer = byte_level.__wrapped__()
    tokenizer.add_tokens([AddedToken(" }", normalized=False), AddedToken("7}", normalized=False)])
    (probe, *_) = make(tokenizer).probes([1], [], [0, 9], [Proposal("15", 1.0)], "boxed")
    assert token(tokenizer, " }") in probe.closing_token_ids
    assert token(tokenizer, "7}") not in probe.closing_token_ids


def test_the_ends_of_turns_are_those_of_model_tokenizer_and_usual_chats():
    tokenizer = byte_level.__wrapped__()
    chats = ["<end_of_turn>", "<|end|>", "<|return|>"]
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in [*chats, "<own>"]])
    own = token(tokenizer, "<own>")
    generation = SimpleNamespace(eos_token_id=[own, tokenizer.eos_token_id])
    ends = Vocabulary(tokenizer, ends=ends_of(generation, SimpleNamespace(eos_token_id=3), SimpleNamespace(), None))
    known = {tokenizer.decode([i]) for i in ends.end_of_sequence_ids()} - {tokenizer.decode([3])}
    assert known == {*chats, "<own>", "<|im_end|>", "<|endoftext|>"}
    asked = Elicitation(ends, parse({"elicitation": {"format": "plain"}}))
    (probe, *_) = asked.probes([1], [], [0, 9], [Proposal("15", 1.0)], "plain")
    assert {own, *(token(tokenizer, text) for text in chats)} <= set(probe.closing_token_ids)


def test_a_closing_that_the_tokenizer_cannot_write_is_refused_though_a_turn_could_end():
    custom = {"format": "custom", "opening": "\nResult: ", "pattern": "Result: (.+)", "closing": ["\n", "日"]}
    with pytest.raises(ValueError, match="elicitation.format=custom: this tokenizer cannot write \\['日'\\]"):
        make(sentencepiece_like(), **custom)
    assert make(byte_level(), **custom)


def test_a_custom_closing_of_several_tokens_counts_beside_the_end_of_the_turn():
    tokenizer = with_tags()
    custom = {"format": "custom", "opening": "\nx: ", "pattern": "x: (.+?)</b>", "closing": ["</b>"]}
    asked = make(tokenizer, **custom)
    assert not any(text.startswith("</b>") for text in asked.vocabulary.texts)
    ids = encode(tokenizer, "so 3")
    model = TableModel(len(tokenizer), habit=continued(tokenizer, "\nx: 15</b>"))
    assert read(asked, model, ids, "15") > 0.9
