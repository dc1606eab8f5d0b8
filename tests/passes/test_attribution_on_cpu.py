"""Weights of segments for an answer: against the slow ways to compute them, and where the truth is known."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from rredcot_verl.passes import answer_attention
from rredcot_verl.passes.answer_attention import attention_by_token
from rredcot_verl.passes.attribution import (
    answer_attention_by_token,
    answer_log_probs,
    attention_attribution,
    gradient_attribution,
    leave_one_out_attribution,
)
from rredcot_verl.passes.attribution_task import AttributionPlan, AttributionTask, decode_plan, encode_plan
from rredcot_verl.passes.input_gradient import gradient_contributions
from rredcot_verl.passes.leave_one_out import leave_one_out_tasks, leave_one_out_weights
from rredcot_verl.passes.protocol import NOTHING
from tests.passes.architectures import ARCHITECTURES, VOCAB_SIZE, build_model, plain_log_probs, random_traces

FUNCTIONS = {
    "attention": attention_attribution,
    "input x gradient": gradient_attribution,
    "leave one out": leave_one_out_attribution,
}
EMPTY = AttributionTask((5,), (), 1, 1)


def make_tasks(seed: int = 0) -> list[AttributionTask]:
    """Traces of several lengths; one segment is empty, one task has no segment, one answer a single token."""
    short, long, single, bare = random_traces([27, 40, 19, 12], seed)
    return [
        AttributionTask(short, (3, 9, 9, 20), 23, 27),
        AttributionTask(long, (1, 10, 20, 35), 35, 40),
        AttributionTask(single, (2, 8, 18), 18, 19),
        AttributionTask(bare, (), 9, 12),
    ]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attention_is_the_models_own(name):
    """Against the matrices of transformers' eager attention, layer by layer."""
    model = build_model(name)
    tasks = make_tasks()
    found = answer_attention_by_token(model, tasks)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    for own, task in zip(found, tasks, strict=True):
        with torch.no_grad():
            layers = model(torch.tensor([task.token_ids]), output_attentions=True).attentions
        rows = torch.stack(layers)[:, 0, :, task.answer_from - 1 : task.answer_to - 1, : task.answer_to - 1]
        torch.testing.assert_close(own, rows.mean(dim=(0, 1, 2)), atol=1e-6, rtol=1e-4)
        assert own.sum().item() == pytest.approx(1, abs=1e-5)
    # The config is every test's.
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("max_scores", [1, 200])
def test_strips_of_rows_give_the_same(monkeypatch, max_scores):
    model, tasks = build_model("qwen3-untied"), make_tasks()
    whole = answer_attention_by_token(model, tasks)
    monkeypatch.setattr(answer_attention, "MAX_SCORES", max_scores)
    for found, expected in zip(answer_attention_by_token(model, tasks), whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_soft_caps():
    """Which FlexAttention applies on a GPU."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(4, 3, 8, generator=generator), torch.randn(2, 7, 8, generator=generator)
    scores = query @ key.repeat_interleave(2, dim=0).transpose(1, 2) * 0.5
    capped = 2 * torch.tanh(scores / 2)
    unseen = torch.arange(7) > torch.arange(4, 7).unsqueeze(1)
    capped = capped.masked_fill(unseen, float("-inf"))
    expected = capped.softmax(dim=-1)
    found = attention_by_token(query, key, 0.5, softcap=2.0)
    torch.testing.assert_close(found, expected.mean(dim=0).sum(dim=0))


def naive_gradient(model, task, temperature: float):
    """Embeddings, and the gradient there, by `inputs_embeds` and the model's own attention."""
    ids = torch.tensor([list(task.token_ids[: task.answer_to])])
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    log_probs = (model(inputs_embeds=embeddings).logits[0].float() / temperature).log_softmax(dim=-1)
    rows = torch.arange(task.answer_from - 1, task.answer_to - 1)
    total = log_probs[rows, ids[0, task.answer_from :]].sum()
    return embeddings.detach()[0], torch.autograd.grad(total, embeddings)[0][0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_the_models_own(name):
    model, tasks = build_model(name), make_tasks()
    temperatures = [0.7, 1.0, 1.5, 0.9]
    found = gradient_contributions(model, tasks, temperature=temperatures)
    for own, task, temperature in zip(found, tasks, temperatures, strict=True):
        embeddings, gradient = naive_gradient(model, task, temperature)
        torch.testing.assert_close(own, (embeddings * gradient).sum(dim=1), atol=1e-4, rtol=1e-3)
    weights = gradient_attribution(model, tasks, temperature=temperatures)
    for task, own, contributions in zip(tasks, weights, found, strict=True):
        sums = [abs(contributions[start:end].sum().item()) for start, end in itertools.pairwise(task.boundaries)]
        assert own == pytest.approx(sums, abs=1e-6)


@pytest.mark.parametrize("method", FUNCTIONS)
@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3-moe", "mistral-sliding"])
def test_packed_is_one_by_one(method, name):
    model, tasks = build_model(name), make_tasks()
    packed = FUNCTIONS[method](model, [*tasks, EMPTY])
    for own, task in zip(packed, [*tasks, EMPTY], strict=True):
        assert len(own) == task.num_segments and all(weight >= 0 for weight in own)
        assert own == pytest.approx(FUNCTIONS[method](model, [task])[0], abs=1e-4, rel=1e-4)
    # The empty segment weighs nothing.
    assert packed[0][1] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("method", FUNCTIONS)
def test_nothing_after_the_answer_counts(method):
    model, tasks = build_model("qwen3-untied"), make_tasks()
    garbage = [
        AttributionTask(
            (*task.token_ids, *random_traces([9], seed)[0]), task.boundaries, task.answer_from, task.answer_to
        )
        for seed, task in enumerate(tasks)
    ]
    assert FUNCTIONS[method](model, garbage) == FUNCTIONS[method](model, tasks)


def naive_log_prob(model, ids, num_answer_tokens, temperature) -> float:
    return plain_log_probs(model, ids, temperature)[-num_answer_tokens:].sum().item()


@pytest.mark.parametrize("name", ["qwen3-untied", "gemma3-sliding"])
@pytest.mark.parametrize("max_tokens", [1, 60, 10**6])
def test_leave_one_out_is_one_sequence_at_a_time(name, max_tokens):
    model = build_model(name)
    tasks = make_tasks()
    found = leave_one_out_attribution(model, tasks, temperature=0.7, max_tokens=max_tokens)
    num_falls = 0
    for task, weights in zip(tasks, found, strict=True):
        whole = naive_log_prob(model, list(task.token_ids), task.num_answer_tokens, 0.7)
        for weight, (start, end) in zip(weights, itertools.pairwise(task.boundaries), strict=True):
            ids = [*task.token_ids[:start], *task.token_ids[end:]]
            fall = whole - naive_log_prob(model, ids, task.num_answer_tokens, 0.7)
            num_falls += fall > 0
            assert weight == pytest.approx(max(0.0, fall), abs=1e-3)
    assert 0 < num_falls < sum(task.num_segments for task in tasks)


def test_leave_one_out_by_hand():
    task = AttributionTask((1, 2, 3, 4, 5, 6, 7), (1, 3, 4), 5, 6)
    variants = [(1, 2, 3, 4, 5, 6), (1, 4, 5, 6), (1, 2, 3, 5, 6)]
    assert leave_one_out_tasks(task) == [AttributionTask(ids, (), len(ids) - 1, len(ids)) for ids in variants]
    assert leave_one_out_weights([-1.0, -3.5, -0.5]) == [2.5, 0.0]
    assert leave_one_out_tasks(AttributionTask((1, 2), (), 1, 2)) == [] == leave_one_out_weights([])


def test_a_model_without_the_seam_is_refused_or_computed_alone():
    model = BloomForCausalLM(BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=16, n_layer=2, n_head=2)).eval()
    tasks = make_tasks()
    for function in (attention_attribution, gradient_attribution):
        with pytest.raises(ValueError, match="bloom does not attend through transformers' attention interface"):
            function(model, tasks)
    found = answer_log_probs(model, tasks, temperature=0.7)
    for task, log_prob in zip(tasks, found, strict=True):
        expected = naive_log_prob(model, list(task.token_ids), task.num_answer_tokens, 0.7)
        assert log_prob == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_left_behind(checkpointing):
    model, tasks = build_model("qwen2-tied"), make_tasks()
    expected = gradient_attribution(model, tasks)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    generator = torch.Generator().manual_seed(1)
    gradients = {}
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name] = torch.randn(parameter.shape, generator=generator)
    before = {name: gradient.clone() for name, gradient in gradients.items()}
    hooks = dict(model.get_input_embeddings()._forward_hooks)
    for own, other in zip(gradient_attribution(model, tasks), expected, strict=True):
        assert own == pytest.approx(other, abs=1e-6)
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name] and torch.equal(parameter.grad, before[name])
    assert not any(module.training for module in model.modules())
    assert model.get_input_embeddings()._forward_hooks == hooks
    assert model.config._attn_implementation == "sdpa" and torch.is_grad_enabled()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_in_another_thread(monkeypatch, checkpointing):
    """As autograd does for a GPU: checkpointed layers are then computed again in that thread."""
    model, tasks = build_model("qwen2-tied"), make_tasks()
    expected = gradient_attribution(model, tasks)
    grad, threads = torch.autograd.grad, []

    def in_a_thread(*args):
        with ThreadPoolExecutor(1) as pool:
            threads.append(pool)
            return pool.submit(grad, *args).result()

    monkeypatch.setattr(torch.autograd, "grad", in_a_thread)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpoint = getattr(model.model.layers[0], "_gradient_checkpointing_func", None)
    for own, other in zip(gradient_attribution(model, tasks), expected, strict=True):
        assert own == pytest.approx(other, abs=1e-6)
    assert len(threads) == 1
    assert getattr(model.model.layers[0], "_gradient_checkpointing_func", None) is checkpoint


def test_an_error_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    model, tasks = build_model("qwen2-tied"), make_tasks()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    monkeypatch.setattr(model.lm_head, "forward", lambda *args: 1 / 0)
    hooks = list(model.get_input_embeddings()._forward_hooks)
    for function in (attention_attribution, gradient_attribution):
        with pytest.raises(ZeroDivisionError):
            function(model, tasks)
        assert model.config._attn_implementation == "sdpa" and not any(m.training for m in model.modules())
        assert list(model.get_input_embeddings()._forward_hooks) == hooks


@pytest.mark.parametrize("offsets", [((0, 2), 3, 4), ((2, 1), 3, 4), ((1, 4), 3, 4), ((1, 2), 4, 3), ((1, 2), 3, 6)])
def test_offsets_out_of_order(offsets):
    boundaries, answer_from, answer_to = offsets
    with pytest.raises(ValueError, match="ascending order"):
        AttributionTask((1, 2, 3, 4, 5), boundaries, answer_from, answer_to)


def test_plans_travel_as_integers():
    trace = list(range(100, 120))
    for plan in (
        AttributionPlan((2, 5, 9), 10, 12),
        AttributionPlan((), 2, 3),
    ):
        row = encode_plan(plan)
        assert decode_plan(row) == plan
        expected = AttributionTask(trace[: plan.answer_to], plan.boundaries, plan.answer_from, plan.answer_to)
        assert plan.task(trace) == expected
        with pytest.raises(ValueError, match="ends early"):
            decode_plan(row[:-1])
        with pytest.raises(ValueError, match="too long"):
            decode_plan([*row, 0])
    assert decode_plan(NOTHING) is None
