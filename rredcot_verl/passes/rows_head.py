"""Logits of some tokens where verl's fused kernels make none.

The fused forward takes the decoder's last hidden states to log-probabilities without keeping logits. A hook on the
decoder gives the head the states of some tokens, and hands on only those whose log-probabilities verl wants.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class RowsHead:
    """What the hook does in a pass over one sequence.

    Attributes:
        rows: `(num_rows,)` int64, the tokens whose logits are wanted, on the model's device.
        num_tokens: The tokens, from the first on, that verl's fused forward gets.
        logits: `(num_rows, vocab_size)`, after the pass.
    """

    rows: Tensor | None = None
    num_tokens: int = 0
    logits: Tensor | None = None


@contextlib.contextmanager
def rows_head(model: Any) -> Iterator[RowsHead]:
    """Within the block, passes of a causal language model leave the logits of the rows asked for.

    These are the head's alone, as verl's fused kernels take them: what else a model does to its logits is left out.

    Args:
        model: Of transformers; may be wrapped by FSDP, FSDP2 or PEFT.
    """
    # The module, not its weight: it may be sharded by itself or adapted.
    head: nn.Module = model.get_output_embeddings()
    current = RowsHead()

    def read(decoder: nn.Module, args: Any, output: Any) -> Any:
        states = output.last_hidden_state
        current.logits = head(states[:, current.rows])[0]
        output.last_hidden_state = states[:, : current.num_tokens]
        return output

    handle = model.get_decoder().register_forward_hook(read)
    try:
        yield current
    finally:
        handle.remove()
