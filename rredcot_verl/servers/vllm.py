"""verl's vLLM server, able to read the probes of a trace inside the server. Importing this module imports vllm."""

import functools
import itertools
from typing import Any

import ray
from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_INT_ID, VLLM_LORA_NAME, VLLM_LORA_PATH
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm import SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from rredcot_verl.servers import vllm_forced, vllm_tree
from rredcot_verl.servers.probe_queue import ProbeQueue
from rredcot_verl.servers.probing_server import ProbingServerMixin
from rredcot_verl.servers.vllm_requests import ReadPlaces, parse_request, read_probes

SHARE_OF_SEQUENCES = 4
"""When nothing is generated, requests of probes take one in so many of the engine's `max_num_seqs` places."""

PROBE_PRIORITY = 1
"""vLLM takes lower numbers first, generation has 0. Used with `rollout.scheduling_policy=priority`."""


class ProbingVLLMHttpServer(ProbingServerMixin, vLLMHttpServer):
    """verl's vLLM server, whose `generate` also takes `sampling_params["read_probes"]`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()

    def _prepare(self) -> None:
        self.probe_queue = ProbeQueue(max(1, self.config.max_num_seqs // SHARE_OF_SEQUENCES))
        self._closing_mass = vllm_tree.ClosingMass()

    def _generation_params(self, sampling_params: dict[str, Any]) -> dict[str, Any]:
        """Without text where none is needed: verl takes tokens.

        One request of probes makes vLLM widen the log-probabilities of every row of its step to as many as the probe
        asked for, and a row with text then decodes each of them.
        """
        return {"detokenize": bool(sampling_params.get("stop")), **sampling_params}

    async def _read_probes(
        self, trace_ids: list[int], sampling_params: dict[str, Any], request_id: str
    ) -> list[dict[str, Any]]:
        vocab_size = self.engine.model_config.get_vocab_size()
        max_model_len = self.config.max_model_len
        probes, temperature = parse_request(sampling_params, len(trace_ids), max_model_len, vocab_size)
        if await self._park_until_admitted(request_id) is not None:
            raise RuntimeError("the vLLM server takes no requests at present, probes cannot be read")
        # The whole trace counts as one admission: a weight update waits for its probes instead of aborting them.
        try:
            lora_request = await self._lora_request()
            priority = PROBE_PRIORITY if self.config.scheduling_policy == "priority" else 0
            numbers = itertools.count(1)

            async def send(prompt_ids: list[int], fields: dict[str, Any]) -> Any:
                own_id = f"{request_id}-probe-{next(numbers)}"
                prompt = TokensPrompt(prompt_token_ids=prompt_ids)
                params = SamplingParams(**fields, output_kind=RequestOutputKind.FINAL_ONLY)
                async with self.probe_queue.request():
                    outputs = self.engine.generate(prompt, params, own_id, lora_request=lora_request, priority=priority)
                    return ([output async for output in outputs] or [None])[-1]

            block_size = self.engine.vllm_config.cache_config.block_size
            return await read_probes(self._read_places, send, trace_ids, probes, temperature, block_size)
        finally:
            self._admitting -= 1

    @property
    def _read_places(self) -> ReadPlaces:
        """By forcing where the engine has our logits processor and shows what it does, else place by place."""
        model = self.engine.model_config
        forces = (
            vllm_forced.PROCESSOR in (model.logits_processors or ()) and model.logprobs_mode == "processed_logprobs"
        )
        return vllm_forced.read_places if forces else functools.partial(vllm_tree.read_places, mass=self._closing_mass)

    async def _lora_request(self) -> LoRARequest | None:
        """The adapter that generation uses, as verl's server asks for it."""
        if not self.lora_as_adapter or VLLM_LORA_INT_ID not in await self.engine.list_loras():
            return None
        return LoRARequest(lora_name=VLLM_LORA_NAME, lora_int_id=VLLM_LORA_INT_ID, lora_path=VLLM_LORA_PATH)


class ProbingVLLMReplica(vLLMReplica):
    """verl's vLLM replica with `ProbingVLLMHttpServer` as its server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(ProbingVLLMHttpServer)

    @property
    def max_concurrency(self) -> int:
        """Calls that Ray lets into the server at once: traces that wait there must not keep generation out."""
        return 2 * super().max_concurrency
