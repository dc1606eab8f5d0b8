"""verl's FSDP engine with hidden states: the pass that computes log-probabilities also leaves one layer's states.

The pass itself is verl's, whatever its attention, kernels or packing: a hook reads, and nothing else is different.
"""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu

from rredcot_verl.passes.hidden_states import HiddenStates, hidden_states
from rredcot_verl.passes.protocol import HIDDEN_ONLY, HIDDEN_POSITIONS, HIDDEN_STATES, PASS, READOUT

if TYPE_CHECKING:
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead as _Engine
else:
    # verl's module registers ours when it is loaded, and so must not be loaded from here.
    _Engine = object


class HiddenStatesMixin(_Engine):
    """Reads hidden states in the log-probability pass of an FSDP engine."""

    _hidden: HiddenStates

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        """See `FSDPEngine.forward_step`."""
        if READOUT not in micro_batch.keys():
            return super().forward_step(micro_batch, loss_function, forward_only)
        layer, dim, seed = tu.get(micro_batch, READOUT)
        with hidden_states(self.module, layer, dim, seed) as self._hidden:
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        if len(self._hidden.collected) != 1:
            raise RuntimeError(f"decoder layer {layer} was called {len(self._hidden.collected)} times in one pass")
        states = self._hidden.collected[0]
        if self._hidden.shard[1] > 1:
            torch.distributed.all_reduce(states, group=self.ulysses_parallel_group)
        del self._hidden
        counts = [len(positions) for positions in _positions(micro_batch)]
        rows = [own.flatten() if len(own) else own.new_zeros(1) for own in torch.split(states, counts)]
        output["model_output"][HIDDEN_STATES] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        return loss, output

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `FSDPEngineWithLMHead.prepare_model_inputs`; notes where the wanted tokens stand in what verl made."""
        inputs, output_args = super().prepare_model_inputs(micro_batch)
        if READOUT not in micro_batch.keys():
            return inputs, output_args
        packed = tu.get_non_tensor_data(micro_batch, key="use_remove_padding", default=True)
        self._hidden.rows = _rows(micro_batch, packed)
        if packed and self.use_ulysses_sp:
            rank = torch.distributed.get_rank(self.ulysses_parallel_group)
            self._hidden.shard = (rank, self.ulysses_sequence_parallel_size)
        if tu.get(micro_batch, PASS) == HIDDEN_ONLY and "logits_to_keep" in _parameters(self.module):
            # Nothing is read of the logits; one row of them keeps the head small.
            inputs["logits_to_keep"] = torch.zeros(1, dtype=torch.int64, device=inputs["input_ids"].device)
        return inputs, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, Tensor]:
        """See `FSDPEngineWithLMHead.prepare_model_outputs`; the states are added when the pass is over."""
        if tu.get(micro_batch, PASS) == HIDDEN_ONLY:
            return {}
        outputs: dict[str, Tensor] = super().prepare_model_outputs(
            output, output_args, micro_batch, logits_processor_func
        )
        return outputs


def _positions(micro_batch: TensorDict) -> list[Tensor]:
    """For each row the indices of its wanted tokens, on CPU."""
    return [row[row >= 0] for row in micro_batch[HIDDEN_POSITIONS].cpu().unbind()]


def _rows(micro_batch: TensorDict, packed: bool) -> Tensor:
    """Where the wanted tokens stand among all tokens of a pass.

    Args:
        micro_batch: The rows.
        packed: Whether verl lays the rows end to end, or pads each to the longest.
    """
    offsets = micro_batch["input_ids"].offsets().cpu()
    lengths = offsets.diff()
    starts = offsets[:-1] if packed else torch.arange(len(lengths)) * lengths.max()
    rows = []
    for number, positions in enumerate(_positions(micro_batch)):
        if len(positions) and int(positions.max()) >= lengths[number]:
            raise RuntimeError(
                f"a hidden state is wanted at token {int(positions.max())} of a row of {int(lengths[number])} tokens"
            )
        rows.append(positions + starts[number])
    return torch.cat(rows)


def _parameters(module: nn.Module) -> set[str]:
    """Names of what a model can be called with, whatever wraps it."""
    module = getattr(module, "_fsdp_wrapped_module", module)
    if hasattr(module, "get_base_model"):
        module = module.get_base_model()  # type: ignore[operator]
    return set(inspect.signature(module.forward).parameters)
