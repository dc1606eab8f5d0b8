"""The quickstart: the checks of a trace, text that survives tokenisation, and the corpus of the warm start."""

import random

import pytest
from transformers import AutoTokenizer
from verl.utils.import_utils import load_extern_object

from recipes.common.policy import build_model
from recipes.quickstart import task, warm_start
from recipes.quickstart.tokens import build_tokenizer

DIFFICULTIES = [
    task.Difficulty(),
    task.Difficulty(min_operations=1, max_operations=3, max_operand=3, max_value=5),
    task.Difficulty(min_operations=6, max_operations=9, max_operand=40, max_value=300),
]
GARBAGE = [
    "",
    "\n",
    "\n\n\n",
    "Answer:",
    "Answer: ",
    "Answer: x",
    "Answer: 1e9",
    "Answer: " + "9" * 10_000,
    "9" * 10_000 + "+1=2\n",
    "7+5=\n=\n+\n7++5=12",
    "\x00\x7f\r\n\u2028 héé 漢字 ١٢ \ud800",
    "²+³=5\nAnswer: ²",
    "Answer: 5 Answer: Answer:",
    "12-3=9\n" * 500,
]


def problems(count: int = 50):
    rng = random.Random(0)
    return [task.make_problem(rng, difficulty) for difficulty in DIFFICULTIES for _ in range(count)]


def corrupted(problem: task.Problem, index: int, shift: int) -> str:
    """A trace whose line ``index`` states a result that is off by ``shift``; later lines continue from it."""
    text, current = "", problem.start
    for position, operand in enumerate(problem.operands):
        result = current + operand + (shift if position == index else 0)
        text += task.calculation_line(current, operand, result)
        current = result
    return text + task.answer_line(current)


def first_wrong_line(problem: task.Problem | str, text: str) -> int | None:
    verdicts = [check.ok for check in task.check_lines(problem, text)]
    return verdicts.index(False) if False in verdicts else None


def score(text: str, problem: task.Problem) -> dict[str, float]:
    return task.compute_score(task.DATA_SOURCE, text, str(problem.answer), {"expression": problem.expression})


def test_expected_trace_golden():
    problem = task.Problem(7, (5, -3, 8))
    assert problem.expression == "7+5-3+8"
    assert task.solve(problem) == "7+5=12\n12-3=9\n9+8=17\nAnswer: 17"


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_problems_respect_the_difficulty(difficulty):
    rng = random.Random(1)
    for _ in range(200):
        problem = task.make_problem(rng, difficulty)
        assert difficulty.min_operations <= len(problem.operands) <= difficulty.max_operations
        values = [problem.start + sum(problem.operands[:k]) for k in range(len(problem.operands) + 1)]
        assert all(0 <= value <= difficulty.max_value for value in values)
        assert all(1 <= abs(operand) <= difficulty.max_operand for operand in problem.operands)


@pytest.mark.parametrize("settings", [{"min_operations": 6}, {"max_operand": 0}, {"max_operand": 30}])
def test_impossible_difficulty_is_refused(settings):
    with pytest.raises(ValueError):
        task.Difficulty(**settings)


def test_problem_round_trip_and_same_seed_same_problem():
    for problem in problems():
        assert task.parse_problem(problem.expression) == problem
        assert task.parse_problem(problem.expression.replace("+", " +")) == problem
    assert problems() == problems()


def test_solved_trace_scores_one_and_has_no_wrong_line():
    for problem in problems():
        text = task.solve(problem)
        assert first_wrong_line(problem, text) is None
        assert first_wrong_line(problem.expression, text) is None
        result = score(text, problem)
        assert result["score"] == result["acc"] == result["well_formed"] == result["answered"] == 1.0
        assert result["num_lines"] == len(problem.operands) + 1
        assert result["first_wrong_line"] == -1.0


def test_a_wrong_result_is_found_where_it_is():
    for problem in problems(10):
        for index in range(len(problem.operands)):
            text = corrupted(problem, index, 1)
            assert [check.ok for check in task.check_lines(problem, text)].count(False) == 1
            assert first_wrong_line(problem, text) == index
            assert score(text, problem)["score"] == 0.0
            assert score(text, problem)["first_wrong_line"] == index


@pytest.mark.parametrize(
    ("line", "wrong_text", "why"),
    [
        (1, "11-3=8\n", "does not continue from the stated value"),
        (1, "12+3=15\n", "wrong sign"),
        (1, "12-4=8\n", "wrong operand"),
        (1, "\n", "empty"),
        (2, "so 9+8=17\n", "not a calculation"),
        (2, "9+8=170\n", "one digit too many"),
        (3, "Answer: 16", "answer differs from the stated value"),
        (3, "17+1=18\nAnswer: 18", "an operation too many"),
    ],
)
def test_other_wrong_lines_are_found(line, wrong_text, why):
    lines = ["7+5=12\n", "12-3=9\n", "9+8=17\n", "Answer: 17"]
    lines[line] = wrong_text
    assert first_wrong_line("7+5-3+8", "".join(lines)) == line, why


def test_an_answer_forced_early_is_judged_by_the_stated_value():
    assert first_wrong_line("7+5-3+8", "7+5=12\nAnswer: 17") is None
    assert first_wrong_line("7+5-3+8", "7+5=13\nAnswer: 18") == 0
    assert [check.ok for check in task.check_lines("7+5-3+8", "7+5=13\nAnswer: 18")] == [False, True]
    assert first_wrong_line("7+5-3+8", "Answer: 17\nAnswer: 17") == 1


@pytest.mark.parametrize("text", GARBAGE)
def test_garbage_never_raises_and_spans_cover_the_text(text):
    for expression in ["7+5-3", "", "nonsense", text]:
        checks = task.check_lines(expression, text)
        assert "".join(text[check.start : check.end] for check in checks) == text
        result = task.compute_score("x", text, "9", {"expression": expression}, unknown=1)
        assert result["score"] == 0.0
        assert result.keys() == task.compute_score("x", "Answer: 9", "9").keys()
        assert all(isinstance(number, float) for number in result.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: 9", 1.0),
        ("Answer:9\n", 1.0),
        ("Answer: 09", 1.0),
        ("Answer: 8\nAnswer: 9", 1.0),
        ("Answer: 9\nAnswer: 8", 0.0),
        ("Answer: 90", 0.0),
        ("Answer: 9.5", 0.0),
        ("Answer: -9", 0.0),
        ("9", 0.0),
    ],
)
def test_only_the_last_answer_counts(text, expected):
    assert task.compute_score(task.DATA_SOURCE, text, "9")["score"] == expected


def test_verl_loads_the_reward_function_by_path():
    loaded = load_extern_object(task.__file__, "compute_score")
    assert loaded("x", "2+7=9\nAnswer: 9", "9", {"expression": "2+7"})["score"] == 1.0


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_tokenizer_round_trip(tokenizer):
    texts = ["".join(map(chr, range(128))), "12+34=46\nAnswer: 007 -5", "héé 漢字 \u2028", *GARBAGE[:10]]
    rng = random.Random(0)
    texts += ["".join(chr(rng.randrange(128)) for _ in range(50)) for _ in range(100)]
    texts += [task.solve(problem) for problem in problems(5)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_cut_at_a_boundary_has_the_tokens_of_the_whole(tokenizer):
    for problem in problems(10):
        text = task.solve(problem)
        cuts = [check.end for check in task.check_lines(problem, text)][:-1]
        cuts.append(text.index(task.ANSWER_PREFIX) + len(task.ANSWER_PREFIX))
        for cut in cuts:
            assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) == tokenizer.encode(text)


def test_newline_and_end_of_sequence_are_single_tokens(tokenizer):
    assert len(tokenizer.encode("\n")) == len(tokenizer.encode(task.ANSWER_PREFIX)) == 1
    assert tokenizer.encode("=12\n")[-1:] == tokenizer.encode("\n")
    assert tokenizer.encode(f"12{tokenizer.eos_token}")[-1:] == [tokenizer.eos_token_id]
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_chat_template_and_saved_tokenizer(tokenizer, tmp_path):
    build_model(tokenizer, hidden_size=32, num_layers=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "7+5"}]
    for each in (tokenizer, loaded):
        text = each.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = each.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert text == "<|user|>7+5<|assistant|>"
        assert ids == tokenizer.encode(text) and len(ids) == 4
        assert (each.eos_token_id, each.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_corpus_errors_are_controlled_and_never_negative():
    rng = random.Random(0)
    faultless = warm_start.WarmStartConfig(hard_error_rate=0.0, easy_error_rate=0.0)
    faulty = warm_start.WarmStartConfig(hard_error_rate=1.0, easy_error_rate=0.0)
    for problem in problems(30):
        assert warm_start.corrupt(rng, problem, faultless)[-1] == problem.answer
        stated = problem.start
        for operand, result in zip(problem.operands, warm_start.corrupt(rng, problem, faulty), strict=True):
            assert result >= 0
            assert result == stated + operand or warm_start.is_hard(stated, operand)
            stated = result
