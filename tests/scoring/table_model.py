"""A language model that is a table, and a rollout server of it that answers both kinds of scoring request."""

from types import SimpleNamespace
from typing import Any

import torch


class TableModel:
    """log p(token | prefix) from a generator seeded by the prefix: any number can be computed a second way."""

    def __init__(self, vocab_size: int, habit: list[int] | None = None) -> None:
        self.vocab_size = vocab_size
        # A text that is nearly always written on once it is begun.
        self.habit = habit or []

    def log_probs(self, prefix: list[int], temperature: float = 1.0) -> torch.Tensor:
        seed = hash(tuple(prefix)) % (2**31)
        logits = torch.randn(self.vocab_size, generator=torch.Generator().manual_seed(seed)).double()
        begun = [n for n in range(len(self.habit)) if prefix[len(prefix) - n :] == self.habit[:n]]
        if begun:
            logits[self.habit[max(begun)]] += 12.0
        return (logits / temperature).log_softmax(0)

    def sequence(self, prefix: list[int], tokens: list[int], temperature: float = 1.0) -> list[float]:
        return [
            self.log_probs([*prefix, *tokens[:place]], temperature)[token].item() for place, token in enumerate(tokens)
        ]

    def any_of(self, prefix: list[int], tokens: list[int], temperature: float = 1.0) -> float:
        return self.log_probs(prefix, temperature)[list(tokens)].logsumexp(0).item()


class FakeServer:
    """`LLMServerClient.generate` of a `TableModel`, in the layout of verl's own servers.

    Args:
        model: The table.
        block_size: Tokens of a block of vLLM's prefix cache; 0 for no cache. A request finds the longest run of full
            blocks that an earlier one (or `generated`) put there, short of its last token; entries up to the token
            after what it found are garbage.
        garbage: What those entries hold.
        generated: A trace whose blocks are in the cache from its generation.
        max_model_len: Longer requests are refused as verl's vLLM server does.
    """

    def __init__(
        self,
        model: TableModel,
        block_size: int = 0,
        garbage: float = -0.2,
        generated: list[int] | None = None,
        max_model_len: int = 10**6,
    ) -> None:
        self.model, self.block_size, self.garbage, self.max_model_len = model, block_size, garbage, max_model_len
        self.requests: list[dict[str, Any]] = []
        self.blocks: set[tuple[int, ...]] = set()
        self._remember(generated or [])

    def _remember(self, token_ids: list[int]) -> None:
        if self.block_size:
            ends = range(self.block_size, len(token_ids) + 1, self.block_size)
            self.blocks |= {tuple(token_ids[:end]) for end in ends}

    def _num_cached(self, token_ids: list[int]) -> int:
        num_cached = 0
        while self.block_size and num_cached + self.block_size < len(token_ids):
            if tuple(token_ids[: num_cached + self.block_size]) not in self.blocks:
                break
            num_cached += self.block_size
        return num_cached

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Any:
        self.requests.append(
            {"request_id": request_id, "prompt_ids": list(prompt_ids), "sampling_params": dict(sampling_params)}
        )
        if "score_branches" in sampling_params:
            return SimpleNamespace(
                extra_fields={
                    "branch_log_probs": [
                        self._branch(prompt_ids, branch, sampling_params["temperature"])
                        for branch in sampling_params["score_branches"]
                    ]
                }
            )
        if self.max_model_len - len(prompt_ids) < 1:
            raise ValueError(f"Prompt length ({len(prompt_ids)}) leaves no room to generate")
        # As `extract_prompt_logprobs`: the first token has no entry, and a dummy closes the list.
        num_cached = 0 if sampling_params["skip_reading_prefix_cache"] else self._num_cached(prompt_ids)
        entries = []
        for place in range(1, len(prompt_ids)):
            computed = self.model.log_probs(prompt_ids[:place])[prompt_ids[place]].item()
            entries.append([computed if place > num_cached else self.garbage])
        self._remember(prompt_ids)
        return SimpleNamespace(extra_fields={"prompt_logprobs": [*entries, [0.0]], "num_cached_tokens": num_cached})

    def _branch(self, trace_ids: list[int], branch: dict[str, Any], temperature: float) -> dict[str, Any]:
        prefix = trace_ids[: branch["position"]]
        forced = branch["token_ids"]
        assert branch["position"] + len(forced) + 1 <= self.max_model_len
        return {
            "token_log_probs": self.model.sequence(prefix, forced, temperature),
            "closing_log_prob": self.model.any_of([*prefix, *forced], branch["closing_token_ids"], temperature),
        }
