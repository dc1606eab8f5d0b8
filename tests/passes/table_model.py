"""A language model that is a table, and a rollout server of it that reads the probes of traces."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from rredcot_verl.probes.proposals import Proposal
from tests.servers.fake_vllm import FakeVLLM


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
    """`LLMServerClient.generate` of a `TableModel`.

    Args:
        model: The table.
        block_size: 0 for the embedded CPU server; otherwise our vLLM server, with a prefix cache of such blocks.
        generated: A trace whose blocks are in the cache from its generation.
        max_model_len: Longest sequence taken, tokens.
    """

    def __init__(
        self, model: TableModel, block_size: int = 0, generated: list[int] | None = None, max_model_len: int = 10**6
    ) -> None:
        self.model, self.max_model_len = model, max_model_len
        self.requests: list[dict[str, Any]] = []
        self.engine = FakeVLLM(model, block_size, generated) if block_size else None

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Any:
        self.requests.append(
            {"request_id": request_id, "prompt_ids": list(prompt_ids), "sampling_params": dict(sampling_params)}
        )
        if self.engine:
            results = await self.engine.read_probes(prompt_ids, sampling_params, self.max_model_len)
        else:
            temperature = sampling_params["temperature"]
            results = [self._probe(prompt_ids, probe, temperature) for probe in sampling_params["read_probes"]]
        return SimpleNamespace(extra_fields={"probe_log_probs": results})

    def _probe(self, trace_ids: list[int], probe: dict[str, Any], temperature: float) -> dict[str, Any]:
        prefix, forced = trace_ids[: probe["position"]], list(probe["token_ids"])
        assert probe["position"] + len(forced) + 1 <= self.max_model_len
        return {
            "token_log_probs": self.model.sequence(prefix, forced, temperature),
            "closing_log_prob": self.model.any_of([*prefix, *forced], probe["closing_token_ids"], temperature),
        }


def utilities(proposals: Sequence[Proposal]) -> list[float]:
    """The utility of each answer."""
    return [proposal.utility for proposal in proposals]
