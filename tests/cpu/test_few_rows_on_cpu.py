"""Linear layers and attention of the rollout server's model: the same numbers, and in-place weight updates."""

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rredcot_verl.cpu.few_rows import LEAST_WEIGHTS, MOST_ROWS, FewRowsLinear, attend, use_few_rows
from rredcot_verl.cpu.language_model import RolloutModel
from rredcot_verl.cpu.sampling import SamplingParams


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (2, 3), (MOST_ROWS,), (MOST_ROWS + 1,), (4, 20), ()])
def test_the_product_is_torchs(shape, bias):
    torch.manual_seed(0)
    plain, rows = nn.Linear(512, 1024, bias=bias), torch.randn(*shape, 512)
    expected = plain(rows)
    use_few_rows(plain)
    assert type(plain) is FewRowsLinear and torch.allclose(plain(rows), expected, atol=1e-5)


def test_small_layers_are_left():
    layer = nn.Linear(LEAST_WEIGHTS // 2 - 1, 2)
    use_few_rows(layer)
    assert type(layer) is nn.Linear


def test_a_tied_head_follows_its_weights():
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=2**12, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    plain, served = Qwen2ForCausalLM(config).eval(), Qwen2ForCausalLM(config)
    model = RolloutModel(served, [1], max_batch_tokens=64)
    assert type(served.lm_head) is FewRowsLinear and type(plain.lm_head) is nn.Linear
    model.load_weights(plain.state_dict().items())
    model.finish_weight_update()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, served(ids).logits, atol=1e-5)


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("mask_heads", [None, 1, 8])
def test_the_attention_is_transformers_sdpa(num_queries, num_groups, mask_heads):
    torch.manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = num_groups, True
    query = torch.randn(3, 8, num_queries, 16)
    key, value = torch.randn(2, 3, 8 // num_groups, 20, 16)
    mask = torch.ones(3, mask_heads or 1, num_queries, 20, dtype=torch.bool)
    mask[1, ..., :7] = False
    arguments = (module, query, key, value, mask if mask_heads else None)
    expected, _ = sdpa_attention_forward(*arguments, scaling=0.3, dropout=0.0)
    found, _ = attend(*arguments, scaling=0.3, dropout=0.0)
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-6)


def test_a_padded_batch_is_decoded_without_copies_of_keys(monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    served = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_key_value_heads=2, **sizes))
    model = RolloutModel(served, [1], max_batch_tokens=64)
    shapes = []
    plain = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, *rest, **kwargs: (
            shapes.append((query.shape, key.shape)) or plain(query, key, *rest, **kwargs)
        ),
    )
    model.generate([[5, 6, 7], [8]], [SamplingParams(max_tokens=3, ignore_eos=True)] * 2)
    # Two layers, the prompts and two steps; four heads of queries, two of keys.
    assert [query[1] for query, _ in shapes] == [4] * 2 + [2] * 4
    assert [key[1] for _, key in shapes] == [4] * 2 + [2] * 4
