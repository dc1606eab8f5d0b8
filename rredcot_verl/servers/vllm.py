"""verl's vLLM server, able to score the probes of a trace inside the server. Importing this module imports vllm."""

import asyncio
from typing import Any

import ray
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_INT_ID, VLLM_LORA_NAME, VLLM_LORA_PATH
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm import SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from rredcot_verl.servers import vllm_forced, vllm_tree
from rredcot_verl.servers.probes import refuse_media
from rredcot_verl.servers.vllm_requests import ScorePlaces, parse_score_request, read_probes

GENERATION_SHARE = 4
"""Requests of probes take at most one in so many of the engine's `max_num_seqs` places; the rest is generation's."""

PROBE_PRIORITY = 1
"""vLLM takes lower numbers first, generation has 0. Used with `rollout.scheduling_policy=priority`."""


class ScoringVLLMHttpServer(vLLMHttpServer):
    """verl's vLLM server, whose `generate` also takes `sampling_params["read_probes"]`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._score_slots = asyncio.Semaphore(max(1, self.config.max_num_seqs // GENERATION_SHARE))

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
            request_id: For generation; the requests of probes get ids made from it.
            image_data: For generation; refused with `read_probes`.
            video_data: For generation; refused with `read_probes`.
            **kwargs: For generation; refused with `read_probes`, unless `None` or 0.

        Returns:
            For probes no tokens, and `extra_fields` with `global_steps` (the weights' version) and
            `probe_log_probs`, as `vllm_requests.read_probes` gives them.

        Raises:
            ValueError: The request asks for what cannot be scored, or a log-probability is NaN.
            RuntimeError: vLLM aborted a request, or the server takes none at present.
        """
        if "read_probes" not in sampling_params:
            return await super().generate(
                prompt_ids, sampling_params, request_id, image_data=image_data, video_data=video_data, **kwargs
            )
        refuse_media({"image_data": image_data, "video_data": video_data, **kwargs})
        trace_ids = [int(token) for token in prompt_ids]
        vocab_size = self.engine.model_config.get_vocab_size()
        probes = parse_score_request(sampling_params, len(trace_ids), self.config.max_model_len, vocab_size)
        temperature = float(sampling_params.get("temperature", 1.0))
        if await self._park_until_admitted(request_id) is not None:
            raise RuntimeError("the vLLM server takes no requests at present, probes cannot be scored")
        # The whole trace counts as one admission: a weight update waits for its probes instead of aborting them.
        try:
            sender = _Sender(self, request_id, await self._lora_request())
            block_size = self.engine.vllm_config.cache_config.block_size
            results = await read_probes(self._score_places, sender.send, trace_ids, probes, temperature, block_size)
        finally:
            self._admitting -= 1
        return TokenOutput(
            token_ids=[],
            stop_reason="completed",
            extra_fields={"global_steps": self.global_steps, "probe_log_probs": results},
        )

    @property
    def _score_places(self) -> ScorePlaces:
        """By forcing where the engine has our logits processor and shows what it does, else place by place."""
        model = self.engine.model_config
        forces = (
            vllm_forced.PROCESSOR in (model.logits_processors or ()) and model.logprobs_mode == "processed_logprobs"
        )
        return vllm_forced.score_places if forces else vllm_tree.score_places

    async def _lora_request(self) -> LoRARequest | None:
        """The adapter that generation uses, as verl's server asks for it."""
        if not self.lora_as_adapter or VLLM_LORA_INT_ID not in await self.engine.list_loras():
            return None
        return LoRARequest(lora_name=VLLM_LORA_NAME, lora_int_id=VLLM_LORA_INT_ID, lora_path=VLLM_LORA_PATH)


class _Sender:
    """Sends the requests of one trace to the server's engine."""

    def __init__(self, server: ScoringVLLMHttpServer, request_id: str, lora_request: LoRARequest | None) -> None:
        self._engine = server.engine
        self._slots = server._score_slots
        self._priority = PROBE_PRIORITY if server.config.scheduling_policy == "priority" else 0
        self._request_id = request_id
        self._lora_request = lora_request
        self._num_requests = 0

    async def send(self, prompt_ids: list[int], fields: dict[str, Any]) -> Any:
        """See `vllm_requests.Send`."""
        self._num_requests += 1
        request_id = f"{self._request_id}-probe-{self._num_requests}"
        params = SamplingParams(**fields, output_kind=RequestOutputKind.FINAL_ONLY)
        async with self._slots:
            outputs = [
                output
                async for output in self._engine.generate(
                    TokensPrompt(prompt_token_ids=prompt_ids),
                    params,
                    request_id,
                    lora_request=self._lora_request,
                    priority=self._priority,
                )
            ]
        return outputs[-1] if outputs else None


class ScoringVLLMReplica(vLLMReplica):
    """verl's vLLM replica with `ScoringVLLMHttpServer` as its server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(ScoringVLLMHttpServer)
