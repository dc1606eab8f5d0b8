"""What verl's vLLM and SGLang servers need to read probes. Imports neither server."""

from typing import Any

from verl.workers.rollout.replica import TokenOutput

from rredcot_verl.servers.probe_queue import ProbeQueue
from rredcot_verl.servers.probe_requests import refuse_media, timeout_of


class ProbingServerMixin:
    """Before a server class of verl's: its `generate` then also takes `sampling_params["read_probes"]`."""

    global_steps: int
    probe_queue: ProbeQueue
    """Set by the server."""

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: list[Any] | None = None,
        video_data: list[Any] | None = None,
        **kwargs: Any,
    ) -> TokenOutput:
        """Generates as verl's server does, or reads the probes of a trace.

        Args:
            prompt_ids: Token ids; the whole trace if probes are read.
            sampling_params: verl's, or `read_probes` as `parse_probes` reads it.
            request_id: For generation. The requests of probes get ids of their own.
            image_data: For generation; refused with `read_probes`.
            video_data: For generation; refused with `read_probes`.
            **kwargs: For generation; refused with `read_probes`, unless `None` or 0.

        Returns:
            For probes no tokens, and `extra_fields` with `global_steps` (the weights' version), `waiting_seconds` (how
            long the trace waited for its turn) and `probe_log_probs`. These hold for each probe, in the order given,
            token_log_probs: One for each of its tokens, nats; 0 before `scored_from`.
            closing_log_prob: Log of the summed probability of the closing tokens, nats; `None` without any.
            num_forward_tokens: Tokens computed after the prefix. What several probes share counts for the first.
            num_recomputed_tokens: Tokens of the prefix that the cache had lost.
            lost_closing_mass: Probability of closing tokens left out where it was measured; 0 elsewhere.

        Raises:
            ValueError: The request asks for what cannot be read, the server refused it, or a log-probability is NaN.
            RuntimeError: The server aborted a request, takes none at present, or answered in another layout.
            ProbingTimeout: The server finished no request at all for `timeout_s` seconds.
        """
        if "read_probes" not in sampling_params:
            params = self._generation_params(sampling_params)
            with self.probe_queue.generating():
                return await super().generate(  # type: ignore[misc]
                    prompt_ids, params, request_id, image_data=image_data, video_data=video_data, **kwargs
                )
        refuse_media("read_probes", {"image_data": image_data, "video_data": video_data, **kwargs})
        trace_ids = [int(token) for token in prompt_ids]
        results, waited = await self.probe_queue.read(
            lambda: self._read_probes(trace_ids, sampling_params, request_id), timeout_of(sampling_params)
        )
        fields = {"global_steps": self.global_steps, "probe_log_probs": results, "waiting_seconds": waited}
        return TokenOutput(token_ids=[], stop_reason="completed", extra_fields=fields)

    def _generation_params(self, sampling_params: dict[str, Any]) -> dict[str, Any]:
        """What a response is generated with."""
        return sampling_params

    async def _read_probes(
        self, trace_ids: list[int], sampling_params: dict[str, Any], request_id: str
    ) -> list[dict[str, Any]]:
        raise NotImplementedError
