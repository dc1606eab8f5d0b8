"""Reading probes' log-probabilities from the rollout server, through verl's own client: one request a trace.

The server computes the probes on the prefix it has in its cache: the embedded CPU server in batches of its own, vLLM
and SGLang by requests inside their servers (`rredcot_verl.servers`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rredcot_verl.config.blocks import SelfValueConfig
from rredcot_verl.probes.probe import Probe
from rredcot_verl.probes.values import ProbeScore
from rredcot_verl.servers.probe_queue import Turns

Generate = Callable[..., Awaitable[Any]]
"""`LLMServerClient.generate(request_id, *, prompt_ids, sampling_params) -> TokenOutput`."""

PROBING_BACKENDS = ("rredcot_cpu", "vllm", "sglang")
"""Rollout backends that can read probes; the CPU server's name is `rredcot_cpu`."""


@dataclass(frozen=True)
class Reading:
    """What a server read of a trace.

    Attributes:
        scores: One a probe.
        waiting_seconds: How long the trace waited for its turn, here and in the server.
    """

    scores: list[ProbeScore]
    waiting_seconds: float


class ProbeReader:
    """One request a trace: the server takes the trace with all its probes.

    Args:
        generate: The client's.
        temperature: The rollout's, which divides the logits.
        max_concurrency: Most requests under way.
        timeout_s: Seconds in which the server must finish some request, whoever made it.
    """

    def __init__(self, generate: Generate, temperature: float, max_concurrency: int, timeout_s: float) -> None:
        self._generate = generate
        self._temperature = temperature
        self._timeout_s = timeout_s
        # As in the server: the last to come has the likeliest prefix.
        self._turns = Turns(lambda: max_concurrency, newest_first=True)

    async def read(self, request_id: str, trace_ids: list[int], probes: Sequence[Probe]) -> Reading:
        """Read the probes of a trace; `request_id` routes to the server that holds its prefix.

        Raises:
            ProbingTimeout: The server stands still.
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
        params = {"temperature": self._temperature, "timeout_s": self._timeout_s, "read_probes": requests}
        loop = asyncio.get_running_loop()
        asked = loop.time()
        async with self._turns.turn():
            waited = loop.time() - asked
            output = await self._generate(request_id=request_id, prompt_ids=trace_ids, sampling_params=params)
        results = output.extra_fields.get("probe_log_probs")
        if results is None:
            raise RuntimeError(
                "the rollout server generated instead of reading probes: it is not one of rredcot_verl.servers"
            )
        if len(results) != len(probes):
            raise RuntimeError(f"the rollout server read {len(results)} of {len(probes)} probes")
        scores = [_to_score(probe, result) for probe, result in zip(probes, results, strict=True)]
        return Reading(scores, waited + output.extra_fields.get("waiting_seconds", 0.0))


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
        lost_closing_mass=result.get("lost_closing_mass", 0.0),
    )


def make_probe_reader(
    rollout_name: str, generate: Generate, config: SelfValueConfig, temperature: float
) -> ProbeReader:
    """The reader for a rollout backend.

    Raises:
        ValueError: The backend cannot read probes.
    """
    if rollout_name not in PROBING_BACKENDS:
        raise ValueError(
            f"actor_rollout_ref.rollout.name={rollout_name!r} cannot read probes; self_value.engine=rollout works "
            f"with {list(PROBING_BACKENDS)}"
        )
    return ProbeReader(generate, temperature, config.max_concurrency, config.timeout_s)
