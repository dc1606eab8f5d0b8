"""What the training engine reads in a log-probability pass besides verl's own numbers: a class for each kind."""

import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name

from rredcot_verl.passes.attribution_task import AttributionTask, decode_plan
from rredcot_verl.passes.hidden_states import HiddenStates, hidden_states
from rredcot_verl.passes.probe_codec import decode
from rredcot_verl.passes.probe_pack import ProbePack, read_probes
from rredcot_verl.passes.probe_parts import filler, parts_of_row
from rredcot_verl.passes.protocol import ALONE, FIELDS, NOTHING, PASSES
from rredcot_verl.passes.rows_head import RowsHead, rows_head
from rredcot_verl.passes.sequence_split import SequenceSplit

# `shared_attention` and what imports it stay inside functions: every process that trains imports this module, and
# registers nothing with transformers.
if TYPE_CHECKING:
    # verl's module registers our engine when it is loaded, and so must not be loaded from here.
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead as Engine

    from rredcot_verl.passes.shared_attention import SharedPrefix

Step = Callable[[TensorDict], Any]
"""`forward_step` of a micro batch."""

_ROWS = "rredcot_rows"
"""`input_ids` of a row, while those in the row only say how much room it needs."""


class EnginePass:
    """One kind of thing to read; hooks around verl's own steps, each of which may be left as it is.

    A batch has an object, and each of its micro batches another, so what one hook notes for the next is soon gone.

    Args:
        engine: Of whose passes it is one.
        name: Key of `FIELDS`.
        options: See `PASSES` in `protocol`.
        alone: Whether the rows' own numbers are left out.
    """

    def __init__(self, engine: "Engine", name: str, options: tuple[Any, ...], alone: bool) -> None:
        self.engine, self.options, self.alone = engine, options, alone
        self.payload, self.result = FIELDS[name].payload, FIELDS[name].result

    def prepare_batch(self, data: TensorDict) -> TensorDict:
        """The batch as verl shall cut it into micro batches."""
        return data

    def _cut_by(self, data: TensorDict, rows: Sequence[Tensor], budget: int | None = None) -> TensorDict:
        """The batch with other `input_ids`, by whose lengths verl cuts it; its other fields are as they were.

        Args:
            data: The batch.
            rows: What stands in for its `input_ids`.
            budget: Tokens of a micro batch on a GPU, raised to hold the longest row of any rank: every rank must come
                to the same number of passes. None where micro batches go by rows.
        """
        data = data.clone(recurse=False)
        data["input_ids"] = _jagged(rows)
        if budget is not None:
            longest = self._most(max(len(row) for row in rows))
            share = -(-longest // self.engine.ulysses_sequence_parallel_size)
            tu.assign_non_tensor(data, max_token_len_per_gpu=max(share, budget))
        return data

    def _most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        most = torch.tensor(number, device=get_device_name())
        group = self.engine.get_data_parallel_group()
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
        return int(most)

    def finish_batch(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """What all micro batches gave, a row for each of `prepare_batch`'s, as the batch's own rows."""
        return results

    def step(self, forward: Step, micro_batch: TensorDict) -> Any:
        """Call `forward`, verl's step of a micro batch, or do something in its place."""
        return forward(micro_batch)

    def add_inputs(self, micro_batch: TensorDict, inputs: dict[str, Any], output_args: dict[str, Any]) -> None:
        """Change what the model is called with."""

    def read_outputs(self, micro_batch: TensorDict, output: Any, output_args: dict[str, Any]) -> Tensor:
        """The field `result`, made before verl makes its own of the same output."""
        raise NotImplementedError


class ProbesPass(EnginePass):
    """Reads probes: the rows' own pass, packed, with the tokens of their probes behind them; see `ProbePack`."""

    _firsts: list[int]
    _shared: "SharedPrefix"
    _head: RowsHead | None = None
    _pack: ProbePack
    _rows: Tensor

    def prepare_batch(self, data: TensorDict) -> TensorDict:
        """Rows have room for their probes, and are cut into parts where that goes over the token budget of a pass."""
        budget = tu.get(data, "max_token_len_per_gpu") if tu.get(data, "use_dynamic_bsz", True) else None
        limit = None if budget is None else budget * self.engine.ulysses_sequence_parallel_size
        # Other passes may read all of a trace.
        whole = not self.alone or len(tu.get(data, PASSES)) > 1
        rows, payloads = data["input_ids"].unbind(), data[self.payload].unbind()
        cut = [
            parts_of_row(number, len(row), payload, limit, whole)
            for number, (row, payload) in enumerate(zip(rows, payloads, strict=True))
        ]
        # Where each row's first part stands, and after them where the last one ends.
        self._firsts = list(itertools.accumulate(map(len, cut), initial=0))
        parts = list(itertools.chain.from_iterable(cut))
        if budget is not None:
            # verl makes no more micro batches than the rank with the fewest rows can fill.
            parts += [filler(payloads[0])] * (self._most(len(parts)) - len(parts))
        if len(parts) > len(rows):
            data = tu.index_select_tensor_dict(data, [part.row for part in parts])
        data = data.clone(recurse=False)
        for fields in FIELDS.values():
            if fields.payload in data.keys():
                # What other passes read is read of a row's first part.
                firsts = set(self._firsts[:-1])
                own = enumerate(data[fields.payload].unbind())
                asked = [row if number in firsts else row.new_tensor(NOTHING) for number, row in own]
                data[fields.payload] = _jagged(asked)
        data[self.payload] = _jagged([part.payload for part in parts])
        positions = data["position_ids"].unbind()
        data["position_ids"] = _jagged([own[: part.num_tokens] for own, part in zip(positions, parts, strict=True)])
        rows = [rows[part.row][: part.num_tokens] for part in parts]
        data[_ROWS] = _jagged(rows)
        if budget is None:
            return data
        with_room = [
            torch.nn.functional.pad(row, (0, part.num_pass_tokens - len(row)))
            for row, part in zip(rows, parts, strict=True)
        ]
        return self._cut_by(data, with_room, budget)

    def finish_batch(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parts of a row are one again: of its own numbers the first part's, of the probes' all."""
        whole = {}
        for name, values in results.items():
            parts, spans = values.unbind(), itertools.pairwise(self._firsts)
            own = [torch.cat(parts[first:end]) if name == self.result else parts[first] for first, end in spans]
            whole[name] = _jagged(own)
        return whole

    def step(self, forward: Step, micro_batch: TensorDict) -> Any:
        """With an attention that knows who sees whom."""
        from rredcot_verl.passes.shared_attention import shared_prefix

        micro_batch = self.own_rows(micro_batch)
        # Packed whatever the model does otherwise: the attention of this pass needs no other kernel for it.
        tu.assign_non_tensor(micro_batch, use_remove_padding=True)
        module = self.engine.module
        fused = tu.get(micro_batch, "use_fused_kernels", False)
        head = rows_head(module) if fused else contextlib.nullcontext()
        with shared_prefix(module.config) as self._shared, head as self._head:
            return forward(micro_batch)

    @staticmethod
    def own_rows(micro_batch: TensorDict) -> TensorDict:
        """The micro batch with the rows' own tokens."""
        micro_batch = micro_batch.clone(recurse=False)
        micro_batch["input_ids"] = micro_batch.pop(_ROWS)
        return micro_batch

    def lay_out(self, micro_batch: TensorDict, pad_size: int) -> tuple[ProbePack, Tensor]:
        """The rows, padding tokens and probes as one sequence; and the tokens whose distributions are needed."""
        lengths = micro_batch["input_ids"].offsets().diff().tolist()
        probes = [decode(row.tolist()) for row in micro_batch[self.payload].unbind()]
        if pad_size:
            lengths, probes = [*lengths, pad_size], [*probes, []]
        pack = ProbePack.build(lengths, probes)
        rows = pack.rows(all_trace_rows=not self.alone and self._head is None)
        # The model must be called all the same; one row keeps its head small.
        return pack, rows if len(rows) else torch.zeros(1, dtype=torch.int64)

    def add_inputs(self, micro_batch: TensorDict, inputs: dict[str, Any], output_args: dict[str, Any]) -> None:
        """The probes follow the packed rows."""
        self._pack, self._rows = self.lay_out(micro_batch, output_args["pad_size"])
        pack, places = self._pack, self._rows
        device = inputs["input_ids"].device
        self._shared.pack = pack.to(device)
        token_ids = pack.probe_token_ids.to(device).unsqueeze(0)
        positions = pack.positions[pack.num_trace_tokens :].to(inputs["position_ids"]).unsqueeze(0)
        if self.engine.use_ulysses_sp:
            self._shared.split = split = SequenceSplit.build(self._shared.pack, self.engine.ulysses_parallel_group)
            token_ids, positions = split.own(token_ids), split.own(positions)
            self._rows, places = split.here(self._rows)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token_ids], dim=1)
        inputs["position_ids"] = torch.cat([inputs["position_ids"], positions], dim=1)
        places = places.to(device)
        if self._head is None:
            inputs["logits_to_keep"] = places
            return
        if self.alone:
            # The fused forward must be called all the same.
            inputs["shift_labels"] = inputs["shift_labels"][:, :1]
        self._head.rows, self._head.num_tokens = places, inputs["shift_labels"].shape[1]

    def read_outputs(self, micro_batch: TensorDict, output: Any, output_args: dict[str, Any]) -> Tensor:
        """What `read_probes` gives; the output keeps the logits of the rows' own tokens."""
        from rredcot_verl.passes.shared_attention import WAY_OUT, kept_logits

        num_traces = len(micro_batch["input_ids"])
        # Padding has none.
        temperatures = torch.ones(len(self._pack.readings))
        temperatures[:num_traces] = torch.as_tensor(tu.get(micro_batch, "temperature"))
        if self._head is None:
            logits = kept_logits(output, len(self._rows), WAY_OUT)
            output.logits = logits[: len(output_args["temperature_rmpad"])].unsqueeze(0)
        else:
            logits = self._head.logits
        results = jagged_results(read_probes(self._pack, self._rows, logits, temperatures)[:num_traces])
        if self._shared.split is not None:
            torch.distributed.all_reduce(results.values(), group=self._shared.split.group)
        return results


class HiddenPass(EnginePass):
    """Reads hidden states: the pass is what it is without, whatever its attention, kernels or packing; a hook reads."""

    _states: HiddenStates

    def step(self, forward: Step, micro_batch: TensorDict) -> Any:
        """With a hook on the layer."""
        with hidden_states(self.engine.module, *self.options) as self._states:
            return forward(micro_batch)

    def add_inputs(self, micro_batch: TensorDict, inputs: dict[str, Any], output_args: dict[str, Any]) -> None:
        """Notes where the wanted tokens stand in what verl made."""
        packed = tu.get(micro_batch, "use_remove_padding", True)
        self._states.rows = self._places(micro_batch, packed)
        if packed and self.engine.use_ulysses_sp:
            rank = torch.distributed.get_rank(self.engine.ulysses_parallel_group)
            num_tokens = len(output_args["temperature_rmpad"])
            self._states.shard = (rank, self.engine.ulysses_sequence_parallel_size, num_tokens)
        if self.alone and "logits_to_keep" not in inputs and "logits_to_keep" in _parameters(self.engine.module):
            # Nothing is read of the logits; one row of them keeps the head small.
            inputs["logits_to_keep"] = torch.zeros(1, dtype=torch.int64, device=inputs["input_ids"].device)

    def read_outputs(self, micro_batch: TensorDict, output: Any, output_args: dict[str, Any]) -> Tensor:
        """What the hook has collected, row by row."""
        if len(self._states.collected) != 1:
            raise RuntimeError(
                f"decoder layer {self.options[0]} was called {len(self._states.collected)} times in one pass"
            )
        (states,) = self._states.collected
        if self._states.shard is not None:
            torch.distributed.all_reduce(states, group=self.engine.ulysses_parallel_group)
        parts = torch.split(states, [len(own) for own in self._positions(micro_batch)])
        return _jagged([own.flatten() if len(own) else own.new_zeros(1) for own in parts])

    def _positions(self, micro_batch: TensorDict) -> list[Tensor]:
        """For each row the int64 indices of its wanted tokens, on CPU."""
        return [row[row >= 0].long() for row in micro_batch[self.payload].cpu().unbind()]

    def _places(self, micro_batch: TensorDict, packed: bool) -> Tensor:
        """Where the wanted tokens stand among all tokens of a pass.

        Args:
            micro_batch: The rows.
            packed: Whether verl lays the rows end to end, or pads each to the longest.
        """
        offsets = micro_batch["input_ids"].offsets().cpu()
        lengths = offsets.diff()
        starts = offsets[:-1] if packed else torch.arange(len(lengths)) * lengths.max()
        places = []
        for start, length, positions in zip(starts, lengths.tolist(), self._positions(micro_batch), strict=True):
            if len(positions) and int(positions.max()) >= length:
                raise RuntimeError(
                    f"a hidden state is wanted at token {int(positions.max())} of a row of {length} tokens"
                )
            places.append(positions + start)
        return torch.cat(places)


def _parameters(module: nn.Module) -> set[str]:
    """Names of what a model can be called with, whatever wraps it."""
    module = getattr(module, "_fsdp_wrapped_module", module)
    if hasattr(module, "get_base_model"):
        module = module.get_base_model()  # type: ignore[operator]
    return set(inspect.signature(module.forward).parameters)


class AttributionPass(EnginePass):
    """Weighs the segments of rows for an answer, in place of verl's own pass: its sequences are others."""

    has_backward: bool

    def weigh(self, tasks: Sequence[AttributionTask], temperature: Any, device: torch.device) -> list[list[float]]:
        """For each task its weights, computed on a device; the parameters may be elsewhere (offload_policy)."""
        raise NotImplementedError

    def prepare_batch(self, data: TensorDict) -> TensorDict:
        """The sequences are those that the rows' plans name; with a backward pass, no more of them than in training."""
        plans = [decode_plan(row.tolist()) for row in data[self.payload].unbind()]
        traces = [row.tolist() for row in data["input_ids"].unbind()]
        # A row without a plan is one token long: it costs nothing, and every rank has something to compute.
        sequences = [
            trace[:1] if plan is None else plan.task(trace).token_ids for trace, plan in zip(traces, plans, strict=True)
        ]
        rows = [torch.tensor(ids, device=data["input_ids"].device) for ids in sequences]
        training = self.engine.engine_config
        if tu.get(data, "use_dynamic_bsz", True):
            budget = tu.get(data, "max_token_len_per_gpu")
            if self.has_backward and training.max_token_len_per_gpu:
                budget = min(budget, training.max_token_len_per_gpu)
            return self._cut_by(data, rows, budget)
        data = self._cut_by(data, rows)
        if self.has_backward and training.micro_batch_size_per_gpu:
            # A divisor of both, so that the rows still divide evenly.
            num_rows = math.gcd(tu.get(data, "micro_batch_size_per_gpu"), training.micro_batch_size_per_gpu)
            tu.assign_non_tensor(data, micro_batch_size_per_gpu=num_rows)
        return data

    def step(self, forward: Step, micro_batch: TensorDict) -> Any:
        """Not verl's."""
        device = torch.device(get_device_name())
        tasks = []
        for ids, row in zip(micro_batch["input_ids"].unbind(), micro_batch[self.payload].unbind(), strict=True):
            plan = decode_plan(row.tolist())
            tasks.append(AttributionTask(ids.tolist(), (), 1, 1) if plan is None else plan.task(ids.tolist()))
        temperature = tu.get(micro_batch, "temperature")
        if isinstance(temperature, Tensor):
            temperature = temperature.tolist()
        # As in verl's own pass: its dtype is settled with FSDP.
        dtype = getattr(self.engine, "_autocast_dtype", torch.bfloat16)
        autocast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
        with autocast:
            weights = self.weigh(tasks, temperature, device)
        output = {"model_output": {self.result: jagged_results(weights)}, "loss": 1.0, "metrics": {}}
        return torch.tensor(1.0, device=device), output


class AttentionPass(AttributionPass):
    """Weighs by attention; one forward pass."""

    has_backward = False

    def weigh(self, tasks: Sequence[AttributionTask], temperature: Any, device: torch.device) -> list[list[float]]:
        """See `attention_attribution`."""
        from rredcot_verl.passes.attribution import attention_attribution

        return attention_attribution(self.engine.module, tasks, device=device)


class GradientPass(AttributionPass):
    """Weighs by gradient; a forward and a backward pass."""

    has_backward = True

    def weigh(self, tasks: Sequence[AttributionTask], temperature: Any, device: torch.device) -> list[list[float]]:
        """See `gradient_attribution`."""
        from rredcot_verl.passes.attribution import gradient_attribution

        return gradient_attribution(self.engine.module, tasks, temperature=temperature, device=device)


TABLE: dict[str, type[EnginePass]] = {
    "probes": ProbesPass,
    "hidden": HiddenPass,
    "attention": AttentionPass,
    "gradient": GradientPass,
}
"""By the name that a batch asks with."""


def asked_passes(engine: "Engine", data: TensorDict) -> list[EnginePass]:
    """The passes that a batch or micro batch asks for."""
    return [TABLE[name](engine, name, options, tu.get(data, ALONE)) for name, options in tu.get(data, PASSES, ())]


def _jagged(rows: Sequence[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def jagged_results(rows: Iterable[list[float]]) -> Tensor:
    """Jagged rows of numbers; a single 0 for none."""
    return _jagged([torch.tensor(own or [0.0], device=get_device_name()) for own in rows])
