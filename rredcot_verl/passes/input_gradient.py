"""What each token contributes to an answer's log-probability, by the gradient in the input embeddings."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rredcot_verl.passes.attribution_pack import AttributionPack, Temperature
from rredcot_verl.passes.attribution_task import AttributionTask
from rredcot_verl.passes.shared_attention import shared_prefix

INPUT_X_GRADIENT = "input_x_gradient"
INTEGRATED_GRADIENTS = "integrated_gradients"


@contextlib.contextmanager
def _scaled_embeddings(model: Any, scale: float) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within the block, the model computes from `scale` times its input embeddings, cut off from their weights.

    Yields:
        For each call what the input embedding gave, and the leaf that stands in for it; `(1, num_tokens, hidden_size)`.
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embeddings = output.detach().float()
        leaf = (scale * embeddings).requires_grad_()
        calls.append((embeddings, leaf))
        return leaf.to(output.dtype)

    hook = model.get_input_embeddings().register_forward_hook(replace)
    try:
        yield calls
    finally:
        hook.remove()


@contextlib.contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Activation checkpointing in evaluation mode too, where the model has it on: transformers looks at `training`."""
    layers: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing and not module.training
    ]
    before = [layer._gradient_checkpointing_func for layer in layers]
    for layer, checkpoint in zip(layers, before, strict=True):
        # Of the layer alone: the dropout inside it stays off.
        layer.training = True
        layer._gradient_checkpointing_func = _in_context(checkpoint)
    try:
        yield
    finally:
        for layer, checkpoint in zip(layers, before, strict=True):
            layer.training = False
            layer._gradient_checkpointing_func = checkpoint


def _in_context(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but a layer is computed again as it was at first: on a GPU autograd does so in a thread of its own."""

    def call(function: Callable[..., Any], *args: Any) -> Any:
        context = contextvars.copy_context()
        return checkpoint(functools.partial(context.run, function), *args)

    return call


def _embedding_gradient(
    model: Any, pack: AttributionPack, scale: float, temperature: Temperature
) -> tuple[Tensor, Tensor]:
    """`(num_tokens, hidden_size)` each: input embeddings, and the answers' gradient where they are scaled."""
    with (
        torch.enable_grad(),
        _checkpointed(model),
        _scaled_embeddings(model, scale) as embedded,
        shared_prefix(model.config, pack.layout) as shared,
    ):
        logits = pack.logits(model, pack.rows)
        if len(embedded) != 1:
            raise RuntimeError(
                f"the model called its input embedding {len(embedded)} times, so gradient_attribution cannot be "
                "computed for it; use attention_attribution or leave_one_out"
            )
        ((embeddings, leaf),) = embedded
        num_calls = shared.num_calls
        # Ranks whose tasks are all empty make the same backward pass: its collectives must stay in step.
        total = pack.log_probs(logits, temperature).sum() if len(pack.rows) else logits.float().sum()
        # Of the embeddings only: no parameter's gradient is computed, accumulated or reduced.
        (gradient,) = torch.autograd.grad(total, leaf)
        # Checkpointed layers have been called twice.
        shared.num_calls = num_calls
    return embeddings.squeeze(0), gradient.squeeze(0)


def gradient_contributions(
    model: PreTrainedModel,
    tasks: Sequence[AttributionTask],
    *,
    method: str = INPUT_X_GRADIENT,
    num_steps: int = 8,
    temperature: Temperature = 1.0,
    device: torch.device | None = None,
) -> list[Tensor]:
    """What each token contributes to the answer's log-probability, by the gradient in its input embedding.

    Input x gradient (Shrikumar et al., arXiv 1605.01713, after the gradients of Simonyan et al., arXiv 1312.6034): the
    dot product of a token's embedding and its gradient. Integrated gradients (Sundararajan et al., arXiv 1703.01365):
    with the gradient's mean along the straight line from a baseline, by the midpoint rule; the contributions of all
    tokens then sum to f(x) - f(baseline), up to the rule's error. Ours: embeddings of zero as baseline, of all tokens,
    those of prompt and answer too. Both see little behind a norm, which forgets its input's scale: contributions
    through a token's first norm alone are 0, and near a zero input so much changes that few steps are far from complete
    (measured in docs/results/attribution.md).

    Args:
        model: As in `answer_attention_by_token`. No gradient of its parameters is touched. Its activation checkpointing
            is used where it is on.
        tasks: At least one; computed in one forward and one backward pass, or `num_steps` of each.
        method: `input_x_gradient` or `integrated_gradients`.
        num_steps: integrated_gradients: points on the line.
        temperature: See `Temperature`.
        device: See `AttributionPack.build`.

    Returns:
        For each task `(answer_to,)` float32, nats.

    Raises:
        ValueError: An unknown method, no step, or a model that cannot be read (see `why_not_shared`).
    """
    if method not in (INPUT_X_GRADIENT, INTEGRATED_GRADIENTS):
        raise ValueError(f"method={method!r}: expected {INPUT_X_GRADIENT!r} or {INTEGRATED_GRADIENTS!r}")
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")
    scales = [1.0] if method == INPUT_X_GRADIENT else [(step + 0.5) / num_steps for step in range(num_steps)]
    pack = AttributionPack.build(model, tasks, device)
    embeddings, mean = _embedding_gradient(model, pack, scales[0], temperature)
    for scale in scales[1:]:
        mean = mean + _embedding_gradient(model, pack, scale, temperature)[1]
    by_token = (embeddings * mean).sum(dim=1) / len(scales)
    return list(torch.split(by_token, [task.answer_to for task in tasks]))
