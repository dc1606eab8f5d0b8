"""The quickstart: the checks of a trace, text that survives tokenisation, and the corpus of the warm start."""

import random

import pandas as pd
import pytest

from recipes.quickstart import task

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
        assert task.first_wrong_line(problem, text) is None
        assert task.first_wrong_line(problem.expression, text) is None
        result = score(text, problem)
        assert result["score"] == result["acc"] == result["well_formed"] == result["answered"] == 1.0
        assert result["num_lines"] == len(problem.operands) + 1
        assert result["first_wrong_line"] == -1.0


def test_a_wrong_result_is_found_where_it_is():
    for problem in problems(10):
        for index in range(len(problem.operands)):
            text = corrupted(problem, index, 1)
            assert [check.ok for check in task.check_lines(problem, text)].count(False) == 1
            assert task.first_wrong_line(problem, text) == index
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
    assert task.first_wrong_line("7+5-3+8", "".join(lines)) == line, why


def test_an_answer_forced_early_is_judged_by_the_stated_value():
    assert task.first_wrong_line("7+5-3+8", "7+5=12\nAnswer: 17") is None
    assert task.first_wrong_line("7+5-3+8", "7+5=13\nAnswer: 18") == 0
    assert [check.ok for check in task.check_lines("7+5-3+8", "7+5=13\nAnswer: 18")] == [False, True]
    assert task.first_wrong_line("7+5-3+8", "Answer: 17\nAnswer: 17") == 1


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
    import_utils = pytest.importorskip("verl.utils.import_utils")
    loaded = import_utils.load_extern_object(task.__file__, "compute_score")
    assert loaded("x", "2+7=9\nAnswer: 9", "9", {"expression": "2+7"})["score"] == 1.0


def test_parquet_schema_and_disjoint_splits(tmp_path):
    easy = task.Difficulty(min_operations=2, max_operations=2)
    frames = {}
    for split in ("train", "validation"):
        path = tmp_path / "data" / f"{split}.parquet"
        task.write_parquet(path, 60, split, seed=3, difficulty=easy)
        frame = frames[split] = pd.read_parquet(path)
        assert len(frame) == 60
        assert set(frame.columns) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
        for index, row in enumerate(frame.to_dict("records")):
            (message,) = row["prompt"]
            problem = task.parse_problem(message["content"])
            assert message["role"] == "user"
            assert row["reward_model"] == {"style": "rule", "ground_truth": str(problem.answer)}
            assert row["extra_info"] == {"split": split, "index": index, "expression": problem.expression}
            assert task.is_validation(problem) == (split == "validation")
    contents = [{prompt[0]["content"] for prompt in frame["prompt"]} for frame in frames.values()]
    assert len(contents[0]) == len(contents[1]) == 60
    assert not contents[0] & contents[1]


def test_too_many_rows_for_the_difficulty_are_refused(tmp_path):
    tiny = task.Difficulty(min_operations=1, max_operations=1, max_operand=2, max_value=3)
    with pytest.raises(ValueError, match="distinct"):
        task.write_parquet(tmp_path / "rows.parquet", 1000, "train", difficulty=tiny)


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers")
    from recipes.quickstart.model import build_tokenizer

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
    from transformers import AutoTokenizer

    from recipes.quickstart.model import build_model

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
    from recipes.quickstart import warm_start

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


def test_one_packed_pass_equals_one_sequence_per_elicited_answer(tokenizer):
    import torch

    from recipes.quickstart import training, warm_start
    from recipes.quickstart.model import build_model

    config = warm_start.WarmStartConfig()
    model = build_model(tokenizer, hidden_size=32, num_layers=2).eval()
    rng = random.Random(0)
    examples = [warm_start.make_example(rng, task.make_problem(rng), config, tokenizer) for _ in range(3)]
    batch = training.collate(examples, tokenizer.pad_token_id)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "attention_mask")}
    with torch.no_grad():
        packed = model(**inputs).logits
        for row, example in enumerate(examples):
            ids, probe = torch.tensor(example["input_ids"]), torch.tensor(example["probe"])
            for index in range(int(probe.max()) + 1):
                own = (probe == index).nonzero()[:, 0]
                fork = example["fork"][own[0]] if index else 0
                alone = model(input_ids=torch.cat([ids[:fork], ids[own]])[None]).logits[0, fork:]
                torch.testing.assert_close(packed[row, own], alone, atol=1e-5, rtol=1e-4)
                if index:  # only the answer, then the end of the sequence
                    labels = [example["labels"][i] for i in own]
                    assert ids[own[0]] == tokenizer.encode(task.ANSWER_PREFIX)[0]
                    assert ids[fork - 1] in (
                        tokenizer.encode("\n")[0],
                        tokenizer.convert_tokens_to_ids("<|assistant|>"),
                    )
                    assert labels[-1] == tokenizer.eos_token_id and tokenizer.decode(labels[:-1]).strip().isdigit()


def test_a_finished_warm_start_is_used_again_only_for_the_same_settings(tmp_path):
    from recipes.quickstart import training, warm_start

    tiny = {"num_updates": 1, "batch_size": 2, "hidden_size": 32, "num_layers": 1}
    tiny |= {"num_train_rows": 8, "num_val_rows": 4}
    config = warm_start.WarmStartConfig(**tiny)
    weights = warm_start.warm_start(tmp_path, config) / "model.safetensors"
    first = weights.stat().st_mtime_ns, weights.read_bytes()
    assert len(pd.read_parquet(tmp_path / "train.parquet")) == 8
    assert len(pd.read_parquet(tmp_path / "val.parquet")) == 4

    warm_start.warm_start(tmp_path, config)
    assert weights.stat().st_mtime_ns == first[0]
    (tmp_path / training.MANIFEST).unlink()
    warm_start.warm_start(tmp_path, config)
    assert weights.stat().st_mtime_ns != first[0] and weights.read_bytes() == first[1]
    assert not training.is_finished(tmp_path, warm_start.WarmStartConfig(**tiny, seed=1))
