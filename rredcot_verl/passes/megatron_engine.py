"""verl's Megatron engine that also reads probes, in a pass of their own: a trace and its probes are one sequence.

Registered under the same model type as the FSDP engine. Training and verl's log-probabilities are verl's, untouched.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.megatron_utils import unwrap_model
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

from rredcot_verl.passes.engine_passes import ProbesPass, asked_passes, jagged_results
from rredcot_verl.passes.probe_codec import num_probe_tokens
from rredcot_verl.passes.probe_pack import read_probes


class RREDCoTMegatronEngine(MegatronEngineWithLMHead):
    """verl's Megatron engine with a language-model head, and a pass that reads the probes of a batch.

    Tensor, pipeline, expert and sequence parallelism are verl's: its schedule calls `forward_step` on every stage.
    """

    ulysses_sequence_parallel_size = 1
    """What passes ask of an engine; Megatron splits no sequence so."""

    _probes: ProbesPass | None = None
    """Of the pass under way, if it is ours."""

    def initialize(self) -> None:
        """See `BaseEngine.initialize`.

        Raises:
            RuntimeError: The model cannot compute traces and probes in one sequence.
        """
        from rredcot_verl.passes.megatron_model import WAY_OUT, why_not_shared

        # The type has chosen this engine; verl builds a language model from its own.
        self.model_config.model_type = "language_model"
        super().initialize()
        for stage in unwrap_model(self.module):
            obstacle = why_not_shared(stage)
            if obstacle is not None:
                raise RuntimeError(f"this model's prefixes cannot be shared on Megatron: {obstacle}; {WAY_OUT}")

    def forward_backward_batch(self, data: TensorDict, loss_function: Any, forward_only: bool = False) -> Any:
        """See `BaseEngine.forward_backward_batch`; what a batch asks for takes the place of verl's numbers."""
        asked = asked_passes(self, data)
        if not asked:
            return super().forward_backward_batch(data, loss_function, forward_only=forward_only)
        (probes,) = asked
        if not isinstance(probes, ProbesPass) or not probes.alone:
            raise RuntimeError("on Megatron only probes are read, and in a pass of their own")
        self._probes = probes
        try:
            output = super().forward_backward_batch(probes.prepare_batch(data), None, forward_only=True)
        finally:
            self._probes = None
        if "model_output" in output:
            output["model_output"] = probes.finish_batch(output["model_output"])
        return output

    def forward_step(
        self,
        batch_iter: Iterator[TensorDict],
        model: nn.Module,
        logits_processor_func: Any,
        postprocess_micro_batch_func: Callable[..., Any],
    ) -> tuple[Any, Callable[..., Any]]:
        """See `MegatronEngineWithLMHead.forward_step`: one micro batch through one pipeline stage."""
        if self._probes is None:
            return super().forward_step(  # type: ignore[no-any-return]
                batch_iter, model, logits_processor_func, postprocess_micro_batch_func
            )
        micro_batch = self._probes.own_rows(next(batch_iter)).to(get_device_id())
        output = self._read(self._probes, micro_batch, model)
        return output, functools.partial(postprocess_micro_batch_func, data=micro_batch)

    def _read(self, probes: ProbesPass, micro_batch: TensorDict, model: nn.Module) -> Tensor | dict[str, Tensor]:
        """What the probes of the micro batch give, on the last stage; hidden states for the next one elsewhere."""
        from rredcot_verl.passes.megatron_model import VocabularyShard, pack_through

        ids, payload = micro_batch["input_ids"], micro_batch[probes.payload]
        num_tokens = ids.values().shape[0] + sum(num_probe_tokens(row) for row in payload.unbind())
        pack, rows = probes.lay_out(micro_batch, -num_tokens % self._multiple())
        pack, rows = pack.to(ids.device), rows.to(ids.device)
        padding = ids.values().new_zeros(pack.num_trace_tokens - ids.values().shape[0])
        tokens = torch.cat([ids.values(), padding, pack.probe_token_ids]).unsqueeze(0)
        temperature = torch.as_tensor(tu.get(micro_batch, "temperature"), dtype=torch.float32).expand(len(ids))
        scores: list[list[float]] = []

        def read(logits: Tensor) -> None:
            scores.extend(read_probes(pack, rows, logits, temperature, VocabularyShard()))

        stage = unwrap_model(model)
        with pack_through(stage, pack, rows, read):
            output = model(input_ids=tokens, position_ids=pack.positions.unsqueeze(0), attention_mask=None)
        return {probes.result: jagged_results(scores[: len(ids)])} if stage.post_process else output

    def _multiple(self) -> int:
        """Of what a sequence's length must be a multiple."""
        config = self.engine_config
        bucket = config.pad_to_length_bucket if config.pad_to_length else 1
        return math.lcm(config.tensor_model_parallel_size, bucket)
