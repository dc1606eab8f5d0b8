"""Final answers in text."""

import random
import time

import numpy as np
import pytest

from rredcot_verl.answers.boxed import boxes_in_a_row
from rredcot_verl.answers.grammar import BUILT_IN, canonical, find_answer, formats_of, reference_answers
from rredcot_verl.answers.thinking import Thinking
from rredcot_verl.config.blocks import ElicitationConfig
from rredcot_verl.config.schema import parse


@pytest.mark.parametrize(
    "text, answer, name",
    [
        ("so \\boxed{15}.", "15", "boxed"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", "boxed"),
        ("\\boxed{1} no, \\boxed{2} then", "2", "boxed"),
        ("\\boxed{7} and then \\boxed{8", "7", "boxed"),
        ("\\boxed{\\boxed{5}}", "5", "boxed"),
        ("\\boxed{a\nb}", "a\nb", "boxed"),
        # A box that stays empty, or is never closed, is none.
        ("\\boxed{7} \\boxed{} \\boxed{ }", "7", "boxed"),
        ("\\boxed{\\boxed{} 5}", "\\boxed{} 5", "boxed"),
        ("\\boxed{7 and } so \\boxed{\\boxed{8}", "8", "boxed"),
        ("} \\boxed{7} }", "7", "boxed"),
        ("3 + 4 = 7\n#### 7", "7", "hash"),
        ("#### -3.5 apples", "-3.5 apples", "hash"),
        ("#### $12\n", "$12", "hash"),
        ("#### 1\n#### 1,234  \nbye", "1,234", "hash"),
        ("The answer: 4 apples\n", "4 apples", "plain"),
        ("Answer: 4\nAnswer:\t5", "5", "plain"),
        ("Answer: 4 \t\nbye", "4", "plain"),
        ("**Answer: 4**\n", "4", "plain"),
        ("**Answer:** 4 \n", "4", "plain"),
        ("Answer: 2 * 3", "2 * 3", "plain"),
        # Of several formats the last one counts, and the box on an answer's line.
        ("Answer: \\boxed{4}", "4", "boxed"),
        ("\\boxed{Answer: 4}", "Answer: 4", "boxed"),
        ("\\boxed{4}\n#### 5\nAnswer: 6", "6", "plain"),
        ("Answer: 6\n#### 5", "5", "hash"),
        ("#### 5\nAnswer: 6\n so \\boxed{4}.", "4", "boxed"),
        ("Perhaps \\boxed{5}. No, we add.\n\nAnswer: 7", "7", "plain"),
        ("\\boxed{5}\nThe answer: it depends on x.", "5", "boxed"),
        ("Answer: 5\nAnswer: see above", "5", "plain"),
        ("\\boxed{5}\nTo check the answer:\nPlug in 2.", "5", "boxed"),
        # Other boxes.
        ("\\fbox{7}", "7", "boxed"),
        ("\\boxed {42}", "42", "boxed"),
        ("so $\\boxed 42$.", "42", "boxed"),
        ("\\boxed \\frac{1}{2}.", "\\frac{1}{2}", "boxed"),
        ("\\boxed{3} as \\boxed asks", "3", "boxed"),
        # Other ways to open a line with it.
        ("**Answer**: 13", "13", "plain"),
        ("ANSWER: 13", "13", "plain"),
        ("Answer : 13", "13", "plain"),
        ("Answers: 3 and 4", "3 and 4", "plain"),
        ("The answer is: 13", "13", "plain"),
        ("Answer:\n13\nbye", "13", "plain"),
        ("**Final Answer:**\n\n$$\n13\n$$\n", "$$\n13\n$$", "plain"),
        ("### The final answer:\n\\[\n13\n\\]\nbye", "\\[\n13\n\\]", "plain"),
        ("### Final answer\n\n**Answer:**\n\\boxed{13}", "13", "boxed"),
        ("Answer: `13`", "13", "plain"),
        # A reason is not the answer's, another candidate is.
        ("Answer: 5, because 2 + 3 = 5", "5", "plain"),
        ("Answer: x + 1 = 4, so x = 3", "x + 1 = 4, so x = 3", "plain"),
        ("Answer: 7. Hope this helps!", "7", "plain"),
        ("Answer: 3. No wait, 4.", "3. No wait, 4.", "plain"),
        ("Answer: St. Louis", "St. Louis", "plain"),
        ("#### 42 since 6*7 = 42", "42", "hash"),
        ("#### 42 (in whole dollars)", "42", "hash"),
        ("#### 5 (mod 7)", "5 (mod 7)", "hash"),
        # The whole line after ####.
        ("#### 3 or 4", "3 or 4", "hash"),
        ("#### 1 1/2", "1 1/2", "hash"),
        ("#### 2e5", "2e5", "hash"),
        ("#### **12**", "12", "hash"),
        ("#### - 5", "- 5", "hash"),
        ("#### −5", "−5", "hash"),
        ("#### x = \\frac{1}{2}", "x = \\frac{1}{2}", "hash"),
        ("####: 55", "55", "hash"),
        ("#### 308.", "308.", "hash"),
    ],
)
def test_the_last_answer_is_found(text, answer, name):
    found = find_answer(text, dict(BUILT_IN))
    assert found is not None and (found.text, found.format) == (answer, name)
    assert text[found.answer_start : found.end] == answer
    assert (
        text[found.start :]
        .lower()
        .startswith({"boxed": ("\\boxed", "\\fbox"), "hash": "####", "plain": "answer"}[name])
    )
    assert found.start < found.answer_start <= found.end <= len(text)


@pytest.mark.parametrize(
    "text",
    [
        *["", "no answer", "\\boxed{", "\\boxed{}", "\\boxed{ }", "\\boxed{\\boxed{}}"[:-1], "####", "#### \n5"],
        *["#### five", "##### 5", "Answer: **", "Answer:\n\n", "myanswer: 5", "we find the answer:\n5"],
        *[
            "The answer: it depends on x.",
            "Answer: we cannot know",
            "\\boxed is where it goes",
            "\\fbox{}",
            "#### Step 1",
        ],
    ],
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
        ("1{,}000\\pi", "1000\\pi"),
        ("x \\ge 1,000", "x \\ge 1000"),
        # Entries, not thousands; "000" is no entry.
        ("(1,234)", "(1,234)"),
        ("[0,100]", "[0,100]"),
        ("\\{100,200,300\\}", "\\{100,200,300\\}"),
        ("(1,000,2,000)", "(1000,2000)"),
        ("[1,234, 5,678]", "[1234, 5678]"),
        ("(1, 2)", "(1, 2)"),
        ("3.50", "3.50"),
        ("\\boxed{42}", "42"),
        ("\\fbox{42}", "42"),
        ("\\text{yes}", "yes"),
        ("\\dfrac{1}{2}", "\\frac{1}{2}"),
        ("\\tfrac12", "\\frac12"),
        ("a  b\n c", "a b c"),
        ("", ""),
        ("$5$.", "5"),
        ("\\boxed{5}.", "5"),
        ("$\\boxed{\\text{ yes. }}$.", "yes"),
        ("\\boxed{1} and \\boxed{2}", "\\boxed{1} and \\boxed{2}"),
        ("10,\\!000", "10000"),
    ],
)
def test_canonical(answer, expected):
    assert canonical(answer) == expected
    assert canonical(expected) == expected


FRAGMENTS = ["$", ".", " ", "\n", "5", "1,234", "1", ",", "000", "x", "-", "{", "}", "\\boxed{", "\\text{", "\\mbox{"]
FRAGMENTS += ["(", ")", "\\{", "{,}", ", ", "200", "\\mathrm{", "\\frac", "\\dfrac", "\\tfrac"]


@pytest.mark.parametrize(
    "more",
    [[], ["\\!"]],
    ids=["plain", "negative_space"],
)
def test_a_canonical_answer_stays_as_it_is(more):
    rng = random.Random(0)
    for _ in range(5000):
        once = canonical("".join(rng.choice([*FRAGMENTS, *more]) for _ in range(rng.randint(1, 7))))
        assert canonical(once) == once


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
        # As Parquet gives them.
        (np.int64(42), ["42"]),
        (np.float32(0.5), ["0.5"]),
        (np.str_("1,234"), ["1234"]),
        (np.bool_(True), []),
        (np.array(4), ["4"]),
        (np.array(["4", "4.0", " 4 "]), ["4", "4.0"]),
        (np.array(["4", "5"], dtype=object), ["4", "5"]),
        (np.array([4, 5]), ["4", "5"]),
        (np.array([{"x": 1}], dtype=object), []),
        (np.array([]), []),
        ([np.str_("4")], ["4"]),
        ([np.int64(4), "5"], ["4", "5"]),
    ],
)
def test_reference_answers(ground_truth, expected):
    assert reference_answers(ground_truth) == expected


def test_yaml_and_default_formats_agree():
    assert list(formats_of(parse({}).elicitation)) == ["boxed", "hash", "plain"]


def test_a_response_that_repeats_an_open_box_is_searched_quickly():
    """Responses that loop are common in training, and the search runs on the agent loop's own thread."""
    for text, expected in (
        ("\\boxed{" * 20_000, None),
        ("\\boxed{" * 20_000 + "5}", "5"),
        ("{" * 80_000, None),
        ("\\boxed \\a{" * 20_000, "\\a"),
        ("Answer: **" * 20_000, "Answer:"),
        ("Answer: it was " * 20_000, "it was"),
        ("Answer: it goes " * 20_000, None),
        ("Answer:\n$$ x\n" * 20_000, "$$ x"),
        ("#### (, , " * 20_000, "(, ,"),
        ("#### and " * 20_000, None),
        ("Answer: " + "1. A (" * 20_000, "1. A (" * 19_999 + "1"),
        ("#### 5" + " " * 80_000 + "x", "5" + " " * 80_000 + "x"),
        ("\\boxed1" * 40_000, "1"),
    ):
        started = time.process_time()
        found = find_answer(text, dict(BUILT_IN))
        # Tenths of a second; a search that starts again at each of them takes minutes.
        assert time.process_time() - started < 20, text[:20]
        assert (found and found.text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "#### Step 1: add\n2 + 3 = 5\nAnswer: 5",
        "##### Note\nAnswer: 5",
        "##### 1. Note\nAnswer: 5",
        "#### 1. Add\n2 + 3 = 5\nAnswer: 5",
        "Answer: 5\n#### 2nd case: none",
    ],
)
def test_a_markdown_heading_is_no_answer(text):
    assert find_answer(text, dict(BUILT_IN)).text == "5"


@pytest.mark.parametrize("text", ["so 4.\nAnswer: **4**", "Answer: 3, no.\nAnswer: **4**\n"])
def test_an_answer_in_bold_type_is_found(text):
    assert canonical(find_answer(text, dict(BUILT_IN)).text).strip("*") == "4"


@pytest.mark.parametrize(
    "text, prompt_opens, answer",
    [
        ("<think>\\boxed{1}</think>\\boxed{2}", False, "2"),
        ("<think>\\boxed{1}</think>none", False, None),
        ("<think>\\boxed{1}", False, None),
        ("\\boxed{1}</think>so \\boxed{2}", True, "2"),
        ("\\boxed{1}", True, None),
        ("\\boxed{1}", False, "1"),
        ("<think>a</think>\\boxed{1}<think>\\boxed{2}", False, None),
    ],
)
def test_an_answer_inside_a_thinking_block_is_not_final(text, prompt_opens, answer):
    found = find_answer(text, dict(BUILT_IN), Thinking(prompt_opens=prompt_opens))
    assert (found and found.text) == answer
    assert found is None or text[found.answer_start : found.end] == answer


@pytest.mark.parametrize(
    "text, answers",
    [
        ("\\boxed{1}", ["1"]),
        ("\\boxed{1} and \\boxed{2}.", ["1", "2"]),
        ("$\\boxed{1}$, $\\boxed{\\frac{1}{2}}$ or $\\boxed{3}$", ["1", "\\frac{1}{2}", "3"]),
        ("\\boxed{1}\\text{ and }\\boxed{1}", ["1"]),
        ("so \\boxed{5}.\n\n$\\boxed{5}$", ["5"]),
        ("$\\boxed {1}$ or $\\fbox{2}$", ["1", "2"]),
        # Anything else between them makes them two answers, of which the last counts.
        ("\\boxed{1}, no, \\boxed{2}", ["2"]),
        ("\\boxed{1}" + " " * 100 + "\\boxed{2}", ["2"]),
        ("\\boxed 1 or \\boxed 2", ["2"]),
        ("\\boxed{1} or \\boxed 2", ["2"]),
        ("\\boxed{} and \\boxed{2}", ["2"]),
        ("\\boxed{x \\boxed{2}}", ["2"]),
    ],
)
def test_boxes_in_a_row_are_one_answer(text, answers):
    found = find_answer(text, dict(BUILT_IN))
    assert boxes_in_a_row(found.text) == answers
    assert text[found.answer_start : found.end] == found.text and text.startswith("\\boxed", found.start)
    # One answer that is said twice is proposed once.
    assert len(answers) > 1 or found.text.strip() == answers[0]


@pytest.mark.parametrize(
    "text",
    [
        "So we get \\boxed{5}, the answer:\nCheck by substitution.",
        "\\boxed{5}, as asked in \\boxed (as it says)",
        "\\boxed{5}, in the \\boxed-format",
        "\\boxed{5}, written as `\\boxed{...}`",
    ],
)
def test_words_after_a_box_do_not_replace_it(text):
    found = find_answer(text, dict(BUILT_IN))
    assert found is not None and found.text == "5"
