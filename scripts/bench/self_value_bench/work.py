"""What is computed: model shapes, random traces, their probes, and the forward tokens that each variant needs."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3Config

from rredcot_verl.passes.probe_pack import count_probe_tokens
from rredcot_verl.probes.probe import Probe

NUM_CLOSING_TOKENS = 64


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": 128,
    }


# The initial range of the first two, ours, is wide, so that distributions depend on what a token sees.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _qwen3(32, 48, 2, 4, 2) | {"head_dim": 8, "vocab_size": 512, "initializer_range": 0.1},
    "small": _qwen3(512, 1536, 8, 8, 2) | {"head_dim": 64, "vocab_size": 32768, "initializer_range": 0.1},
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8),
}
"""Shapes of Qwen3 models with tied embeddings, by name."""


def qwen3(shape: str) -> Qwen3Config:
    """The config of one of `SHAPES`."""
    return Qwen3Config(
        **SHAPES[shape],
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )


def build_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """A model with random weights."""
    torch.manual_seed(seed)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@dataclass(frozen=True)
class Work:
    """Traces of one length with the probes of one number of segments.

    Attributes:
        traces: Prompt and response of each trace, `num_prompt_tokens + length` tokens.
        num_prompt_tokens: Tokens of each prompt.
        boundaries: For each trace the offsets in the response at which probes stand, the first 0.
        probes: For each trace its probes: one for each boundary and answer, all of the same lengths.
    """

    traces: list[list[int]]
    num_prompt_tokens: int
    boundaries: list[list[int]]
    probes: list[list[Probe]]

    def at(self, states: Sequence[int]) -> "Work":
        """The same work at some of the boundaries."""
        boundaries = [[own[state] for state in states] for own in self.boundaries]
        probes = [[probe for probe in own if probe.state in states] for own in self.probes]
        return Work(self.traces, self.num_prompt_tokens, boundaries, probes)


def evenly(num_chosen: int, total: int) -> list[int]:
    """So many of the indices below `total`, evenly chosen; all of them for 0."""
    if not 0 < num_chosen < total:
        return list(range(total))
    return [(2 * rank + 1) * total // (2 * num_chosen) for rank in range(num_chosen)]


def make_traces(num_traces: int, num_tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Traces of random tokens, all of one length."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (num_traces, num_tokens), generator=generator).tolist()


def make_work(
    traces: list[list[int]],
    num_prompt_tokens: int,
    num_segments: int,
    num_proposals: int,
    num_opening_tokens: int,
    num_answer_tokens: int,
    vocab_size: int,
    seed: int,
) -> Work:
    """Probes of the same answers at the start of every segment.

    Segments are evenly long, each inner boundary moved by up to a quarter of a segment. No two answers of a trace
    start with the same token: only their opening is shared.
    """
    draw = random.Random(seed)
    length = len(traces[0]) - num_prompt_tokens
    boundaries, probes = [], []
    for _ in traces:
        inner = [round(length * (k + draw.uniform(-0.25, 0.25)) / num_segments) for k in range(1, num_segments)]
        opening = tuple(draw.choices(range(vocab_size), k=num_opening_tokens))
        starts = draw.sample(range(vocab_size), num_proposals)
        answers = [(start, *draw.choices(range(vocab_size), k=num_answer_tokens - 1)) for start in starts]
        closing = tuple(draw.sample(range(vocab_size), NUM_CLOSING_TOKENS))
        boundaries.append([0, *inner])
        lengths = (num_opening_tokens, num_opening_tokens)
        probes.append(
            [
                Probe(state, number, num_prompt_tokens + boundary, (*opening, *answer), *lengths, closing)
                for state, boundary in enumerate(boundaries[-1])
                for number, answer in enumerate(answers)
            ]
        )
    return Work(traces, num_prompt_tokens, boundaries, probes)


def forward_tokens(work: Work, num_rollouts: int) -> dict[str, int]:
    """Tokens that go through the model forward, for all traces, by variant.

    `naive` computes the whole prefix of every probe. `server` computes a trace once up to its last boundary, and every
    probe with the token before it. `monte_carlo` is counted with every prefix cached, so a trace once up to its last
    boundary, and from boundary b of a response of `length` tokens `num_rollouts * (length - b)` generated tokens: a
    rollout is as long as what it replaces. `monte_carlo_uncached` computes every rollout's prefix again. `update`
    counts its forward only.
    """
    size = len(work.traces[0])
    plain = len(work.traces) * size
    shared = plain + sum(count_probe_tokens(own) for own in work.probes)
    probes = list(itertools.chain.from_iterable(work.probes))
    up_to_last = [work.num_prompt_tokens + own[-1] for own in work.boundaries]
    rolled_out = sum(size - work.num_prompt_tokens - boundary for own in work.boundaries for boundary in own)
    return dict.fromkeys(("plain", "packed", "update", "generation"), plain) | {
        "shared": shared,
        "fused": shared,
        "naive": sum(probe.position + len(probe.token_ids) for probe in probes),
        "server": sum(last - 1 for last in up_to_last) + sum(len(probe.token_ids) + 1 for probe in probes),
        "monte_carlo": sum(up_to_last) + num_rollouts * rolled_out,
        "monte_carlo_uncached": num_rollouts * size * sum(map(len, work.boundaries)),
    }
