"""verl's Megatron engine on four ranks, in one layout after the other: `python -m tests.passes.megatron_ranks FOLDER`.

Every rank runs all `CASES` in all `LAYOUTS` and writes what each gave to `megatron-<RANK>.pt`. The ranks are forked
from one process, so that verl and Megatron are imported once.
"""

import multiprocessing
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig
from verl.workers.engine.base import EngineRegistry

from rredcot_verl.passes.protocol import MODEL_TYPE
from tests import PATIENCE_S
from tests.passes import cases
from tests.passes.architectures import SHAPE
from tests.passes.megatron_cpu import stand_in_for_cuda
from tests.passes.ranks import make_batch

NUM_RANKS = 4
TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {"model": "dense"},
    "dense tp2": {"model": "dense", TP: 2, "sequence_parallel": False},
    "dense tp2 sp": {"model": "dense", TP: 2},
    "dense pp2": {"model": "dense", PP: 2},
    "dense tp2 pp2": {"model": "dense", TP: 2, PP: 2},
    "experts tp2 ep2": {"model": "experts", TP: 2, EP: 2, "expert_tensor_parallel_size": 1},
}
CASES = [
    "verl",
    "probes alone",
    "probes alone small",
    "probes alone fixed",
    "probes alone by-row",
    "probes alone one-sided",
    "probes alone none",
]


def build_model(name: str) -> PreTrainedModel:
    """A random model of transformers, float32: its weights are those of all layouts."""
    shape = SHAPE | {"num_hidden_layers": 4, "tie_word_embeddings": False}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = {
            "dense": lambda: Qwen3ForCausalLM(Qwen3Config(**shape)),
            "experts": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts)),
        }[name]()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
            else:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.float().eval()


def build_engine(folder: Path, model_type: str, model: str, **options: Any) -> Any:
    """The engine of a model type, as verl's training worker builds it."""
    model_config = HFModelConfig(path=str(folder / model), load_tokenizer=False, use_remove_padding=True)
    model_config.model_type = model_type
    engine = EngineRegistry.new(
        model_type=model_type,
        backend="megatron",
        model_config=model_config,
        engine_config=McoreEngineConfig(forward_only=True, **options),
        optimizer_config=McoreOptimizerConfig(lr=1e-2, total_training_steps=1),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


class Padding:
    """All that verl's engine asks of a tokenizer."""

    pad_token_id = 0


def run_pass(engine: Any, name: str) -> dict[str, Any]:
    """Fields that a pass gives on the last stage, and the tokens of every call of the model."""
    (stage,) = engine.module
    rows, sizes = cases.rows_of(name)[engine.get_data_parallel_rank() % 2], []
    handle = stage.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    parts = dict(stage.named_modules())
    hooks = [(list(part._forward_hooks), list(part._forward_pre_hooks)) for part in parts.values()]
    data = make_batch(rows, cases.settings_of(name) | cases.PACKED)
    with engine.eval_mode():
        output = engine.infer_batch(data).get("model_output", {})
    # Nothing of ours is left in the model.
    assert dict(stage.named_modules()) == parts
    assert hooks == [(list(part._forward_hooks), list(part._forward_pre_hooks)) for part in parts.values()]
    handle.remove()
    return {"fields": {field: list(value.unbind()) for field, value in output.items()}, "sizes": sizes}


def run_rank(folder: Path, rank: int) -> None:
    """One rank, in a process of its own."""
    torch.set_num_threads(1)
    stand_in_for_cuda()
    store = f"file://{folder}/store"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=NUM_RANKS, timeout=timedelta(seconds=PATIENCE_S)
    )
    results: dict[str, Any] = {}
    for layout, options in LAYOUTS.items():
        engine = build_engine(folder, MODEL_TYPE, **options)
        object.__setattr__(engine.model_config, "tokenizer", Padding())
        results[layout] = {name: run_pass(engine, name) for name in CASES}
        results[layout]["dp"] = engine.get_data_parallel_rank()
        mpu.destroy_model_parallel()
    torch.save(results, folder / f"megatron-{rank}.pt")
    torch.distributed.destroy_process_group()


def main(folder: Path) -> int:
    """Start all ranks; the number of those that failed."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for name in ("dense", "experts"):
        build_model(name).save_pretrained(folder / name)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(folder, rank)) for rank in range(NUM_RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return sum(rank.exitcode != 0 for rank in ranks)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
