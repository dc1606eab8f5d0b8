"""The quickstart: the checks of a trace, text that survives tokenisation, and the corpus of the warm start."""

import dataclasses
import random

import pytest
from transformers import AutoTokenizer
from verl.utils.import_utils import load_extern_object

from recipes.common.policy import build_model
from recipes.quickstart import oracle, table, task, warm_start
from recipes.quickstart.tokens import build_tokenizer

DIFFICULTIES = [
    task.Difficulty(),
    task.Difficulty(min_operations=1, max_operations=3, max_operand=3, max_value=5, answer="last"),
    task.Difficulty(min_operations=6, max_operations=9, max_operand=40, max_value=300, max_without_rule=1),
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
    text, current, results = "", problem.start, []
    for position, operand in enumerate(problem.operands):
        result = current + task.counts_for(position, operand) + (shift if position == index else 0)
        text += task.calculation_line(current, operand, result)
        current = result
        results.append(result)
    return text + task.answer_line(problem.answer_of(results))


def wordy(problem: task.Problem, rng: random.Random) -> str:
    """The right trace with openers, verbs and remarks."""
    stated = (problem.start, *problem.results)
    lines = zip(stated, problem.operands, problem.results, strict=False)
    return "".join(task.calculation_line(*line, rng, 4.0) for line in lines) + task.answer_line(problem.answer)


def first_wrong_line(problem: task.Problem | str, text: str) -> int | None:
    verdicts = [check.ok for check in task.check_lines(problem, text)]
    return verdicts.index(False) if False in verdicts else None


def score(text: str, problem: task.Problem) -> dict[str, float]:
    return task.compute_score(task.DATA_SOURCE, text, problem.answer, {"expression": problem.expression})


def test_expected_trace_golden():
    problem = task.Problem(7, (5, -3, 8))
    assert problem.expression == "7+5-3+8"
    # +5 counts for 7 as the first operation, and +8 for 12 as the third.
    assert task.solve(problem) == "7+5=14\n14-3=11\n11+8=23\nAnswer: 14 11 23"
    problem = dataclasses.replace(problem, answer_parts="last")
    assert task.solve(problem) == "7+5=14\n14-3=11\n11+8=23\nAnswer: 23"


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_problems_respect_the_difficulty(difficulty):
    rng = random.Random(1)
    for _ in range(200):
        problem = task.make_problem(rng, difficulty)
        assert difficulty.min_operations <= len(problem.operands) <= difficulty.max_operations
        assert all(0 <= value <= difficulty.max_value for value in (problem.start, *problem.results))
        assert all(1 <= abs(operand) <= difficulty.max_operand for operand in problem.operands)
        rules = [task.rule(place, operand) for place, operand in enumerate(problem.operands)]
        assert sum(rule.other == rule.as_written for rule in rules) <= difficulty.max_without_rule


@pytest.mark.parametrize(
    "settings",
    [{"min_operations": 6}, {"max_operand": 0}, {"max_operand": 30}, {"answer": "some"}, {"max_without_rule": -1}],
)
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
        (1, "13-3=10\n", "does not continue from the stated value"),
        (1, "14+3=17\n", "wrong sign"),
        (1, "14-4=10\n", "wrong operand"),
        (0, "7+5=12\n", "the number as it stands, where a rule is"),
        (1, "\n", "empty"),
        (2, "so 11+8=23\n", "not a calculation"),
        (2, "11+8=23 good\n", "a remark without a full stop"),
        (2, "11+8=230\n", "one digit too many"),
        (3, "Answer: 16", "answer differs from the stated value"),
        (3, "Answer: 14 12 23", "a result of the answer differs from the stated one"),
        (3, "Answer: 11 23", "a result of the answer is left out"),
        (3, "23+1=24\nAnswer: 24", "an operation too many"),
    ],
)
def test_other_wrong_lines_are_found(line, wrong_text, why):
    lines = ["7+5=14\n", "14-3=11\n", "11+8=23\n", "Answer: 23"]
    lines[line] = wrong_text
    assert first_wrong_line("7+5-3+8", "".join(lines)) == line, why


def test_an_answer_forced_early_is_judged_by_the_stated_value():
    assert first_wrong_line("7+5-3+8", "7+5=14\nAnswer: 23") is None
    assert first_wrong_line("7+5-3+8", "7+5=14\nAnswer: 14 11 23") is None
    assert [check.ok for check in task.check_lines("7+5-3+8", "7+5=13\nAnswer: 13 10 22")] == [False, True]
    assert first_wrong_line("7+5-3+8", "7+5=13\nAnswer: 22") == 0
    assert [check.ok for check in task.check_lines("7+5-3+8", "7+5=13\nAnswer: 22")] == [False, True]
    assert first_wrong_line("7+5-3+8", "Answer: 23\nAnswer: 23") == 1


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
    assert task.compute_score(task.DATA_SOURCE, "4+5=9\n" + text, "9")["score"] == expected


@pytest.mark.parametrize(
    ("lines", "answer", "expected"),
    [
        ("7+5=14\n14-3=11\n", "14 11", 1.0),
        ("7+5=14\n14-3=11\n", "11", 1.0),
        ("7+5=12\n12-3=9\n", "14 11", 0.0),
        ("7+5=14\n14-3=12\n", "11", 0.0),
        ("7+5=14\n", "14 11", 0.0),
        ("", "11", 0.0),
    ],
)
def test_an_answer_that_contradicts_the_lines_is_wrong(lines, answer, expected):
    assert task.compute_score(task.DATA_SOURCE, f"{lines}Answer: {answer}", answer)["score"] == expected


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
    texts += [wordy(problem, rng) for problem in problems(5)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_cut_at_a_boundary_has_the_tokens_of_the_whole(tokenizer):
    for problem in problems(10):
        text = wordy(problem, random.Random(0))
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


def test_rules_are_fixed_facts_of_their_places_and_as_often_one_as_the_other():
    places = [(place, operand) for place in range(5) for operand in [*range(-9, 0), *range(1, 10)]]
    rules = [task.rule(*place) for place in places]
    unsure = [rule for rule in rules if rule.other != rule.as_written]
    assert len(unsure) == 56 and sum(rule.counts != rule.as_written for rule in unsure) == 33
    assert all(rule.counts in (rule.as_written, rule.other) for rule in rules)
    assert [task.rule(*place) for place in places] == rules


def test_wording_and_remarks_decide_nothing():
    rng = random.Random(1)
    texts = [wordy(problem, rng) for problem in problems(20)]
    for text, problem in zip(texts, problems(20), strict=True):
        assert first_wrong_line(problem, text) is None
        assert score(text, problem)["score"] == score(text, problem)["well_formed"] == 1.0
    words = [word for text in texts for word in text.split() if word in task.WORDS]
    assert set(words) == set(task.WORDS)
    lines = sum(len(problem.operands) for problem in problems(20))
    assert 3.0 < len(words) / lines < 5.0


def test_the_corpus_states_either_number_of_a_rule_and_nothing_negative():
    rng, config = random.Random(0), warm_start.WarmStartConfig(slip_rate=0.0)
    right = wrong = 0
    for problem in problems(30):
        results = warm_start.draw_results(rng, problem.start, problem.operands, 0, config)
        stated = problem.start
        for position, (operand, result) in enumerate(zip(problem.operands, results, strict=True)):
            rule = task.rule(position, operand)
            assert result >= 0 and result - stated in (rule.as_written, rule.other)
            if rule.as_written != rule.other:
                right, wrong = right + (result - stated == rule.counts), wrong + (result - stated != rule.counts)
            stated = result
    assert 0.2 < right / (right + wrong) < 0.4


# --- the oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("", (True, 0)),
        ("7+", (True, 0)),
        ("7+5=14", (True, 1)),
        ("7+5=14\n", (True, 1)),
        ("Now 7+5 is 14. let me", (True, 1)),
        ("7+5=12\n", (False, 1)),
        ("7+5=12\n12-3=9\n", (False, 2)),
        ("7+5=14\n14-3=11\n11+8=23\nAnswer:", (True, 3)),
        ("no line\n", (False, 1)),
    ],
)
def test_the_state_of_a_prefix(prefix, expected):
    assert oracle.state_of("7+5-3+8", prefix) == expected


def test_chances_are_those_of_earlier_traces():
    chances = oracle.Chances()
    guess = chances.value("7+5-3+8", True, 0)
    assert guess == pytest.approx(chances.of(0, 5) * chances.of(1, -3) * chances.of(2, 8))
    assert chances("7+5-3+8", "7+5=14\n") == pytest.approx(guess / chances.of(0, 5))
    assert chances.value("7+5-3+8", True, 3) == 1.0 and chances.value("7+5-3+8", False, 3) == 0.0
    for _ in range(500):
        chances.learn("7+5-3+8", "7+5=14\n14-3=11\n11+8=19\nAnswer: 19")
    assert chances.value("7+5-3+8", True, 0) < 0.02 and chances.value("7+5-3+8", True, 2) < 0.02
    assert chances.of(0, 5) > 0.98
    # What is long past weighs nothing against the first guess.
    for _ in range(500):
        chances.forget()
    assert chances.value("7+5-3+8", True, 0) == pytest.approx(guess, abs=1e-6)


def test_the_table_has_a_dash_for_what_a_run_has_not():
    figures = {"blame": {"rate": 0.9, "chance_rate": 0.2, "num_traces": 5}, "max_return_error": 0.0, "seconds": 9.0}
    figures |= {"self_value": {"probe_tokens_per_response_token": 1.2, "share_of_step_seconds": 0.1}}
    never_validated = figures | {"validation": None, "baseline": None}
    rows = table.table(never_validated, "seed 0").splitlines()
    assert "| validation accuracy before | — |" in rows and "| after, GRPO (paired) | — |" in rows
    assert "| seconds of all steps, RREDCoT | 9 |" in rows
    validated = {"validation": {"before": 0.25, "after": 0.5}, "baseline": {"validation": None, "seconds": 8.0}}
    rows = table.table(figures | validated, "seed 0").splitlines()
    assert "| after, RREDCoT | 0.5 |" in rows and "| after, GRPO (paired) | — |" in rows
