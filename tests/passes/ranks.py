"""Small training engines on one rank, on two and on four, side by side: `python -m tests.passes.ranks FOLDER`.

Every rank runs its `cases`, and a training step and FSDP's first version, but the four all architectures, and writes
what each gave to `<NUM_RANKS>-<RANK>.pt`. The ranks are forked from one process, so that verl is imported once. Where a
sequence is split over ranks, verl's own passes have an attention of this file's: theirs needs flash attention, hence a
GPU.
"""

import functools
import multiprocessing
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.ulysses import (
    get_ulysses_sequence_parallel_group,
    get_ulysses_sequence_parallel_rank,
    get_ulysses_sequence_parallel_world_size,
)
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry

from rredcot_verl.passes.attribution import attention_attribution, gradient_attribution
from rredcot_verl.passes.hidden_states import hidden_states
from rredcot_verl.passes.probe_pack import ProbePack, read_probes
from rredcot_verl.passes.sequence_split import SequenceSplit
from rredcot_verl.passes.shared_attention import shared_prefix
from tests import PATIENCE_S
from tests.passes import cases
from tests.passes.architectures import ARCHITECTURES, build_model
from tests.passes.cases import Rows

SPLIT = "rredcot_test_split"
STEPPED = ("verl", "ours", "verl lora", "ours lora")


def _whole(part: torch.Tensor, dim: int) -> torch.Tensor:
    parts = [torch.empty_like(part) for _ in range(get_ulysses_sequence_parallel_world_size())]
    torch.distributed.all_gather(parts, part.contiguous(), group=get_ulysses_sequence_parallel_group())
    return torch.cat(parts, dim=dim)


def split_attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    """Causal attention of packed rows whose tokens are split over the ranks: gathered, computed, cut again."""
    query, key, value = (_whole(each, 2) for each in (query, key, value))
    positions = _whole(kwargs["position_ids"], 1)[0]
    rows = (positions == 0).cumsum(0)
    tokens = torch.arange(len(rows))
    mask = (rows[:, None] == rows[None]) & (tokens[:, None] >= tokens[None])
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=kwargs["scaling"], enable_gqa=True)
    length = len(rows) // get_ulysses_sequence_parallel_world_size()
    first = get_ulysses_sequence_parallel_rank() * length
    return output[:, :, first : first + length].transpose(1, 2).contiguous(), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The attention above makes its own."""


AttentionInterface.register(SPLIT, split_attention)
AttentionMaskInterface.register(SPLIT, no_mask)


def build_engine(model_type: str, model: dict[str, Any], param_dtype: str = "fp32", **options: Any) -> Any:
    """The engine of a model type, as verl's training worker builds it."""
    common = {
        "load_tokenizer": False,
        "use_remove_padding": False,
        "enable_gradient_checkpointing": False,
        "override_config": {"attn_implementation": "sdpa"},
    }
    model_config = HFModelConfig(**common | model)
    model_config.model_type = model_type
    engine_config = FSDPEngineConfig(
        strategy="fsdp2",
        use_torch_compile=False,
        mixed_precision={"param_dtype": param_dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        **options,
    )
    engine = EngineRegistry.new(
        model_type=model_type,
        backend="fsdp2",
        model_config=model_config,
        engine_config=engine_config,
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, total_training_steps=1),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    if engine.use_ulysses_sp:
        engine.module.config._attn_implementation = SPLIT
    return engine


def make_batch(rows: Rows, settings: dict[str, Any]) -> TensorDict:
    """Rows as a worker gets them."""
    positions = [torch.arange(len(trace)) for trace in rows.traces]
    # As a response mask with a hole.
    masks = [(positions_of % 3 != 1).long() for positions_of in positions]
    fields = rows.fields() | {"position_ids": positions, "loss_mask": masks}
    nested = {name: torch.nested.as_nested_tensor(value, layout=torch.jagged) for name, value in fields.items()}
    data = TensorDict(nested, batch_size=len(positions))
    for name, value in settings.items():
        if isinstance(value, torch.Tensor):
            data[name] = value
        else:
            tu.assign_non_tensor(data, **{name: value})
    return data


def run_pass(engine: Any, rows: Rows, settings: dict[str, Any]) -> dict[str, Any]:
    """What a log-probability pass gives: fields, and of each call of the model the tokens, logits and layer calls."""
    sizes: list[int] = []
    num_logits: list[int] = []
    num_fused: list[int] = []
    num_head_rows: list[int] = []
    layer_calls: list[int] = []

    def count(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        sizes.append(kwargs["input_ids"].numel())
        num_logits.append(0 if output.logits is None else output.logits.shape[1])
        num_fused.append(0 if output.get("log_probs") is None else output.log_probs.shape[1])

    module = engine.module
    layer = next(part for name, part in module.named_modules() if name.endswith("layers.0.self_attn"))
    attention, hooks = module.config._attn_implementation, _hooks(module)
    handles = [
        module.register_forward_hook(count, with_kwargs=True),
        layer.register_forward_hook(lambda *args: layer_calls.append(1)),
        module.get_output_embeddings().register_forward_hook(
            lambda head, args, output: num_head_rows.append(output.shape[1])
        ),
    ]
    data = make_batch(rows, settings)
    with engine.eval_mode():
        output = engine.infer_batch(data)["model_output"]
    for handle in handles:
        handle.remove()
    assert module.config._attn_implementation == attention and engine.__dict__.get("_passes", ()) == ()
    assert not any(part.training for part in module.modules()) and _hooks(module) == hooks
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(value.requires_grad for value in output.values())
    assert [row.tolist() for row in data["input_ids"].unbind()] == rows.traces
    fields = {name: list(value.unbind()) for name, value in output.items()}
    counts = {"num_logits": num_logits, "num_fused": num_fused, "num_head_rows": num_head_rows}
    return {"fields": fields, "sizes": sizes, "num_layer_calls": len(layer_calls)} | counts


def _hooks(module: Any) -> list[list[int]]:
    return [list(part._forward_hooks) for part in module.modules()]


def train_step(engine: Any, rows: Rows) -> dict[str, Any]:
    """The parameters after a step on the mean log-probability of all tokens, and the norm of its gradient."""

    def loss_function(model_output: Any, data: Any, dp_group: Any = None) -> Any:
        return -model_output["log_probs"].values().mean(), {}

    data = make_batch(rows, cases.PLAIN)
    tu.assign_non_tensor(data, global_batch_size=len(data))
    with engine.train_mode():
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(data, loss_function)
        norm = engine.optimizer_step()
        engine.optimizer_zero_grad()
    named = engine.module.named_parameters()
    parameters = {name: own.full_tensor() if hasattr(own, "full_tensor") else own for name, own in named}
    return {"norm": norm, "parameters": {name: own.detach().clone() for name, own in parameters.items()}}


def run_fsdp1(path: Path, rows: Rows, tasks: Any) -> dict[str, Any]:
    """States and weights of a model in FSDP1, for which verl's engine needs a GPU; weights after a backward too."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    wrap = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(model.model.layers[0])})
    sharded = FullyShardedDataParallel(model, auto_wrap_policy=wrap, device_id=torch.device("cpu"))
    with torch.no_grad(), hidden_states(sharded, *cases.READOUT) as states:
        states.rows = torch.tensor(rows.positions[0])
        sharded(input_ids=torch.tensor(rows.traces[:1]))
    weights = []
    for _ in range(2):
        with torch.no_grad():
            weights.append((attention_attribution(sharded, tasks), gradient_attribution(sharded, tasks)))
        assert all(parameter.grad is None for parameter in sharded.parameters())
        sharded(input_ids=torch.arange(9).unsqueeze(0), use_cache=False).logits.sum().backward()
        sharded.zero_grad(set_to_none=True)
    return {"states": states.collected[0], "weights": weights}


@torch.no_grad()
def run_split(model: Any) -> list[float]:
    """The log-probabilities of probes by a model whose sequence is split over all ranks."""
    group = torch.distributed.group.WORLD
    lengths = [len(trace) for trace in cases.SPLIT_TRACES]
    padding = -sum(lengths) % group.size()
    pack = ProbePack.build([*lengths, padding], [*cases.SPLIT_PROBES, []])
    split = SequenceSplit.build(pack, group)
    traces, probes = torch.tensor([sum(cases.SPLIT_TRACES, []) + [0] * padding]), pack.probe_token_ids.unsqueeze(0)
    positions = pack.positions.unsqueeze(0).split([traces.shape[1], probes.shape[1]], dim=1)
    rows, places = split.here(pack.rows(all_trace_rows=False))
    with shared_prefix(model.config, pack) as current:
        current.split = split
        logits = model(
            input_ids=torch.cat([split.own(traces), split.own(probes)], dim=1),
            attention_mask=None,
            position_ids=torch.cat([split.own(part) for part in positions], dim=1),
            use_cache=False,
            logits_to_keep=places,
        ).logits[0]
    temperatures = torch.full((len(pack.readings),), cases.TEMPERATURE)
    scores = torch.tensor(sum(read_probes(pack, rows, logits, temperatures), []))
    torch.distributed.all_reduce(scores, group=group)
    return scores.tolist()


def run_rank(folder: Path, num_ranks: int, rank: int) -> None:
    """One rank, in a process of its own."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": "0"}
    torch.manual_seed(0)
    store = f"file://{folder}/store{num_ranks}"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=PATIENCE_S)
    )
    engines: dict[str, Any] = {}
    results: dict[str, Any] = {}
    if num_ranks == 4:
        # First: fused kernels replace the forward of a class.
        results["architectures"] = {name: run_split(build_model(name)) for name in ARCHITECTURES}
    for name in (cases.CASES if num_ranks < 4 else []) + cases.SPLIT_CASES[num_ranks]:
        whose = cases.engine_of(name)
        if whose not in engines:
            engines[whose] = build_engine(**cases.engine_options(whose, folder))
        rows = cases.rows_of(name)[rank // cases.num_parts(name)]
        results[name] = run_pass(engines[whose], rows, cases.settings_of(name))
    if num_ranks < 4:
        results["steps"] = {name: train_step(engines[name], cases.ROWS[rank]) for name in STEPPED}
        tasks = cases.ROWS_BY_WORD["one-sided"][rank].tasks()
        results["fsdp1"] = run_fsdp1(folder / "untied", cases.ROWS[rank], tasks)
    torch.save(results, folder / f"{num_ranks}-{rank}.pt")
    torch.distributed.destroy_process_group()


def main(folder: Path) -> int:
    """Start all ranks; the number of those that failed."""
    for name, make in cases.MODELS.items():
        make().save_pretrained(folder / name)
    context = multiprocessing.get_context("fork")
    numbers = [(num_ranks, rank) for num_ranks in cases.SPLIT_CASES for rank in range(num_ranks)]
    ranks = [context.Process(target=run_rank, args=(folder, *own)) for own in numbers]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return sum(rank.exitcode != 0 for rank in ranks)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
