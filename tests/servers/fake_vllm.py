"""A vLLM engine that is a table: `RequestOutput`s of a `TableModel`, with a prefix cache of whole blocks."""

import asyncio
import contextlib
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rredcot_verl.servers import vllm_tree
from rredcot_verl.servers.vllm_forced import EXTRA_ARG, ForcedRequest, replace_rows
from rredcot_verl.servers.vllm_requests import ReadPlaces, parse_request, read_probes


class FakeVLLM:
    """Answers as vLLM answers requests with `logprob_token_ids`.

    Args:
        model: A `TableModel`.
        block_size: Tokens of a block of the prefix cache. A request finds the longest run of blocks that an earlier one
            (or `generated`) put there, short of its last token.
        generated: A trace whose blocks are in the cache from its generation; its last token was never computed.
        edit: Changes an output before it is given.
    """

    def __init__(self, model: Any, block_size: int = 4, generated: list[int] | None = None, edit: Any = None) -> None:
        self.model, self.block_size, self.edit = model, block_size, edit
        self.requests: list[tuple[list[int], dict[str, Any]]] = []
        self.num_computed: list[int] = []
        self.by_tree: ReadPlaces = functools.partial(vllm_tree.read_places, mass=vllm_tree.ClosingMass())
        self.running = self.most_running = 0
        self.blocks: set[tuple[int, ...]] = set()
        self._remember((generated or [])[:-1])

    def _remember(self, token_ids: list[int]) -> None:
        ends = range(self.block_size, len(token_ids) + 1, self.block_size)
        self.blocks |= {tuple(token_ids[:end]) for end in ends}

    def _num_cached(self, token_ids: list[int]) -> int:
        num_cached = 0
        while num_cached + self.block_size < len(token_ids):
            if tuple(token_ids[: num_cached + self.block_size]) not in self.blocks:
                break
            num_cached += self.block_size
        return num_cached

    async def send(self, prompt_ids: list[int], fields: dict[str, Any]) -> Any:
        """The last `RequestOutput` of a request."""
        assert 1 <= len(fields["logprob_token_ids"]) <= vllm_tree.MAX_TOKEN_IDS
        self.requests.append((list(prompt_ids), dict(fields)))
        with self._under_way():
            await asyncio.sleep(0)
            num_cached = self._num_cached(prompt_ids)
            self.num_computed.append(len(prompt_ids) - num_cached)
            token_ids: list[int] = []
            logprobs = []
            for _ in range(fields["max_tokens"]):
                log_probs = self._log_probs([*prompt_ids, *token_ids], token_ids, fields)
                token_ids.append(int(log_probs.argmax()))
                # The token that was sampled stands first, asked for or not.
                ids = [token_ids[-1], *fields["logprob_token_ids"]]
                logprobs.append({token: SimpleNamespace(logprob=log_probs[token].item()) for token in ids})
            self._remember([*prompt_ids, *token_ids[:-1]])
        completion = SimpleNamespace(finish_reason="length", token_ids=token_ids, logprobs=logprobs)
        output = SimpleNamespace(outputs=[completion], num_cached_tokens=num_cached)
        return self.edit(output) if self.edit else output

    def _log_probs(self, context: list[int], output_ids: list[int], fields: dict[str, Any]) -> torch.Tensor:
        """Processed ones, as verl's default has it."""
        forcing = fields.get("extra_args", {}).get(EXTRA_ARG)
        if forcing is None:
            return self.model.log_probs(context, fields["temperature"])
        request = ForcedRequest(**forcing, output_ids=output_ids)
        return replace_rows(self.model.log_probs(context, 1.0).unsqueeze(0), [request])[0].log_softmax(-1)

    @contextlib.contextmanager
    def _under_way(self):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        yield
        self.running -= 1

    async def read_probes(
        self,
        trace_ids: list[int],
        sampling_params: dict[str, Any],
        max_model_len: int = 10**6,
        read_places: ReadPlaces | None = None,
        vocab_size: int = 10**6,
    ) -> list[dict[str, Any]]:
        """What our server does with a request that holds `read_probes`."""
        probes, temperature = parse_request(sampling_params, len(trace_ids), max_model_len, vocab_size)
        return await read_probes(
            read_places or self.by_tree, self.send, trace_ids, probes, temperature, self.block_size
        )


def expected(
    model: Any, trace_ids: list[int], probe: dict[str, Any], temperature: float = 1.0
) -> tuple[list[float], float | None]:
    """A probe's `token_log_probs`, 0 before `scored_from`, and `closing_log_prob`, computed directly."""
    prefix, tokens = trace_ids[: probe["position"]], list(probe["token_ids"])
    scored_from = probe.get("scored_from", 0)
    scored = model.sequence([*prefix, *tokens[:scored_from]], tokens[scored_from:], temperature)
    closing = sorted(set(probe.get("closing_token_ids", ())))
    after = model.any_of([*prefix, *tokens], closing, temperature) if closing else None
    return [0.0] * scored_from + scored, after


def check(
    model: Any, trace_ids: list[int], probes: list[dict[str, Any]], results: list[Any], temperature: float = 1.0
) -> None:
    """Fails where a result is not that of its probe."""
    assert len(results) == len(probes)
    for probe, result in zip(probes, results, strict=True):
        token_log_probs, closing = expected(model, trace_ids, probe, temperature)
        assert result["token_log_probs"] == pytest.approx(token_log_probs, abs=1e-12)
        assert result["closing_log_prob"] == (None if closing is None else pytest.approx(closing, abs=1e-12))
