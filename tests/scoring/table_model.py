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
        cached: Entries of this many first tokens are garbage, as those of a cached prefix are.
        max_model_len: Longer requests are refused as verl's vLLM server does.
    """

    def __init__(self, model: TableModel, cached: int = 0, max_model_len: int = 10**6) -> None:
        self.model, self.cached, self.max_model_len = model, cached, max_model_len
        self.requests: list[dict[str, Any]] = []

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
        entries = []
        for place in range(1, len(prompt_ids)):
            value = 77.0 if place < self.cached else self.model.log_probs(prompt_ids[:place])[prompt_ids[place]].item()
            entries.append([value])
        return SimpleNamespace(extra_fields={"prompt_logprobs": [*entries, [0.0]]})

    def _branch(self, trace_ids: list[int], branch: dict[str, Any], temperature: float) -> dict[str, Any]:
        prefix = trace_ids[: branch["position"]]
        forced = branch["token_ids"]
        assert branch["position"] + len(forced) + 1 <= self.max_model_len
        return {
            "token_log_probs": self.model.sequence(prefix, forced, temperature),
            "closing_log_prob": self.model.any_of([*prefix, *forced], branch["closing_token_ids"], temperature),
        }
