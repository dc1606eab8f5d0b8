"""Linear layers of the rollout server's model: the same numbers, and in-place weight updates."""

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from rredcot_verl.cpu.few_rows import LEAST_WEIGHTS, MOST_ROWS, FewRowsLinear, use_few_rows
from rredcot_verl.cpu.language_model import RolloutModel


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
