"""The quickstart's tokenizer and its small Qwen3 model, both made from nothing but code and a seed."""

import string

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from recipes.quickstart.task import ANSWER_PREFIX

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


def _words() -> list[str]:
    numbers = [str(number) for number in range(10, 100)]
    operations = [sign + digit for sign in "+-" for digit in string.digits]
    return [ANSWER_PREFIX, *operations, *numbers]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer: words of the task, and single bytes for everything else.

    One token each: a number below 100, a signed digit (``+5``), ``Answer:``, the newline and the blank. A word is never
    joined with what follows it, so a text cut at a line boundary or after ``Answer:`` has the same tokens as the whole.

    Returns:
        A tokenizer with ``decode(encode(text)) == text`` for any text without special tokens.
    """
    byte_symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([PAD, EOS, USER, ASSISTANT, SYSTEM, *byte_symbols, *_words()])}
    # ignore_merges: a pre-token that is in the vocabulary is one token; any other one falls apart into its bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    # A two-digit operand must not become a signed digit and a digit: "12+34" is 12, +, 34.
    words = Regex(rf"{ANSWER_PREFIX}|[+-][0-9](?![0-9])|[1-9][0-9]|[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
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
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model
