"""Reading probes' log-probabilities from the rollout server, through verl's own client: one request a trace.

The server computes the probes on the prefix it has in its cache: the embedded CPU server in batches of its own, vLLM
and SGLang by requests inside their servers (`rredcot_verl.servers`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from rredcot_verl.config.blocks import SelfValueConfig
from rredcot_verl.probes.elicitation import Probe
from rredcot_verl.probes.values import ProbeScore

Generate = Callable[..., Awaitable[Any]]
"""`LLMServerClient.generate(request_id, *, prompt_ids, sampling_params) -> TokenOutput`."""

PROBING_BACKENDS = ("rredcot_cpu", "vllm", "sglang")
"""Rollout backends that can read probes; the CPU server's name is `rredcot_cpu`."""


class ProbingTimeout(RuntimeError):
    """The server did not read the probes of a trace in time."""


class ProbeReader:
    """One request a trace: the server takes the trace with all its probes.

    Args:
        generate: The client's.
        temperature: The rollout's, which divides the logits.
    """

    def __init__(self, generate: Generate, temperature: float) -> None:
        self._generate = generate
        self._temperature = temperature

    async def read(self, request_id: str, trace_ids: list[int], probes: Sequence[Probe]) -> list[ProbeScore]:
        """Read the probes of a trace; `request_id` routes to the server that holds its prefix.

        Raises:
            RuntimeError: The server's answer does not fit what was asked.
        """
        requests = [
            {
                "position": probe.position,
                "token_ids": list(probe.token_ids),
                "scored_from": probe.scored_from,
                # As it is: probes share it, and what is one object here is sent once.
                "closing_token_ids": probe.closing_token_ids,
            }
            for probe in probes
        ]
        output = await self._generate(
            request_id=request_id,
            prompt_ids=trace_ids,
            sampling_params={"temperature": self._temperature, "read_probes": requests},
        )
        results = output.extra_fields.get("probe_log_probs")
        if results is None:
            raise RuntimeError(
                "the rollout server generated instead of reading probes: it is not one of rredcot_verl.servers"
            )
        if len(results) != len(probes):
            raise RuntimeError(f"the rollout server read {len(results)} of {len(probes)} probes")
        return [_to_score(probe, result) for probe, result in zip(probes, results, strict=True)]


def _to_score(probe: Probe, result: Mapping[str, Any]) -> ProbeScore:
    found, expected = len(result["token_log_probs"]), len(probe.token_ids)
    if found != expected:
        raise RuntimeError(f"the rollout server gave {found} log-probabilities of a probe, expected {expected}")
    return ProbeScore(
        token_log_probs=result["token_log_probs"],
        closing_log_prob=result["closing_log_prob"],
        # A server that counts nothing computes the probes and nothing else.
        num_forward_tokens=result.get("num_forward_tokens", expected),
        num_recomputed_tokens=result.get("num_recomputed_tokens", 0),
    )


def make_probe_reader(
    rollout_name: str, generate: Generate, config: SelfValueConfig, temperature: float
) -> ProbeReader:
    """The reader for a rollout backend, with at most `max_concurrency` requests under way.

    Raises:
        ValueError: The backend cannot read probes.
    """
    if rollout_name not in PROBING_BACKENDS:
        raise ValueError(
            f"actor_rollout_ref.rollout.name={rollout_name!r} cannot read probes; self_value.engine=rollout works "
            f"with {list(PROBING_BACKENDS)}"
        )
    slots = asyncio.Semaphore(config.max_concurrency)

    async def limited(**request: Any) -> Any:
        # The time a request waits for its turn does not count as its own.
        async with slots:
            try:
                return await asyncio.wait_for(generate(**request), config.timeout_s)
            except asyncio.TimeoutError:
                raise ProbingTimeout(
                    f"no answer within algorithm.rredcot.self_value.timeout_s={config.timeout_s}"
                ) from None

    return ProbeReader(limited, temperature)
