"""Programs as answers: the final fenced block, how it is asked for at a prefix, and which programs are tried."""

import time

import pytest

from rredcot_verl.answers.grammar import PROGRAM, find_answer, formats_of, look_up, reference_answers
from rredcot_verl.answers.program import canonical_program, open_fence
from rredcot_verl.config.blocks import GROUND_TRUTH
from rredcot_verl.config.schema import parse
from rredcot_verl.probes.elicitation import Elicitation
from rredcot_verl.probes.proposals import Proposal, build_proposals
from rredcot_verl.probes.vocabulary import Vocabulary
from tests.probes.tiny_tokenizers import KINDS, byte_level, encode

CODE = {"elicitation": {"format": "code"}, "self_value": {"reference_key": "extra_info.solutions", "form": "geometric"}}
PROGRAM_TEXT = "def f(x):\n    return x + 1\n"
RESPONSE = f"Add one.\n\n```python\n{PROGRAM_TEXT}```\n"


def found(text: str) -> str | None:
    answer = find_answer(text, formats_of(parse(CODE).elicitation))
    return answer and answer.text


@pytest.mark.parametrize(
    "text, program",
    [
        (RESPONSE, PROGRAM_TEXT),
        ("```py\na = 1\n```", "a = 1\n"),
        ("```Python\na = 1\n```", "a = 1\n"),
        ("```\na = 1\n```", "a = 1\n"),
        ("  ```python\na = 1\n  ```", "a = 1\n"),
        # The last one counts, and a block of another language is none.
        ("```python\na = 1\n```\nno:\n```python\na = 2\n```\n", "a = 2\n"),
        ("```python\na = 1\n```\nIt prints\n```text\n1\n```\n", "a = 1\n"),
        # An unfinished block is no answer; one opened inside another takes its place.
        ("```python\na = 1\n```\n```python\na = 2\n", "a = 1\n"),
        ("```python\na = 1\n\n```python\na = 2\n```", "a = 2\n"),
        ("```python\na = 1", None),
        ("```python\n\n```", None),
        ("```python\n```", None),
        ("Use ```python code``` here.", None),
        ("no code", None),
        ("", None),
        ("\\boxed{15}", None),
    ],
)
def test_the_program_is_the_last_complete_block(text, program):
    assert found(text) == program


def test_the_span_leads_back_to_the_text():
    start, answer_start, end = PROGRAM.find(RESPONSE)
    assert RESPONSE[start:].startswith("```python") and RESPONSE[answer_start:end] == PROGRAM_TEXT
    assert RESPONSE[end:].startswith("```")


def test_programs_are_looked_for_only_where_asked_for():
    assert "code" not in formats_of(parse({}).elicitation)


@pytest.mark.parametrize(
    "text, fence",
    [
        ("<think>```python\na</think>\nb", ""),
        ("", ""),
        ("a\n```python\nb = 1\n", "```"),
        ("```python\nb\n```\n", ""),
        ("```python\nb\n```python\n", "```"),
        ("````python\nb\n```\n", "````"),
        ("- ~~~\n  b\n", "~~~"),
        ("so: ```python", "```"),
    ],
)
def test_open_fence(text, fence):
    assert open_fence(text, "</think>") == fence


def test_a_response_of_many_fences_is_searched_quickly():
    for text in (
        "```" + "a" * 50_000 + "`",
        "```" + " " * 50_000 + "`",
        "```python\n" * 20000,
        "```\n" * 20001,
        "`" * 100_000,
        " " * 100_000 + "```",
    ):
        started = time.process_time()
        PROGRAM.find(text), open_fence(text, "</think>")
        # Half a second of fences, less than a twentieth of all else; quadratic search takes minutes.
        assert time.process_time() - started < 20


@pytest.mark.parametrize(
    "program, expected",
    [
        ("\n\na = 1  \n\n  b\n\n", "a = 1\n\n  b\n"),
        ("    return 1", "    return 1\n"),
        ("a = '$1,000.'", "a = '$1,000.'\n"),
        (" \n\t\n", ""),
        ("", ""),
    ],
)
def test_canonical_program(program, expected):
    assert canonical_program(program) == expected
    assert canonical_program(expected) == expected


def opened(response: str, boundary_text: str, kind: str = "byte_level", **elicitation) -> tuple[str, str]:
    """What a probe of PROGRAM_TEXT appends after `boundary_text`: the opening, and the program."""
    asked = Elicitation(Vocabulary(KINDS[kind]()), parse(CODE | {"elicitation": {"format": "code", **elicitation}}))
    tokenizer = asked.vocabulary.tokenizer
    prefix, rest = encode(tokenizer, boundary_text), encode(tokenizer, response.removeprefix(boundary_text))
    ids = prefix + rest
    probe, *_ = asked.probes([], ids, [len(prefix), len(ids) + 1], [Proposal(PROGRAM_TEXT, 1.0)], "code")
    assert probe.position == len(prefix)
    before = tokenizer.decode(prefix)
    given = tokenizer.decode(prefix + list(probe.token_ids[: probe.answer_from])).removeprefix(before)
    whole = tokenizer.decode(prefix + list(probe.token_ids)).removeprefix(before)
    assert all(asked.vocabulary.texts[i].startswith("`") for i in probe.closing_token_ids)
    return given, whole.removeprefix(given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "prefix, opening",
    [
        # While reasoning; after a line; where the response opens its own program.
        ("Add", "\n\n```python\n"),
        ("Add one.\n", "```python\n"),
        ("Add one.\n\n", "```python\n"),
        # Inside the program: the block is closed first, then the whole program is asked for.
        ("Add one.\n\n```python\ndef f(x):\n", "```\n\n```python\n"),
        ("Add one.\n\n```python\ndef f(x)", "\n```\n\n```python\n"),
        # After it.
        (RESPONSE, "```python\n"),
    ],
)
def test_a_program_is_asked_for_at_any_prefix(kind, prefix, opening):
    assert opened(RESPONSE + "x" * (prefix == RESPONSE), prefix, kind) == (opening, PROGRAM_TEXT)


def test_a_draft_in_an_open_thinking_block_is_closed_with_it():
    response = "<think>try\n```python\na = 1\n```\nso</think>\n" + RESPONSE
    assert opened(response, "<think>try")[0] == "\n</think>\n\n```python\n"
    assert opened(response, "<think>try\n```python\na")[0] == "\n```\n\n</think>\n\n```python\n"
    assert opened(response, "<think>try\n```python\na = 1\n```\n")[0] == "</think>\n\n```python\n"


def test_a_draft_left_open_in_the_thinking_block_ends_with_it():
    response = "<think>try\n```python\na = 1\nno</think>\n" + RESPONSE
    assert opened(response, "<think>try\n```python\na = 1\nno</think>\nAdd")[0] == "\n\n```python\n"
    assert opened(response, response.removesuffix(f"```python\n{PROGRAM_TEXT}```\n"))[0] == "```python\n"


def test_a_block_is_closed_by_a_fence_as_it_was_opened_with():
    response = f"Try.\n~~~~\na = 1\n~~~~\n````python\n{PROGRAM_TEXT}````\n"
    assert opened(response, "Try.\n~~~~\na")[0] == "\n~~~~\n\n```python\n"
    assert opened(response, "Try.\n~~~~\na = 1\n~~~~\n````python\ndef f(x):\n")[0] == "````\n\n```python\n"


def test_every_line_of_a_program_is_probed_as_in_a_sequence_of_its_own():
    """Boundaries decoded piece by piece know an open block as well as whole prefixes do."""
    asked = Elicitation(Vocabulary(byte_level()), parse(CODE))
    ids = encode(byte_level(), RESPONSE + "and\n~~~~\nmore\n~~~~\n")
    boundaries = list(range(len(ids) + 1))
    together = asked._open_fences(ids, boundaries, "code")
    assert together == [open_fence(asked.vocabulary.decode(ids[:k]), "</think>") for k in boundaries[:-1]]
    assert set(together) >= {"```", "~~~~", ""}


def programs(references, members, **self_value):
    block = {"elicitation": {"format": "code"}, "self_value": {"reference_key": "extra_info.solutions", **self_value}}
    return [(p.text, p.utility) for p in build_proposals(parse(block), references, members)]


def test_proposals_are_the_reference_solutions_and_the_groups_programs():
    members = [("a = 1\n", 1.0), ("a = 1  \n\n", 1.0), ("a  = 1\n", 0.5), ("b\n", 0.0)]
    assert programs(["x = 2"], members) == [("x = 2\n", 1.0)]
    # The fraction of tests passed is the utility; blanks inside a line make another text.
    expected = [("x = 2\n", 1.0), ("a = 1\n", 1.0), ("a  = 1\n", 0.5)]
    assert programs(["x = 2"], members, proposals="union") == expected
    assert programs(None, members, proposals="group") == expected[1:]
    assert programs(["x = 2"], members, proposals="union", max_proposals=2) == expected[:2]


def test_the_tests_of_a_row_are_not_taken_for_a_program():
    with pytest.raises(ValueError, match="reward_model.ground_truth holds tests, not a program; set self_value.refere"):
        parse({"elicitation": {"format": "code"}})
    parse({"elicitation": {"format": "code"}, "self_value": {"proposals": "group"}})
    parse(CODE)


def test_look_up():
    row = {"reward_model": {"ground_truth": "15"}, "extra_info": {"solutions": ["a"]}, "text": "b"}
    assert look_up(row, GROUND_TRUTH) == "15"
    assert look_up(row, "extra_info.solutions") == ["a"] and look_up(row, "text") == "b"
    assert look_up(row, "extra_info.nothing") is None and look_up(row, "text.deeper") is None
    assert reference_answers(look_up(row, "nothing.at.all")) == []
