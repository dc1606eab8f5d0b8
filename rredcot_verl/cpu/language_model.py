"""The rollout server's model: the two kinds of work it does, and in-place weight updates."""

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from rredcot_verl.cpu.few_rows import use_few_rows
from rredcot_verl.cpu.generation import GeneratedSequence, generate_batch
from rredcot_verl.cpu.probing import read_probes
from rredcot_verl.cpu.sampling import SamplingParams
from rredcot_verl.servers.probe_requests import Probe


class RolloutModel:
    """A causal language model, used by one thread at a time.

    Args:
        model: The model; it is put into evaluation mode and its generation defaults are cleared, because sampling is
            governed by the request alone.
        eos_token_ids: Tokens that end a sequence.
        max_batch_tokens: Bound on the tokens, cached ones included, of one batch of probes.
    """

    def __init__(self, model: PreTrainedModel, eos_token_ids: Sequence[int], max_batch_tokens: int):
        self.model = model.eval()
        use_few_rows(self.model)
        self.model.generation_config = GenerationConfig()
        self.eos_token_ids = tuple(eos_token_ids)
        self.abort = threading.Event()
        self._max_batch_tokens = max_batch_tokens
        self._updated: set[int] = set()

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[GeneratedSequence]:
        """Samples one continuation of each prompt; see `generate_batch`."""
        return generate_batch(self.model, prompts, params, self.eos_token_ids, self.abort)

    def read_probes(
        self, traces: Sequence[Sequence[int]], probes: Sequence[Sequence[Probe]], temperature: float
    ) -> list[list[dict[str, Any]]]:
        """Reads probes of some traces; see `probing.read_probes`."""
        return read_probes(self.model, traces, probes, temperature, self._max_batch_tokens)

    @torch.no_grad()
    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies tensors into the model's parameters and buffers of the same name.

        Raises:
            ValueError: A name is unknown to the model, or a shape differs.
        """
        targets = self.model.state_dict(keep_vars=True)
        for name, tensor in named_tensors:
            target = targets.get(name)
            if target is None:
                raise ValueError(
                    f"the actor sent weight {name!r}, which the rollout model does not have; models whose weights verl "
                    "renames for the rollout (mixture of experts, multimodal) are not supported on CPU"
                )
            if target.shape != tensor.shape:
                raise ValueError(
                    f"weight {name!r} has shape {tuple(tensor.shape)}, expected {tuple(target.shape)}; "
                    "is the actor's model the rollout's?"
                )
            target.copy_(tensor)
            self._updated.add(target.data_ptr())

    def finish_weight_update(self) -> None:
        """Checks that the tensors loaded since the last call covered all parameters.

        Raises:
            ValueError: Some parameters were not sent; the rollout model would be a mixture of two policies.
        """
        missing = [name for name, tensor in self.model.named_parameters() if tensor.data_ptr() not in self._updated]
        self._updated.clear()
        if missing:
            raise ValueError(f"the actor's weight update left out {len(missing)} weights, among them {missing[0]!r}")
