"""Final answers in text."""

import time

import pytest

from rredcot_verl.config.schema import ElicitationConfig, parse
from rredcot_verl.scoring.answers import BOXED, BUILT_IN, canonical, find_answer, formats_of, reference_answers


@pytest.mark.parametrize(
    "text, answer, name",
    [
        ("so \\boxed{15}.", "15", "boxed"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", "boxed"),
        ("\\boxed{1} no, \\boxed{2} then", "2", "boxed"),
        ("\\boxed{7} and then \\boxed{8", "7", "boxed"),
        ("\\boxed{\\boxed{5}}", "5", "boxed"),
        ("\\boxed{a\nb}", "a\nb", "boxed"),
        ("3 + 4 = 7\n#### 7", "7", "hash"),
        ("#### 1\n#### 1,234  \nbye", "1,234", "hash"),
        ("The answer: 4 apples\n", "4 apples", "plain"),
        ("Answer: 4\nAnswer:\t5", "5", "plain"),
        # `auto` prefers a box, wherever it stands.
        ("Answer: \\boxed{4}", "4", "boxed"),
        ("\\boxed{4}\n#### 5\nAnswer: 6", "4", "boxed"),
        ("Answer: 6\n#### 5", "5", "hash"),
    ],
)
def test_the_last_answer_is_found(text, answer, name):
    found = find_answer(text, dict(BUILT_IN))
    assert found is not None and (found.text, found.format) == (answer, name)
    assert text[found.answer_start : found.end] == answer
    assert text[found.start :].startswith(BUILT_IN[name].marker) or name == "plain"
    assert found.start < found.answer_start <= found.end <= len(text)


@pytest.mark.parametrize(
    "text", ["", "no answer", "\\boxed{", "\\boxed{}", "\\boxed{ }", "####", "#### \n5", "Answer:\n5", "myanswer: 5"]
)
def test_there_may_be_no_answer(text):
    assert find_answer(text, dict(BUILT_IN)) is None


def test_one_format_only_and_a_custom_one():
    text = "#### 4\nResult: 12 km; done"
    assert find_answer(text, formats_of(ElicitationConfig(format="boxed"))) is None
    config = ElicitationConfig(format="custom", opening="\nResult: ", pattern=r"Result: ([^;]+)", closing=(";",))
    formats = formats_of(config)
    found = find_answer(text, formats)
    assert (found.text, found.format, text[found.start : found.answer_start]) == ("12 km", "custom", "Result: ")
    custom = formats["custom"]
    # The answer's own first token would hold the space.
    assert (custom.opening, custom.marker, custom.lead, custom.closing) == ("\nResult:", "Result:", " ", (";",))
    assert custom.ends_at_eos


@pytest.mark.parametrize("pattern, message", [("Result: (", "not a regular expression"), ("Result: .+", "in a group")])
def test_a_faulty_pattern_is_named(pattern, message):
    with pytest.raises(ValueError, match=f"elicitation.pattern=.*{message}"):
        formats_of(ElicitationConfig(format="custom", opening="Result:", pattern=pattern))


@pytest.mark.parametrize(
    "answer, expected",
    [
        (" 42 ", "42"),
        ("42.", "42"),
        ("$42$", "42"),
        ("1,234,567", "1234567"),
        ("1,23", "1,23"),
        ("(1, 2)", "(1, 2)"),
        ("3.50", "3.50"),
        ("\\boxed{42}", "42"),
        ("\\text{yes}", "yes"),
        ("\\dfrac{1}{2}", "\\frac{1}{2}"),
        ("\\tfrac12", "\\frac12"),
        ("a  b\n c", "a b c"),
        ("", ""),
        pytest.param("$5$.", "5", marks=pytest.mark.xfail(strict=True, reason="BUG (minor): the dot goes last")),
        pytest.param("\\boxed{5}.", "5", marks=pytest.mark.xfail(strict=True, reason="BUG (minor): as above")),
    ],
)
def test_canonical(answer, expected):
    assert canonical(answer) == expected
    assert canonical(expected) == expected


@pytest.mark.parametrize(
    "ground_truth, expected",
    [
        ("1,234", ["1234"]),
        (42, ["42"]),
        (0.5, ["0.5"]),
        (["4", "4.0", " 4 "], ["4", "4.0"]),
        (("a",), ["a"]),
        ([], []),
        ("", []),
        (None, []),
        (True, []),
        ({"tests": []}, []),
        (["4", {"x": 1}], []),
    ],
)
def test_reference_answers(ground_truth, expected):
    assert reference_answers(ground_truth) == expected


def test_yaml_and_default_formats_agree():
    assert list(formats_of(parse({}).elicitation)) == ["boxed", "hash", "plain"]


@pytest.mark.xfail(strict=True, reason="BUG: quadratic: a response that repeats \\boxed{ blocks the event loop")
def test_a_response_that_repeats_an_open_box_is_searched_quickly():
    text = "\\boxed{" * 600
    started = time.process_time()
    assert BOXED.find(text) is None
    assert time.process_time() - started < 0.05


@pytest.mark.xfail(strict=True, reason="DOUBTFUL: in `auto` a markdown heading counts as a GSM8K answer")
@pytest.mark.parametrize("text", ["#### Step 1: add\n2 + 3 = 5\nAnswer: 5", "##### Note\nAnswer: 5"])
def test_a_markdown_heading_is_no_answer(text):
    assert find_answer(text, dict(BUILT_IN)).text == "5"
