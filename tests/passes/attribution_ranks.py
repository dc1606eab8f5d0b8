"""One rank of a small engine with attribution: `python -m tests.passes.attribution_ranks FOLDER RANK NUM_RANKS`.

Runs the passes of `passes.pt`, then one training step on every engine, and writes what each gave to `rank<RANK>.pt`.
"""

import functools
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoModelForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry

from rredcot_verl.cpu.engine import CPUFSDPEngineWithLMHead
from rredcot_verl.passes.attribution import attention_attribution, gradient_attribution
from rredcot_verl.passes.attribution_engine import AttributionMixin
from rredcot_verl.passes.attribution_protocol import WEIGHTS
from rredcot_verl.passes.attribution_task import AttributionTask
from rredcot_verl.passes.engine import SharedPrefixMixin
from tests.passes.engine_ranks import make_batch


@EngineRegistry.register(model_type="attribution_on_cpu", backend="fsdp2", device="cpu")
class Engine(AttributionMixin, SharedPrefixMixin, CPUFSDPEngineWithLMHead):
    """As it stands in a run."""


def build_engine(
    path: str, adapter: str | None = None, param_dtype: str = "fp32", checkpointing: bool = False, **options: Any
) -> Any:
    """The engine as verl's training worker builds it."""
    model_config = HFModelConfig(
        path=path,
        load_tokenizer=False,
        lora_rank=4 if adapter else 0,
        lora_adapter_path=adapter,
        use_remove_padding=False,
        enable_gradient_checkpointing=checkpointing,
        override_config={"attn_implementation": "sdpa"},
    )
    engine_config = FSDPEngineConfig(
        strategy="fsdp2",
        use_torch_compile=False,
        mixed_precision={"param_dtype": param_dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        **options,
    )
    optimizer = FSDPOptimizerConfig(lr=1e-2, total_training_steps=1)
    engine = EngineRegistry.new(
        model_type="attribution_on_cpu",
        backend="fsdp2",
        model_config=model_config,
        engine_config=engine_config,
        optimizer_config=optimizer,
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def run_pass(engine: Any, rows: dict[str, list[torch.Tensor]], settings: dict[str, Any]) -> dict[str, Any]:
    """What a pass gives, the tokens of each call of the model, and how often its layers were called."""
    sizes: list[int] = []
    num_layer_calls = 0

    def count(module: Any, args: Any, kwargs: Any) -> None:
        sizes.append(kwargs["input_ids"].numel())

    def count_layer(*args: Any) -> None:
        nonlocal num_layer_calls
        num_layer_calls += 1

    layer = next(module for name, module in engine.module.named_modules() if name.endswith("layers.0.self_attn"))
    hooks = [engine.module.register_forward_pre_hook(count, with_kwargs=True), layer.register_forward_hook(count_layer)]
    embedding = engine.module.get_input_embeddings()
    hooks_of_others = list(embedding._forward_hooks)
    data = make_batch(rows, settings)
    with engine.eval_mode():
        output = engine.infer_batch(data)["model_output"]
    for hook in hooks:
        hook.remove()
    assert engine.module.config._attn_implementation == "sdpa"
    assert not any(module.training for module in engine.module.modules())
    assert list(embedding._forward_hooks) == hooks_of_others
    assert all(parameter.grad is None for parameter in engine.module.parameters())
    assert not any(value.requires_grad for value in output.values())
    assert [row.tolist() for row in data["input_ids"].unbind()] == [row.tolist() for row in rows["input_ids"]]
    fields = {name: list(value.unbind()) for name, value in output.items()}
    return {"sizes": sizes, "num_layer_calls": num_layer_calls, **fields}


def train_step(engine: Any, rows: dict[str, list[torch.Tensor]], settings: dict[str, Any]) -> dict[str, Any]:
    """The parameters after a step on the mean log-probability of all tokens, and the norm of its gradient."""

    def loss_function(model_output: Any, data: Any, dp_group: Any = None) -> Any:
        return -model_output["log_probs"].values().mean(), {}

    data = make_batch(rows, settings)
    tu.assign_non_tensor(data, global_batch_size=len(data))
    with engine.train_mode():
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(data, loss_function)
        norm = engine.optimizer_step()
        engine.optimizer_zero_grad()
    named = engine.module.named_parameters()
    parameters = {name: own.full_tensor() if hasattr(own, "full_tensor") else own for name, own in named}
    return {"norm": norm, "parameters": {name: own.detach().clone() for name, own in parameters.items()}}


def run_sharded(tasks: list[AttributionTask], path: str) -> dict[str, Any]:
    """Weights by a model in FSDP1, for which verl's own engine needs a GPU; and again after a backward pass."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    wrap = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(model.model.layers[0])})
    sharded = FullyShardedDataParallel(model, auto_wrap_policy=wrap, device_id=torch.device("cpu"))
    results: dict[str, Any] = {}
    for name in ("first", "second"):
        with torch.no_grad():
            results[name] = attention_attribution(sharded, tasks), gradient_attribution(sharded, tasks)
        assert all(parameter.grad is None for parameter in sharded.parameters())
        sharded(input_ids=torch.arange(9).unsqueeze(0), use_cache=False).logits.sum().backward()
        sharded.zero_grad(set_to_none=True)
    return results


def main(folder: Path, rank: int, num_ranks: int) -> None:
    torch.manual_seed(0)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=60)
    )
    plan = torch.load(folder / "passes.pt", weights_only=False)
    engines = {name: build_engine(**options) for name, options in plan["engines"].items()}
    results: dict[str, Any] = {}
    for name, (engine, rows_of_ranks, settings) in plan["passes"].items():
        results[name] = run_pass(engines[engine], rows_of_ranks[rank], settings)
        assert set(results[name]) == {"sizes", "num_layer_calls", WEIGHTS}
    rows_of_ranks, settings = plan["training"]
    results["steps"] = {name: train_step(engine, rows_of_ranks[rank], settings) for name, engine in engines.items()}
    results["FSDP1"] = run_sharded(plan["FSDP1"][rank], plan["engines"]["plain"]["path"])
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
