"""How far `old_log_prob` is from what the update computes, of verl's own pass and of one that reads probes too.

Both are compared with the traces in one padded batch; verl's own pass in smaller ones, as other micro batches.
"""

import pytest
import torch

from tests.passes.architectures import build_model, random_probes, random_traces
from tests.passes.test_shared_prefix_on_cpu import TEMPERATURE, run

LENGTHS = (60, 200, 333, 120, 90, 300)


@torch.no_grad()
def padded(model, traces) -> torch.Tensor:
    """Log-probabilities of all tokens after the first of each trace."""
    width = max(map(len, traces))
    ids = torch.tensor([[*trace, *[0] * (width - len(trace))] for trace in traces])
    mask = torch.tensor([[1] * len(trace) + [0] * (width - len(trace)) for trace in traces])
    log_probs = (model(ids, attention_mask=mask, use_cache=False).logits.float() / TEMPERATURE).log_softmax(-1)
    rows = [
        own[: len(trace) - 1].gather(1, torch.tensor(trace[1:])[:, None])[:, 0]
        for own, trace in zip(log_probs, traces, strict=True)
    ]
    return torch.cat(rows)


def drifts(name: str, attention: str, dtype: torch.dtype) -> tuple[float, float]:
    """Mean difference in nats to the update, of verl's other micro batches and of a fused pass."""
    model = build_model(name).to(dtype)
    model.set_attn_implementation(attention)
    traces = random_traces(LENGTHS)
    update = padded(model, traces)
    others = torch.cat([padded(model, traces[first : first + 2]) for first in range(0, len(traces), 2)])
    _, fused = run(model, traces, [random_probes(len(trace), 4, seed) for seed, trace in enumerate(traces)], fused=True)
    return (others - update).abs().mean().item(), (torch.cat(fused) - update).abs().mean().item()


@pytest.mark.parametrize("name", ["qwen3-untied", "llama"])
@pytest.mark.parametrize("dtype, small", [(torch.float32, 1e-7), (torch.bfloat16, 5e-4)])
def test_a_fused_pass_is_the_updates_where_the_kernel_is(name, dtype, small):
    """Up to what other micro batches change; with another kernel it is further off: why `fuse=auto` asks for it."""
    others, fused = drifts(name, "sdpa", dtype)
    assert others < small and fused < small
    others, fused = drifts(name, "eager", dtype)
    assert others < small and fused > 10 * small
