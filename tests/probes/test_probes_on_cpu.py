"""Probes: what is appended to a trace, where it counts, what ends an answer, and which answers are tried."""

import asyncio
import dataclasses
import itertools
import math
import random

import pytest

from rredcot_verl.answers.grammar import canonical, find_answer
from rredcot_verl.config.schema import parse
from rredcot_verl.probes.elicitation import Elicitation, JoinError
from rredcot_verl.probes.proposals import Proposal, build_proposals
from rredcot_verl.probes.values import self_values
from rredcot_verl.probes.vocabulary import Vocabulary
from rredcot_verl.servers.client import PROBING_BACKENDS, make_probe_reader
from tests.passes.table_model import FakeServer, TableModel, utilities
from tests.probes.tiny_tokenizers import KINDS, byte_level, encode, sentencepiece_like, token

PROMPT = "What is 12 + 3?\n"
THINK = "<think>"


def elicitation(kind: str = "byte_level", **block) -> Elicitation:
    return Elicitation(Vocabulary(KINDS[kind]()), parse(block))


def probe_of(asked: Elicitation, prompt: str, response: str, answer: str = "15", name: str = "boxed", boundary=None):
    """The probe of the whole answer at a boundary (default: the response's end); ids of prompt and response."""
    tokenizer = asked.vocabulary.tokenizer
    prompt_ids, response_ids = encode(tokenizer, prompt), encode(tokenizer, response)
    boundary = len(response_ids) if boundary is None else boundary
    # The last boundary of a response is never probed; here it stands for one inside a longer response.
    boundaries = [boundary, len(response_ids) + 1]
    probes = asked.probes(prompt_ids, response_ids, boundaries, [Proposal(answer, 1.0)], name)
    first, *merged = probes
    assert len(merged) <= 1
    for probe in merged:
        # It differs in the answer's last token and in what ends it, nothing else.
        changes = {"token_ids": first.token_ids[:-1], "closing_token_ids": probe.closing_token_ids}
        assert probe == dataclasses.replace(first, **changes)
        assert not set(probe.closing_token_ids) & {first.token_ids[-1]} and probe.closing_token_ids
    return first, prompt_ids, response_ids


def texts(tokenizer, probe):
    return (
        tokenizer.decode(probe.token_ids[: probe.scored_from]),
        tokenizer.decode(probe.token_ids[probe.scored_from :]),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["boxed", "hash", "plain"])
@pytest.mark.parametrize("answer", ["15", "\\frac{1}{2}", "x + 1", "-3", "a, b"])
@pytest.mark.parametrize("response", ["First, 12 + 3 = 15.", "First, 12 + 3 = 15.\n", f"{THINK}so 3 but", ""])
def test_joins_preserve_the_text_and_the_prefix_is_never_encoded_again(kind, name, answer, response):
    asked = elicitation(kind)
    tokenizer = asked.vocabulary.tokenizer
    probe, prompt_ids, response_ids = probe_of(asked, PROMPT, response, answer, name)
    prefix = prompt_ids + response_ids
    assert probe.position == len(prefix)
    whole = tokenizer.decode(prefix + list(probe.token_ids))
    before = tokenizer.decode(prefix)
    assert whole.startswith(before)
    appended = whole[len(before) :]
    opening = asked.formats[name].opening
    if response.startswith(THINK):
        opening = "\n</think>\n\n" + opening.lstrip("\n")
    if before.endswith("\n"):
        opening = opening.lstrip("\n")
    assert appended == opening + asked.formats[name].lead + answer


def test_the_prefix_is_taken_as_generated_even_where_encoding_would_give_other_tokens():
    asked = elicitation()
    tokenizer = asked.vocabulary.tokenizer
    # "}" and "}" apart, where the tokenizer itself writes "}}".
    odd = [*encode(tokenizer, "{\\frac{1}{2"), token(tokenizer, "}"), token(tokenizer, "}")]
    assert encode(tokenizer, tokenizer.decode(odd)) != odd
    prompt_ids = encode(tokenizer, PROMPT)
    probe = asked.probes(prompt_ids, odd, [len(odd), 99], [Proposal("1", 1.0)], "boxed")[0]
    assert probe.position == len(prompt_ids) + len(odd)
    assert tokenizer.decode(probe.token_ids) == "\n\nThe final answer is \\boxed{1"


@pytest.mark.parametrize(
    "prompt, response, opening",
    [
        (PROMPT + THINK, "so 3", "\n</think>\n\nThe final answer is \\boxed{"),
        (PROMPT, THINK + "so 3", "\n</think>\n\nThe final answer is \\boxed{"),
        (PROMPT, THINK + "so 3\n", "</think>\n\nThe final answer is \\boxed{"),
        (PROMPT + THINK, "so</think> 3", "\n\nThe final answer is \\boxed{"),
        (PROMPT + THINK + "x</think>", "so 3", "\n\nThe final answer is \\boxed{"),
        (PROMPT, "so 3", "\n\nThe final answer is \\boxed{"),
    ],
    ids=["open_in_prompt", "open_in_response", "after_newline", "closed", "closed_in_prompt", "none"],
)
def test_an_open_thinking_block_is_closed(prompt, response, opening):
    asked = elicitation()
    probe, _, _ = probe_of(asked, prompt, response)
    assert asked.vocabulary.tokenizer.decode(probe.token_ids) == opening + "15"


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT.rstrip()])
def test_at_the_start_of_a_response_no_newline_is_due(prompt):
    asked = elicitation()
    probe, prompt_ids, _ = probe_of(asked, prompt, "so 3.", boundary=0)
    assert probe.position == len(prompt_ids)
    assert asked.vocabulary.tokenizer.decode(probe.token_ids) == "The final answer is \\boxed{15"


def test_thinking_is_judged_at_each_boundary_not_at_the_end():
    asked = elicitation()
    tokenizer = asked.vocabulary.tokenizer
    response_ids = encode(tokenizer, THINK + "so 3</think> 15")
    close = response_ids.index(token(tokenizer, "</think>"))
    assert asked.landmarks([], response_ids) == ([], [close])
    assert asked.landmarks([], response_ids[:close]) == ([], [])
    boundaries = [0, close, close + 1, len(response_ids)]
    found = asked.probes(encode(tokenizer, PROMPT), response_ids, boundaries, [Proposal("1", 1.0)], "plain")
    assert ["</think>" in tokenizer.decode(b.token_ids) for b in found] == [False, True, False]
    assert [b.state for b in found] == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, opened", [("boxed", "so 3 \\boxed{"), ("hash", "so\n####"), ("plain", "so\nAnswer:")])
def test_after_an_opening_only_the_answer_is_forced(kind, name, opened):
    asked = elicitation(kind)
    tokenizer = asked.vocabulary.tokenizer
    prefix, whole = encode(tokenizer, opened), encode(tokenizer, opened + asked.formats[name].lead + "15")
    assert whole[: len(prefix)] == prefix
    (probe, *_) = asked.probes([], whole, [len(prefix), 99], [Proposal("15", 1.0)], name)
    assert list(probe.token_ids) == whole[len(prefix) :] and probe.answer_from == probe.scored_from == 0
    assert asked.landmarks([], whole) == ([len(prefix) - 1], [])
    # So too where others are asked in another format; while thinking it is no opening.
    other = {"boxed": "plain", "plain": "hash", "hash": "boxed"}[name]
    assert asked.probes([], whole, [len(prefix), 99], [Proposal("15", 1.0)], other)[0] == probe
    thinking = encode(tokenizer, THINK)
    (probe, *_) = asked.probes(thinking, whole, [len(prefix), 99], [Proposal("15", 1.0)], name)
    assert probe.answer_from > 0
    assert asked.landmarks(thinking, whole) == ([], [])


def test_an_answer_that_would_have_joined_with_the_opening_is_forced_as_it_can_still_be_written():
    """The response has written "{" alone, so the model goes on with other tokens than those it would have taken."""
    asked, tokenizer = elicitation(), byte_level()
    prefix, half = encode(tokenizer, "so 3 \\boxed{"), "\\frac{1}{2}"
    proposals = [Proposal("15", 1.0), Proposal(half, 1.0)]
    found = asked.probes([], prefix, [len(prefix), 99], proposals, "boxed")
    assert [tokenizer.decode(probe.token_ids) for probe in found] == ["15", half, half[:-1]]
    assert {probe.scored_from for probe in found} == {0}


def test_after_an_opening_all_answers_are_forced_there_or_none(monkeypatch):
    asked, tokenizer = elicitation(), byte_level()
    prefix, proposals = encode(tokenizer, "so 3 \\boxed{"), [Proposal("15", 1.0), Proposal("16", 1.0)]

    def forced() -> list[str]:
        return [
            tokenizer.decode(probe.token_ids)
            for probe in asked.probes([], prefix, [len(prefix), 99], proposals, "boxed")
        ]

    assert forced() == ["15", "16"]
    encode_text = asked._continue_text

    def refuse(text: str) -> list[int]:
        if text.endswith("\\boxed{16") and not text.startswith("\n"):
            raise JoinError
        return encode_text(text)

    monkeypatch.setattr(asked, "_continue_text", refuse)
    assert forced() == ["\n\nThe final answer is \\boxed{15", "\n\nThe final answer is \\boxed{16"]


def test_how_the_response_goes_on_changes_no_probe():
    asked, tokenizer = elicitation(), elicitation().vocabulary.tokenizer
    prefix = encode(tokenizer, "so 3 but")
    found = {
        tuple(asked.probes([], prefix + encode(tokenizer, rest), [len(prefix), 99], [Proposal("15", 1.0)], "boxed"))
        for rest in (" \\boxed{15}", " so\n\\boxed{4}", ", Answer: 15", "</think>")
    }
    assert len(found) == 1


def test_the_answer_is_read_with_its_format_and_first_token():
    asked = elicitation()
    tokenizer = asked.vocabulary.tokenizer
    ids = encode(tokenizer, "so 3.\n\\boxed{\\frac{1}{2}}.\n")
    read = asked.read(ids)
    assert (read.format, read.text) == ("boxed", "\\frac{1}{2}")
    assert tokenizer.decode(ids[: read.start]) == "so 3.\n"
    assert asked.read(encode(tokenizer, "so 3.")) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["boxed", "hash", "plain"])
def test_only_the_answer_counts_unless_the_opening_is_scored_too(kind, name):
    asked = elicitation(kind)
    probe, _, _ = probe_of(asked, PROMPT, "so 3.", name=name)
    tokenizer = asked.vocabulary.tokenizer
    given, counted = texts(tokenizer, probe)
    assert tokenizer.decode(probe.token_ids[probe.answer_from :]).strip() == "15"
    # What is given ends where the first token starts that could hold the opening's end and more.
    opening = asked.formats[name].opening + asked.formats[name].lead
    anchor = encode(tokenizer, "so 3.")
    texts_of = [tokenizer.decode([*anchor, token_id]).removeprefix("so 3.") for token_id in range(len(tokenizer))]
    crossing = min(
        place
        for place in range(len(opening))
        for text in texts_of
        if text != opening[place:] and text.startswith(opening[place:])
    )
    first = len(tokenizer.decode(anchor + list(probe.token_ids[: probe.scored_from + 1]))) - len("so 3.")
    assert len(given) <= crossing < first and counted
    scored = elicitation(kind, self_value={"score_opening": True})
    other, _, _ = probe_of(scored, PROMPT, "so 3.", name=name)
    # The answer starts where it starts, whatever counts.
    assert other.scored_from == 0 and other == dataclasses.replace(probe, scored_from=0)


def test_an_opening_that_merges_with_the_answer_counts_from_the_merged_token():
    asked = elicitation()
    tokenizer = asked.vocabulary.tokenizer
    assert "{\\" in tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    probe, _, _ = probe_of(asked, PROMPT, "so 3.", answer="\\frac{1}{2}")
    given, counted = texts(tokenizer, probe)
    assert given.endswith("\\boxed") and counted == "{\\frac{1}{2}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["boxed", "hash", "plain"])
def test_the_tokens_that_end_an_answer_are_those_after_which_it_is_found_whatever_follows(kind, name):
    asked = elicitation(kind)
    tokenizer = asked.vocabulary.tokenizer
    probe, _, _ = probe_of(asked, PROMPT, "so 3.", name=name)
    found = {tokenizer.decode([i]) for i in probe.closing_token_ids}
    form = asked.formats[name]
    expected = set()
    for text in (tokenizer.decode([i]) for i in range(len(tokenizer))):
        answers = [
            find_answer(f"so\n{form.marker}{form.lead}15{text}{rest}", {name: form}) for rest in ("7}\n", "\\x}\n")
        ]
        if all(answer is not None and canonical(answer.text) == "15" for answer in answers):
            expected.add(text)
    if name != "boxed":
        expected |= {tokenizer.decode([i]) for i in asked.vocabulary.end_of_sequence_ids()}
    assert found == expected
    assert len(set(probe.closing_token_ids)) == len(probe.closing_token_ids)
    if kind == "byte_level" and name == "boxed":
        assert {"}", "}.\n"} <= found


def test_closing_tokens_seen_in_responses_come_first():
    asked = elicitation()
    tokenizer = asked.vocabulary.tokenizer
    before = probe_of(asked, PROMPT, "so 3.")[0].closing_token_ids
    assert tokenizer.decode([before[0]]) == "}"
    for _ in range(2):
        asked.remember(asked.read(encode(tokenizer, "\\boxed{15}.\n")))
    asked.remember(asked.read([*encode(tokenizer, "\\boxed{15"), token(tokenizer, "}")]))
    after = probe_of(asked, PROMPT, "so 3.")[0].closing_token_ids
    assert [tokenizer.decode([i]) for i in after[:2]] == ["}.\n", "}"]
    assert sorted(after) == sorted(before)


def ids_starting_with(tokenizer, start: str) -> list[int]:
    return [i for i in range(len(tokenizer)) if tokenizer.decode([i]).startswith(start)]


def test_an_answer_that_ends_in_a_brace_counts_as_the_model_writes_it():
    """The probability of `\\boxed{\\frac{1}{2}}` as the tokenizer writes it must be part of some probe."""
    asked = elicitation()
    tokenizer = asked.vocabulary.tokenizer
    natural = encode(tokenizer, "\n\nThe final answer is \\boxed{\\frac{1}{2}}")
    assert tokenizer.decode(natural[-1:]) == "}}"
    ids = encode(tokenizer, "so 3.")
    probes = asked.probes(encode(tokenizer, PROMPT), ids, [0, len(ids), 99], [Proposal("\\frac{1}{2}", 1.0)], "boxed")
    assert [probe.state for probe in probes] == [0, 0, 1, 1]
    ways = [(*probe.token_ids, end) for probe in probes[2:] for end in probe.closing_token_ids]
    assert tuple(natural) in ways
    # Each way to write it counts once, and each writes the answer and its end.
    assert len(set(ways)) == len(ways)
    assert all(canonical(find_answer(tokenizer.decode(way), asked.formats).text) == "\\frac{1}{2}" for way in ways)
    for probe, ends in zip(probes, ["}", "}}"] * 2, strict=True):
        assert set(ids_starting_with(tokenizer, ends)) <= set(probe.closing_token_ids)
    assert len(probes[1].closing_token_ids) > 1


@pytest.mark.parametrize("backend", PROBING_BACKENDS)
@pytest.mark.parametrize("score_opening", [False, True])
def test_the_probability_of_an_answer_that_ends_in_a_brace_is_the_full_one(backend, score_opening):
    block = {"max_closing_tokens": 64, "score_opening": score_opening}
    asked = elicitation(self_value=block)
    tokenizer = asked.vocabulary.tokenizer
    opening, answer = "\n\nThe final answer is \\boxed{", "\\frac{1}{2}"
    natural = encode(tokenizer, opening + answer + "}")
    # A model that nearly always writes what the tokenizer would: "}}" after "2", never "}" and "}".
    model = TableModel(len(tokenizer), habit=natural)
    prompt_ids, ids = encode(tokenizer, PROMPT), encode(tokenizer, "First, so 3.")
    proposals = [Proposal(answer, 1.0), Proposal("15", 0.5)]
    # The second answer comes first in the list, but it has one probe a boundary only.
    probes = asked.probes(prompt_ids, ids, [1, len(ids), 99], proposals[::-1], "boxed")
    assert [(probe.state, probe.proposal) for probe in probes] == [(0, 0), (0, 1), (0, 1), (1, 0), (1, 1), (1, 1)]
    reader = make_probe_reader(backend, FakeServer(model).generate, asked.config.self_value, 1.0)
    scores = asyncio.run(reader.read("request-1", prompt_ids + ids, probes)).scores

    def probability(prefix: list[int], forced: list[int], start: int, ends: str) -> float:
        closing = model.any_of([*prefix, *forced], ids_starting_with(tokenizer, ends))
        return math.exp(sum(model.sequence(prefix, forced)[start:]) + closing)

    for form in ("joint", "geometric"):
        found = self_values(form, probes, scores, utilities(proposals[::-1]))
        for value, boundary in zip(found.tolist(), (1, len(ids)), strict=True):
            prefix = prompt_ids + ids[:boundary]
            whole = encode(tokenizer, opening + answer)
            # The answer's first token holds the opening's last brace too.
            start = 0 if score_opening else len(encode(tokenizer, opening)) - 1
            assert tokenizer.decode(whole[:start]) in ("", opening[:-1])
            apart, merged = probability(prefix, whole, start, "}"), probability(prefix, whole[:-1], start, "}}")
            fifteen = encode(tokenizer, opening + "15")
            first = 0 if score_opening else len(encode(tokenizer, opening))
            other = probability(prefix, fifteen, first, "}")
            # Nearly all of it is in the merged token.
            assert apart < 1e-2 * merged and merged > 0.5
            if form == "joint":
                assert value == pytest.approx(apart + merged + 0.5 * other, rel=1e-5)
            else:
                lengths = len(whole) - start + 1, len(fifteen) - first + 1
                expected = max((apart + merged) ** (1 / lengths[0]), 0.5 * other ** (1 / lengths[1]))
                assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind, name, answer", [("byte_level", "boxed", "15"), ("byte_level", "plain", "15")])
def test_an_answer_that_no_token_joins_to_its_end_has_one_probe(kind, name, answer):
    asked = elicitation(kind)
    prompt_ids = encode(asked.vocabulary.tokenizer, PROMPT)
    assert len(asked.probes(prompt_ids, [], [0, 9], [Proposal(answer, 1.0)], name)) == 1


def test_merged_closing_tokens_seen_in_responses_come_first_too():
    asked = elicitation()
    tokenizer = asked.vocabulary.tokenizer
    rare = asked.probes([], [], [0, 9], [Proposal("\\frac{1}{2}", 1.0)], "boxed")[1].closing_token_ids[-1]
    for _ in range(2):
        asked.remember(asked.read([*encode(tokenizer, "\\boxed{\\frac{1}{2"), rare]))
    again = asked.probes([], [], [0, 9], [Proposal("\\frac{1}{2}", 1.0)], "boxed")
    assert again[0].closing_token_ids[0] == rare
    assert again[1].closing_token_ids[0] == rare


@pytest.mark.parametrize(
    "kind, answer, expected",
    [
        ("sentencepiece_like", "日本", False),
        ("sentencepiece_like", "15", True),
        ("byte_level", "日本", True),
        ("byte_level", "\\frac{1}{2}", True),
    ],
)
def test_whether_an_answer_can_be_written_is_known_before(kind, answer, expected):
    asked = elicitation(kind)
    assert {asked.can_append(answer, name) for name in asked.formats} == {expected}
    if expected:
        probe_of(asked, PROMPT, "so 3.", answer=answer)
    else:
        with pytest.raises(JoinError, match=f"cannot continue a prefix with .*{answer}"):
            probe_of(asked, PROMPT, "so 3.", answer=answer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ["15", "-3", "x + 1", "日本", "é", "\\boxed{}", "}", "</think>", "a\tb"])
def test_an_answer_that_can_be_written_can_be_written_at_every_boundary(kind, answer):
    asked = elicitation(kind)
    tokenizer = asked.vocabulary.tokenizer
    for name in asked.formats:
        if not asked.can_append(answer, name):
            continue
        for response in ("so 3.", "so 3.\n", THINK + "so 3", THINK + "so 3\n"):
            ids = encode(tokenizer, response)
            proposals = [Proposal(answer, 1.0)]
            probe = asked.probes(encode(tokenizer, PROMPT), ids, [len(ids), 99], proposals, name)[0]
            assert tokenizer.decode(ids + list(probe.token_ids)).endswith(answer)


def test_an_opening_that_cannot_be_appended_is_refused_at_the_start():
    """With a dummy space after every special token, the text after `</think>` cannot be written."""
    vocabulary = Vocabulary(sentencepiece_like("always"))
    with pytest.raises(JoinError, match="cannot continue a prefix with .*</think>.*elicitation.format=custom"):
        Elicitation(vocabulary, parse({}))
    assert issubclass(JoinError, ValueError)
    # A tag of ordinary tokens can be followed.
    asked = Elicitation(vocabulary, parse({"elicitation": {"think_close": "</reasoning>"}}))
    probe, _, _ = probe_of(asked, PROMPT + THINK, "so 3")
    assert vocabulary.tokenizer.decode(probe.token_ids).endswith("\\boxed{15")


@pytest.mark.parametrize("opening", ["\n\n日本: ", "日本: "])
def test_a_custom_opening_that_cannot_be_written_is_refused_at_the_start(opening):
    custom = {"format": "custom", "opening": opening, "pattern": "日本: (.+)", "closing": [";"]}
    with pytest.raises(JoinError, match="日本"):
        elicitation("sentencepiece_like", elicitation=custom)


def test_format_to_ask_in():
    asked = elicitation()
    tokenizer = asked.vocabulary.tokenizer
    assert asked.usual_format() == "boxed"
    for text in ("#### 1", "#### 2", "\\boxed{3}", "no answer"):
        asked.remember(asked.read(encode(tokenizer, text)))
    assert asked.usual_format() == "hash"
    # Equally often seen: not the one that came last, or first.
    asked.remember(asked.read(encode(tokenizer, "\\boxed{3}")))
    assert asked.usual_format() == "boxed"


def test_one_probe_for_each_boundary_and_answer_in_order():
    asked = elicitation()
    tokenizer = asked.vocabulary.tokenizer
    prompt_ids, ids = encode(tokenizer, PROMPT), encode(tokenizer, "First, 12 + 3 = 15.\n")
    proposals = [Proposal("15", 1.0), Proposal("16", 0.0)]
    found = asked.probes(prompt_ids, ids, [0, 3, len(ids)], proposals, "boxed")
    assert [(b.state, b.proposal) for b in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [b.position - len(prompt_ids) for b in found] == [0, 0, 3, 3]


def test_a_custom_format():
    custom = {"format": "custom", "opening": "\nResult: ", "pattern": r"Result: ([^;\n]+)", "closing": [";"]}
    asked = elicitation(elicitation=custom)
    tokenizer = asked.vocabulary.tokenizer
    probe, _, _ = probe_of(asked, PROMPT, "so 3.", name="custom")
    assert tokenizer.decode(probe.token_ids) == "\nResult: 15"
    ends = {tokenizer.decode([i]) for i in probe.closing_token_ids}
    assert ";" in ends and "<|im_end|>" in ends and "}" not in ends


def test_a_format_that_no_token_can_end_is_refused():
    custom = {"format": "custom", "opening": "\nResult: ", "pattern": "Result: (.+)", "closing": ["日"]}
    tokenizer = KINDS["sentencepiece_like"]()
    with pytest.raises(ValueError, match="this tokenizer cannot write \\['日'\\]"):
        Elicitation(Vocabulary(tokenizer), parse({"elicitation": custom}))


# --- which answers ----------------------------------------------------------------------------------------------------


def proposals(ground_truth, members, **self_value):
    return [(p.text, p.utility) for p in build_proposals(parse({"self_value": self_value}), ground_truth, members)]


MEMBERS = [("7", 0.0), ("8", 1.0), ("8.", 1.0), (" $8$", 0.0), ("9", 0.5), ("1,000", 0.0), ("9", 0.5)]


def test_reference_answers_only():
    assert proposals("1,234", MEMBERS) == [("1234", 1.0)]
    assert proposals(["4", "four"], MEMBERS) == [("4", 1.0), ("four", 1.0)]
    assert proposals(None, MEMBERS) == proposals({"tests": []}, MEMBERS) == []


def test_the_groups_own_answers_merged_with_their_mean_utility():
    assert proposals(None, MEMBERS, proposals="group") == [("8", pytest.approx(2 / 3)), ("9", 0.5)]
    # The ground truth is not looked at.
    assert proposals("5", MEMBERS, proposals="group")[0][0] == "8"
    assert proposals("5", [("7", 0.0)], proposals="group") == []
    assert proposals("5", [], proposals="group") == []


def test_union_keeps_the_references_utility():
    assert proposals("9.", MEMBERS, proposals="union") == [("9", 1.0), ("8", pytest.approx(2 / 3))]
    assert proposals(None, MEMBERS, proposals="union")[0][0] == "8"


def test_the_budget_keeps_the_most_useful():
    members = [(str(n), n / 10) for n in range(1, 10)]
    found = proposals("0", members, proposals="union", max_proposals=3)
    assert found == [("0", 1.0), ("9", 0.9), ("8", 0.8)]
    # Of equal utility, the more frequent.
    assert proposals(None, [("1", 1.0), ("2", 1.0), ("2", 1.0)], proposals="group", max_proposals=1) == [("2", 1.0)]


def test_normalized_keeps_a_wrong_answer_to_compare_with():
    useful = [(str(n), 1.0) for n in range(5)]
    wrong = [("x", 0.0), ("y", 0.0), ("y", 0.0)]
    found = proposals(None, useful + wrong, proposals="group", form="normalized", max_proposals=3)
    assert [utility for _, utility in found] == [1.0, 1.0, 0.0] and found[2][0] == "y"
    # Room left over goes to more wrong ones; nothing useful: nothing to probe.
    assert len(proposals(None, useful[:1] + wrong, proposals="group", form="normalized", max_proposals=4)) == 3
    assert proposals(None, wrong, proposals="group", form="normalized") == []
    # Other forms gain nothing from a wrong one.
    assert proposals(None, useful[:1] + wrong, proposals="group") == [("0", 1.0)]


def spelled(references, others, members=(), **self_value):
    config = parse({"self_value": self_value})
    return [(p.text, p.utility) for p in build_proposals(config, references, members, others=others)]


def test_spellings_of_others_follow_the_answers_the_most_frequent_first():
    others = [("\\dfrac{1}{2}", 1.0), ("$1/2$", 1.0), (" 0.5", 1.0), ("0.5", 1.0), ("\\frac{1}{2}", 1.0), ("7", 0.0)]
    expected = [("\\frac{1}{2}", 1.0), ("0.5", 1.0), ("$1/2$", 1.0), ("\\dfrac{1}{2}", 1.0)]
    assert spelled("\\frac{1}{2}", others) == expected == spelled("\\frac{1}{2}", others[::-1])
    # In the room that distinct answers leave.
    assert spelled("\\frac{1}{2}", others, max_proposals=2) == expected[:2]
    assert spelled(["\\frac{1}{2}", "one half"], others, max_proposals=2) == [expected[0], ("one half", 1.0)]
    assert spelled("1234", [("1,234", 1.0), ("$1234$", 1.0)]) == [("1234", 1.0), ("$1234$", 1.0), ("1,234", 1.0)]
    # Nothing to spell.
    assert spelled(None, others) == []


def test_only_what_the_verifier_counts_as_the_same_is_a_spelling():
    # The same text to us and wrong to the verifier; half right; more than a line.
    assert spelled("8", [("$8$", 0.0), ("8.0", 0.5), ("$$\n8\n$$", 1.0)]) == [("8", 1.0)]
    # The group's answers have spellings of their own, by our canonical form alone.
    members = [("9", 0.5), ("8", 1.0), ("7", 0.0)]
    others = [*members, ("$9$", 0.5), ("8.0", 1.0), ("8.", 1.0), ("$7$", 0.0), ("9.", 0.0)]
    assert spelled(None, others, members, proposals="group", max_proposals=9) == [
        *(("8", 1.0), ("9", 0.5)),
        *(("$9$", 0.5), ("8.", 1.0)),
    ]
    compared = spelled(None, others, members, proposals="group", form="normalized", max_proposals=9)
    assert compared == [("8", 1.0), ("9", 0.5), ("7", 0.0), ("$7$", 0.0), ("$9$", 0.5), ("8.", 1.0)]


def test_a_program_has_no_other_spelling():
    config = parse({"elicitation": {"format": "code"}, "self_value": {"reference_key": "extra_info.solutions"}})
    assert len(build_proposals(config, ["a = 1"], [], others=[("a  = 1", 1.0), ("b = 1", 1.0)])) == 1


# Ends that hold an answer's last character too, and one that goes on as another answer.
ENDS = {
    "elicitation": {
        "format": "custom",
        "opening": "\nResult: ",
        "pattern": "Result: (.+)",
        "closing": ["\n", ".", " = "],
    }
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [{}, ENDS])
@pytest.mark.parametrize("seed", range(5))
def test_no_sequence_of_tokens_is_part_of_two_probes(kind, block, seed):
    rng, asked = random.Random(seed), elicitation(kind, **block)
    texts_of = ["15", "15.", "15. = 4", "1", "15.5", "$15$", "15}", "15}}", "15} = 4", "\\frac{1}{2}", "15\n", "15.}"]
    proposals = [Proposal(text, 1.0) for text in rng.sample(texts_of, 8)]
    for name in asked.formats:
        known = [each for each in proposals if asked.can_append(each.text, name)]
        for prefix in ("so 3.", asked.formats[name].marker):
            ids = encode(asked.vocabulary.tokenizer, prefix)
            probes = asked.probes([], ids, [len(ids), 99], known, name)
            ways = sorted((*probe.token_ids, end) for probe in probes for end in probe.closing_token_ids)
            assert ways and not any(after[: len(way)] == way for way, after in itertools.pairwise(ways))
            # What the first one counts is counted.
            assert probes[0].proposal == 0 and (*probes[0].token_ids, probes[0].closing_token_ids[0]) in ways
