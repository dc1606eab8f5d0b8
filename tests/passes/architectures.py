"""Tiny random models of several architectures, and log-probabilities of probes the slow way."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from rredcot_verl.probes.probe import Probe

VOCAB_SIZE = 64
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    # Large enough that distributions are far from uniform.
    "initializer_range": 0.3,
    "attn_implementation": "sdpa",
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOW = 9

ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "qwen2-tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2-sliding": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3-untied": Qwen3Config(**SHAPE, tie_word_embeddings=False),
    "qwen3-moe": Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "deepseek-v3-latent": DeepseekV3Config(
        **(SHAPE | {"num_key_value_heads": 4, "head_dim": 4}),
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "mistral-sliding": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "gemma3-sliding": Gemma3TextConfig(
        **SHAPE, sliding_window=WINDOW, layer_types=["sliding_attention"] * 2 + ["full_attention"]
    ),
}


def build_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, float32, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # A copy: tests change the config of their model.
        model = AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES[name]), dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def naive_scores(
    model: PreTrainedModel, trace: Sequence[int], probes: Sequence[Probe], temperature: float
) -> list[float]:
    """Each probe in a sequence of its own, with the model's own attention; laid out as `read_probes` does."""
    scores = []
    for probe in probes:
        ids = torch.tensor([[*trace[: probe.position], *probe.token_ids]])
        log_probs = (model(ids).logits[0].float() / temperature).log_softmax(-1)
        for index in range(probe.scored_from, len(probe.token_ids)):
            scores.append(log_probs[probe.position + index - 1, probe.token_ids[index]].item())
        closing = torch.tensor(sorted(set(probe.closing_token_ids)))
        scores.append(log_probs[-1, closing].logsumexp(0).item())
    return scores


@torch.no_grad()
def plain_log_probs(model: PreTrainedModel, trace: Sequence[int], temperature: float) -> Tensor:
    """`(len(trace) - 1,)` log-probabilities of a trace's tokens after the first."""
    ids = torch.tensor([trace])
    log_probs = (model(ids).logits[0, :-1].float() / temperature).log_softmax(-1)
    return log_probs.gather(1, ids[0, 1:, None])[:, 0]


def random_traces(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Traces of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def random_probes(length: int, num_boundaries: int, seed: int = 0) -> list[Probe]:
    """Probes with all that occurs: shared openings, answers that begin others, empty ones, scored openings."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCAB_SIZE, (size,), generator=generator).tolist())

    positions = sorted({1, length, *torch.randint(1, length + 1, (num_boundaries,), generator=generator).tolist()})
    opening, answers = draw(3), [draw(4), draw(1), draw(2)]
    probes = []
    for state, position in enumerate(positions):
        for number, answer in enumerate(answers):
            tokens = (*opening, *answer)
            probes.append(Probe(state, number, position, tokens, 3, 3 * (number != 1), draw(3)))
            probes.append(Probe(state, number, position, tokens[:-1], 3, 3, draw(1)))
        probes.append(Probe(state, 0, position, (), 0, 0, (1, 1, 2)))
    return probes
