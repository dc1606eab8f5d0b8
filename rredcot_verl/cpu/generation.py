"""Batched sampling with the transformers library, and the log-probabilities of what was sampled."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rredcot_verl.cpu.sampling import SamplingParams
from rredcot_verl.live import TOKENS, tell


@dataclass(frozen=True)
class GeneratedSequence:
    """One sampled continuation.

    Attributes:
        token_ids: The generated tokens, the stop token included.
        log_probs: One log-probability in nats for each token, under the whole distribution at the sampling
            temperature (truncation and penalties left out): what the actor computes for the same token. At
            temperature 0 the distribution is that of temperature 1.
        aborted: Whether generation was cut short from outside.
    """

    token_ids: list[int]
    log_probs: list[float]
    aborted: bool


def temperature_scaled_log_probs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns log-probabilities in nats, shape of `logits` (..., vocab_size), of `logits / temperature` in float32."""
    scaled = logits.float()
    if temperature not in (0, 1):
        scaled = scaled / temperature
    return torch.log_softmax(scaled, dim=-1)


class _LogProbRecorder(LogitsProcessor):
    """Keeps each sampled token's log-probability while `generate` runs.

    `generate` can return the logits of all positions instead, at (batch, length, vocab_size) floats; this holds one
    position at a time. It must come first in the list, to see the logits before anything changed them.
    """

    def __init__(self, temperature: float):
        self._temperature = temperature
        self._pending: torch.Tensor | None = None
        self._recorded: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._take_last_token(input_ids)
        tell(TOKENS, begun=1, ended=1)
        self._pending = temperature_scaled_log_probs(scores, self._temperature)
        return scores

    def finish(self, sequences: torch.Tensor) -> torch.Tensor:
        """Returns the log-probabilities, shape (batch, num_generated_tokens)."""
        self._take_last_token(sequences)
        return torch.stack(self._recorded, dim=1)

    def _take_last_token(self, input_ids: torch.Tensor) -> None:
        if self._pending is not None:
            self._recorded.append(self._pending.gather(-1, input_ids[:, -1:]).squeeze(-1))
        self._pending = None


class _PerRowLimit(StoppingCriteria):
    """Ends each row at its own limit, and all rows when `abort` is set."""

    def __init__(self, prompt_width: int, limits: torch.Tensor, abort: threading.Event):
        self._prompt_width = prompt_width
        self._limits = limits
        self._abort = abort

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        if self._abort.is_set():
            return torch.ones_like(self._limits, dtype=torch.bool)
        return input_ids.shape[1] - self._prompt_width >= self._limits


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    eos_token_ids: Sequence[int],
    abort: threading.Event,
) -> list[GeneratedSequence]:
    """Samples one continuation of each prompt, all in one batch.

    Prompts are padded on the left and masked, so a row's distribution is that of the prompt alone.

    Args:
        model: A causal language model.
        prompts: Token ids, each prompt at least one token.
        params: One for each prompt; equal but for `max_tokens` and `logprobs`. With a `seed`, or with a repetition
            penalty and unequal prompt lengths, only one prompt: other rows would draw from the seeded generator, and
            the padding token would count as repeated.
        eos_token_ids: Tokens that end a sequence.
        abort: Set from outside to end the batch early.

    Raises:
        ValueError: The batch is not one that can be sampled together.
    """
    shared = params[0]
    lengths = {len(prompt) for prompt in prompts}
    if any(other != shared for other in params):
        raise ValueError("a batch must share its sampling parameters, max_tokens and logprobs apart")
    if len(prompts) > 1 and (shared.seed is not None or (shared.repetition_penalty != 1 and len(lengths) > 1)):
        raise ValueError("prompts with a seed, or with a repetition penalty and unequal lengths, cannot share a batch")
    stop_token_ids = [] if shared.ignore_eos else sorted({*eos_token_ids, *shared.stop_token_ids})
    width = max(lengths)
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1

    limits = torch.tensor([each.max_tokens for each in params])
    recorder = _LogProbRecorder(shared.temperature)
    config = GenerationConfig(
        do_sample=not shared.is_greedy,
        max_new_tokens=int(limits.max()),
        eos_token_id=stop_token_ids or None,
        pad_token_id=0,
        # Written out, because the library's own default for sampling is not neutral (top_k=50).
        **({} if shared.is_greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
    )
    with torch.random.fork_rng(devices=[], enabled=shared.seed is not None):
        if shared.seed is not None:
            torch.manual_seed(shared.seed)
        sequences = model.generate(
            input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([recorder, *shared.logits_processors()]),
            stopping_criteria=StoppingCriteriaList([_PerRowLimit(width, limits, abort)]),
        )
    log_probs = recorder.finish(sequences)
    aborted = abort.is_set()
    return [
        _cut_row(tokens.tolist(), row_log_probs.tolist(), each.max_tokens, stop_token_ids, aborted)
        for tokens, row_log_probs, each in zip(sequences[:, width:], log_probs, params, strict=True)
    ]


def _cut_row(
    tokens: list[int], log_probs: list[float], max_tokens: int, stop_token_ids: Sequence[int], aborted: bool
) -> GeneratedSequence:
    """Drops what `generate` wrote after a row had ended: the padding token is no proof, it can be sampled too."""
    end = min(max_tokens, len(tokens))
    stop = next((index for index in range(end) if tokens[index] in stop_token_ids), None)
    if stop is not None:
        end = stop + 1
    finished = stop is not None or end == max_tokens
    return GeneratedSequence(tokens[:end], log_probs[:end], aborted and not finished)
