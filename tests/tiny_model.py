"""A 2-layer Qwen3 model with random weights, its tokenizer, and data in verl's schema: all made on the spot."""

import string
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# verl asks a tokenizer of a Qwen model for these very names.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per printable character, and a chat template."""
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_tiny_model(seed: int = 0, initializer_range: float = 0.2) -> Qwen3ForCausalLM:
    """Returns the model, float32.

    Args:
        seed: Seed of the weights.
        initializer_range: Standard deviation of the weights; large enough that distributions are far from uniform.
    """
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).float().eval()
        # The library starts the padding token's embedding at zero. A random model samples that token like any other,
        # and the first norm would blow the smallest update of a zero vector up to full size.
        torch.nn.init.normal_(model.model.embed_tokens.weight.data[config.pad_token_id], std=initializer_range)
        return model


def make_tiny_model(folder: str | Path, seed: int = 0) -> Path:
    """Writes model and tokenizer to a folder and returns it."""
    folder = Path(folder)
    build_tiny_model(seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tiny_data(folder: str | Path, num_rows: int = 16) -> tuple[Path, Path]:
    """Writes sums in verl's schema for GSM8K to `train.parquet` and `val.parquet`, and returns the two paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.parquet", folder / "val.parquet"
    for path in paths:
        rows = [
            {
                "data_source": "openai/gsm8k",
                "prompt": [{"role": "user", "content": f"{index % 10}+{index // 10}="}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": str(index % 10 + index // 10)},
                "extra_info": {"split": path.stem, "index": index},
            }
            for index in range(num_rows)
        ]
        pd.DataFrame(rows).to_parquet(path)
    return paths
