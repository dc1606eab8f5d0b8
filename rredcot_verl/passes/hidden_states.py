"""The policy's hidden state at boundaries: read by a hook on one decoder layer, projected at once.

Of a pass over T tokens nothing of shape `(T, hidden_size)` is kept: the hook picks the tokens asked for and leaves
`(num_rows, dim)` floats. All of it is ours; no paper's.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rredcot_verl.config.schema import PREFIX

RMS_EPSILON = 1e-6
"""Added to the mean square of a state, as in the RMS norms of the models this is for."""


@functools.lru_cache(maxsize=16)
def random_projection(hidden_size: int, dim: int, seed: int) -> Tensor:
    """A random projection with entries of either sign and one size.

    Signs serve as well as normal numbers (Achlioptas, "Database-friendly random projections", 2003), and unlike those
    they are the same bits on every machine: they are made of the raw bits of numpy's PCG64, whose stream numpy keeps
    from version to version. The size `1 / sqrt(hidden_size)` is ours: of a state of root mean square 1 each of the
    `dim` features has a variance of about 1 over the seeds, whatever the two sizes are.

    Args:
        hidden_size: Size of the states.
        dim: Features that are left of them.
        seed: 0 or more.

    Returns:
        `(hidden_size, dim)` float32 on CPU; shared by all callers, so not to be written to.

    Raises:
        ValueError: A size is not positive, or the seed is negative.
    """
    if hidden_size < 1 or dim < 1 or seed < 0:
        raise ValueError(
            f"a projection needs sizes of at least 1 and a seed of at least 0, got {hidden_size=} {dim=} {seed=}"
        )
    num_words = -(-hidden_size * dim // 64)
    # One byte order everywhere, hence the same bits.
    words = np.random.PCG64(seed).random_raw(num_words).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=hidden_size * dim, bitorder="little")
    signs = torch.from_numpy(bits.reshape(hidden_size, dim)).float() * 2 - 1
    return signs / math.sqrt(hidden_size)


def project(states: Tensor, projection: Tensor) -> Tensor:
    """Scale states to a root mean square of 1 and project them, in float32 whatever autocast says.

    The scale is taken out because the model itself never sees it: attention, feed-forward blocks and head read the
    residual stream through a norm. It grows with the depth and drifts over training, and the features of several steps
    are fitted together. Ours.

    Args:
        states: `(num_rows, hidden_size)`, any floating type.
        projection: `(hidden_size, dim)` float32, on the same device.

    Returns:
        `(num_rows, dim)` float32.
    """
    with torch.autocast(device_type=states.device.type, enabled=False):
        states = states.float()
        scale = torch.rsqrt(states.square().mean(dim=1, keepdim=True) + RMS_EPSILON)
        return (states * scale) @ projection


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model of transformers, also wrapped by FSDP, FSDP2 or PEFT.

    Raises:
        ValueError: There is no list of as many modules as the model's config has layers.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"a model of type {type(model).__name__} has no config that says how many layers it has")
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    # The wrappers pass the method on. Of a multimodal model it is the text part, whose layers are the ones meant.
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    # Outermost first: a layer's experts may be as many as the layers.
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(f"a model of type {type(model).__name__} has no list of its {num_layers} decoder layers")


def layer_index(layer: int, num_layers: int) -> int:
    """Index of a layer that may be counted from the end.

    Raises:
        ValueError: The model has no such layer.
    """
    if not -num_layers <= layer < num_layers:
        raise ValueError(
            f"{PREFIX}.readout.layer={layer} is out of range: the model has {num_layers} decoder layers, so the layer "
            f"must be from {-num_layers} to {num_layers - 1}"
        )
    return layer % num_layers


@dataclass
class HiddenStates:
    """What a hook collects.

    Attributes:
        dim: Features of a state.
        seed: Of the projection.
        rows: `(num_rows,)` int64, which tokens are wanted, as indices into the pass's `(batch, length)` tokens laid end
            to end; set before the model is called.
        shard: With sequences split over ranks, this rank's number, how many there are and how many of the tokens each
            has, in order. A token elsewhere gives 0 here, so the ranks' results sum to the whole.
        collected: One `(num_rows, dim)` float32 tensor for each pass, in order.
    """

    dim: int
    seed: int
    rows: Tensor | None = None
    shard: tuple[int, int, int] | None = None
    collected: list[Tensor] = field(default_factory=list)

    def read(self, layer: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of a decoder layer.

        Raises:
            RuntimeError: Nobody said which tokens are wanted, or some are outside the pass, or the layer gives no
                residual stream.
        """
        stream = output[0] if isinstance(output, tuple) else output
        if self.rows is None:
            raise RuntimeError("hidden states are collected but `rows` does not say at which tokens")
        if stream.dim() != 3:
            raise RuntimeError(
                f"decoder layer {type(layer).__name__} gives a tensor of shape {tuple(stream.shape)}, expected "
                "(batch, length, hidden_size)"
            )
        batch, length, hidden_size = stream.shape
        rank, num_ranks, num_tokens = self.shard or (0, 1, batch * length)
        if bool(((self.rows < 0) | (self.rows >= num_ranks * num_tokens)).any()):
            raise RuntimeError(
                f"hidden states are wanted at tokens {self.rows.tolist()} of a pass of {num_ranks * num_tokens} tokens"
            )
        rows = self.rows.to(stream.device) - rank * num_tokens
        here = (rows >= 0) & (rows < num_tokens)
        rows = rows.clamp(0, num_tokens - 1)
        projection = random_projection(hidden_size, self.dim, self.seed).to(stream.device)
        # Indexed, so a copy of these tokens only.
        states = project(stream.detach()[rows // length, rows % length], projection)
        self.collected.append(states if self.shard is None else states * here.unsqueeze(1))


@contextlib.contextmanager
def hidden_states(model: nn.Module, layer: int, dim: int, seed: int) -> Iterator[HiddenStates]:
    """Within the block, passes of a model leave one layer's projected states at the tokens asked for.

    The model computes what it would have computed: the hook reads, and changes nothing. Several may be open at once,
    one for each layer that is compared.

    Args:
        model: A causal language model of transformers; may be wrapped, see `decoder_layers`.
        layer: Which decoder layer's output, the residual stream after it; negative counts from the end.
        dim: Features of a state.
        seed: Of the projection.

    Yields:
        HiddenStates: Set its `rows` before each call of the model.

    Raises:
        ValueError: The model has no such layer.
    """
    layers = decoder_layers(model)
    states = HiddenStates(dim, seed)
    handle = layers[layer_index(layer, len(layers))].register_forward_hook(states.read)
    try:
        yield states
    finally:
        handle.remove()
