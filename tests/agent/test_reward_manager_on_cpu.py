"""verl's verification, and where the final answer is."""

import asyncio

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl import DataProto
from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls

from rredcot_verl.agent.reward_manager import RESPONSE_MASK
from tests.probes.test_words_on_cpu import CHANNELS
from tests.probes.tiny_tokenizers import byte_level, encode, harmony


def verify(
    text: str | list[tuple[int, str]],
    compute_score,
    prompt: str = "What is it?",
    tells: bool = True,
    tokenizer=None,
    **block,
) -> dict:
    """What the manager says of a response: a text of the model's, or pieces, each with who wrote it."""
    tokenizer = tokenizer or byte_level()
    pieces = [(writer, encode(tokenizer, own)) for writer, own in ([(1, text)] if isinstance(text, str) else text)]
    ids = [i for _, own in pieces for i in own]
    mask = [writer for writer, own in pieces for _ in own]
    # Padding holds another answer, which must not be found.
    padding = encode(tokenizer, "\\boxed{99}")
    data = DataProto.from_dict(
        {
            "responses": torch.tensor([ids + padding]),
            "prompts": torch.tensor([encode(tokenizer, prompt)]),
            "attention_mask": torch.tensor([[1, 1, *[1] * len(ids), *[0] * len(padding)]]),
        },
        {
            "tool_extra_fields": np.array([{"other": 3} | ({RESPONSE_MASK: mask} if tells else {})], dtype=object),
            "__num_turns__": np.array([2 * len(pieces)]),
            "data_source": np.array(["test"], dtype=object),
            "reward_model": np.array([{"ground_truth": "15"}], dtype=object),
            "extra_info": np.array([{}], dtype=object),
        },
    )

    config = {"algorithm": {"rredcot": block}} if block else {}

    async def run():
        manager = get_reward_manager_cls("rredcot")(OmegaConf.create(config), tokenizer, compute_score)
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


@pytest.mark.parametrize(
    "pieces, seen, found",
    [
        ([(1, "so "), (0, "see \\boxed{15}.")], "so \n", 0.0),
        ([(1, "\\boxed{15}"), (0, "so \\boxed{16}."), (1, "So")], "\\boxed{15}\nSo", 1.0),
        ([(1, "<think>so"), (0, "</think>so"), (1, "\\boxed{15}")], "<think>so\n\\boxed{15}", 0.0),
        # The template opens the next turn with a thinking block.
        ([(1, "so"), (0, "15\n<think>\n"), (1, "\\boxed{15}")], "so\n<think>\n\\boxed{15}", 0.0),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_verifier_sees_what_the_model_wrote(pieces, seen, found, is_async):
    handed = []

    def judge(data_source, solution_str, ground_truth, extra_info=None):
        handed.append((solution_str, extra_info))
        return score(data_source, solution_str, ground_truth)

    async def judge_later(**kwargs):
        return judge(**kwargs)

    result = verify(pieces, judge_later if is_async else judge)
    ((text, extra),) = handed
    assert text == seen
    assert result["reward_extra_info"]["answer_found"] == found
    # Other fields of the agent loop reach it as ever, the mask does not.
    assert extra["other"] == 3 and RESPONSE_MASK not in extra


def test_a_tools_answer_is_not_paid():
    right, wrong = "\\boxed{15}", "\\boxed{16}"
    assert verify([(1, "so "), (0, right)], score)["reward_score"] == 0.0
    assert verify([(1, right), (0, "so " + wrong)], score)["reward_score"] == 1.0


def test_a_worker_that_does_not_tell_who_wrote_what_is_reported(caplog):
    pieces = [(1, "so "), (0, "\\boxed{15}"), (1, "so")]
    assert verify(pieces, score, tells=False)["reward_score"] == 1.0
    assert "what tools say counts as the response's; use actor_rollout_ref.rollout.agent" in caplog.text
    caplog.clear()
    verify("so \\boxed{15}", score, tells=False)
    assert not caplog.records


def test_tags_that_are_special_tokens_stand_in_the_text():
    handed = []

    def judge(solution_str, **kwargs):
        handed.append(solution_str)
        return 1.0

    thought, said = "<|channel|>analysis<|message|>\\boxed{16}", "<|channel|>final<|message|>\\boxed{15}"
    text = f"{thought}<|end|><|start|>assistant{said}<|return|>"
    result = verify(text, judge, tokenizer=harmony(), elicitation=CHANNELS)
    assert handed == [text.replace("<|end|><|start|>", "").replace("<|return|>", "")]
    assert result["reward_extra_info"]["answer_position"] == handed[0].rindex("\\boxed") / len(handed[0])
    assert verify(thought, judge, tokenizer=harmony(), elicitation=CHANNELS)["reward_extra_info"]["answer_found"] == 0.0
