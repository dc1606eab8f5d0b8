"""The CPU rollout server in one process, against plain forward passes of the same model."""

import asyncio
import copy
import math

import pytest
import torch

from rredcot_verl.cpu import rollout_server
from rredcot_verl.cpu.language_model import RolloutModel
from rredcot_verl.cpu.rollout import CPURolloutServer, check_cpu_run
from rredcot_verl.cpu.rollout_server import RolloutServer, ServerLimits
from rredcot_verl.preflight.composition import compose_as_main_ppo
from tests import PATIENCE_S
from tests.tiny_model import build_tiny_model, make_tiny_model

EOS = 1
LIMITS = ServerLimits(prompt_length=64, response_length=64, max_model_len=128, context_length=512, max_num_seqs=8)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [20, 21, 22, 23, 24]]


@pytest.fixture(scope="module")
def tiny_model():
    return build_tiny_model()


@pytest.fixture
def server(tiny_model):
    return RolloutServer(RolloutModel(copy.deepcopy(tiny_model), [EOS], max_batch_tokens=256), LIMITS)


@pytest.fixture(scope="module", autouse=True)
def event_loop_of_the_module():
    # A server lives on one event loop, as it does in its Ray actor.
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def run(coroutine):
    loop = asyncio.get_event_loop_policy().get_event_loop()
    return loop.run_until_complete(asyncio.wait_for(coroutine, timeout=PATIENCE_S))


def ask(server, prompts, **sampling_params):
    async def gather():
        calls = [server.generate(prompt, dict(sampling_params), f"request-{i}") for i, prompt in enumerate(prompts)]
        return await asyncio.gather(*calls)

    return run(gather())


@torch.no_grad()
def own_sequence_log_probs(model, token_ids, temperature=1.0):
    """Log-probabilities of tokens 1, 2, ..., and after the last, from one plain forward pass."""
    logits = model(torch.tensor([token_ids])).logits[0]
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    return log_probs[:-1].gather(-1, torch.tensor(token_ids[1:])[:, None]).squeeze(-1).tolist(), log_probs[-1]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_log_probs_are_those_of_a_plain_forward_pass(server, tiny_model, temperature):
    outputs = ask(server, PROMPTS, temperature=temperature, max_tokens=12, logprobs=True, top_p=0.9, top_k=20)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert 1 <= len(output.token_ids) <= 12
        assert EOS not in output.token_ids[:-1]
        expected, _ = own_sequence_log_probs(tiny_model, prompt + output.token_ids, temperature)
        assert output.log_probs == pytest.approx(expected[len(prompt) - 1 :], abs=1e-4)
        assert output.stop_reason == "completed"
        assert output.extra_fields == {"global_steps": 0, "num_cached_tokens": 0}


def test_greedy_takes_the_most_likely_token_whatever_shares_the_batch(server, tiny_model):
    alone = [ask(server, [prompt], temperature=0, max_tokens=8)[0].token_ids for prompt in PROMPTS]
    together = [output.token_ids for output in ask(server, PROMPTS, temperature=0, max_tokens=8)]
    assert together == alone
    tokens = list(PROMPTS[0])
    for token in alone[0]:
        assert token == int(tiny_model(torch.tensor([tokens])).logits[0, -1].argmax())
        tokens.append(token)


def test_samples_follow_the_truncated_distribution(server, tiny_model):
    torch.manual_seed(0)
    outputs = ask(server, [PROMPTS[1]] * 400, temperature=1.2, top_k=3, max_tokens=1)
    _, log_probs = own_sequence_log_probs(tiny_model, PROMPTS[1], 1.2)
    top = log_probs.topk(3)
    expected = dict(zip(top.indices.tolist(), top.values.softmax(dim=-1).tolist(), strict=True))
    drawn = [output.token_ids[0] for output in outputs]
    assert set(drawn) <= set(expected)
    for token, probability in expected.items():
        assert drawn.count(token) / len(drawn) == pytest.approx(probability, abs=4 * math.sqrt(0.25 / len(drawn)))


def test_limits_hold_for_each_request_of_a_batch(server):
    async def gather():
        calls = [
            server.generate(PROMPTS[0], {"temperature": 1.0, "max_tokens": limit, "ignore_eos": True}, str(limit))
            for limit in (1, 5, 9)
        ]
        calls.append(server.generate([5] * 126, {"max_tokens": 50, "ignore_eos": True}, "no room"))
        return await asyncio.gather(*calls)

    assert [len(output.token_ids) for output in run(gather())] == [1, 5, 9, 2]


def test_requests_that_trickle_in_share_a_batch(server, tiny_model, monkeypatch):
    sizes = []
    generate = server._model.generate
    monkeypatch.setattr(
        server._model, "generate", lambda prompts, params: sizes.append(len(prompts)) or generate(prompts, params)
    )

    async def trickle(pauses):
        calls = []
        for number, pause in enumerate(pauses):
            await asyncio.sleep(pause)
            calls.append(asyncio.create_task(server.generate([5, 6], {"temperature": 0, "max_tokens": 1}, f"{number}")))
        await asyncio.gather(*calls)

    # Long enough for a busy machine.
    monkeypatch.setattr(rollout_server, "_QUIET_SECONDS", 0.5)
    monkeypatch.setattr(rollout_server, "_LONGEST_WAIT_SECONDS", 10.0)
    run(trickle([0, 0.02, 0.02, 0.02]))
    assert sizes == [4]
    # One that nothing joins is not held up until the longest wait is over.
    run(trickle([0, 3.0]))
    assert sizes == [4, 1, 1]


def test_default_limit_is_what_the_lengths_leave(server):
    (output,) = ask(server, [[5] * 100], ignore_eos=True)
    assert len(output.token_ids) == 28


def test_a_seed_gives_the_same_sequence_whatever_came_before(server):
    first = ask(server, [PROMPTS[0]], temperature=1.0, max_tokens=16, seed=7)[0].token_ids
    second = ask(server, PROMPTS[::-1], temperature=1.0, max_tokens=16, seed=7)[-1].token_ids
    assert first == second


def test_stop_tokens_and_repetition_penalty(server):
    (greedy,) = ask(server, [PROMPTS[0]], temperature=0, max_tokens=8, ignore_eos=True)
    stop = greedy.token_ids[2]
    (stopped,) = ask(server, [PROMPTS[0]], temperature=0, max_tokens=8, stop_token_ids=[stop])
    assert stopped.token_ids == greedy.token_ids[: greedy.token_ids.index(stop) + 1]
    penalised = ask(server, PROMPTS[:2], temperature=0, max_tokens=8, repetition_penalty=1e6, ignore_eos=True)
    assert all(len(set(output.token_ids)) == 8 for output in penalised)


def random_ids(seed, num_tokens):
    return torch.randint(2, 100, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def random_probes(num_probes, trace):
    generator = torch.Generator().manual_seed(3)

    def draw(low, high, size):
        return torch.randint(low, high, (size,), generator=generator).tolist()

    return [
        {
            "position": draw(1, len(trace) + 1, 1)[0],
            "token_ids": draw(2, 100, length),
            "closing_token_ids": draw(2, 100, 3),
        }
        for length in draw(0, 9, num_probes)
    ]


def check_probes(model, trace, probes, output, temperature=1.0):
    """Each probe is what a plain pass over its own sequence gives."""
    results = output.extra_fields["probe_log_probs"]
    assert len(results) == len(probes)
    for probe, result in zip(probes, results, strict=True):
        sequence = trace[: probe["position"]] + probe["token_ids"]
        expected, after = own_sequence_log_probs(model, sequence, temperature)
        assert result["token_log_probs"] == pytest.approx(expected[probe["position"] - 1 :], abs=1e-4, rel=0)
        closing = sorted(set(probe.get("closing_token_ids", [])))
        wanted = pytest.approx(after[closing].logsumexp(dim=-1).item(), abs=1e-4, rel=0) if closing else None
        assert result["closing_log_prob"] == wanted


@pytest.mark.parametrize("temperature", [0.8, 1.0])
@pytest.mark.parametrize("max_batch_tokens", [1, 128, 100_000])
def test_probes_equal_their_own_sequences(tiny_model, temperature, max_batch_tokens):
    server = RolloutServer(RolloutModel(copy.deepcopy(tiny_model), [EOS], max_batch_tokens), LIMITS)
    trace = random_ids(0, 60)
    probes = random_probes(24, trace)
    # The first and the last token's boundary, and an empty probe at each.
    probes += [{"position": position, "token_ids": []} for position in (1, len(trace))]
    (output,) = ask(server, [trace], read_probes=probes, temperature=temperature, max_tokens=1)
    check_probes(tiny_model, trace, probes, output, temperature)
    assert output.extra_fields["global_steps"] == 0


@pytest.mark.parametrize("max_batch_tokens", [1, 128, 100_000])
def test_traces_read_together_equal_traces_read_alone(tiny_model, max_batch_tokens):
    server = RolloutServer(RolloutModel(copy.deepcopy(tiny_model), [EOS], max_batch_tokens), LIMITS)
    traces = [random_ids(num_tokens, num_tokens) for num_tokens in (7, 40, 1, 23)]
    probes = [random_probes(6, trace) for trace in traces]

    async def together():
        requests = [
            server.generate(trace, {"read_probes": own, "temperature": 0.9}, str(number))
            for number, (trace, own) in enumerate(zip(traces, probes, strict=True))
        ]
        return await asyncio.gather(*requests)

    for trace, own, output in zip(traces, probes, run(together()), strict=True):
        check_probes(tiny_model, trace, own, output, 0.9)


def test_reading_a_long_trace_in_chunks_changes_nothing(tiny_model):
    limits = ServerLimits(
        prompt_length=64, response_length=2048, max_model_len=2112, context_length=2112, max_num_seqs=8
    )
    server = RolloutServer(RolloutModel(copy.deepcopy(tiny_model), [EOS], max_batch_tokens=8192), limits)
    trace = random_ids(0, 1100)
    probes = [{"position": position, "token_ids": trace[position:][:3]} for position in (600, 1, 1097)]
    (output,) = ask(server, [trace], read_probes=probes, temperature=1.0)
    check_probes(tiny_model, trace, probes, output)


def test_probes_and_generation_share_the_server(server, tiny_model):
    probe = {"position": 2, "token_ids": [9]}

    async def gather():
        return await asyncio.gather(
            server.generate(PROMPTS[0], {"temperature": 0, "max_tokens": 4}, "a"),
            server.generate(PROMPTS[1], {"read_probes": [probe], "temperature": 1.0}, "b"),
            server.generate(PROMPTS[0], {"temperature": 0, "max_tokens": 4}, "c"),
        )

    first, read, second = run(gather())
    assert first.token_ids == second.token_ids
    check_probes(tiny_model, PROMPTS[1], [probe], read)


@pytest.mark.parametrize(
    ("sampling_params", "named"),
    [
        ({"n": 2}, "n=2"),
        ({"stop": ["x"]}, "stop"),
        ({"min_p": 0.1}, "min_p"),
        ({"logprobs": 5}, "logprobs=5"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"prompt_logprobs": 0, "max_tokens": 1}, "prompt_logprobs=0"),
        ({"read_probes": [{"position": 0, "token_ids": []}]}, "position"),
        ({"read_probes": [{"position": 3, "token_ids": [5] * 510}]}, "512 positions"),
    ],
)
def test_refuses_by_name_what_it_cannot_do(server, sampling_params, named):
    with pytest.raises(ValueError, match=named):
        ask(server, [PROMPTS[0]], **sampling_params)


def test_refuses_images_and_prompts_without_room(server):
    with pytest.raises(ValueError, match="image_data"):
        run(server.generate(PROMPTS[0], {}, "image", image_data=[object()]))
    with pytest.raises(ValueError, match="audio_data"):
        run(server.generate(PROMPTS[0], {}, "audio", audio_data=[object()]))
    for prompt in ([], [5] * 128):
        with pytest.raises(ValueError, match="1 to 127 tokens"):
            run(server.generate(prompt, {}, "length"))


def test_weight_update_makes_it_the_other_model(server, tiny_model):
    other = build_tiny_model(seed=1)

    async def update():
        before = await server.generate(PROMPTS[0], {"temperature": 1.0, "max_tokens": 8, "logprobs": True}, "a")
        weights = list(other.state_dict().items())
        await server.load_weights(weights[:5])
        await server.load_weights(weights[5:])
        await server.finish_weight_update(3)
        after = await server.generate(PROMPTS[0], {"temperature": 1.0, "max_tokens": 8, "logprobs": True}, "b")
        return before, after

    before, after = run(update())
    assert (before.extra_fields["global_steps"], after.extra_fields["global_steps"]) == (0, 3)
    for model, output in ((tiny_model, before), (other, after)):
        expected, _ = own_sequence_log_probs(model, PROMPTS[0] + output.token_ids)
        assert output.log_probs == pytest.approx(expected[len(PROMPTS[0]) - 1 :], abs=1e-4)


def test_weight_update_must_fit_and_be_complete(server, tiny_model):
    weights = dict(tiny_model.state_dict())
    with pytest.raises(ValueError, match="mlp.experts"):
        run(server.load_weights([("model.layers.0.mlp.experts.0.up_proj.weight", torch.zeros(1))]))
    with pytest.raises(ValueError, match="shape"):
        run(server.load_weights([("model.norm.weight", torch.zeros(1))]))
    weights.pop("model.norm.weight")
    run(server.load_weights(list(weights.items())))
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        run(server.finish_weight_update(1))


def test_asleep_it_refuses_until_all_of_it_is_awake(server):
    async def life():
        await server.sleep()
        with pytest.raises(RuntimeError, match="asleep"):
            await server.generate(PROMPTS[0], {"max_tokens": 1}, "a")
        await server.wake_up(tags=["weights"])
        with pytest.raises(RuntimeError, match="kv_cache"):
            await server.generate(PROMPTS[0], {"max_tokens": 1}, "b")
        await server.wake_up(tags=["kv_cache"])
        return await server.generate(PROMPTS[0], {"max_tokens": 1}, "c")

    assert len(run(life()).token_ids) == 1


def test_abort_returns_what_there_is_and_holds_new_requests(tiny_model):
    limits = ServerLimits(prompt_length=8, response_length=500, max_model_len=508, context_length=512, max_num_seqs=8)
    server = RolloutServer(RolloutModel(copy.deepcopy(tiny_model), [EOS], max_batch_tokens=256), limits)

    async def life():
        params = {"max_tokens": 500, "ignore_eos": True}
        running = asyncio.create_task(server.generate(PROMPTS[0], params, "a"))
        await asyncio.sleep(0.1)
        await server.abort_all_requests()
        cut = await running
        held = asyncio.create_task(server.generate(PROMPTS[0], {"max_tokens": 2, "ignore_eos": True}, "b"))
        await asyncio.sleep(0.05)
        assert not held.done()
        await server.resume_generation()
        return cut, await held

    cut, held = run(life())
    assert cut.stop_reason == "aborted" and 1 <= len(cut.token_ids) < 500
    assert held.stop_reason == "completed" and len(held.token_ids) == 2


def test_refuses_to_start_where_verl_does_not_run_on_cpu(monkeypatch):
    monkeypatch.setattr("rredcot_verl.cpu.rollout.get_device_name", lambda: "cuda")
    with pytest.raises(RuntimeError, match=r"VERL_PLATFORM=cpu.*trainer\.device=cpu"):
        check_cpu_run({})
    monkeypatch.setattr("rredcot_verl.cpu.rollout.get_device_name", lambda: "cpu")
    with pytest.raises(ValueError, match="tensor_model_parallel_size=1, got 2"):
        check_cpu_run({"tensor_model_parallel_size": 2})
    with pytest.raises(ValueError, match="dtype of float32, bfloat16, got float16"):
        check_cpu_run({"dtype": "float16"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_setting_is_the_type_of_the_server_and_of_training(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("rredcot_verl.cpu.rollout.get_device_name", lambda: "cpu")
    config = compose_as_main_ppo(
        [
            *("--config-path=pkg://rredcot_verl.config", "--config-name=rredcot_trainer", "+backend=cpu"),
            f"actor_rollout_ref.model.path={make_tiny_model(tmp_path)}",
            f"actor_rollout_ref.rollout.dtype={dtype}",
        ]
    ).actor_rollout_ref
    for role in (config.actor, config.ref):
        assert role.fsdp_config.mixed_precision.param_dtype == role.fsdp_config.dtype == dtype
        assert role.fsdp_config.model_dtype == "fp32"
    threads = torch.get_num_threads()
    server = CPURolloutServer(config.rollout, config.model, replica_rank=0, num_threads=threads)
    found = asyncio.get_event_loop().run_until_complete(
        server.generate([5, 6, 7], {"max_tokens": 3, "logprobs": 0}, "a")
    )
    assert server._model.model.dtype == getattr(torch, dtype) and len(found.log_probs) == len(found.token_ids)
