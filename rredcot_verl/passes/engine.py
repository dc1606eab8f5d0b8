"""verl's FSDP engine with passes of ours: what computes log-probabilities also reads what the batch asks for.

Registered under a model type of its own, which the trainer sets for runs that need it; training itself is verl's,
untouched. Every rank makes the same number of passes, forward and backward, whether its rows want something or not, so
the collectives of FSDP stay in step.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from rredcot_verl.live import PASSED, under_way
from rredcot_verl.passes.engine_passes import EnginePass, asked_passes
from rredcot_verl.passes.protocol import ALONE


class RREDCoTEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine with a language-model head, and the hooks of the passes that a batch asks for.

    A batch that asks for none goes through verl's own code alone.
    """

    _passes: Sequence[EnginePass] = ()
    """Those of the micro batch under way: verl's methods hand nothing down to each other."""

    def initialize(self) -> None:
        """See `BaseEngine.initialize`."""
        # The type has chosen this engine; verl builds a language model from its own.
        self.model_config.model_type = "language_model"
        super().initialize()

    def forward_backward_batch(self, data: TensorDict, loss_function: Any, forward_only: bool = False) -> Any:
        """See `BaseEngine.forward_backward_batch`."""
        passes = asked_passes(self, data)
        for each in passes:
            data = each.prepare_batch(data)
        output = super().forward_backward_batch(data, loss_function, forward_only=forward_only)
        for each in passes:
            output["model_output"] = each.finish_batch(output["model_output"])
        return output

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        """See `FSDPEngine.forward_step`."""
        step = functools.partial(super().forward_step, loss_function=loss_function, forward_only=forward_only)
        self._passes = asked_passes(self, micro_batch)
        for each in self._passes:
            step = functools.partial(each.step, step)
        first = torch.distributed.get_rank() == 0
        try:
            with under_way(PASSED) if first else contextlib.nullcontext():
                return step(micro_batch)
        finally:
            # What they hold is on the device.
            self._passes = ()

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `FSDPEngineWithLMHead.prepare_model_inputs`."""
        inputs, output_args = super().prepare_model_inputs(micro_batch)
        for each in self._passes:
            each.add_inputs(micro_batch, inputs, output_args)
        return inputs, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        """See `FSDPEngineWithLMHead.prepare_model_outputs`, which makes the rows' own numbers of their logits."""
        read = {each.result: each.read_outputs(micro_batch, output, output_args) for each in self._passes}
        if self._passes and tu.get(micro_batch, ALONE):
            return read
        own: dict[str, torch.Tensor] = super().prepare_model_outputs(
            output, output_args, micro_batch, logits_processor_func
        )
        return own | read
