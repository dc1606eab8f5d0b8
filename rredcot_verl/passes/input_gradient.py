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


@contextlib.contextmanager
def _leaf_embeddings(model: Any) -> Iterator[list[Tensor]]:
    """Within the block, the model computes from its input embeddings cut off from their weights.

    Yields:
        For each call the leaf that stands in for what the input embedding gave; `(1, num_tokens, hidden_size)`.
    """
    calls: list[Tensor] = []

    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaf = output.detach().float().requires_grad_()
        calls.append(leaf)
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


def _embedding_gradient(model: Any, pack: AttributionPack, temperature: Temperature) -> tuple[Tensor, Tensor]:
    """`(num_tokens, hidden_size)` each: input embeddings, and the answers' gradient there."""
    with (
        torch.enable_grad(),
        _checkpointed(model),
        _leaf_embeddings(model) as embedded,
        shared_prefix(model.config, pack.layout) as shared,
    ):
        logits = pack.logits(model, pack.rows)
        if len(embedded) != 1:
            raise RuntimeError(
                f"the model called its input embedding {len(embedded)} times, so gradient_attribution cannot be "
                "computed for it; use attention_attribution or leave_one_out"
            )
        (embeddings,) = embedded
        num_calls = shared.num_calls
        # Ranks whose tasks are all empty make the same backward pass: its collectives must stay in step.
        total = pack.log_probs(logits, temperature).sum() if len(pack.rows) else logits.float().sum()
        # Of the embeddings only: no parameter's gradient is computed, accumulated or reduced.
        (gradient,) = torch.autograd.grad(total, embeddings)
        # Checkpointed layers have been called twice.
        shared.num_calls = num_calls
    return embeddings.detach().squeeze(0), gradient.squeeze(0)


def gradient_contributions(
    model: PreTrainedModel,
    tasks: Sequence[AttributionTask],
    *,
    temperature: Temperature = 1.0,
    device: torch.device | None = None,
) -> list[Tensor]:
    """What each token contributes to the answer's log-probability, by the gradient in its input embedding.

    Input x gradient (Shrikumar et al., arXiv 1605.01713, after the gradients of Simonyan et al., arXiv 1312.6034): the
    dot product of a token's embedding and its gradient. It sees little behind a norm, which forgets its input's scale:
    contributions through a token's first norm alone are 0 (measured in docs/results/attribution.md).

    Args:
        model: As in `answer_attention_by_token`. No gradient of its parameters is touched. Its activation checkpointing
            is used where it is on.
        tasks: At least one; computed in one forward and one backward pass.
        temperature: See `Temperature`.
        device: See `AttributionPack.build`.

    Returns:
        For each task `(answer_to,)` float32, nats.

    Raises:
        ValueError: The model cannot be read; see `why_not_shared`.
    """
    pack = AttributionPack.build(model, tasks, device)
    embeddings, gradient = _embedding_gradient(model, pack, temperature)
    return list(torch.split((embeddings * gradient).sum(dim=1), [task.answer_to for task in tasks]))
