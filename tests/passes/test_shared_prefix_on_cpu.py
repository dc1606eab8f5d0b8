"""One sequence for traces and probes gives the numbers of a sequence for each probe, on several architectures."""

import copy
import functools
import itertools
import math

import pytest
import torch
import torch._dynamo.testing
from peft import LoraConfig, get_peft_model
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MiniMaxConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from rredcot_verl.passes import shared_attention
from rredcot_verl.passes.probe_pack import ProbePack, read_probes
from rredcot_verl.passes.shared_attention import make_block_mask, make_tiles, shared_prefix, why_not_shared
from tests.passes.architectures import (
    ARCHITECTURES,
    SHAPE,
    WINDOW,
    build_model,
    naive_scores,
    plain_log_probs,
    random_probes,
    random_traces,
)

TEMPERATURE = 0.7
# One token, shorter than the window, longer than it.
LENGTHS = (1, WINDOW - 2, 40, 23)


def run(model, traces, probes, *, fused: bool, temperature: float = TEMPERATURE):
    """The probes' log-probabilities of each trace, and those of the traces' own tokens where they are asked for."""
    pack = ProbePack.build([len(trace) for trace in traces], probes)
    rows = pack.rows(all_trace_rows=fused)
    input_ids = torch.cat([torch.tensor(trace) for trace in traces] + [pack.probe_token_ids]).unsqueeze(0)
    with torch.no_grad(), shared_prefix(model.config) as current:
        current.pack = pack
        logits = model(
            input_ids=input_ids,
            attention_mask=None,
            position_ids=pack.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=rows,
        ).logits[0]
    scores = read_probes(pack, rows, logits, torch.full((len(traces),), temperature))
    if not fused:
        return scores, None
    log_probs = (logits[: pack.num_trace_tokens].float() / temperature).log_softmax(-1)
    own = [
        log_probs[torch.arange(start, end - 1), torch.tensor(trace[1:], dtype=torch.int64)]
        for (start, end), trace in zip(itertools.pairwise(pack.trace_starts), traces, strict=True)
    ]
    return scores, own


def cases(lengths=LENGTHS, num_boundaries: int = 3):
    traces = random_traces(lengths)
    return traces, [random_probes(length, num_boundaries, seed) for seed, length in enumerate(lengths)]


def assert_same(model, traces, probes, found, tolerance: float) -> None:
    for trace, own, scores in zip(traces, probes, found, strict=True):
        assert scores == pytest.approx(naive_scores(model, trace, own, TEMPERATURE), abs=tolerance)


# --- equivalence


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_pass_gives_what_a_sequence_a_probe_gives(name):
    model = build_model(name)
    traces, probes = cases()
    # A trace without probes stands between the others.
    probes[1] = []
    alone, nothing = run(model, traces, probes, fused=False)
    together, own = run(model, traces, probes, fused=True)
    assert nothing is None
    assert_same(model, traces, probes, alone, 1e-4)
    for first, second in zip(alone, together, strict=True):
        assert first == pytest.approx(second, abs=1e-4)
    for trace, log_probs in zip(traces, own, strict=True):
        torch.testing.assert_close(log_probs, plain_log_probs(model, trace, TEMPERATURE), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
def test_traces_and_probes_of_many_tiles(name):
    """More probes than a tile holds, traces longer than one, boundaries closer together than the window."""
    model = build_model(name)
    traces, probes = cases((3 * shared_attention.QUERY_TILE + 5, 30), num_boundaries=25)
    pack = ProbePack.build([len(trace) for trace in traces], probes)
    assert len(pack.probe_token_ids) > 3 * shared_attention.QUERY_TILE
    scores, own = run(model, traces, probes, fused=True)
    assert_same(model, traces, probes, scores, 1e-4)
    torch.testing.assert_close(own[0], plain_log_probs(model, traces[0], TEMPERATURE), atol=1e-4, rtol=0)


def test_half_precision():
    """bfloat16 has 8 bits: two ways through 3 layers differ by a few per cent of a nat, with means that agree."""
    model = build_model("gemma3-sliding").bfloat16()
    traces, probes = cases()
    scores, _ = run(model, traces, probes, fused=True)
    differences = []
    for trace, own, found in zip(traces, probes, scores, strict=True):
        expected = naive_scores(model, trace, own, TEMPERATURE)
        differences += [theirs - ours for theirs, ours in zip(expected, found, strict=True)]
    errors = torch.tensor(differences)
    assert errors.abs().max() < 0.5 and errors.abs().mean() < 0.05 and errors.mean().abs() < 0.02


def test_adapters_are_part_of_the_policy_until_they_are_switched_off():
    """verl's reference pass of an adapted actor is the actor's own pass with its adapter off."""
    model = build_model("qwen3-untied")
    traces, probes = cases()
    before, _ = run(model, traces, probes, fused=False)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    scores, _ = run(adapted.eval(), traces, probes, fused=False)
    assert_same(adapted, traces, probes, scores, 1e-4)
    assert scores[2] != pytest.approx(before[2], abs=1e-2)
    with adapted.disable_adapter():
        without, _ = run(adapted, traces, probes, fused=False)
    assert without[2] == pytest.approx(before[2], abs=1e-5)


def test_no_pass_leaves_a_trace():
    """Neither in the config nor in the numbers: of this model, of another of its kind, of the next pass."""
    model, other = build_model("mistral-sliding"), build_model("mistral-sliding", seed=1)
    traces, probes = cases()
    plain = [plain_log_probs(model, trace, 1.0) for trace in traces]
    first, _ = run(model, traces, probes, fused=True)
    run(model, *cases((5, 60), 9), fused=False)
    run(other, traces, probes, fused=True)
    again, _ = run(model, traces, probes, fused=True)
    assert first == again
    assert model.config._attn_implementation == "sdpa"
    for trace, before in zip(traces, plain, strict=True):
        assert torch.equal(plain_log_probs(model, trace, 1.0), before)


# --- masks


@pytest.mark.parametrize("sliding_window", [None, 1, 3, 8, 1000])
@pytest.mark.parametrize("tile", [1, 4, 128])
@pytest.mark.parametrize("lengths", [(1,), (9, 1, 30), (17, 0, 4)])
def test_the_tiles_are_the_mask(monkeypatch, sliding_window, tile, lengths):
    monkeypatch.setattr(shared_attention, "QUERY_TILE", tile)
    probes = [random_probes(length, 4, seed) if length else [] for seed, length in enumerate(lengths)]
    pack = ProbePack.build(lengths, probes)
    index = torch.arange(pack.num_tokens)
    found = torch.zeros(pack.num_tokens, pack.num_tokens, dtype=torch.bool)
    times_computed = torch.zeros(pack.num_tokens, dtype=torch.int64)
    for part in make_tiles(pack, sliding_window):
        keys, queries = index[part.keys], index[part.queries]
        times_computed[queries] += 1
        causal = torch.ones(len(queries), len(keys), dtype=torch.bool).tril()
        found[queries.unsqueeze(1), keys.unsqueeze(0)] = causal if part.mask is None else part.mask
    assert torch.equal(times_computed, torch.ones_like(times_computed))
    assert torch.equal(found, pack.sees(index.unsqueeze(1), index.unsqueeze(0), sliding_window))


def capped_model():
    """Soft-capped, with windows: which needs FlexAttention."""
    fields = {"sliding_window": WINDOW, "attn_logit_softcapping": 5.0, "attn_implementation": "eager"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config_of(Gemma2Config, **fields), dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["qwen3-untied", "gemma2"])
def test_flex_attention_is_compiled_once_for_packs_of_all_lengths(monkeypatch, name):
    """The road of a GPU, with a backend that counts: mask and attention once for each window, the first pack too.

    One block of 128 tokens is a case of its own for torch. What tensordict has noted of classes is a guard of torch's,
    and grows once in the first passes of a process.
    """
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    monkeypatch.setattr(shared_attention, "FLEX_DEVICE", "cpu")
    monkeypatch.setattr(
        shared_attention, "_compiled", functools.cache(lambda f: torch.compile(f, dynamic=True, backend=counter))
    )
    model = build_model("qwen3-untied") if name != "gemma2" else capped_model()
    for lengths in ((150,), (41, 150), (30, 220), (150, 9, 50, 33)):
        traces, probes = cases(lengths)
        scores, own = run(model, traces, probes, fused=True)
        assert_same(model, traces, probes, scores, 1e-4)
        torch.testing.assert_close(own[0], plain_log_probs(model, traces[0], TEMPERATURE), atol=1e-4, rtol=0)
    assert counter.frame_count - 2 * (1 if name != "gemma2" else 2) in (0, 1)


def test_a_window_keeps_the_masks_small():
    """A long trace under a short window: strips, and no mask of trace by trace."""
    pack = ProbePack.build([4096], [random_probes(4096, 4)])
    masks = [part.mask for part in make_tiles(pack, 64) if part.mask is not None]
    assert sum(mask.numel() for mask in masks) < 4096 * 4 * shared_attention.QUERY_TILE
    assert [part.mask for part in make_tiles(pack, None)][0] is None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("sliding_window", [None, WINDOW])
def test_the_block_mask_of_the_gpu(sliding_window):
    """FlexAttention, run on CPU with the very mask that a GPU gets, against the tiles."""
    traces, probes = cases((150, 3, 40), num_boundaries=10)
    pack = ProbePack.build([len(trace) for trace in traces], probes)
    assert pack.num_tokens > 2 * 128
    index = torch.arange(pack.num_tokens)
    block_mask = make_block_mask(pack, sliding_window)
    seen = pack.sees(index.unsqueeze(1), index.unsqueeze(0), sliding_window)
    assert torch.equal(block_mask.mask_mod(0, 0, index.unsqueeze(1), index.unsqueeze(0)), seen)
    # A block that is left out holds nothing that is seen.
    blocks = block_mask.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert not (seen & ~blocks[: pack.num_tokens, : pack.num_tokens]).any()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, pack.num_tokens, 8, generator=generator) for heads in (4, 2, 2))
    flex = flex_attention(query, key, value, block_mask=block_mask, scale=0.4, enable_gqa=True)
    tiles = shared_attention._in_parts(query, key, value, make_tiles(pack, sliding_window), 0.4)
    torch.testing.assert_close(flex, tiles, atol=1e-5, rtol=1e-5)


# --- refusals


def config_of(config_class, **fields):
    return config_class(**(SHAPE | fields))


def rope(kind: str, **fields):
    return {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **fields}


@pytest.mark.parametrize(
    "config, on_cpu, on_gpu",
    [
        (config_of(Qwen3Config), None, None),
        (config_of(LlamaConfig, rope_parameters=rope("linear")), None, None),
        (config_of(LlamaConfig, rope_parameters=rope("yarn")), None, None),
        (config_of(LlamaConfig, rope_parameters=rope("dynamic")), "dynamic", "dynamic"),
        (
            config_of(
                LlamaConfig,
                rope_parameters=rope("longrope", long_factor=[1.0] * 4, short_factor=[1.0] * 4)
                | {"original_max_position_embeddings": 32},
            ),
            "longrope",
            "longrope",
        ),
        (
            config_of(
                Gemma3TextConfig,
                rope_parameters={"sliding_attention": rope("default"), "full_attention": rope("dynamic")},
            ),
            "dynamic",
            "dynamic",
        ),
        (config_of(Gemma2Config), "soft-capped", None),
        (config_of(Gemma2Config, attn_logit_softcapping=None), None, None),
        (config_of(GptOssConfig, num_local_experts=4), "sinks", "sinks"),
        (config_of(Qwen3NextConfig), "interface|linear_attention", "interface|linear_attention"),
        (config_of(MiniMaxConfig), "linear_attention", "linear_attention"),
        (MambaConfig(), "interface", "interface"),
        (Gemma3Config(), "multimodal", "multimodal"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_models_that_cannot_share(config, on_cpu, on_gpu):
    for device, words in (("cpu", on_cpu), ("cuda", on_gpu)):
        reason = why_not_shared(config, device)
        if words is None:
            assert reason is None
        else:
            assert reason is not None and any(word in reason for word in words.split("|")), reason


def test_a_config_of_remote_code_cannot_share():
    class RemoteConfig(LlamaConfig):
        model_type = "from_the_hub"

    assert "from_the_hub does not attend through" in why_not_shared(RemoteConfig(), "cuda")


def test_layers_that_attend_their_own_way_are_noticed():
    model = build_model("llama")
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    traces, probes = cases()
    with pytest.raises(RuntimeError, match="2 of 3 layers.*self_value.share_prefix=false"):
        run(model, traces, probes, fused=False)
    assert model.config._attn_implementation == "sdpa"


SLIDING = {"sliding_window": 4}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    "config, message",
    [
        # Their windows are in the mask alone: flash attention would not see them either.
        (config_of(PhimoeConfig, **SLIDING, num_local_experts=4), "Window.size=4.*sliding_window=None"),
        (
            config_of(Qwen2MoeConfig, **SLIDING, **EXPERTS, num_experts=4, use_sliding_window=True),
            "Window.size=4.*sliding_window=None",
        ),
        (
            config_of(Gemma3TextConfig, **SLIDING, use_bidirectional_attention=True),
            "more than causal",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_masks_that_are_not_understood_are_refused(config, message):
    assert why_not_shared(config, "cpu") is None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(RuntimeError, match=f"{message}.*share_prefix=false"):
        run(model, *cases(), fused=False)
    assert model.config._attn_implementation == config._attn_implementation


def test_a_soft_cap_is_refused_off_the_gpu():
    config = config_of(Gemma2Config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(ValueError, match="softcap.*FlexAttention"):
        run(model, *cases(), fused=False)


def test_the_attention_function_outside_a_pass():
    model = build_model("llama")
    model.config._attn_implementation = shared_attention.NAME
    with pytest.raises(RuntimeError, match="outside `shared_prefix`"):
        model(torch.tensor([[1, 2]]))
    with pytest.raises(RuntimeError, match="expected one sequence of 3 tokens"), shared_prefix(model.config) as current:
        current.pack = ProbePack.build([3], [[]])
        model(torch.tensor([[1, 2]]))


def test_the_models_own_attention_is_put_back_whatever_happens():
    config = AutoConfig.for_model("qwen3", **SHAPE)
    config._attn_implementation = "eager"
    with pytest.raises(ZeroDivisionError), shared_prefix(config):
        assert config._attn_implementation == shared_attention.NAME
        math.log(1 / 0)
    assert config._attn_implementation == "eager"
