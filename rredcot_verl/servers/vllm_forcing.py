"""The logits processor of `vllm_forced`. Importing this module imports vllm; vLLM's workers do, by its name."""

from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from rredcot_verl.servers.vllm_forced import EXTRA_ARG, ForcedRequest, replace_rows


class ForcedAnswers(LogitsProcessor):
    """Forces tokens, and hands over the log-probabilities they and closing tokens would have had.

    A row of a request that forces is replaced; see `vllm_forced.replace_rows`. The rows of others are left alone.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._requests: dict[int, ForcedRequest] = {}

    def is_argmax_invariant(self) -> bool:
        """It decides what is sampled."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """See vLLM's `LogitsProcessor`."""
        process_dict_updates(self._requests, batch_update, _new_request)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """See vLLM's `LogitsProcessor`; `(num_requests, vocab_size)`."""
        if not self._requests:
            return logits
        rows = torch.tensor(list(self._requests), device=logits.device)
        requests = list(self._requests.values())
        replaced = replace_rows(logits[rows].float(), requests)
        logits[rows] = replaced.to(logits.dtype)
        return logits


def _new_request(params: SamplingParams, prompt_ids: Any, output_ids: list[int]) -> ForcedRequest | None:
    fields = (params.extra_args or {}).get(EXTRA_ARG)
    return ForcedRequest(**fields, output_ids=output_ids) if fields else None
