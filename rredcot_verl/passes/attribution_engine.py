"""verl's FSDP engine with attribution: passes of their own that weigh the segments of their rows.

Called through `compute_log_prob` like the probes' passes, inside verl's evaluation mode. Every rank makes the same
number of passes, forward and backward, whether its rows have something to weigh or not, so the collectives of FSDP stay
in step.
"""

import contextlib
import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name

from rredcot_verl.passes.attribution_protocol import ATTENTION, GRADIENT, OPTIONS, PLANS, WEIGHTS
from rredcot_verl.passes.attribution_task import NO_PLAN, AttributionTask, decode_plan, encode_plan
from rredcot_verl.passes.protocol import PASS

if TYPE_CHECKING:
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead as _Engine
else:
    # verl's module registers ours when it is loaded, and so must not be loaded from here.
    _Engine = object

_METHOD = "rredcot_attribution_method"
"""`PASS` of the pass under way: verl's engine and the probes' mixin need not know of it."""


class AttributionMixin(_Engine):
    """Adds attribution passes to an FSDP engine. Stands before `SharedPrefixMixin`, which does not see these passes."""

    def forward_backward_batch(self, data: TensorDict, loss_function: Any, forward_only: bool = False) -> Any:
        """See `BaseEngine.forward_backward_batch`; the sequences of a pass are those that its rows' plans name."""
        if tu.get(data, PASS) in (ATTENTION, GRADIENT):
            data = self._planned(data)
        return super().forward_backward_batch(data, loss_function, forward_only=forward_only)

    def _planned(self, data: TensorDict) -> TensorDict:
        sequences, rows = [], []
        for trace, row in zip(data["input_ids"].unbind(), data[PLANS].unbind(), strict=True):
            plan = decode_plan(row.tolist())
            # A row without a plan is one token long: it costs nothing, and every rank has something to compute.
            ids = trace.tolist()[:1] if plan is None else plan.task(trace.tolist()).token_ids
            sequences.append(torch.tensor(ids, device=trace.device))
            kept = None if plan is None else dataclasses.replace(plan, num_kept=plan.num_tokens, appended=())
            rows.append(torch.tensor(NO_PLAN if kept is None else encode_plan(kept), device=trace.device))
        fields = {
            "input_ids": sequences,
            "position_ids": [torch.arange(len(ids), device=ids.device) for ids in sequences],
            # Only for verl's count of tokens.
            "loss_mask": [torch.ones_like(ids) for ids in sequences],
            PLANS: rows,
        }
        nested = {name: torch.nested.as_nested_tensor(own, layout=torch.jagged) for name, own in fields.items()}
        planned = TensorDict(nested, batch_size=len(data))
        temperature = tu.get(data, "temperature")
        if isinstance(temperature, torch.Tensor):
            # One a row.
            planned["temperature"] = temperature
        else:
            tu.assign_non_tensor(planned, temperature=temperature)
        tu.assign_non_tensor(planned, **self._sizes(data, max(len(ids) for ids in sequences)))
        tu.assign_non_tensor(planned, **{_METHOD: tu.get(data, PASS), OPTIONS: tu.get(data, OPTIONS)})
        return planned

    def _sizes(self, data: TensorDict, longest: int) -> dict[str, Any]:
        """Tokens and rows of a micro batch: verl's own of such a pass; with a backward pass, training's if smaller."""
        with_backward = tu.get(data, PASS) == GRADIENT
        if not tu.get(data, "use_dynamic_bsz", True):
            num_rows = tu.get(data, "micro_batch_size_per_gpu")
            if with_backward and self.engine_config.micro_batch_size_per_gpu:
                # A divisor of both, so that the rows still divide evenly.
                num_rows = math.gcd(num_rows, self.engine_config.micro_batch_size_per_gpu)
            return {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": num_rows}
        budget = tu.get(data, "max_token_len_per_gpu")
        if with_backward and self.engine_config.max_token_len_per_gpu:
            budget = min(budget, self.engine_config.max_token_len_per_gpu)
        longest_of_all = torch.tensor(longest, device=get_device_name())
        # Every rank must come to the same number of passes.
        torch.distributed.all_reduce(
            longest_of_all, op=torch.distributed.ReduceOp.MAX, group=self.get_data_parallel_group()
        )
        return {"use_dynamic_bsz": True, "max_token_len_per_gpu": max(int(longest_of_all), budget)}

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        """See `FSDPEngine.forward_step`."""
        if _METHOD not in micro_batch.keys():
            return super().forward_step(micro_batch, loss_function, forward_only)
        device = get_device_name()
        tasks = []
        for ids, row in zip(micro_batch["input_ids"].unbind(), micro_batch[PLANS].unbind(), strict=True):
            plan = decode_plan(row.tolist())
            tasks.append(AttributionTask(ids.tolist(), (), 1, 1) if plan is None else plan.task(ids.tolist()))
        temperature = tu.get(micro_batch, "temperature")
        if isinstance(temperature, torch.Tensor):
            temperature = temperature.tolist()
        # As in verl's own pass: its dtype is settled with FSDP.
        dtype = getattr(self, "_autocast_dtype", torch.bfloat16)
        autocast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype=dtype)
        with autocast:
            weights = self._weights(tu.get(micro_batch, _METHOD), tu.get(micro_batch, OPTIONS), tasks, temperature)
        rows = [torch.tensor(own or [0.0], device=device) for own in weights]
        output = {WEIGHTS: torch.nested.as_nested_tensor(rows, layout=torch.jagged)}
        return torch.tensor(1.0, device=device), {"model_output": output, "loss": 1.0, "metrics": {}}

    def _weights(self, method: str, options: Any, tasks: list[AttributionTask], temperature: Any) -> list[list[float]]:
        # Not at the top: every process that trains imports this module, and registers nothing with transformers.
        from rredcot_verl.passes.attribution import attention_attribution, gradient_attribution

        # Its parameters may be elsewhere (offload_policy).
        device = torch.device(get_device_name())
        if method == ATTENTION:
            (layers,) = options
            return attention_attribution(self.module, tasks, layers=layers, device=device)
        name, num_steps = options
        return gradient_attribution(
            self.module, tasks, method=name, num_steps=num_steps, temperature=temperature, device=device
        )
