"""verl's SGLang server, able to read the probes of a trace inside the server. Importing this module imports sglang.

Written against the interface of SGLang 0.5.12 and of verl 0.9.1's server for it; not run with SGLang.
"""

from collections.abc import Mapping
from typing import Any

import ray
from sglang.srt.managers.io_struct import GenerateReqInput
from verl.workers.rollout.sglang_rollout.async_sglang_server import SGLangHttpServer, SGLangReplica
from verl.workers.rollout.sglang_rollout.utils import SGLANG_LORA_NAME

from rredcot_verl.servers.probe_queue import ProbeQueue
from rredcot_verl.servers.probing_server import ProbingServerMixin
from rredcot_verl.servers.sglang_requests import parse_request, read_probes

MAX_PROBES_UNDER_WAY = 128
"""SGLang keeps the logits of every token of a batch that is read at once: rows of the vocabulary's size, about 10 bytes
an entry. 128 probes of 12 such tokens over 150 000 entries are 2.3 GB; without a bound a batch holds as many probes
as `rollout.max_num_seqs`, and memory left over by `rollout.gpu_memory_utilization` may not suffice. Chosen, not
measured."""


class ProbingSGLangHttpServer(ProbingServerMixin, SGLangHttpServer):
    """verl's SGLang server, whose `generate` also takes `sampling_params["read_probes"]`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.probe_queue = ProbeQueue(MAX_PROBES_UNDER_WAY)

    async def _read_probes(
        self, trace_ids: list[int], sampling_params: dict[str, Any], request_id: str
    ) -> list[dict[str, Any]]:
        if self._disaggregation_role != "null":
            raise ValueError("read_probes needs one engine that prefills and decodes: set disaggregation.enabled=false")
        probes = parse_request(sampling_params, len(trace_ids))
        return await read_probes(self._send, trace_ids, probes)

    async def _send(self, fields: dict[str, Any]) -> Mapping[str, Any]:
        request = GenerateReqInput(**fields)
        if self.lora_as_adapter:
            request.lora_path = SGLANG_LORA_NAME
        async with self.probe_queue.request():
            return await self.tokenizer_manager.generate_request(request, None).__anext__()


class ProbingSGLangReplica(SGLangReplica):
    """verl's SGLang replica with `ProbingSGLangHttpServer` as its server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(ProbingSGLangHttpServer)

    @property
    def max_concurrency(self) -> int:
        """See `ProbingVLLMReplica`."""
        return 2 * super().max_concurrency
