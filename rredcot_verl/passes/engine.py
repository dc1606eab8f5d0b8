"""verl's FSDP engine with probes: the pass that computes log-probabilities also reads the probes of its rows.

Registered under a model type of its own, which the trainer sets for runs that score on the training engine or want
hidden states of it; training itself is verl's, untouched. Every rank makes the same number of passes whether its rows
have probes or not, so the collectives of FSDP stay in step.
"""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from rredcot_verl.passes.attribution_engine import AttributionMixin
from rredcot_verl.passes.hidden_engine import HiddenStatesMixin
from rredcot_verl.passes.probe_codec import decode, num_probe_tokens
from rredcot_verl.passes.probe_pack import ProbePack, read_probes
from rredcot_verl.passes.protocol import FUSED, PASS, PROBE_LOG_PROBS, PROBES, PROBES_ONLY

if TYPE_CHECKING:
    from rredcot_verl.passes.shared_attention import SharedPrefix

_TRACES = "rredcot_traces"
"""`input_ids` of a row, while those in the row have room for its probes."""


class SharedPrefixMixin(HiddenStatesMixin):
    """Adds probes to the log-probability pass of an FSDP engine that may also be asked for hidden states."""

    _shared: "SharedPrefix"

    def initialize(self) -> None:
        """See `BaseEngine.initialize`."""
        # The type has chosen this engine; verl builds a language model from its own.
        self.model_config.model_type = "language_model"
        super().initialize()

    def forward_backward_batch(self, data: TensorDict, loss_function: Any, forward_only: bool = False) -> Any:
        """See `BaseEngine.forward_backward_batch`; the token budget of a pass counts the probes' tokens."""
        if _reads_probes(data) and tu.get_non_tensor_data(data, key="use_dynamic_bsz", default=True):
            data = self._with_room(data)
        return super().forward_backward_batch(data, loss_function, forward_only=forward_only)

    def _with_room(self, data: TensorDict) -> TensorDict:
        """The same rows, as long as they are with their probes: so verl packs them."""
        traces = data["input_ids"]
        rows = [
            torch.nn.functional.pad(trace, (0, num_probe_tokens(probes)))
            for trace, probes in zip(traces.unbind(), data[PROBES].unbind(), strict=True)
        ]
        longest = torch.tensor(max(len(row) for row in rows), device=get_device_name())
        # Every rank must come to the same number of passes.
        torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX, group=self.get_data_parallel_group())
        budget = tu.get_non_tensor_data(data, key="max_token_len_per_gpu", default=None)
        data = data.clone(recurse=False)
        data[_TRACES] = traces
        data["input_ids"] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        tu.assign_non_tensor(data, max_token_len_per_gpu=max(int(longest), budget))
        return data

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        """See `FSDPEngine.forward_step`."""
        if not _reads_probes(micro_batch):
            return super().forward_step(micro_batch, loss_function, forward_only)
        # Not at the top: every process that trains imports this module, and registers nothing with transformers.
        from rredcot_verl.passes.shared_attention import shared_prefix

        with shared_prefix(self.module.config) as self._shared:
            result = super().forward_step(micro_batch, loss_function, forward_only)
        # Its masks are on the device.
        del self._shared
        return result

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `FSDPEngineWithLMHead.prepare_model_inputs`; the probes follow the packed traces."""
        if not _reads_probes(micro_batch):
            return super().prepare_model_inputs(micro_batch)
        if _TRACES in micro_batch.keys():
            micro_batch["input_ids"] = micro_batch.pop(_TRACES)
        # Packed whatever the model does otherwise: the attention of this pass needs no other kernel for it.
        tu.assign_non_tensor(micro_batch, use_remove_padding=True)
        inputs, output_args = super().prepare_model_inputs(micro_batch)
        lengths = micro_batch["input_ids"].offsets().diff().tolist()
        probes = [decode(row.tolist()) for row in micro_batch[PROBES].unbind()]
        if output_args["pad_size"]:
            lengths, probes = [*lengths, output_args["pad_size"]], [*probes, []]
        pack = ProbePack.build(lengths, probes)
        rows = pack.rows(all_trace_rows=tu.get(micro_batch, PASS) == FUSED)
        if not len(rows):
            # The model must be called all the same; one row keeps its head small.
            rows = torch.zeros(1, dtype=torch.int64)
        device = inputs["input_ids"].device
        self._shared.pack = pack.to(device)
        output_args |= {"pack": pack, "rows": rows}
        num_traces = pack.num_trace_tokens
        inputs["input_ids"] = torch.cat([inputs["input_ids"], pack.probe_token_ids.to(device).unsqueeze(0)], dim=1)
        probe_positions = pack.positions[num_traces:].to(inputs["position_ids"]).unsqueeze(0)
        inputs["position_ids"] = torch.cat([inputs["position_ids"], probe_positions], dim=1)
        inputs["logits_to_keep"] = rows.to(device)
        return inputs, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        """See `FSDPEngineWithLMHead.prepare_model_outputs`, which makes the traces' own numbers of their logits."""
        if not _reads_probes(micro_batch):
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        pack, rows, temperatures = output_args["pack"], output_args["rows"], output_args["temperature_rmpad"]
        logits = output.logits.squeeze(0)
        if hasattr(logits, "full_tensor"):
            logits = logits.full_tensor()
        if len(logits) != len(rows):
            raise RuntimeError(
                f"the model gave logits of {len(logits)} tokens where {len(rows)} were asked for (logits_to_keep); set "
                "algorithm.rredcot.self_value.share_prefix=false"
            )
        scores = read_probes(pack, rows, logits, temperatures[list(pack.trace_starts[:-1])])
        num_rows = len(micro_batch["input_ids"])
        results = [torch.tensor(own or [0.0], device=logits.device) for own in scores[:num_rows]]
        model_output = {}
        if tu.get(micro_batch, PASS) == FUSED:
            traces = SimpleNamespace(logits=logits[: pack.num_trace_tokens].unsqueeze(0))
            model_output = super().prepare_model_outputs(traces, output_args, micro_batch, logits_processor_func)
        model_output[PROBE_LOG_PROBS] = torch.nested.as_nested_tensor(results, layout=torch.jagged)
        return model_output


def _reads_probes(data: TensorDict) -> bool:
    return tu.get(data, PASS) in (FUSED, PROBES_ONLY)


class SharedPrefixEngine(AttributionMixin, SharedPrefixMixin, FSDPEngineWithLMHead):
    """verl's FSDP engine with a language-model head, and probes, hidden states and attributions."""
