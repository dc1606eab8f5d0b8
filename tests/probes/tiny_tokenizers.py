"""Two kinds of real tokenizers, trained on the spot: byte-level BPE with merged ends, sentencepiece-like Unigram."""

import functools

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "First, 12 + 3 = 15.\n\nSo the answer is \\boxed{15}.\n",
    "Let me check. Wait, \\boxed{\\frac{1}{2}}\n",
    "#### 72\n",
    "Answer: 4\n",
    "let's see, but so 3.\n\nWait, then 4 but not 5, so let me see.\n",
] * 20
# Qwen's pre-tokenizer, shortened: digits alone, punctuation takes the newlines after it.
SPLIT = r"\p{N}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
THINKING = [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)]


@functools.cache
def byte_level(thinking: bool = True, texts: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on some texts more; "}.\\n", "}}", "{\\\\" and "\\n\\n" are single tokens."""
    fast = _byte_level([*TEXTS, *["a.\n\nb\n\nc.}. x}. ", *texts] * 20])
    if thinking:
        fast.add_tokens(THINKING)
    return fast


def _byte_level(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@functools.cache
def with_tags() -> PreTrainedTokenizerFast:
    """Byte-level; "</" is a token, and so is ")</", as in vocabularies that have seen much code."""
    return _byte_level([*TEXTS, *["so (a)</b></answer>\n", "x</answer>\n", "<answer>(1)</answer>"] * 30])


@functools.cache
def harmony() -> PreTrainedTokenizerFast:
    """Byte-level, with the special tokens in which gpt-oss writes its channels."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level(thinking=False).backend_tokenizer.to_str()),
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
    )
    marks = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return tokenizer


@functools.cache
def sentencepiece_like(prepend_scheme: str = "first") -> PreTrainedTokenizerFast:
    """Unigram over Metaspace: every text starts with a dummy space, which decoding drops again."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(32, 127)] + ["\n"],
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<s>"
    )
    fast.add_tokens(THINKING)
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def token(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """Id of the one token whose text is `text`."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return texts.index(text)


KINDS = {"byte_level": byte_level, "sentencepiece_like": sentencepiece_like}
