"""One rank of a small training engine, as a process: `python -m tests.passes.engine_ranks FOLDER RANK NUM_RANKS`.

Runs the passes of `passes.pt` and writes what each gave to `rank<RANK>.pt`.
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry


def build_engine(
    model_type: str, path: str, adapter: str | None = None, param_dtype: str = "fp32", **engine_options: Any
) -> Any:
    """The engine of a model type, as verl's training worker builds it."""
    model_config = HFModelConfig(
        path=path,
        load_tokenizer=False,
        lora_rank=4 if adapter else 0,
        lora_adapter_path=adapter,
        use_remove_padding=False,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa"},
    )
    model_config.model_type = model_type
    engine_config = FSDPEngineConfig(
        strategy="fsdp2",
        use_torch_compile=False,
        mixed_precision={"param_dtype": param_dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        **engine_options,
    )
    engine = EngineRegistry.new(
        model_type=model_type,
        backend="fsdp2",
        model_config=model_config,
        engine_config=engine_config,
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=1),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def make_batch(rows: dict[str, list[torch.Tensor]], settings: dict[str, Any]) -> TensorDict:
    """Rows of tokens and probes as a worker gets them."""
    positions = [torch.arange(len(row)) for row in rows["input_ids"]]
    # As a response mask with a hole.
    masks = [(positions_of % 3 != 1).long() for positions_of in positions]
    fields = rows | {"position_ids": positions, "loss_mask": masks}
    nested = {name: torch.nested.as_nested_tensor(value, layout=torch.jagged) for name, value in fields.items()}
    data = TensorDict(nested, batch_size=len(positions))
    for name, value in settings.items():
        if isinstance(value, torch.Tensor):
            data[name] = value
        else:
            tu.assign_non_tensor(data, **{name: value})
    return data


def run_pass(engine: Any, rows: dict[str, list[torch.Tensor]], settings: dict[str, Any]) -> dict[str, Any]:
    """What a log-probability pass gives, and the tokens and logits of each of its forward passes."""
    sizes: list[int] = []
    num_logits: list[int] = []

    def count(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        sizes.append(kwargs["input_ids"].numel())
        num_logits.append(output.logits.shape[1])

    hook = engine.module.register_forward_hook(count, with_kwargs=True)
    data = make_batch(rows, settings)
    with engine.eval_mode():
        output = engine.infer_batch(data)["model_output"]
    hook.remove()
    assert engine.module.config._attn_implementation == "sdpa" and not hasattr(engine, "_shared")
    assert all(parameter.grad is None for parameter in engine.module.parameters())
    assert not any(value.requires_grad for value in output.values())
    assert [row.tolist() for row in data["input_ids"].unbind()] == [row.tolist() for row in rows["input_ids"]]
    return {"sizes": sizes, "num_logits": num_logits, **{name: list(value.unbind()) for name, value in output.items()}}


def main(folder: Path, rank: int, num_ranks: int) -> None:
    torch.manual_seed(0)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=60)
    )
    plan = torch.load(folder / "passes.pt", weights_only=False)
    engines = {name: build_engine(**options) for name, options in plan["engines"].items()}
    results = {}
    for name, (engine, rows_of_ranks, settings) in plan["passes"].items():
        results[name] = run_pass(engines[engine], rows_of_ranks[rank], settings)
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
