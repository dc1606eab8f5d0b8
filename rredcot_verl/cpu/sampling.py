"""Sampling parameters of the CPU rollout server: what it understands, and a clear refusal of the rest."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# Parameters verl's own callers send that ask this server for nothing: accepted at the value that means "off".
_ONLY_NEUTRAL = {
    "detokenize": (False,),
    "frequency_penalty": (0, None),
    "min_p": (0, None),
    "min_tokens": (0, None),
    "n": (1,),
    "presence_penalty": (0, None),
    "prompt_logprobs": (None,),
    "stop": (None, [], ()),
}


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one sequence.

    Attributes:
        temperature: Divides the logits; 0 is greedy.
        top_p: Nucleus mass in (0, 1]; 1 keeps all tokens.
        top_k: Number of most likely tokens kept; -1 or 0 keeps all.
        repetition_penalty: Factor on the logits of tokens that occurred; 1 is none.
        ignore_eos: Generate up to the limit whatever is generated.
        stop_token_ids: Tokens that end a sequence besides the model's own.
        seed: Seed of this sequence alone, or `None` to draw from the server's generator.
        max_tokens: Limit on generated tokens. No part of equality: sequences with different limits share a batch.
        logprobs: Whether to return log-probabilities. No part of equality.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    max_tokens: int = field(default=1, compare=False)
    logprobs: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < -1:
            raise ValueError(f"top_k must be -1 or 0 (all tokens) or more, got {self.top_k}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken each time."""
        return self.temperature == 0

    def logits_processors(self) -> LogitsProcessorList:
        """Returns the processors that turn raw logits into those sampled from, in vLLM's order."""
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.is_greedy:
            return processors
        if self.temperature != 1:
            processors.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k > 0:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        return processors


def parse_sampling_params(
    sampling_params: Mapping[str, Any], default_max_tokens: int, max_possible_tokens: int, default_ignore_eos: bool
) -> SamplingParams:
    """Reads sampling parameters as verl's agent loops send them.

    Args:
        sampling_params: Names and values, vLLM's spelling; `max_new_tokens` is taken for `max_tokens`.
        default_max_tokens: Limit when none is given, in tokens.
        max_possible_tokens: Room the model's context leaves, in tokens; the limit is clamped to it.
        default_ignore_eos: `actor_rollout_ref.rollout.ignore_eos`.

    Raises:
        ValueError: A parameter is unknown, out of range, or asks for what this server cannot do.
    """
    params = dict(sampling_params)
    for name, neutral in _ONLY_NEUTRAL.items():
        if name in params and params.pop(name) not in neutral:
            raise ValueError(
                f"the CPU rollout server does not support sampling parameter {name}={sampling_params[name]!r}"
            )
    unknown = sorted(params.keys() - {each.name for each in fields(SamplingParams)} - {"max_new_tokens"})
    if unknown:
        raise ValueError(f"the CPU rollout server does not know sampling parameter(s) {', '.join(unknown)}")

    max_tokens = params.pop("max_tokens", None)
    max_new_tokens = params.pop("max_new_tokens", None)
    limit = next((value for value in (max_tokens, max_new_tokens) if value is not None), default_max_tokens)
    params["max_tokens"] = max(1, min(limit, max_possible_tokens))
    params["logprobs"] = _asks_for_logprobs(params.get("logprobs"))
    params["stop_token_ids"] = tuple(params.get("stop_token_ids") or ())
    params.setdefault("ignore_eos", default_ignore_eos)
    return SamplingParams(**params)


def _asks_for_logprobs(value: Any) -> bool:
    # verl sends a bool; vLLM's own 0 means "the sampled token only", which is what True gets here.
    if value is None or isinstance(value, bool):
        return bool(value)
    if value == 0:
        return True
    raise ValueError(f"logprobs={value!r}: the CPU rollout server returns the sampled token's log-probability only")
