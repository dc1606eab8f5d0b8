"""What the CPU engine refuses."""

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen3Config,
)

from rredcot_verl.cpu.engine import check_fused

TINY = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}


@pytest.mark.parametrize(
    "config, model, name",
    [
        (Gemma2Config(final_logit_softcapping=0.01, **TINY), Gemma2ForCausalLM, "final_logit_softcapping"),
        (CohereConfig(logit_scale=0.25, **TINY), CohereForCausalLM, "logit_scale"),
        (GraniteConfig(logits_scaling=4.0, **TINY), GraniteForCausalLM, "logits_scaling"),
    ],
)
def test_fused_kernels_are_refused_where_logits_are_not_the_heads_alone(config, model, name):
    torch.manual_seed(0)
    policy: nn.Module = model(config).eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        of_the_head = policy.get_output_embeddings()(policy.get_decoder()(ids).last_hidden_state)
        assert not torch.allclose(policy(ids).logits, of_the_head)
    with pytest.raises(ValueError, match=f"{name}=.*use_fused_kernels=false"):
        check_fused(config)


def test_others_are_taken():
    check_fused(Qwen3Config(**TINY))
    check_fused(CohereConfig(logit_scale=1.0, **TINY))
