"""One rank of an engine asked for hidden states: `python -m tests.passes.hidden_ranks FOLDER RANK NUM_RANKS`.

Runs the passes of `passes.pt` and writes what each gave to `rank<RANK>.pt`. With two ranks a sequence may also be split
between them, with an attention of this file's own: verl's needs flash attention, hence a GPU.
"""

import functools
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from verl.utils.ulysses import (
    get_ulysses_sequence_parallel_group,
    get_ulysses_sequence_parallel_rank,
    get_ulysses_sequence_parallel_world_size,
)

from rredcot_verl.passes.hidden_states import hidden_states
from rredcot_verl.passes.protocol import HIDDEN_STATES
from tests.passes import engine_ranks
from tests.passes.engine_ranks import build_engine, make_batch, run_pass

SPLIT = "rredcot_test_split"


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


def build(model: dict[str, Any] | None = None, **options: Any) -> Any:
    """An engine whose model has options of its own, besides those of `build_engine`."""
    made = functools.partial(_model_config, engine_ranks.HFModelConfig, model or {})
    with mock.patch.object(engine_ranks, "HFModelConfig", made):
        return build_engine(**options)


def _model_config(cls: Any, model: dict[str, Any], **options: Any) -> Any:
    return cls(**options | model)


def run_bare_pass(engine: Any, rows: dict[str, list[torch.Tensor]], settings: dict[str, Any]) -> dict[str, Any]:
    """What a pass gives that makes no logits, or whose sequence is split over the ranks."""
    if engine.use_ulysses_sp:
        engine.module.config._attn_implementation = SPLIT
    with engine.eval_mode():
        output = engine.infer_batch(make_batch(rows, settings))["model_output"]
    return {name: list(value.unbind()) for name, value in output.items()}


def run_under_fsdp1(path: str, trace: list[int], positions: list[int], readout: tuple[int, int, int]) -> torch.Tensor:
    """States of a model in FSDP's first version, which verl's engine starts on a GPU only."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(model.model.layers[0])})
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    with torch.no_grad(), hidden_states(wrapped, *readout) as states:
        states.rows = torch.tensor(positions)
        wrapped(input_ids=torch.tensor([trace]))
    return states.collected[0]


def main(folder: Path, rank: int, num_ranks: int) -> None:
    torch.manual_seed(0)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=60)
    )
    plan = torch.load(folder / "passes.pt", weights_only=False)
    engines = {name: build(**options) for name, options in plan["engines"].items()}
    results = {}
    for name, (engine, rows_of_ranks, settings) in plan["passes"].items():
        run = run_bare_pass if "model" in plan["engines"][engine] else run_pass
        results[name] = run(engines[engine], rows_of_ranks[rank], settings)
    results["fsdp1"] = {HIDDEN_STATES: run_under_fsdp1(*plan["fsdp1"][rank])}
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
