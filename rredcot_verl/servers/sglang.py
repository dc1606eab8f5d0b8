"""verl's SGLang server, able to score the probes of a trace inside the server. Importing this module imports sglang.

Written against the interface of SGLang 0.5.12 and of verl 0.9.1's server for it; not run with SGLang.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import ray
from sglang.srt.managers.io_struct import GenerateReqInput
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.sglang_rollout.async_sglang_server import SGLangHttpServer, SGLangReplica
from verl.workers.rollout.sglang_rollout.utils import SGLANG_LORA_NAME

from rredcot_verl.servers.probes import refuse_media
from rredcot_verl.servers.sglang_requests import parse_score_request, read_probes

MAX_BRANCHES_UNDER_WAY = 128
"""SGLang keeps the logits of every scored token of a batch at once: rows of the vocabulary's size, about 10 bytes an
entry. 128 probes of 12 scored tokens over 150 000 entries are 2.3 GB; without a bound a batch holds as many probes
as `rollout.max_num_seqs`, and memory left over by `rollout.gpu_memory_utilization` may not suffice. Chosen, not
measured."""


class ScoringSGLangHttpServer(SGLangHttpServer):
    """verl's SGLang server, whose `generate` also takes `sampling_params["read_probes"]`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._score_slots = asyncio.Semaphore(MAX_BRANCHES_UNDER_WAY)

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: list[Any] | None = None,
        video_data: list[Any] | None = None,
        **kwargs: Any,
    ) -> TokenOutput:
        """Generates as verl's server does, or scores probes of a trace.

        Args:
            prompt_ids: Token ids; the whole trace if probes are scored.
            sampling_params: verl's, or `read_probes` as `parse_score_request` reads it.
            request_id: For generation. The requests of probes get ids of their own.
            image_data: For generation; refused with `read_probes`.
            video_data: For generation; refused with `read_probes`.
            **kwargs: For generation; refused with `read_probes`, unless `None`.

        Returns:
            For probes no tokens, and `extra_fields` with `global_steps` (the weights' version) and
            `probe_log_probs`, one `sglang_requests.read_answer` a probe.

        Raises:
            ValueError: The request asks for what cannot be scored, or a log-probability is NaN.
            RuntimeError: SGLang aborted a request or answered in another layout.
        """
        if "read_probes" not in sampling_params:
            return await super().generate(
                prompt_ids, sampling_params, request_id, image_data=image_data, video_data=video_data, **kwargs
            )
        if self._disaggregation_role != "null":
            raise ValueError("read_probes needs one engine that prefills and decodes: set disaggregation.enabled=false")
        refuse_media({"image_data": image_data, "video_data": video_data, **kwargs})
        trace_ids = [int(token) for token in prompt_ids]
        probes = parse_score_request(sampling_params, len(trace_ids))
        results = await read_probes(self._send, trace_ids, probes, self._score_slots)
        return TokenOutput(
            token_ids=[],
            stop_reason="completed",
            extra_fields={"global_steps": self.global_steps, "probe_log_probs": results},
        )

    async def _send(self, fields: dict[str, Any]) -> Mapping[str, Any]:
        request = GenerateReqInput(**fields)
        if self.lora_as_adapter:
            request.lora_path = SGLANG_LORA_NAME
        return await self.tokenizer_manager.generate_request(request, None).__anext__()


class ScoringSGLangReplica(SGLangReplica):
    """verl's SGLang replica with `ScoringSGLangHttpServer` as its server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(ScoringSGLangHttpServer)
