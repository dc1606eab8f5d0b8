"""Weights on their way to the rollout server, some at a time."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable

import torch
from verl.workers.rollout.utils import ensure_async_iterator

Bucket = list[tuple[str, torch.Tensor]]
"""Names and tensors of weights that are sent off together."""


async def in_buckets(
    weights: Iterable[tuple[str, torch.Tensor]] | AsyncIterable[tuple[str, torch.Tensor]], bucket_bytes: int
) -> AsyncIterator[Bucket]:
    """Draws `weights` to the end, a bucket whenever it has at least `bucket_bytes`."""
    bucket: Bucket = []
    num_bytes = 0
    async for name, tensor in ensure_async_iterator(weights):
        bucket.append((name, tensor.detach()))
        num_bytes += tensor.nbytes
        if num_bytes >= bucket_bytes:
            yield bucket
            bucket, num_bytes = [], 0
    if bucket:
        yield bucket
