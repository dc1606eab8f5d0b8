"""`compute_score` of the math verifier: where the answer is, what it returns, which ground truths it can use."""

import asyncio
import inspect

import numpy as np
import pytest

from rredcot_verl.answers.boxed import boxes_in_a_row
from rredcot_verl.answers.grammar import BUILT_IN, find_answer, formats_of
from rredcot_verl.config.blocks import ElicitationConfig
from rredcot_verl.rewards.math import compute_score, why_unusable

KEYS = ["score", "acc", "pred", "answer_start", "timed_out"]


def _score(response, gold="5", **options):
    return asyncio.run(compute_score("test", response, gold, {"index": 0}, **{"timeout_s": 60, **options}))


@pytest.mark.parametrize(
    "response, score, opening",
    [
        ("2 + 3 = 5, so \\boxed{5}.", 1.0, "\\boxed{5}"),
        ("2 + 3 = 5\n#### 5", 1.0, "#### 5"),
        ("2 + 3 = 5\nAnswer: 5\n", 1.0, "Answer: 5"),
        ("**Answer: 5**", 1.0, "Answer: 5"),
        ("The answer is 6, I mean \\boxed{6}", 0.0, "\\boxed{6}"),
        # The last answer counts.
        ("\\boxed{5} no: \\boxed{6}", 0.0, "\\boxed{6}"),
        ("\\boxed{6} no: \\boxed{5}", 1.0, "\\boxed{5}"),
        # Whatever it is written in; the same as for the probes.
        ("\\boxed{5}\nAnswer: 6", 0.0, "Answer: 6"),
        ("\\boxed{6}\nAnswer: 5", 1.0, "Answer: 5"),
        ("Answer: 6\nSo \\boxed{5}", 1.0, "\\boxed{5}"),
        ("\\boxed{5}\nThe answer: it depends on x.", 1.0, "\\boxed{5}"),
        ("**Answer:**\n\n$$\n5\n$$", 1.0, "Answer:**"),
        ("so $\\boxed 5$.", 1.0, "\\boxed 5"),
        # Nothing but a box, a last line or a custom pattern is an answer.
        ("2 + 3 = 5", 0.0, None),
        ("", 0.0, None),
        ("\\boxed{5", 0.0, None),
        ("\\boxed{}", 0.0, None),
    ],
)
def test_formats(response, score, opening):
    result = _score(response)
    assert list(result) == KEYS
    assert (result["score"], result["acc"], result["timed_out"]) == (score, score, 0.0)
    if opening is None:
        assert (result["pred"], result["answer_start"]) == ("", -1.0)
    else:
        assert response[int(result["answer_start"]) :].startswith(opening)
        # Probes and verifier find the same place.
        assert result["answer_start"] == find_answer(response, dict(BUILT_IN)).start


@pytest.mark.parametrize(
    "response, score, opening",
    [
        ("<think>2 + 3 = 5</think>\nSo \\boxed{5}.", 1.0, "\\boxed{5}."),
        ("<think>maybe \\boxed{6}</think>\nSo \\boxed{5}.", 1.0, "\\boxed{5}."),
        ("<think>maybe \\boxed{5}</think>\nSo \\boxed{6}.", 0.0, "\\boxed{6}."),
        # Neither an answer in the thinking block alone nor one in an unfinished block was given to the user.
        ("<think>surely \\boxed{5}</think>\nThere it is.", 0.0, None),
        ("<think>surely \\boxed{5}", 0.0, None),
        ("<think>a</think> <think>surely \\boxed{5}", 0.0, None),
        ("<think>a</think> \\boxed{6} <think>b</think> \\boxed{5}", 1.0, "\\boxed{5}"),
        # A template may have opened the block in the prompt.
        ("maybe \\boxed{6}</think>\nAnswer: 5", 1.0, "Answer: 5"),
        ("surely \\boxed{5}", 1.0, "\\boxed{5}"),
    ],
)
def test_what_is_thought_is_not_said(response, score, opening):
    result = _score(response)
    assert result["score"] == score
    assert result["answer_start"] == (-1.0 if opening is None else response.index(opening))


def test_a_prompt_that_opens_the_thinking_block():
    assert _score("surely \\boxed{5}", prompt_opens_thinking=True)["answer_start"] == -1.0
    assert _score("surely</think>\\boxed{5}", prompt_opens_thinking=True)["score"] == 1.0


def test_other_tags():
    tags = {"think_open": "[THINK]", "think_close": "[/THINK]"}
    assert _score("[THINK] \\boxed{6} [/THINK] \\boxed{5}", **tags)["score"] == 1.0
    assert _score("[THINK] \\boxed{5}", **tags)["answer_start"] == -1.0


@pytest.mark.parametrize(
    "response, parts",
    [
        ("\\boxed{1} and \\boxed{-2}", ["1", "-2"]),
        ("$\\boxed{1}$, $\\boxed{-2}$", ["1", "-2"]),
        ("\\[ \\boxed{1} \\quad \\text{and} \\quad \\boxed{-2} \\]", ["1", "-2"]),
        ("\\(\\boxed{1}\\), \\(\\boxed{2}\\) or \\(\\boxed{\\frac{3}{4}}\\).", ["1", "2", "\\frac{3}{4}"]),
        ("\\boxed{1}, \\boxed{1}", ["1"]),
        # Anything else between them makes them two.
        ("\\boxed{1} hence \\boxed{-2}", ["-2"]),
        ("part a: \\boxed{1}\npart b: \\boxed{-2}", ["-2"]),
        ("{1} and \\boxed{-2}", ["-2"]),
        ("\\boxed{7} so {1} and \\boxed{-2}", ["-2"]),
    ],
)
def test_boxes_in_a_row_are_one_answer(response, parts):
    found = find_answer(response, BUILT_IN)
    assert boxes_in_a_row(found.text) == parts
    assert response[found.answer_start : found.end] == found.text
    assert response[found.start :].startswith("\\boxed{")


def test_naming_several_candidates_does_not_pay():
    assert _score("\\boxed{3} or \\boxed{5}")["score"] == 0.0
    assert _score("\\boxed{3}, \\boxed{5}", "3, 5")["score"] == 1.0
    assert _score("\\boxed{5} and \\boxed{3}", "\\{3, 5\\}")["score"] == 1.0
    assert _score("\\boxed{5}, \\boxed{5}")["score"] == 1.0


@pytest.mark.parametrize(
    "gold, line, score",
    [
        *[("3", "3 or 4", 0.0), ("3", "3, 4", 0.0), ("3", "3 and 4", 0.0)],
        *[("1/2", "1/2", 1.0), ("1", "1/2", 0.0), ("1.5", "1 1/2", 1.0), ("1000", "10^3", 1.0), ("10", "10^3", 0.0)],
        *[("200000", "2e5", 1.0), ("2", "2e5", 0.0), ("5000000", "5 million", 1.0), ("5", "5 million", 0.0)],
        *[("3:30", "3:30", 1.0), ("3", "3:30", 0.0), ("42", "6*7", 1.0), ("6", "6*7", 0.0), ("42", "6*7 = 42", 1.0)],
        *[("50", "50%", 1.0), ("12", "**12**", 1.0), ("5", "+5", 1.0), ("-5", "- 5", 1.0), ("-5", "−5", 1.0)],
        *[("5", "- 5", 0.0), ("1234", "1,234", 1.0), ("12", "$12.00", 1.0), ("42", "42 apples. They are red.", 1.0)],
        *[("42", "42 because 6*7 = 42", 1.0), ("42", "42.", 1.0), ("12", "12 (twelve dollars)", 1.0)],
    ],
)
def test_the_whole_line_after_hashes_is_the_answer(gold, line, score):
    assert _score(f"6 and 7 make\n#### {line}\n", gold)["score"] == score


def test_one_format_only_and_a_custom_one():
    assert _score("\\boxed{6}\n#### 5", answer_format="hash")["score"] == 1.0
    assert _score("\\boxed{5}", answer_format="plain")["answer_start"] == -1.0
    options = {"answer_format": "custom", "opening": "\nResult:", "pattern": "Result: ([^;]+)"}
    assert _score("\\boxed{6} Result: 5; done", **options)["score"] == 1.0
    formats = formats_of(ElicitationConfig(format="custom", opening="\nResult:", pattern="Result: ([^;]+)"))
    assert find_answer("\\boxed{6} Result: 5; done", formats).start == 10


@pytest.mark.parametrize(
    "options, message",
    [
        ({"answer_format": "box"}, "reward_kwargs.answer_format='box' must be one of"),
        ({"timeout_s": 0}, "reward_kwargs.timeout_s=0 must be greater than 0"),
        ({"num_processes": 0}, "reward_kwargs.num_processes=0 must be a positive integer"),
        (
            {"timeout": 5},
            r"reward_kwargs: unknown options \['timeout'\]; allowed: \['answer_format', .*'timeout_s', 'num",
        ),
        ({"answer_format": "custom"}, "elicitation.opening and elicitation.pattern"),
    ],
)
def test_a_faulty_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        _score("\\boxed{x+2}", "x+1", **options)


@pytest.mark.parametrize(
    "gold", [["6", "5"], np.array(["6", "5"]), np.int64(5), [np.float32(5)], ["6", " ", "5 "], 5, 5.0, ("5",), "5"]
)
def test_ground_truths_as_parquet_gives_them(gold):
    assert _score("\\boxed{5}", gold)["score"] == 1.0
    assert _score("\\boxed{7}", gold)["score"] == 0.0


def test_any_of_several_ground_truths_is_right_by_either_road():
    assert _score("\\boxed{1+x}", ["5", "x+1"])["score"] == 1.0
    assert _score("\\boxed{5}", ["x+1", "5"])["score"] == 1.0


@pytest.mark.parametrize(
    "gold, reason",
    [
        (None, "is missing"),
        ("", "is empty"),
        ("  ", "is empty"),
        ("$$", "is empty"),
        ([], "is empty"),
        ({"a": 1}, "is of type dict"),
        (True, "is of type bool"),
        (["5", None], "is empty, or not a list"),
        ("proof", "names no answer"),
        ("2 + 3 = 5\n#### 5", "holds a whole solution"),
        ("7" * 2000, "has 2000 characters"),
        ("the set of all those integers which the two of them have in common is finite", "is prose"),
        ("\\frac{1}{", "cannot be read by the parser"),
        ("x^{", "cannot be read by the parser"),
    ],
)
def test_unusable_ground_truths(gold, reason):
    found = why_unusable(gold, timeout_s=60)
    assert found is not None and reason in found


@pytest.mark.parametrize(
    "gold",
    [
        *("5", 5, "\\frac{1}{2}", "$x+1$", "Evelyn", "yes", "B", "(1,2)", "[1, 2)", "5 km", "50\\%", "x=1, y=2"),
        *("\\begin{pmatrix}1\\\\2\\end{pmatrix}", ["3", "x^2"], np.array(["4"])),
    ],
    ids=str,
)
def test_usable_ground_truths(gold):
    assert why_unusable(gold, timeout_s=60) is None


def test_a_ground_truth_that_hangs_the_parser_is_named():
    assert "more than 1.0 s" in why_unusable(
        "\\int_0^1 \\frac{\\sin(x^5)e^{x^3}}{\\ln(x+2)}dx + 9^{9^{9^9}}", timeout_s=1.0
    )


def test_what_verl_adds_is_let_through():
    assert _score("\\boxed{5}", reward_router_address="x", reward_model_tokenizer=None)["score"] == 1.0


def test_verl_loads_it_as_a_coroutine():
    from omegaconf import OmegaConf
    from verl.trainer.ppo.reward import get_custom_reward_fn

    function = {"path": "pkg://rredcot_verl.rewards.math", "name": "compute_score"}
    options = {"answer_format": "plain", "num_processes": 1}
    config = OmegaConf.create({"reward": {"custom_reward_function": {**function, "reward_kwargs": options}}})
    loaded = get_custom_reward_fn(config)
    assert inspect.iscoroutinefunction(loaded)
    row = {"data_source": "test", "solution_str": "\\boxed{6}\nAnswer: 5", "ground_truth": "5", "extra_info": {}}
    assert asyncio.run(loaded(**row, reward_router_address=None))["score"] == 1.0
