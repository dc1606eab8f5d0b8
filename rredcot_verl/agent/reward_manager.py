"""The reward manager `rredcot`: verl's own verification, plus where the final answer is."""

import logging
from typing import Any

from verl import DataProto
from verl.experimental.reward_loop.reward_manager import NaiveRewardManager, register

from rredcot_verl.answers.grammar import find_answer, formats_of
from rredcot_verl.answers.thinking import Thinking
from rredcot_verl.run.settings import parse_block

logger = logging.getLogger(__name__)

NAME = "rredcot"


@register(NAME)
class RREDCoTRewardManager(NaiveRewardManager):
    """verl's naive manager (plain and async `compute_score` alike) with two diagnostics for every response.

    `answer_found`: 1.0 if the response holds a final answer in one of the formats that are looked for.
    `answer_position`: where its opening starts, as a share of the response's characters; 1.0 without an answer.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **kwargs: Any) -> None:
        super().__init__(config, tokenizer, compute_score, **kwargs)
        self._elicitation = parse_block(config).elicitation
        self._formats = formats_of(self._elicitation)
        self._warned = False

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Verify the last output of a session; see `NaiveRewardManager.run_single`."""
        result = await super().run_single(data)
        item = data[-1:][0]
        response_ids = item.batch["responses"]
        num_valid = int(item.batch["attention_mask"][-response_ids.shape[-1] :].sum())
        text = await self.loop.run_in_executor(
            None, lambda: self.tokenizer.decode(response_ids[:num_valid], skip_special_tokens=True)
        )
        found = find_answer(text, self._formats, self._thinking(item.batch))
        diagnostics = {
            "answer_found": float(found is not None),
            "answer_position": found.start / len(text) if found else 1.0,
        }
        self._compare(found.start if found else -1, result["reward_extra_info"].get("answer_start"))
        # The verifier's own keys win: a user's compute_score may report the same names.
        return {**result, "reward_extra_info": {**diagnostics, **result["reward_extra_info"]}}

    def _thinking(self, batch: Any) -> Thinking:
        tags, prompt_ids = self._elicitation, batch.get("prompts", None)
        prompt = "" if prompt_ids is None else self.tokenizer.decode(prompt_ids)
        return Thinking(
            tags.think_open, tags.think_close, prompt.rfind(tags.think_open) > prompt.rfind(tags.think_close)
        )

    def _compare(self, start: int, verified_start: float | None) -> None:
        """Say once if the verifier judges another part of the response than the one that is probed."""
        if verified_start is None or verified_start == start or self._warned:
            return
        self._warned = True
        logger.warning(
            "rredcot: the verifier found the answer of a response at character %d and "
            "algorithm.rredcot.elicitation at %d (-1: none); give both the same format and thinking tags "
            "(reward.custom_reward_function.reward_kwargs)",
            verified_start,
            start,
        )
