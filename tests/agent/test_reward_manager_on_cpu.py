"""verl's verification, and where the final answer is."""

import asyncio

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl import DataProto
from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls

from tests.probes.tiny_tokenizers import byte_level, encode


def verify(text: str, compute_score, prompt: str = "What is it?") -> dict:
    tokenizer = byte_level()
    ids = encode(tokenizer, text)
    # Padding holds another answer, which must not be found.
    padding = encode(tokenizer, "\\boxed{99}")
    data = DataProto.from_dict(
        {
            "responses": torch.tensor([ids + padding]),
            "prompts": torch.tensor([encode(tokenizer, prompt)]),
            "attention_mask": torch.tensor([[1, 1, *[1] * len(ids), *[0] * len(padding)]]),
        },
        {
            "data_source": np.array(["test"], dtype=object),
            "reward_model": np.array([{"ground_truth": "15"}], dtype=object),
            "extra_info": np.array([{}], dtype=object),
        },
    )

    async def run():
        manager = get_reward_manager_cls("rredcot")(OmegaConf.create({}), tokenizer, compute_score)
        return await manager.run_single(data)

    return asyncio.run(run())


def score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(f"{{{ground_truth}}}" in solution_str), "acc": 1.0}


async def score_async(**kwargs):
    return score(**kwargs)


@pytest.mark.parametrize("compute_score", [score, score_async])
def test_the_answer_is_reported_beside_verls_own_result(compute_score):
    text = "So 12 + 3 = 15.\n\\boxed{15}.\n"
    result = verify(text, compute_score)
    assert result["reward_score"] == 1.0
    assert result["reward_extra_info"] == {
        "score": 1.0,
        "acc": 1.0,
        "answer_found": 1.0,
        "answer_position": text.index("\\boxed") / len(text),
    }


def test_without_an_answer():
    result = verify("So 12 + 3", score)
    assert result["reward_score"] == 0.0
    assert result["reward_extra_info"]["answer_found"] == 0.0
    assert result["reward_extra_info"]["answer_position"] == 1.0


@pytest.mark.parametrize(
    "prompt, text, found",
    [
        ("What?", "so \\boxed{15}", 1.0),
        # The template has opened the thinking block: what stands in it is not said yet.
        ("What?<think>\n", "so \\boxed{15}", 0.0),
        ("What?<think>\n", "so \\boxed{14}</think>\\boxed{15}", 1.0),
        ("What?<think>\n\n</think>\n", "so \\boxed{15}", 1.0),
        ("What?", "<think>so \\boxed{15}", 0.0),
    ],
)
def test_an_answer_that_is_only_thought_is_not_found(prompt, text, found):
    assert verify(text, score, prompt)["reward_extra_info"]["answer_found"] == found


def test_the_verifiers_own_keys_win():
    result = verify("\\boxed{15}", lambda **kwargs: {"score": 0.5, "answer_found": 7.0})
    assert result["reward_score"] == 0.5 and result["reward_extra_info"]["answer_found"] == 7.0


@pytest.mark.parametrize("start, warned", [(17.0, False), (-1.0, True), (3.0, True), (None, False)])
def test_a_verifier_that_judges_another_answer_is_reported(caplog, start, warned):
    extra = {} if start is None else {"answer_start": start}
    verify("So 12 + 3 = 15.\n\n\\boxed{15}", lambda **kwargs: {"score": 1.0, **extra})
    assert ("the verifier found the answer of a response at character" in caplog.text) == warned


def test_a_verifier_that_agrees_on_no_answer_is_not_reported(caplog):
    verify("So 12 + 3", lambda **kwargs: {"score": 0.0, "answer_start": -1.0})
    assert not caplog.records
