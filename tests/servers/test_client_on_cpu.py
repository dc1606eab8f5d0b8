"""Scores of probes, against a table-driven model computed directly."""

import asyncio
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from rredcot_verl.config.blocks import SelfValueConfig
from rredcot_verl.config.schema import parse
from rredcot_verl.probes.probe import Probe
from rredcot_verl.probes.proposals import Proposal
from rredcot_verl.probes.values import ProbeScore, self_values
from rredcot_verl.servers.client import PROBING_BACKENDS, ProbeReader, make_probe_reader
from tests.passes.table_model import FakeServer, TableModel, utilities
from tests.servers.fake_vllm import expected

MODEL = TableModel(vocab_size=12)
TRACE = [3, 1, 4, 1, 5, 9, 2, 6]
CLOSING = (7, 8, 11)
PROBES = [
    Probe(state=0, proposal=0, position=2, token_ids=(10, 4), answer_from=1, scored_from=1, closing_token_ids=CLOSING),
    Probe(
        state=0, proposal=1, position=2, token_ids=(10, 5, 5), answer_from=1, scored_from=1, closing_token_ids=CLOSING
    ),
    Probe(state=1, proposal=0, position=6, token_ids=(4,), answer_from=0, scored_from=0, closing_token_ids=CLOSING),
    Probe(state=1, proposal=1, position=6, token_ids=(5, 5), answer_from=0, scored_from=0, closing_token_ids=CLOSING),
]
PROPOSALS = [Proposal("4", 1.0), Proposal("55", 0.5)]


def reader_of(generate, temperature=1.0, max_concurrency=64):
    return ProbeReader(generate, temperature, max_concurrency, timeout_s=60.0)


def read(reader, probes=PROBES):
    return asyncio.run(reader.read("request-1", TRACE, probes)).scores


def directly(probe: Probe, temperature: float = 1.0) -> tuple[list[float], float]:
    """What comes before the first scored token is given, and may hold anything."""
    tokens, closing = expected(MODEL, TRACE, dataclasses.asdict(probe), temperature)
    return tokens[probe.scored_from :], closing


@pytest.mark.parametrize("block_size", [0, 1, 3, 4, 16])
@pytest.mark.parametrize("generated", [[], TRACE, [*TRACE[:2], 10, 4, 7, 7, 7], [*TRACE[:6], 5, 5, 8, 8]])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_equal_direct_computation(block_size, generated, temperature):
    """Whatever the server, and whatever its cache holds: also the probed answers themselves."""
    server = FakeServer(MODEL, block_size, generated)
    found = read(reader_of(server.generate, temperature))
    for probe, result in zip(PROBES, found, strict=True):
        tokens, closing = directly(probe, temperature)
        assert list(result.token_log_probs)[probe.scored_from :] == pytest.approx(tokens, abs=1e-12)
        assert result.closing_log_prob == pytest.approx(closing, abs=1e-12)


def test_one_request_a_trace_to_the_server_that_holds_it():
    server = FakeServer(MODEL)
    found = read(reader_of(server.generate, 0.7))
    (request,) = server.requests
    assert request["request_id"] == "request-1" and request["prompt_ids"] == TRACE
    assert request["sampling_params"]["temperature"] == 0.7
    assert request["sampling_params"]["timeout_s"] == 60.0
    for probe, sent in zip(PROBES, request["sampling_params"]["read_probes"], strict=True):
        assert sent == {
            "position": probe.position,
            "token_ids": list(probe.token_ids),
            "scored_from": probe.scored_from,
            "closing_token_ids": probe.closing_token_ids,
        }
    # A server that counts nothing computes the probes and nothing else.
    assert [(each.num_forward_tokens, each.num_recomputed_tokens) for each in found] == [(2, 0), (3, 0), (1, 0), (2, 0)]


def test_the_closing_tokens_that_probes_share_are_sent_once():
    server = FakeServer(MODEL)
    read(reader_of(server.generate, 1.0))
    sent = server.requests[0]["sampling_params"]["read_probes"]
    assert all(probe["closing_token_ids"] is CLOSING for probe in sent)


def test_computed_tokens_are_counted():
    whole = FakeServer(MODEL, block_size=2, generated=TRACE)
    found = read(reader_of(whole.generate, 1.0))
    assert sum(result.num_recomputed_tokens for result in found) == 0
    lost = FakeServer(MODEL, block_size=2)
    found = read(reader_of(lost.generate, 1.0))
    # The longest prefix was computed once, for all: six tokens, of which a request that ends there computes two anyway.
    assert [result.num_recomputed_tokens for result in found] == [0, 0, 4, 0]


def test_no_more_traces_at_once_than_allowed():
    server, running, most = FakeServer(MODEL), 0, 0

    async def slow(*args, **kwargs):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return await server.generate(*args, **kwargs)

    reader = make_probe_reader("vllm", slow, parse({"self_value": {"max_concurrency": 2}}).self_value, 1.0)

    async def run():
        await asyncio.gather(*[reader.read(f"request-{n}", TRACE, PROBES) for n in range(6)])

    asyncio.run(run())
    assert len(server.requests) == 6 and most == 2


def test_what_a_trace_waits_for_its_turn_here_and_in_the_server_is_told():
    server = FakeServer(MODEL)

    async def slow(*args, **kwargs):
        await asyncio.sleep(0.1)
        output = await server.generate(*args, **kwargs)
        output.extra_fields["waiting_seconds"] = 7.0
        return output

    async def run():
        reader = reader_of(slow, max_concurrency=1)
        return await asyncio.gather(*[reader.read(f"request-{n}", TRACE, PROBES) for n in range(3)])

    waits = [reading.waiting_seconds - 7.0 for reading in asyncio.run(run())]
    # The first has its turn at once; of the others the last to come is the next.
    assert 0 <= waits[0] < waits[2] < waits[1] and waits[1] > 0.19


def test_answers_that_do_not_fit_the_question_are_refused():
    async def fewer(**kwargs):
        return SimpleNamespace(extra_fields={"probe_log_probs": []})

    with pytest.raises(RuntimeError, match="read 0 of 4 probes"):
        read(reader_of(fewer, 1.0))

    async def another_server(**kwargs):
        return SimpleNamespace(extra_fields={})

    with pytest.raises(RuntimeError, match="generated instead of reading"):
        read(reader_of(another_server, 1.0))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_list_of_another_length_is_refused(change):
    server = FakeServer(MODEL)

    async def generate(*args, **kwargs):
        output = await server.generate(*args, **kwargs)
        for result in output.extra_fields["probe_log_probs"][1:2]:
            given = result["token_log_probs"]
            result["token_log_probs"] = given[:change] if change < 0 else [*given, -1.0]
        return output

    with pytest.raises(RuntimeError, match=r"gave \d log-probabilities of a probe, expected \d"):
        read(make_probe_reader("rredcot_cpu", generate, SelfValueConfig(), 1.0))


def test_values_from_scores_by_hand():
    half, tenth = math.log(0.5), math.log(0.1)
    scores = [
        # What comes before `scored_from` is given and does not count.
        ProbeScore([-50.0, half], half, 2),
        ProbeScore([-50.0, tenth, 0.0], half, 3),
        ProbeScore([0.0], half, 1),
        ProbeScore([half, half], 0.0, 2),
    ]
    assert self_values("joint", PROBES, scores, utilities(PROPOSALS)).tolist() == pytest.approx(
        [0.275, 0.625], abs=1e-6
    )
    wanted = [(0.25 + 0.025) / 0.3, (0.5 + 0.125) / 0.75]
    assert self_values("normalized", PROBES, scores, utilities(PROPOSALS)).tolist() == pytest.approx(wanted, abs=1e-6)
    # exp of the mean over the answer's tokens and its end: max(0.25^(1/2), ...), max(0.5^(1/2), ...).
    wanted = [0.5, math.sqrt(0.5)]
    assert self_values("geometric", PROBES, scores, utilities(PROPOSALS)).tolist() == pytest.approx(wanted, abs=1e-6)


def test_joint_from_both_servers_is_the_probability_of_the_texts():
    scores = read(reader_of(FakeServer(MODEL).generate, 1.0))
    values = []
    for first in (0, 2):
        total = 0.0
        for probe, proposal in zip(PROBES[first : first + 2], PROPOSALS, strict=True):
            tokens, closing = directly(probe)
            total += proposal.utility * math.exp(sum(tokens) + closing)
        values.append(total)
    assert self_values("joint", PROBES, scores, utilities(PROPOSALS)).tolist() == pytest.approx(values, abs=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), 0.5, 77.0])
@pytest.mark.parametrize("place", ["token", "closing"])
@pytest.mark.parametrize("form", ["joint", "normalized", "geometric"])
def test_numbers_that_are_no_log_probabilities_are_refused(bad, place, form):
    good = ProbeScore([-1.0], -1.0, 1)
    faulty = ProbeScore([bad], -1.0, 1) if place == "token" else ProbeScore([-1.0], bad, 1)
    probes = [Probe(0, 0, 2, (4,), 0, 0, CLOSING), Probe(0, 1, 2, (5,), 0, 0, CLOSING)]
    with pytest.raises(ValueError, match="got log-probability"):
        self_values(form, probes, [good, faulty], utilities(PROPOSALS))


def test_impossible_tokens_give_value_zero():
    probes = [Probe(0, 0, 2, (4,), 0, 0, CLOSING)]
    scores = [ProbeScore([-math.inf], -1.0, 1)]
    assert self_values("joint", probes, scores, utilities(PROPOSALS[:1])).tolist() == [0.0]
    # Rounding above log 1 is no fault.
    scores = [ProbeScore([0.0], 1e-7, 1)]
    assert torch.equal(self_values("joint", probes, scores, utilities(PROPOSALS[:1])), torch.ones(1))


def test_the_two_probes_of_an_answer_add_up():
    half, tenth = math.log(0.5), math.log(0.1)
    probes = [
        Probe(0, 0, 2, (10, 4, 5), 1, 1, CLOSING),
        # The same answer where the closing token holds its last token too.
        Probe(0, 0, 2, (10, 4), 1, 1, (9,)),
        Probe(0, 1, 2, (10, 6), 1, 1, CLOSING),
        Probe(1, 0, 6, (4, 5), 0, 0, CLOSING),
        Probe(1, 0, 6, (4,), 0, 0, (9,)),
        Probe(1, 1, 6, (6,), 0, 0, CLOSING),
    ]
    never = -math.inf
    scores = [
        ProbeScore([-50.0, half, half], half, 3),  # 0.125
        ProbeScore([-50.0, half], tenth, 2),  # 0.05
        ProbeScore([-50.0, tenth], 0.0, 2),  # 0.1
        ProbeScore([half, never], never, 2),  # 0
        ProbeScore([half], half, 1),  # 0.25
        ProbeScore([half], half, 1),  # 0.25
    ]
    wanted = [0.175 + 0.5 * 0.1, 0.25 + 0.5 * 0.25]
    assert self_values("joint", probes, scores, utilities(PROPOSALS)).tolist() == pytest.approx(wanted, abs=1e-6)
    wanted = [(0.175 + 0.05) / 0.275, (0.25 + 0.125) / 0.5]
    assert self_values("normalized", probes, scores, utilities(PROPOSALS)).tolist() == pytest.approx(wanted, abs=1e-6)
    # The root is that of the longer probe: two tokens and the end.
    wanted = [0.175 ** (1 / 3), 0.25 ** (1 / 3)]
    assert self_values("geometric", probes, scores, utilities(PROPOSALS)).tolist() == pytest.approx(wanted, abs=1e-6)


def test_readers_by_backend():
    generate = FakeServer(MODEL).generate
    for name in PROBING_BACKENDS:
        assert isinstance(make_probe_reader(name, generate, SelfValueConfig(), 1.0), ProbeReader)
    with pytest.raises(ValueError, match="rollout.name='trtllm' cannot read probes.*rredcot_cpu.*vllm.*sglang"):
        make_probe_reader("trtllm", generate, SelfValueConfig(), 1.0)
