"""Weights of segments where the truth is known: linear models, windows that end, a token that is copied."""

import itertools

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config
from transformers.modeling_outputs import CausalLMOutput

from rredcot_verl.passes.attribution import answer_log_probs, gradient_attribution
from rredcot_verl.passes.attribution_task import AttributionTask
from rredcot_verl.passes.input_gradient import gradient_contributions
from tests.passes.architectures import SHAPE, VOCAB_SIZE, WINDOW, build_model, random_traces
from tests.passes.test_attribution_on_cpu import FUNCTIONS


class LinearModel(nn.Module):
    """log p(token 0) = z - LOG_TOTAL with z linear in the embeddings of all tokens so far."""

    LOG_TOTAL = 30.0

    def __init__(self) -> None:
        super().__init__()
        self.config = Qwen3Config(**(SHAPE | {"num_hidden_layers": 0}))
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(VOCAB_SIZE, 8, _weight=torch.randn(VOCAB_SIZE, 8, generator=generator).double())
        self.weight = nn.Parameter(torch.randn(8, generator=generator).double())

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids, logits_to_keep, **kwargs):
        z = (self.embed(input_ids) @ self.weight).cumsum(dim=1)[:, logits_to_keep]
        rest = self.LOG_TOTAL + torch.log1p(-(z - self.LOG_TOTAL).exp())
        return CausalLMOutput(logits=torch.stack([z, rest], dim=2))


def test_gradients_of_a_linear_model_are_exact():
    model = LinearModel()
    task = AttributionTask((9, 3, 7, 5, 8, 0, 0), (1, 3, 5), 5, 7)
    (found,) = gradient_contributions(model, [task])
    by_token = (model.embed(torch.tensor(task.token_ids)) @ model.weight).float().detach()
    # The first six tokens stand before the answer's second one, the first five before its first.
    expected = by_token * torch.tensor([2.0, 2, 2, 2, 2, 1, 0])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    (weights,) = gradient_attribution(model, [task])
    assert weights == pytest.approx([abs(expected[1:3].sum().item()), abs(expected[3:5].sum().item())], abs=1e-5)


def test_input_x_gradient_is_blind_to_what_only_a_norm_has_seen():
    """A warning: one layer reads the other tokens through its norm alone, and no scale passes a norm."""
    config = LlamaConfig(**(SHAPE | {"num_hidden_layers": 1}), rms_norm_eps=1e-12)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    task = AttributionTask(random_traces([12])[0], (1, 6, 10), 11, 12)
    (contributions,) = gradient_contributions(model, [task])
    assert contributions[:10].abs().max() < 1e-5 < contributions[10].abs()
    whole, without = answer_log_probs(model, [task, task.without(0)])
    assert abs(whole - without) > 1e-2


@pytest.mark.parametrize("method", FUNCTIONS)
def test_a_segment_that_no_path_leads_from_weighs_nothing(method):
    """Three layers with a window of 9 tokens reach back 24 tokens from the rows that predict the answer."""
    model = build_model("mistral-sliding")
    reach = 3 * (WINDOW - 1)
    start = 10
    task = AttributionTask(random_traces([start + 5 + reach + 3])[0], (1, start, start + 5, 37), 38, 40)
    assert task.answer_from - 1 - reach > start
    (weights,) = FUNCTIONS[method](model, [task])
    # Rotary embeddings are relative only up to rounding, which leave-one-out sees.
    assert weights[0] == pytest.approx(0, abs=1e-4 if method == "leave one out" else 0)
    assert weights[2] > 1e-2


QUERY, VALUES, NOISE = 11, (6, 7, 8, 9), range(6)


def copying_model() -> LlamaForCausalLM:
    """One layer built by hand: after `QUERY` it gives the one token of `VALUES` that stood before."""
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        # The last pair of dimensions is hardly turned, and the norms hardly normalise.
        rope_parameters={"rope_type": "default", "rope_theta": 1e16},
        rms_norm_eps=1.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        attention, values = model.model.layers[0].self_attn, list(VALUES)
        model.model.embed_tokens.weight[range(12), range(12)] = 1.0
        attention.q_proj.weight[7, QUERY] = 7.0
        attention.k_proj.weight[7, values] = 7.0
        attention.v_proj.weight[values, values] = 4.0
        attention.o_proj.weight[values, values] = 1.0
        model.lm_head.weight[values, values] = 1.5
    return model


@pytest.mark.parametrize("method", FUNCTIONS)
@pytest.mark.parametrize("place", [3, 8, 14])
def test_a_copied_token_takes_the_weight(method, place):
    generator = torch.Generator().manual_seed(place)
    ids = torch.randint(len(NOISE), (18,), generator=generator).tolist()
    ids[place], ids[16], ids[17] = 8, QUERY, 8
    task = AttributionTask(ids, (1, 6, 11, 16), 17, 18)
    (weights,) = FUNCTIONS[method](copying_model(), [task])
    holder = next(k for k, (start, end) in enumerate(itertools.pairwise(task.boundaries)) if start <= place < end)
    others = sum(weights) - weights[holder]
    assert weights[holder] > 0.05 and others < 0.01 * weights[holder], weights
