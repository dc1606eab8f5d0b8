"""Probes sent to the training engine and read back: what travels, what is left alone, and sequences one by one."""

import math
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from rredcot_verl.config.schema import parse
from rredcot_verl.passes.probe_codec import NO_PROBES, encode
from rredcot_verl.passes.protocol import PASS, PROBE_LOG_PROBS, PROBES, PROBES_ONLY
from rredcot_verl.probes.elicitation import Probe
from rredcot_verl.sources.record import NO_PROPOSAL, PLANNED, SCORED, CreditRecord
from rredcot_verl.trainer import actor_probes
from rredcot_verl.trainer import batch as batch_module
from rredcot_verl.trainer.actor_probes import (
    SeparateSequences,
    any_planned,
    attach_probes,
    read_probes_only,
    scored,
    without_probes,
)
from tests.fake_queue import stand_in
from tests.passes.architectures import build_model, naive_scores, random_traces

LENGTHS = (12, 20, 5, 1)
TRACES = random_traces(LENGTHS)
KEYS = ["a_0_0", "a_1_0", "b_0_0", "pad_0_0"]
SETTINGS = parse({"self_value": {"reward_range": [-1, 3]}}).self_value
UTILITIES = [1.0, 0.25]


def probes_of(length: int) -> list[Probe]:
    """Two answers at three boundaries; the second ends in two ways at one of them, as after a brace."""
    probes = []
    for state, position in enumerate((2, length // 2 + 1, length)):
        probes.append(Probe(state, 0, position, (7, 8, 9), 2, 2, (3, 4, 5)))
        probes.append(Probe(state, 1, position, (7, 8, 10, 11), 2, 1, (5, 3)))
        if state == 1:
            probes.append(Probe(state, 1, position, (7, 8, 10), 2, 1, (60,)))
    return probes


BRANCHES = [probes_of(LENGTHS[0]), probes_of(LENGTHS[1]), [], []]
RECORDS = [
    CreditRecord(PLANNED, segment_boundaries=[0, 1, 2, 3], utilities=UTILITIES, probes=encode(BRANCHES[0])),
    CreditRecord(PLANNED, segment_boundaries=[0, 1, 2, 3], utilities=UTILITIES, probes=encode(BRANCHES[1])),
    CreditRecord(NO_PROPOSAL),
    None,
]


@pytest.fixture(scope="module")
def model():
    return build_model("qwen3-untied")


@pytest.fixture
def queue(monkeypatch):
    return stand_in(monkeypatch, (batch_module, actor_probes), KEYS, TRACES)


def make_batch(fields=None) -> KVBatchMeta:
    return KVBatchMeta(
        keys=KEYS, tags=[{}] * len(KEYS), partition_id="train", fields=fields, extra_info={"temperature": 0.7}
    )


class ModelWorkers:
    """`compute_log_prob` of a worker group, with a model's true log-probabilities."""

    def __init__(self, model, num_ranks: int = 1) -> None:
        self.model = model
        self.num_ranks = num_ranks
        self.calls: list[list[list[int]]] = []

    @torch.no_grad()
    def compute_log_prob(self, data: TensorDict) -> dict:
        assert len(data) % self.num_ranks == 0
        rows = [row.tolist() for row in data["input_ids"].unbind()]
        assert [row.tolist() for row in data["position_ids"].unbind()] == [list(range(len(row))) for row in rows]
        assert max(map(len, rows)) <= data["max_token_len_per_gpu"] and data["use_dynamic_bsz"]
        assert not data["calculate_entropy"] and not data["compute_loss"]
        self.calls.append(rows)
        log_probs = []
        for row in rows:
            logits = self.model(torch.tensor([row])).logits[0].float() / data["temperature"]
            # As verl's: entry i is for token i + 1, the last one for whatever follows in the batch.
            log_probs.append(logits.log_softmax(-1)[torch.arange(len(row)), torch.tensor([*row[1:], 0])])
        return {"log_probs": torch.nested.as_nested_tensor(log_probs, layout=torch.jagged)}


def separate(workers, **fields) -> SeparateSequences:
    defaults = {"num_ranks": workers.num_ranks, "temperature": 0.7, "max_closing_tokens": 64, "max_tokens": 10}
    return SeparateSequences(worker_group=workers, **(defaults | fields))


def expected_values(model, trace, probes) -> list[float]:
    """Summed probability of the answers, by hand: the mass on each boundary, scaled to the range of rewards."""
    values = [0.0] * 3
    for probe in probes:
        log_prob = sum(naive_scores(model, trace, [probe], 0.7))
        values[probe.state] += UTILITIES[probe.proposal] * math.exp(log_prob)
    return [-1 + 4 * value for value in values]


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("max_tokens_per_call", [1, 60, 2**22])
def test_separate_sequences(queue, model, monkeypatch, num_ranks, max_tokens_per_call):
    monkeypatch.setattr(SeparateSequences, "MAX_TOKENS_PER_CALL", max_tokens_per_call)
    workers = ModelWorkers(model, num_ranks)
    separate(workers).read(make_batch(), RECORDS)
    for found, trace, own in zip(queue[PROBE_LOG_PROBS].unbind(), TRACES, BRANCHES, strict=True):
        assert found.tolist() == pytest.approx(naive_scores(model, trace, own, 0.7) or [0.0], abs=1e-5)
    num_sequences = sum(len(probe.closing_token_ids) for own in BRANCHES for probe in own)
    if max_tokens_per_call == 1:
        assert len(workers.calls) == num_sequences
    if max_tokens_per_call == 2**22:
        assert [len(call) for call in workers.calls] == [-(-num_sequences // num_ranks) * num_ranks]
    records = scored(make_batch(), RECORDS, SETTINGS)
    assert [record and record.status for record in records] == [SCORED, SCORED, NO_PROPOSAL, None]
    for record, trace, own in zip(records[:2], TRACES, BRANCHES, strict=False):
        assert record.self_values == pytest.approx(expected_values(model, trace, own), rel=1e-4)
        assert record.segment_boundaries == [0, 1, 2, 3]


def test_fewer_closing_tokens_give_a_lower_bound(queue, model):
    rows = []
    for count in (64, 2, 1):
        separate(ModelWorkers(model), max_closing_tokens=count).read(make_batch(), RECORDS)
        rows.append(queue[PROBE_LOG_PROBS].unbind()[0])
    everything, two, one = rows
    # Three closing tokens, two, and one; counted tokens do not change.
    assert (everything >= two).all() and (two >= one).all()
    ends = [1, 5, 7, 11, 14, 16, 20]
    changed = (two > one).nonzero().flatten().tolist()
    assert set(changed) <= set(ends) and len(changed) >= 6


def test_probes_travel_beside_the_rows(queue):
    batch = make_batch()
    attach_probes(batch, RECORDS)
    rows = [row.tolist() for row in queue[PROBES].unbind()]
    assert rows == [encode(BRANCHES[0]), encode(BRANCHES[1]), list(NO_PROBES), list(NO_PROBES)]
    assert set(queue) == {"input_ids", PROBES} and batch.fields is None and batch.extra_info == {"temperature": 0.7}
    # A batch that names its fields names this one too, once.
    named = make_batch(["input_ids"])
    attach_probes(named, RECORDS)
    attach_probes(named, RECORDS)
    assert named.fields == ["input_ids", PROBES]


def test_a_pass_for_probes_alone_leaves_the_batch_as_it_was():
    seen = []
    batch = make_batch()
    workers = SimpleNamespace(compute_log_prob=lambda meta: seen.append(dict(meta.extra_info)))
    read_probes_only(workers, batch, 0.9)
    assert seen == [{PASS: PROBES_ONLY, "calculate_entropy": False, "compute_loss": False, "temperature": 0.9}]
    assert batch.extra_info == {"temperature": 0.7}


def test_nothing_is_fetched_where_nothing_was_planned(queue):
    done = [CreditRecord(SCORED, [0, 1], [0.5]), CreditRecord(NO_PROPOSAL), None, None]
    assert any_planned(RECORDS) and not any_planned(done) and not any_planned([None])
    assert scored(make_batch(), done, SETTINGS) == done


def test_numbers_that_are_none_stop_the_training(queue):
    counts = [sum(len(b.token_ids) - b.scored_from + 1 for b in own) or 1 for own in BRANCHES]
    for bad in (float("nan"), 0.5):
        rows = [torch.full((count,), bad) for count in counts]
        queue[PROBE_LOG_PROBS] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        with pytest.raises(ValueError, match="nan|0.5"):
            scored(make_batch(), RECORDS, SETTINGS)


def test_a_row_of_another_length_is_named(queue):
    rows = [torch.zeros(3), torch.zeros(1), torch.zeros(1), torch.zeros(1)]
    queue[PROBE_LOG_PROBS] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    batch = KVBatchMeta(keys=KEYS, tags=[{}] * 4, partition_id="train")
    with pytest.raises(RuntimeError, match="gave 3 log-probabilities of the probes of a_0_0, expected"):
        scored(batch, RECORDS, SETTINGS)


def test_nothing_of_ours_is_left_to_fetch():
    fields = ["input_ids", PROBES, "old_log_probs", PROBE_LOG_PROBS]
    batch = KVBatchMeta(keys=KEYS, tags=[{}] * 4, partition_id="train", fields=fields)
    assert without_probes(batch).fields == ["input_ids", "old_log_probs"]
    assert without_probes(KVBatchMeta(keys=KEYS, tags=[{}] * 4, partition_id="train")).fields is None
