"""Continuations: independent draws of the model's own distribution, however batched; and the gold they give."""

import itertools
import math

import pytest
import torch

from rredcot_verl.analyze.measured_rollouts import RolloutMeasurement
from rredcot_verl.analyze.prefix_sampler import Request, Sampler
from rredcot_verl.analyze.problems import Problem
from rredcot_verl.analyze.records import TraceRecord
from rredcot_verl.analyze.verifier import Verifier
from tests.analyze.context import make_context
from tests.tiny_model import build_tiny_model, make_tokenizer

MODEL = build_tiny_model()
TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id
PROMPTS = [TOKENIZER.encode(text) for text in ("1+1=", "a longer prompt: 2+3=", "x", "12+30=")]


def sampler(temperature: float = 1.0, max_batch_tokens: int = 4096, eos=(EOS,)) -> Sampler:
    return Sampler(MODEL, eos, temperature, seed=7, max_batch_tokens=max_batch_tokens)


def sample_all(own: Sampler, requests):
    results = [None] * len(requests)
    for batch in own.batches(requests):
        for number, result in zip(batch, own.sample([requests[n] for n in batch]), strict=True):
            results[number] = result
    return results


REQUESTS = [Request(prompt, 5 + place, 9 - place, (0, place)) for place, prompt in enumerate(PROMPTS)]


def test_draws_do_not_depend_on_the_batch():
    together = sample_all(sampler(), REQUESTS)
    alone = sample_all(sampler(max_batch_tokens=1), REQUESTS)
    assert len(list(sampler(max_batch_tokens=1).batches(REQUESTS))) == len(REQUESTS)
    assert [[c.token_ids for c in own] for own in together] == [[c.token_ids for c in own] for own in alone]
    other_stream = sampler().sample([Request(PROMPTS[0], 5, 9, (1, 0))])[0]
    assert [c.token_ids for c in other_stream] != [c.token_ids for c in together[0]]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_the_whole_sequence(temperature):
    for request, own in zip(REQUESTS, sample_all(sampler(temperature), REQUESTS), strict=True):
        assert len(own) == request.count
        for each in own:
            ids = torch.tensor([[*request.prefix, *each.token_ids]])
            with torch.no_grad():
                log_probs = (MODEL(ids).logits[0] / temperature).log_softmax(-1)
            start = len(request.prefix)
            expected = [log_probs[start + n - 1, token].item() for n, token in enumerate(each.token_ids)]
            assert each.log_probs == pytest.approx(expected, abs=2e-4)


def test_a_continuation_ends_at_its_limit_or_at_an_end_token_and_shares_what_is_equal():
    ends = tuple(range(20, 60))
    own = sampler(eos=ends)
    results = sample_all(own, [Request(PROMPTS[0], 200, 6, (2, 0))])[0]
    lengths = {len(each.token_ids) for each in results}
    assert max(lengths) == 6 and min(lengths) == 1
    for each in results:
        assert not set(each.token_ids[:-1]) & set(ends)
        assert len(each.token_ids) == 6 or each.token_ids[-1] in ends
    assert own.count["num_continuations"] == 200
    assert own.count["num_tokens"] == sum(len(each.token_ids) for each in results)
    assert own.count["num_computed_tokens"] < own.count["num_tokens"]


def test_first_tokens_follow_the_distribution():
    num_samples = 20000
    results = sampler(0.7).sample([Request(PROMPTS[1], num_samples, 1, (3, 0))])[0]
    with torch.no_grad():
        probabilities = (MODEL(torch.tensor([PROMPTS[1]])).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(torch.tensor([each.token_ids[0] for each in results]), minlength=len(probabilities))
    errors = (probabilities * (1 - probabilities) / num_samples).sqrt()
    likely = probabilities > 1e-3
    assert ((counts / num_samples - probabilities).abs() / errors)[likely].max() < 4.5
    # Halves are samples of their own.
    first = torch.tensor([each.token_ids[0] == int(probabilities.argmax()) for each in results]).float()
    gap = (first[: num_samples // 2].mean() - first[num_samples // 2 :].mean()).abs()
    assert gap < 4.5 * 2 * errors.max()


def is_even(data_source, solution_str, ground_truth, extra_info=None):
    """Rewards a response whose characters sum to an even number."""
    return {"score": float(sum(map(ord, solution_str)) % 2 == 0)}


def exact_value(prefix: list[int], response: list[int], num_tokens: int) -> float:
    """E[R | state] by enumeration of all continuations of at most `num_tokens` tokens."""
    vocab = MODEL.config.vocab_size
    total = 0.0
    with torch.no_grad():
        first = MODEL(torch.tensor([prefix + response])).logits[0, -1].double().softmax(-1)
        rows = torch.tensor([[*prefix, *response, token] for token in range(vocab)])
        second = MODEL(rows).logits[:, -1].double().softmax(-1)
    for token in range(vocab):
        if token == EOS or num_tokens == 1:
            total += first[token].item() * reward_of([*response, token])
            continue
        rewards = torch.tensor([reward_of([*response, token, other]) for other in range(vocab)]).double()
        total += first[token].item() * (second[token] @ rewards).item()
    return total


def reward_of(response: list[int]) -> float:
    return is_even("", TOKENIZER.decode(response, skip_special_tokens=True), None)["score"]


def rollouts(traces, problem, boundaries, count, max_response_tokens):
    context = make_context(MODEL, TOKENIZER, traces, {trace.trace: boundaries for trace in traces}, [problem])
    own, verifier = sampler(max_batch_tokens=1 << 20), Verifier(is_even)
    groups = {trace.group for trace in traces}
    measurement = RolloutMeasurement(context, own, verifier, max_response_tokens, (count, count), groups)
    return list(measurement.measure([unit for trace in traces for unit in measurement.units(trace)]))


def test_monte_carlo_meets_the_exact_value_of_an_enumerable_model():
    prompt, response = TOKENIZER.encode("3+4="), TOKENIZER.encode("ab7")
    trace = TraceRecord(4, "0", "3+4=", "ab7", prompt, response, [0.0] * 3, 1.0)
    problem = Problem("0", "3+4=", [], {"data_source": "x"})
    count = 4000
    # The response may have 4 tokens: after 2 of them two are left, after 3 one.
    records = {record.offset: record for record in rollouts([trace], problem, [2, 3, 4], count, 4)}
    for offset, left in ((2, 2), (3, 1)):
        exact = exact_value(prompt, response[:offset], left)
        rewards = records[offset].rewards
        assert 0.05 < exact < 0.95 and len(rewards) == count
        error = math.sqrt(exact * (1 - exact) / count)
        assert abs(sum(rewards) / count - exact) < 4 * error
        halves = [sum(half) / len(half) for half in (rewards[: count // 2], rewards[count // 2 :])]
        assert abs(halves[0] - halves[1]) < 4 * 2 * error
        assert records[offset].num_tokens <= left * count


def test_equal_states_of_two_traces_are_drawn_apart():
    prompt, response = TOKENIZER.encode("3+4="), TOKENIZER.encode("ab7")
    traces = [TraceRecord(number, "0", "", "ab7", prompt, response, [0.0] * 3, 1.0) for number in (0, 1)]
    problem = Problem("0", "", [], {})
    records = rollouts(traces, problem, [0, 3], 64, 8)
    assert records[0].rewards != records[1].rewards
    again = rollouts(traces[1:], problem, [0, 3], 64, 8)
    assert again[0].rewards == next(record.rewards for record in records if record.trace == 1)


def test_batches_hold_all_requests_once():
    batches = list(sampler(max_batch_tokens=200).batches(REQUESTS))
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(len(REQUESTS)))


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="positive temperature"):
        sampler(temperature=0.0)
