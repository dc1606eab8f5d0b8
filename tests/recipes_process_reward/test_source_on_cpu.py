"""A process reward model as a source of one's own: its scores, what it refuses, and a run."""

import asyncio
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig,
    BertForTokenClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
)

from recipes.process_reward.source import Classifier, Options, ProcessReward
from rredcot_verl.config.schema import parse
from rredcot_verl.sources.registry import make_source
from tests.runs import main_ppo
from tests.tiny_model import make_tokenizer

TEXTS = [["1+2=\n", "so 3\n", "wait, 4\n"], ["7+8=\n"], ["3+4=\n", "then 7\n"]]
PATH = "recipes.process_reward.source:ProcessReward"


@pytest.fixture(scope="module", params=["token", "sequence"])
def folder(request, tmp_path_factory):
    """A random classifier with two labels, beside its tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp(request.param), make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_labels=2,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    kinds = {"token": Qwen3ForTokenClassification, "sequence": Qwen3ForSequenceClassification}
    kinds[request.param](config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("max_tokens", [1, 10**6])
def test_the_scores_are_the_probabilities_at_the_ends(folder, max_tokens):
    classifier = Classifier(Options(model=str(folder), max_tokens=max_tokens, separator=";"))
    found = classifier.scores(TEXTS)
    assert [len(own) for own in found] == [3, 1, 2]
    tokenizer, model = make_tokenizer(), classifier._model
    for parts, own in zip(TEXTS, found, strict=True):
        text = ""
        for number, (part, score) in enumerate(zip(parts, own, strict=True)):
            text += part if number == 0 else part.rstrip("\n") + ";"
            logits = model(torch.tensor([tokenizer.encode(text, add_special_tokens=False)])).logits[0]
            expected = (logits[-1] if logits.ndim == 2 else logits).softmax(-1)[-1].item()
            assert score == pytest.approx(expected, abs=1e-5)


def test_a_token_classifier_that_reads_ahead_is_refused(tmp_path):
    """Its score of a step would know the outcome."""
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    BertForTokenClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="moves by 0.* with the tokens after it; expected a causal token classifier"):
        Classifier(Options(model=str(tmp_path)))


def source(folder, **block) -> ProcessReward:
    options = {"model": str(folder), **block.pop("options", {})}
    return make_source(parse({"source": PATH, "source_options": options, **block}), "rredcot")


def test_values_are_in_the_range_of_the_rewards_and_the_lowest_so_far_where_asked(folder):
    records = [SimpleNamespace(payload={"texts": own}) for own in TEXTS]
    rows = SimpleNamespace(scored=[0, 2], records=[records[0], None, records[2]], keys=["a", "b", "c"])
    scores = Classifier(Options(model=str(folder))).scores([TEXTS[0], TEXTS[2]])
    found = source(folder, self_value={"reward_range": [-1, 1]}).values(rows)
    assert found[1] == [] and found[0] == pytest.approx([2 * score - 1 for score in scores[0]])
    lowest = source(folder, options={"running": "min"}).values(rows)
    assert lowest[0] == pytest.approx([min(scores[0][: k + 1]) for k in range(3)])


def test_the_prompt_and_every_segment_but_the_last_are_judged(folder):
    own = source(folder)
    own.start(SimpleNamespace(elicitation=SimpleNamespace(vocabulary=SimpleNamespace(decode=bytes.decode))))
    response = SimpleNamespace(prompt_ids=b"1+2=", response_ids=b"so 3, no 4, 3")
    plan = asyncio.run(own.plan(response, None, [0, 5, 11, 13]))
    assert plan.record.payload["texts"] == ["1+2=", "so 3,", " no 4,"] and not plan.rows


@pytest.mark.parametrize(
    "options, words",
    [({"modle": "x"}, "source_options.modle='x': unknown key"), ({"kind": "t"}, "kind='t'"), ({}, "model is missing")],
)
def test_faulty_options_are_named(options, words):
    block = {"model": "x"} if words.startswith("kind") else {}
    with pytest.raises(ValueError, match=words):
        make_source(parse({"source": PATH, "source_options": block | options}), "rredcot")


@pytest.mark.run
@pytest.mark.parametrize("folder", ["token"], indirect=True)
def test_another_estimator_reads_the_redistributed_rewards(folder, tmp_path, ray_folder):
    run = main_ppo(
        tmp_path,
        ray_folder,
        "algorithm.adv_estimator=reinforce_plus_plus",
        "+algorithm.rredcot.enable=true",
        f"+algorithm.rredcot.source={PATH}",
        f"+algorithm.rredcot.source_options.model={folder}",
        "+algorithm.rredcot.segmentation.method=fixed",
        "+algorithm.rredcot.segmentation.min_tokens=2",
        f"+algorithm.rredcot.traces.dir={tmp_path / 'traces'}",
    )
    assert run.returncode == 0, run.output[-8000:]
    for step in run.steps:
        assert step["rredcot/rows_scored/mean"] > 0 and step["rredcot/return_error/max"] < 1e-6
        assert step["actor/grad_norm"] > 0 and step["rredcot/scored_by_actor/mean"] == 0
    lines = [json.loads(line) for line in (tmp_path / "traces" / "2.jsonl").read_text().splitlines()]
    assert {line["source"] for line in lines} == {PATH} and {line["engine"] for line in lines} == {f"source, {PATH}"}
    scored = [line for line in lines if line["status"] == "scored"]
    assert scored and all(0 < line["start_value"] < 1 for line in scored)
