"""Weights from the training workers to rollout servers of their own, over TCP: what `separate_async` needs on CPU."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import ray
import torch
import zmq
from verl.checkpoint_engine.base import CheckpointEngine

from rredcot_verl.cpu.weight_buckets import Bucket, in_buckets

# A rollout server that died must not leave the trainer waiting for ever, nor the other way round.
_TIMEOUT_MS = 600_000
# Buckets on their way to one receiver: one is being loaded, one waits.
_MAX_BUCKETS_IN_FLIGHT = 1


class CPUCheckpointEngine(CheckpointEngine):
    """Sends whole tensors from training rank 0 to each rollout worker, one ZeroMQ pipe for each.

    verl's other engines need device memory (nccl, nixl, mooncake), and its `naive` one a trainer and a server in one
    process. The pipes live for one update: receivers listen in `prepare`, the sender connects in `init_process_group`.

    Args:
        bucket_size: Bytes after which tensors are sent off together; a larger tensor goes alone.
        is_master: Whether this is training rank 0, the sender.
    """

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self._bucket_size = bucket_size
        self._is_master = is_master
        self._receiving: zmq.Socket | None = None
        self._sending: list[zmq.Socket] = []

    def prepare(self) -> str | None:
        """Starts to listen.

        Returns:
            The address to send to; None for the sender.
        """
        if self._is_master:
            return None
        node = ray.util.get_node_ip_address().strip("[]")
        address = f"tcp://[{node}]" if ":" in node else f"tcp://{node}"
        self._receiving = _socket(zmq.PULL, address)
        return f"{address}:{self._receiving.bind_to_random_port(address)}"

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[str | None]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Tells training rank 0 the addresses of all rollout workers; nobody else sends."""
        receivers = metadata[actor_wg_world_size:]
        nobody: list[str] = []
        return (
            {"addresses": [receivers, *[nobody] * (actor_wg_world_size - 1)]},
            {"addresses": [nobody] * rollout_world_size},
        )

    def init_process_group(self, addresses: list[str]) -> None:
        """Connects to the receivers at `addresses`."""
        for address in addresses:
            socket = _socket(zmq.PUSH, address)
            socket.connect(address)
            self._sending.append(socket)

    def finalize(self) -> None:
        """Closes the pipes; verl calls it when every worker is done."""
        for socket in (*self._sending, self._receiving):
            if socket is not None:
                socket.close(linger=0)
        self._sending, self._receiving = [], None

    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, float]:
        """Sends `weights`. Every training rank must call it: each tensor is gathered by a collective.

        Returns:
            No metrics.
        """
        # Who does not send keeps nothing.
        async for bucket in in_buckets(weights, self._bucket_size if self._sending else 0):
            await self._send(bucket)
        # An empty bucket is the end.
        await self._send([])
        return {}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Yields names and tensors in the order in which they were sent."""
        assert self._receiving is not None, "prepare comes first"
        while True:
            header, *buffers = await asyncio.to_thread(self._receiving.recv_multipart, copy=False)
            metadata = json.loads(header.bytes)
            if not metadata:
                return
            for (name, dtype, shape), buffer in zip(metadata, buffers, strict=True):
                # A copy: the frame's memory is read-only, and freed with it.
                data = torch.frombuffer(bytearray(buffer.buffer), dtype=getattr(torch, dtype))
                yield name, data.view(shape)

    async def _send(self, bucket: Bucket) -> None:
        if not self._sending:
            return
        header = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in bucket]
        buffers = [tensor.contiguous().view(-1).view(torch.uint8).numpy() for _, tensor in bucket]
        parts = [json.dumps(header).encode(), *buffers]
        await asyncio.gather(*(asyncio.to_thread(socket.send_multipart, parts) for socket in self._sending))


def _socket(kind: int, address: str) -> zmq.Socket:
    socket = zmq.Context.instance().socket(kind)
    socket.set_hwm(_MAX_BUCKETS_IN_FLIGHT)
    socket.setsockopt(zmq.IPV6, "[" in address)
    socket.sndtimeo = socket.rcvtimeo = _TIMEOUT_MS
    return socket
