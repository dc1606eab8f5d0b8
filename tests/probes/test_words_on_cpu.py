"""Whose words count: tools' and templates' are none of the model's; thinking is marked in many ways."""

import string

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rredcot_verl.config.schema import parse
from rredcot_verl.probes.elicitation import Elicitation, Proposal
from rredcot_verl.probes.vocabulary import Vocabulary
from tests.probes.real_tokenizers import REAL, vocabulary
from tests.probes.tiny_tokenizers import KINDS, byte_level, encode, harmony, sentencepiece_like, token

TOOL, MODEL = 0, 1
QUESTION = "What is 12 + 3?\n"
CHANNELS = {
    "think_open": "<|channel|>analysis<|message|>",
    "think_close": "<|channel|>final<|message|>",
    "think_exit": "<|end|><|start|>assistant<|channel|>final<|message|>",
    "think_skip": "<|channel|>final<|message|>",
}
QWEN3 = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)


def make(tokenizer, **elicitation) -> Elicitation:
    return Elicitation(Vocabulary(tokenizer), parse({"elicitation": elicitation}))


def tokens_of(tokenizer, *pieces: tuple[int, str]) -> tuple[list[int], list[int]]:
    """A response of several pieces, each with who wrote it: its tokens and its mask."""
    ids, mask = [], []
    for writer, text in pieces:
        own = encode(tokenizer, text)
        ids += own
        mask += [writer] * len(own)
    return ids, mask


def forced(asked: Elicitation, ids, boundary, mask=None, prompt="", name=None, answer="15") -> str:
    """The text that the first probe at a boundary forces."""
    tokenizer = asked.vocabulary.tokenizer
    probes = asked.probes(
        encode(tokenizer, prompt),
        ids,
        [boundary, len(ids) + 1],
        [Proposal(answer, 1.0)],
        name or asked.usual_format(),
        response_mask=mask,
    )
    return tokenizer.decode(probes[0].token_ids)


# --- tools ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "pieces, answer, place",
    [
        # The tool's box is nobody's answer, before the model's or after it.
        ([(MODEL, "let me see "), (TOOL, "so \\boxed{15}.\n")], None, None),
        ([(MODEL, "so \\boxed{15}"), (TOOL, "\nso \\boxed{16}.\n")], "15", 0),
        ([(MODEL, "so \\boxed{15}"), (TOOL, "\nso \\boxed{16}.\n"), (MODEL, "so.\n")], "15", 0),
        ([(TOOL, "\\boxed{16}"), (MODEL, "so \\boxed{15}")], "15", 1),
        ([(TOOL, "Answer: 16\n"), (MODEL, "let me see\n")], None, None),
        ([(MODEL, "Answer: 4"), (TOOL, "6\nAnswer: 5\n")], "4", 0),
        # What a tool writes closes no box of the model's, and is no part of it.
        ([(MODEL, "\\boxed{1"), (TOOL, "5}")], None, None),
        ([(MODEL, "so \\boxed{1"), (TOOL, "6"), (MODEL, "5}")], "1\n5", 0),
        # Nor does it say that the model thinks, or no longer does.
        ([(MODEL, "so "), (TOOL, "see <think> so"), (MODEL, "\\boxed{15}")], "15", 2),
        ([(MODEL, "<think>so "), (TOOL, "</think> so"), (MODEL, "\\boxed{15}")], None, None),
        # A template's tag does.
        ([(MODEL, "so."), (TOOL, "15\n<think>\n"), (MODEL, "\\boxed{15}")], None, None),
        ([(MODEL, "<think>so."), (TOOL, "15\n<think>\n\n</think>\n\n"), (MODEL, "\\boxed{15}")], "15", 2),
    ],
)
def test_only_what_the_model_wrote_is_its_answer(kind, pieces, answer, place):
    tokenizer = KINDS[kind]()
    asked = make(tokenizer)
    ids, mask = tokens_of(tokenizer, *pieces)
    found = asked.read(ids, (), mask)
    assert (found and found.text.split()) == (answer and answer.split())
    if answer is not None:
        start = sum(len(encode(tokenizer, text)) for _, text in pieces[:place])
        assert start <= found.start < start + len(encode(tokenizer, pieces[place][1]))
        assert mask[found.start] == MODEL
    assert asked.landmarks((), ids, mask)[0] == [at for at in asked.landmarks((), ids, mask)[0] if mask[at] == MODEL]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_blanked_out_has_the_length_of_what_stood_there(kind):
    tokenizer = KINDS[kind]()
    asked = make(tokenizer)
    ids, mask = tokens_of(tokenizer, (MODEL, "let me"), (TOOL, "so 3 but 4\n"), (MODEL, "see."), (TOOL, "5"))
    words = asked.written(ids, mask)
    assert len(words) == len(ids)
    assert [word for word, own in zip(words, mask, strict=True) if own] == [
        i for i, own in zip(ids, mask, strict=True) if own
    ]
    assert "".join(asked.vocabulary.decode(words).split()) == "letmesee."
    assert asked.written(ids, None) == ids
    with pytest.raises(ValueError, match="3 entries for"):
        asked.written(ids, [1, 0, 1])


def test_a_probe_goes_on_from_the_models_own_words():
    tokenizer = byte_level()
    asked = make(tokenizer)
    ids, mask = tokens_of(tokenizer, (MODEL, "so "), (TOOL, "see \\boxed{"), (MODEL, "3"))
    place = mask.index(TOOL) + mask.count(TOOL)
    # The tool has opened no answer.
    assert forced(asked, ids, place, mask) == "\n\nThe final answer is \\boxed{15"
    ids, mask = tokens_of(tokenizer, (MODEL, "<think>so "), (TOOL, "</think> so"), (MODEL, "3"))
    assert forced(asked, ids, len(ids), mask) == "\n</think>\n\nThe final answer is \\boxed{15"
    ids, mask = tokens_of(tokenizer, (MODEL, "so "), (TOOL, "<think> so"), (MODEL, "3"))
    assert forced(asked, ids, len(ids), mask) == "\n\nThe final answer is \\boxed{15"


def test_a_block_that_a_tool_left_open_is_not_the_programs():
    tokenizer = byte_level()
    block = {"elicitation": {"format": "code"}, "self_value": {"reference_key": "extra_info.solutions"}}
    asked = Elicitation(Vocabulary(tokenizer), parse(block))
    ids, mask = tokens_of(tokenizer, (MODEL, "so\n"), (TOOL, "```python\nx = 1\n"), (MODEL, "but\n"))
    assert forced(asked, ids, len(ids), mask, answer="a\n") == "```python\na\n"
    assert forced(asked, ids, len(ids), answer="a\n") == "```\n\n```python\na\n"


# --- tags of several tokens -------------------------------------------------------------------------------------------


def test_a_tag_of_several_tokens_is_found_and_closed():
    tokenizer = byte_level(thinking=False)
    assert len(encode(tokenizer, "<think>")) > 1 and len(encode(tokenizer, "</think>")) > 1
    asked = make(tokenizer)
    for prompt, response in ((QUESTION + "<think>\n", "so 3"), (QUESTION, "<think>so 3")):
        ids = encode(tokenizer, response)
        assert forced(asked, ids, len(ids), prompt=prompt) == "\n</think>\n\nThe final answer is \\boxed{15"
        ids = encode(tokenizer, response + " \\boxed{15}")
        assert asked.read(ids, encode(tokenizer, prompt)) is None
        assert asked.landmarks(encode(tokenizer, prompt), ids) == ([], [])
    ids = encode(tokenizer, "<think>so \\boxed{16}\n</think>\n\\boxed{15}")
    assert asked.read(ids).text == "15"
    opened, closed = asked.landmarks((), ids)
    assert tokenizer.decode(ids[: closed[0] + 1]).rstrip("\n") == "<think>so \\boxed{16}\n</think>" and len(closed) == 1
    assert [tokenizer.decode(ids[place + 1 :]) for place in opened] == ["15}"]
    # Until its last letter is written, the tag is none.
    assert "</think>" in forced(asked, ids, closed[0]) and "</think>" not in forced(asked, ids, closed[0] + 1)


@pytest.mark.parametrize("kind", REAL)
def test_a_tag_that_a_real_vocabulary_does_not_have_is_found_and_closed(kind):
    """Qwen cuts "<think>a" into "<th", "ink", ">a": the tag's end is merged with what follows."""
    asked = Elicitation(vocabulary(kind), parse({}))
    tokenizer = asked.vocabulary.tokenizer
    ids = encode(tokenizer, "<think>a \\boxed{16}\n</think>\n\nSo \\boxed{15}.")
    assert asked.vocabulary.special_id("<think>") is None
    assert asked.read(ids).text == "15"
    opened, (closed,) = asked.landmarks((), ids)
    assert [tokenizer.decode(ids[place + 1 :]).strip() for place in opened] == ["15}."]
    assert tokenizer.decode(ids[: closed + 1]).rstrip("\n").endswith("</think>")
    assert forced(asked, ids, closed).lstrip("\n").startswith("</think>\n\nThe final answer")
    assert "</think>" not in forced(asked, ids, closed + 1)
    assert "</think>" in forced(asked, ids, 4)
    # What a tool wrote is as long in tokens as before, and is read as a line's end.
    mask = [MODEL] * 4 + [TOOL] * (len(ids) - 5) + [MODEL]
    assert asked.vocabulary.decode(asked.written(ids, mask)).count("\n") == 1 and asked.read(ids, (), mask) is None


@pytest.mark.parametrize("tag", ["<end of thought>", "◁/think▷", "[/思考]"])
def test_tags_are_found_however_they_are_cut(tag):
    """In pieces of the tokenizer's, in single bytes, and where its end is in one token with what follows."""
    tokenizer = byte_level()
    asked = make(tokenizer, think_open="<think>", think_close=tag)
    alone = [i for byte in tag.encode() for i in encode_bytes(tokenizer, bytes([byte]))]
    for written in (encode(tokenizer, tag), alone):
        assert tokenizer.decode(written) == tag
        ids = [*encode(tokenizer, "<think>so "), *written, *encode(tokenizer, " so 3")]
        end = len(encode(tokenizer, "<think>so ")) + len(written)
        assert asked.landmarks((), ids) == ([], [end - 1])
        assert tag in forced(asked, ids, end - 1) and tag not in forced(asked, ids, end)


def encode_bytes(tokenizer, raw: bytes) -> list[int]:
    """The token of one byte in a byte-level vocabulary."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = {name: tokenizer.convert_tokens_to_ids(name) for name in names}
    shown = {bytes_of(name): number for name, number in texts.items()}
    return [shown[raw]]


def bytes_of(name: str) -> bytes:
    """The byte that a byte-level vocabulary writes as a letter (the table of GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if ord(name) in plain:
        return bytes([ord(name)])
    return bytes([[byte for byte in range(256) if byte not in plain][ord(name) - 256]])


def test_a_tag_whose_end_is_merged_with_what_follows():
    tokenizer = byte_level(thinking=False)
    merged = token(tokenizer, "}.\n")
    asked = make(tokenizer, think_open="{so", think_close="so}")
    ids = [*encode(tokenizer, "{so 3 so"), merged, *encode(tokenizer, "\\boxed{15}")]
    assert asked.landmarks((), ids)[1] == [ids.index(merged)]
    assert asked.read(ids).text == "15"


@pytest.mark.parametrize("key", ["think_open", "think_close", "think_exit", "think_skip"])
def test_a_tag_that_the_tokenizer_cannot_write_is_refused(key):
    tags = {key: "<思考>"} | ({"think_close": "<思考>"} if key == "think_exit" else {})
    with pytest.raises(ValueError, match=r"elicitation\.think_\w+='<思考>': this tokenizer cannot write it"):
        make(sentencepiece_like(), **tags)


def test_tags_by_default_may_be_unwritable():
    """Such a policy never thinks; nobody asked for it."""
    letters = {
        letter: number
        for number, letter in enumerate(["~", *string.printable.translate(dict.fromkeys(map(ord, "<~")))])
    }
    inner = Tokenizer(models.WordLevel(letters, unk_token="~"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split("", behavior="isolated"), decoders.Fuse()
    asked = make(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="~", clean_up_tokenization_spaces=False))
    ids = encode(asked.vocabulary.tokenizer, "so \\boxed{15}")
    assert asked.read(ids).text == "15" and asked.landmarks((), ids)[1] == []
    assert forced(asked, ids, 2) == "\n\nThe final answer is \\boxed{15"


def test_an_exit_must_end_in_the_closing_tag():
    with pytest.raises(ValueError, match="think_exit='so' must end in elicitation.think_close='</think>'"):
        parse({"elicitation": {"think_exit": "so"}})


def test_what_instructions_say_of_tags_opens_nothing():
    tokenizer = byte_level()
    turn = "Think within <think> first.<|im_end|>\nso"
    asked = make(tokenizer)
    assert not asked.thinking_after(encode(tokenizer, turn)).prompt_opens
    assert asked.thinking_after(encode(tokenizer, turn + "\n<think>\nFirst,")).prompt_opens


# --- channels ---------------------------------------------------------------------------------------------------------


def test_channels_of_special_tokens():
    tokenizer = harmony()
    prompt = "<|start|>user<|message|>What?<|end|><|start|>assistant"
    asked = make(tokenizer, **CHANNELS)
    text = "<|channel|>analysis<|message|>so \\boxed{16}<|end|><|start|>assistant<|channel|>final<|message|>\\boxed{15}"
    ids = [*encode(tokenizer, text), tokenizer.eos_token_id]
    assert asked.read(ids, encode(tokenizer, prompt)).text == "15"
    thought = encode(tokenizer, "<|channel|>analysis<|message|>so \\boxed{16}")
    assert asked.read(thought) is None
    final = "<|channel|>final<|message|>The final answer is \\boxed{15"
    assert forced(asked, ids, len(thought), prompt=prompt) == "<|end|><|start|>assistant" + final
    # Nothing is written: no analysis has to be left.
    assert forced(asked, ids, 0, prompt=prompt) == final
    said = encode(tokenizer, text[: text.index("\\boxed{15}")])
    assert forced(asked, ids, len(said), prompt=prompt) == final.removeprefix("<|channel|>final<|message|>").join(
        ["\n\n", ""]
    )
    assert asked.landmarks((), ids)[1] == [len(said) - 1]
    # Around a tool's turn, too.
    ids, mask = tokens_of(
        tokenizer,
        (MODEL, "<|channel|>analysis<|message|>so<|end|>"),
        (TOOL, "<|start|>tool<|channel|>final<|message|>\\boxed{16}<|end|><|start|>assistant"),
        (MODEL, "<|channel|>final<|message|>\\boxed{15}"),
    )
    assert asked.read(ids, (), mask).text == "15"
    assert (
        asked.read(ids[: mask.index(TOOL) + mask.count(TOOL)], (), mask[: mask.index(TOOL) + mask.count(TOOL)]) is None
    )


@pytest.mark.parametrize("tags, warned", [({}, True), (CHANNELS, False)])
def test_channels_that_no_tag_names_are_reported(caplog, tags, warned):
    make(harmony(), **tags)
    assert ("names no channel" in caplog.text) == warned
    caplog.clear()
    make(byte_level())
    assert not caplog.records


# --- nothing thought --------------------------------------------------------------------------------------------------


def with_template(template: str | None):
    tokenizer = byte_level.__wrapped__()
    tokenizer.chat_template = template
    return tokenizer


BLOCK = "<think>\n\n</think>\n\n"
GENERATION = QUESTION + "<|im_end|>\nassistant\n"


@pytest.mark.parametrize(
    "template, prompt, settings, begins",
    [
        (QWEN3, GENERATION, {}, BLOCK),
        # The prompt says it already, or says the contrary.
        (QWEN3, GENERATION + BLOCK, {}, ""),
        (QWEN3, GENERATION + "<think>\n", {}, "</think>\n\n"),
        # A user's words do not.
        (QWEN3, "no <think></think>" + GENERATION, {}, BLOCK),
        # Models that do not think, or whose template has no such switch.
        (None, GENERATION, {}, ""),
        (QWEN3.replace("enable_thinking is false", "false"), GENERATION, {}, ""),
        (QWEN3.replace("enable_thinking is false", "true"), GENERATION, {}, ""),
        ("{{ raise_exception('no') }}", GENERATION, {}, ""),
        (QWEN3, GENERATION, {"think_skip": ""}, ""),
        (None, GENERATION, {"think_skip": "<think></think>"}, "<think></think>"),
    ],
)
def test_at_the_start_nothing_is_thought_as_the_template_says_it(template, prompt, settings, begins):
    asked = make(with_template(template), **settings)
    ids = encode(asked.vocabulary.tokenizer, "<think>so 3</think> but \\boxed{15}")
    assert forced(asked, ids, 0, prompt=prompt) == begins + "The final answer is \\boxed{15"
    # From there on the response's own words say whether it thinks; where it has begun is not told either.
    assert BLOCK not in forced(asked, ids, 3, prompt=prompt)
    assert begins != BLOCK or asked.can_append("15", "boxed")
