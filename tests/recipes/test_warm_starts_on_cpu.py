"""What the CPU recipes share: parquet files, the packed pass of the warm start, and its folder."""

import random

import pandas as pd
import pytest
import torch

import recipes.code.tiny.task as code_task
import recipes.quickstart.task as math_task
from recipes.code.tiny import language
from recipes.code.tiny import tokens as code_tokens
from recipes.code.tiny import warm_start as code_warm_start
from recipes.common import policy, problems, warm_start
from recipes.quickstart import tokens as math_tokens
from recipes.quickstart import warm_start as math_warm_start

EASY = {
    math_task: math_task.Difficulty(min_operations=1, max_operations=1, max_operand=2, max_value=3),
    code_task: code_task.Difficulty(min_operations=1, max_operations=1, always_share=1.0),
}
SMALLEST = {
    "num_updates": 1,
    "batch_size": 2,
    "hidden_size": 32,
    "num_layers": 1,
    "num_train_rows": 8,
    "num_val_rows": 4,
}


@pytest.mark.parametrize("task", [math_task, code_task], ids=["math", "code"])
def test_parquet_schema_and_disjoint_splits(task, tmp_path):
    contents = []
    for split in ("train", "validation"):
        path = tmp_path / "data" / f"{split}.parquet"
        problems.write_parquet(path, task, 60, split, seed=3)
        frame = pd.read_parquet(path)
        assert len(frame) == 60
        assert set(frame.columns) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
        for index, row in enumerate(frame.to_dict("records")):
            (message,) = row["prompt"]
            problem = task.parse_problem(message["content"])
            assert message["role"] == "user" and problems.is_validation(problem) == (split == "validation")
            info = row["extra_info"]
            assert (info["split"], info["index"]) == (split, index)
            if task is math_task:
                assert row["reward_model"] == {"style": "rule", "ground_truth": problem.answer}
                assert info["expression"] == problem.expression
            else:
                assert row["reward_model"] == {"style": "rule", "ground_truth": problem.tests}
                assert list(info["solutions"]) == [problem.solution]
        contents.append({prompt[0]["content"] for prompt in frame["prompt"]})
    assert len(contents[0]) == len(contents[1]) == 60 and not contents[0] & contents[1]


@pytest.mark.parametrize("task", [math_task, code_task], ids=["math", "code"])
def test_too_many_rows_for_the_difficulty_are_refused(task, tmp_path):
    with pytest.raises(ValueError, match="distinct"):
        problems.write_parquet(tmp_path / "rows.parquet", task, 2000, "train", difficulty=EASY[task])


@pytest.mark.parametrize(
    "task, tokens, recipe, settings",
    [
        (math_task, math_tokens, math_warm_start, {}),
        (code_task, code_tokens, code_warm_start, {"num_elicited": 5}),
    ],
    ids=["math", "code"],
)
def test_one_packed_pass_equals_one_sequence_per_elicited_answer(task, tokens, recipe, settings):
    config, tokenizer = recipe.WarmStartConfig(**settings), tokens.build_tokenizer()
    model = policy.build_model(tokenizer, hidden_size=32, num_layers=2).eval()
    rng = random.Random(0)
    examples = [recipe.make_example(rng, task.make_problem(rng), config, tokenizer) for _ in range(3)]
    batch = warm_start.collate(examples, tokenizer.pad_token_id)
    with torch.no_grad():
        packed = model(**{key: batch[key] for key in ("input_ids", "position_ids", "attention_mask")}).logits
        for row, example in enumerate(examples):
            ids, probe = torch.tensor(example["input_ids"]), torch.tensor(example["probe"])
            assert int(probe.max()) == 5
            for index in range(6):
                own = (probe == index).nonzero()[:, 0]
                fork = example["fork"][own[0]] if index else 0
                alone = model(input_ids=torch.cat([ids[:fork], ids[own]])[None]).logits[0, fork:]
                torch.testing.assert_close(packed[row, own], alone, atol=1e-5, rtol=1e-4)
                if not index:
                    continue
                labels = [label for i in own if (label := example["labels"][i]) != warm_start.IGNORE]
                if task is math_task:  # only the answer is learnt, then the end of the sequence
                    assert ids[own[0]] == tokenizer.encode(task.ANSWER_PREFIX)[0]
                    assert tokenizer.decode(ids[fork - 1]) in ("\n", policy.ASSISTANT)
                    assert (
                        labels[-1] == tokenizer.eos_token_id
                        and tokenizer.decode(labels[:-1]).replace(" ", "").isdigit()
                    )
                else:  # only the program is learnt, then the fence that ends it
                    text = tokenizer.decode(labels)
                    assert text.startswith(language.DEF_LINE) and text.endswith(language.RETURN_LINE + language.FENCE)


@pytest.mark.parametrize("recipe", [math_warm_start, code_warm_start], ids=["math", "code"])
def test_a_finished_warm_start_is_used_again_only_for_the_same_settings(recipe, tmp_path):
    config = recipe.WarmStartConfig(**SMALLEST)
    weights = recipe.warm_start(tmp_path, config) / "model.safetensors"
    first = weights.stat().st_mtime_ns, weights.read_bytes()
    assert len(pd.read_parquet(tmp_path / "train.parquet")) == 8
    assert len(pd.read_parquet(tmp_path / "val.parquet")) == 4

    recipe.warm_start(tmp_path, config)
    assert weights.stat().st_mtime_ns == first[0]
    (tmp_path / warm_start.MANIFEST).unlink()
    recipe.warm_start(tmp_path, config)
    assert weights.stat().st_mtime_ns != first[0] and weights.read_bytes() == first[1]
    assert not warm_start.is_finished(tmp_path, recipe.WarmStartConfig(**SMALLEST, seed=1))
