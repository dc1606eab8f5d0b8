"""The tokenizer and the small Qwen3 model of the CPU recipes, both made from nothing but code and a seed."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# verl asks a Qwen tokenizer for these two names.
PAD, EOS, USER, ASSISTANT, SYSTEM = "<|endoftext|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>"

# The role token opens a message and nothing closes it: the next role token does, which keeps prompts short.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- '<|im_end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_tokenizer(words: list[str], pattern: str) -> PreTrainedTokenizerFast:
    """Builds a tokenizer: words of a task, and single bytes for everything else.

    Args:
        words: One token each, without repeats.
        pattern: Where a text is split: the words, and as the last alternative any single character.

    Returns:
        A tokenizer with ``decode(encode(text)) == text`` for any text without special tokens.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The vocabulary holds words as byte-level text writes them, e.g. blanks as "Ġ".
    pieces = ["".join(part for part, _ in byte_level.pre_tokenize_str(word)) for word in words]
    vocab = {token: index for index, token in enumerate([PAD, EOS, USER, ASSISTANT, SYSTEM, *symbols, *pieces])}
    # ignore_merges: a pre-token that is in the vocabulary is one token; any other one falls apart into its bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    hidden_size: int = 128,
    num_layers: int = 5,
) -> Qwen3ForCausalLM:
    """Builds a Qwen3 model with random weights.

    Args:
        tokenizer: Gives the vocabulary size and the special ids.
        seed: Seed of the weights.
        hidden_size: Width; a multiple of 32.
        num_layers: Depth.

    Returns:
        The model, float32, on the CPU.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = sampling_config(tokenizer)
    return model


def sampling_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """How a policy generates by itself: samples of the whole distribution."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def encode_prompt(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a user message, ready for generation."""
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
