"""The reward manager `rredcot`: verl's own verification, plus where the final answer is."""

import logging
from typing import Any

import numpy as np
import torch
from verl import DataProto
from verl.experimental.reward_loop.reward_manager import NaiveRewardManager, register

from rredcot_verl.answers.grammar import find_answer, formats_of
from rredcot_verl.answers.thinking import Thinking
from rredcot_verl.probes.words import Words
from rredcot_verl.run.settings import TELLING_AGENT_LOOP_MANAGER, parse_block

logger = logging.getLogger(__name__)

NAME = "rredcot"
RESPONSE_MASK = "rredcot_response_mask"
"""Extra field of an output under which our agent loop workers send its mask."""
_TURNS_OF_A_PLAIN_RESPONSE = 2


@register(NAME)
class RREDCoTRewardManager(NaiveRewardManager):
    """verl's naive manager (plain and async `compute_score` alike) on what the model wrote, with two diagnostics.

    What tools and templates put into a response is a newline to the verifier. Tags of thinking stand in the text even
    where they are special tokens.
    `answer_found`: 1.0 if the response holds a final answer in one of the formats that are looked for.
    `answer_position`: where its opening starts, as a share of the response's characters; 1.0 without an answer.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **kwargs: Any) -> None:
        super().__init__(config, tokenizer, compute_score, **kwargs)
        self._elicitation = parse_block(config).elicitation
        self._formats = formats_of(self._elicitation)
        self._words = self.tokenizer = Words(tokenizer, self._elicitation)
        self._warned: set[str] = set()

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Verify the last output of a session; see `NaiveRewardManager.run_single`."""
        data = self._written(data[-1:])
        result = await super().run_single(data)
        item = data[0]
        response_ids = item.batch["responses"]
        num_valid = int(item.batch["attention_mask"][-response_ids.shape[-1] :].sum())
        text = await self.loop.run_in_executor(None, lambda: self._words.decode(response_ids[:num_valid]))
        found = find_answer(text, self._formats, self._thinking(item))
        diagnostics = {
            "answer_found": float(found is not None),
            "answer_position": found.start / len(text) if found else 1.0,
        }
        self._compare(found.start if found else -1, result["reward_extra_info"].get("answer_start"))
        # The verifier's own keys win: a user's compute_score may report the same names.
        return {**result, "reward_extra_info": {**diagnostics, **result["reward_extra_info"]}}

    def _written(self, data: DataProto) -> DataProto:
        """The one response without what others wrote, and without the field that says so."""
        fields = dict(data.non_tensor_batch.get("tool_extra_fields", [{}])[0])
        mask = fields.pop(RESPONSE_MASK, None)
        if mask is None:
            if int(data.non_tensor_batch.get("__num_turns__", [0])[0]) > _TURNS_OF_A_PLAIN_RESPONSE:
                self._warn_once(
                    "rredcot: this agent loop worker does not say which tokens the model wrote, so what tools say "
                    "counts as the response's; use %s or one derived from it",
                    f"actor_rollout_ref.rollout.agent.agent_loop_manager_class={TELLING_AGENT_LOOP_MANAGER}",
                )
            return data
        responses = data.batch["responses"].clone()
        written = self._words.written(responses[0, : len(mask)].tolist(), mask)
        responses[0, : len(mask)] = torch.tensor(written, dtype=responses.dtype)
        others = np.empty(1, dtype=object)
        others[0] = fields
        return DataProto(
            batch=data.batch.clone(recurse=False).update({"responses": responses}),
            non_tensor_batch={**data.non_tensor_batch, "tool_extra_fields": others},
            meta_info=data.meta_info,
        )

    def _thinking(self, item: Any) -> Thinking:
        tags, prompt_ids = self._elicitation, item.batch.get("prompts", [])
        length = item.non_tensor_batch.get("prompt_len", len(prompt_ids))
        ids = [int(token_id) for token_id in prompt_ids[:length]]
        return Thinking(tags.think_open, tags.think_close, self._words.last_tag(ids) or False)

    def _compare(self, start: int, verified_start: float | None) -> None:
        """Say once if the verifier judges another part of the response than the one that is probed."""
        if verified_start is not None and verified_start != start:
            self._warn_once(
                "rredcot: the verifier found the answer of a response at character %d and "
                "algorithm.rredcot.elicitation at %d (-1: none); give both the same format and thinking tags "
                "(reward.custom_reward_function.reward_kwargs)",
                verified_start,
                start,
            )

    def _warn_once(self, text: str, *values: object) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning(text, *values)
