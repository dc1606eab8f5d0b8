"""Two roads to a probe's log-probability on one real model: the CPU server's batches, and what vLLM is asked for."""

import asyncio
import copy
from types import SimpleNamespace

import pytest
import torch

from rredcot_verl.config.schema import parse
from rredcot_verl.cpu.language_model import RolloutModel
from rredcot_verl.cpu.rollout_server import RolloutServer, ServerLimits
from rredcot_verl.probes.elicitation import Elicitation
from rredcot_verl.probes.proposals import Proposal
from rredcot_verl.probes.values import self_values
from rredcot_verl.probes.vocabulary import Vocabulary
from rredcot_verl.servers.client import ProbeReader
from tests.passes.table_model import utilities
from tests.servers.fake_vllm import FakeVLLM
from tests.tiny_model import build_tiny_model, make_tokenizer

LIMITS = ServerLimits(prompt_length=64, response_length=128, max_model_len=256, context_length=512, max_num_seqs=64)


@pytest.fixture(scope="module")
def setting():
    tokenizer = make_tokenizer()
    elicitation = Elicitation(Vocabulary(tokenizer), parse({}))
    prompt = tokenizer.encode("12+30=")
    response = tokenizer.encode("first 12\nthen 42\nAnswer: 42\n")
    proposals = [Proposal("42", 1.0), Proposal("7", 0.0)]
    start = elicitation.read(response).start
    probes = elicitation.probes(prompt, response, [0, 9, start, len(response)], proposals, "plain")
    return build_tiny_model(), prompt + response, probes, proposals


class Logits:
    """The real model in the place of a `TableModel`."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def log_probs(self, prefix, temperature):
        return (self.model(torch.tensor([prefix])).logits[0, -1] / temperature).log_softmax(-1)


def score(model, trace, probes, temperature=1.0):
    """Scores with a fresh server: its dispatcher belongs to one event loop."""

    async def run():
        server = RolloutServer(RolloutModel(copy.deepcopy(model), [1], max_batch_tokens=4096), LIMITS)

        async def generate(request_id, *, prompt_ids, sampling_params):
            return await server.generate(prompt_ids, sampling_params, request_id)

        return (await ProbeReader(generate, temperature, 64, 60.0).read("request", trace, probes)).scores

    return asyncio.run(run())


def score_like_vllm(model, trace, probes, temperature=1.0):
    async def generate(request_id, *, prompt_ids, sampling_params):
        results = await FakeVLLM(Logits(model), block_size=16).read_probes(prompt_ids, sampling_params)
        return SimpleNamespace(extra_fields={"probe_log_probs": results})

    return asyncio.run(ProbeReader(generate, temperature, 64, 60.0).read("request", trace, probes)).scores


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_both_roads_give_the_same_values(setting, temperature):
    model, trace, probes, proposals = setting
    at_once = score(model, trace, probes, temperature)
    one_by_one = score_like_vllm(model, trace, probes, temperature)
    for probe, ours, theirs in zip(probes, at_once, one_by_one, strict=True):
        counted = slice(probe.scored_from, None)
        assert ours.token_log_probs[counted] == pytest.approx(theirs.token_log_probs[counted], abs=1e-4)
        assert ours.closing_log_prob == pytest.approx(theirs.closing_log_prob, abs=1e-4)
    for form in ("joint", "normalized", "geometric"):
        values = [self_values(form, probes, scores, utilities(proposals)) for scores in (at_once, one_by_one)]
        torch.testing.assert_close(*values, atol=1e-5, rtol=1e-4)


def test_the_temperature_is_applied_before_the_softmax(setting):
    model, trace, probes, _ = setting
    probe = probes[-1]
    hot = score(model, trace, [probe], 2.0)[0]
    with torch.no_grad():
        sequence = torch.tensor([trace[: probe.position] + list(probe.token_ids)])
        log_probs = (model(sequence).logits[0] / 2.0).log_softmax(-1)
    expected = [log_probs[probe.position - 1 + place, token].item() for place, token in enumerate(probe.token_ids)]
    assert list(hot.token_log_probs) == pytest.approx(expected, abs=1e-4)
