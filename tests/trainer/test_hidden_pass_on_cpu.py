"""Hidden states asked for and read back: of which tokens, for which rows, what travels, and who refuses."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta

from rredcot_verl.config.blocks import ReadoutConfig
from rredcot_verl.passes.hidden_states import hidden_states
from rredcot_verl.passes.protocol import HIDDEN_ONLY, HIDDEN_POSITIONS, HIDDEN_STATES, MODEL_TYPE, PASS, READOUT
from rredcot_verl.run.capabilities import check_layer, why_no_hidden
from rredcot_verl.sources.record import NO_PROPOSAL, PLANNED, SCORED, UNIFORM_GROUP, CreditRecord
from rredcot_verl.trainer import batch as batch_module
from rredcot_verl.trainer import hidden_pass
from rredcot_verl.trainer.hidden_pass import (
    attach_positions,
    read_hidden,
    read_hidden_only,
    state_positions,
    without_hidden,
)
from tests.fake_queue import stand_in
from tests.passes.architectures import build_model, random_traces
from tests.passes.test_hidden_on_cpu import expected

KEYS = ["a_0_0", "a_1_0", "b_0_0", "b_1_0", "pad_0_0"]
PROMPTS = [4, 4, 7, 7, 1]
TRACES = random_traces([12, 20, 9, 8, 2])
# Probed; in a group of one reward, so not probed; one segment; none; padding.
RECORDS = [
    CreditRecord(PLANNED, segment_boundaries=[0, 3, 8]),
    CreditRecord(UNIFORM_GROUP, segment_boundaries=[0, 1, 9, 16]),
    CreditRecord(SCORED, segment_boundaries=[0, 2]),
    CreditRecord(NO_PROPOSAL),
    None,
]
POSITIONS = [[3, 6], [3, 4, 12], [6], [], []]
ASKED = ReadoutConfig(layer=1, dim=6, seed=2)


@pytest.fixture
def queue(monkeypatch):
    return stand_in(monkeypatch, (batch_module, hidden_pass), KEYS, TRACES)


def make_batch(fields=None) -> KVBatchMeta:
    # verl's padding has no such tag.
    tags = [{"prompt_len": length} for length in PROMPTS[:-1]] + [{"is_padding": True}]
    return KVBatchMeta(keys=KEYS, tags=tags, partition_id="train", fields=fields, extra_info={"temperature": 0.7})


def compute(queue, model, batch) -> None:
    """What the training engine gives, one row at a time."""
    layer, dim, seed = batch.extra_info[READOUT]
    rows = []
    for ids, positions in zip(queue["input_ids"].unbind(), queue[HIDDEN_POSITIONS].unbind(), strict=True):
        with torch.no_grad(), hidden_states(model, layer, dim, seed) as collected:
            collected.rows = positions[positions >= 0]
            model(ids.unsqueeze(0))
        rows.append(collected.collected[0].flatten() if len(collected.rows) else torch.zeros(1))
    queue[HIDDEN_STATES] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def test_the_last_token_before_each_boundary():
    """State k ends with token b_k - 1 of the response, state 0 with the prompt; after b_K the outcome is known."""
    pairs = zip(RECORDS[:-1], PROMPTS[:-1], strict=True)
    found = [state_positions(record, {"prompt_len": length}) for record, length in pairs]
    assert found == POSITIONS[:-1]


def test_positions_travel_beside_the_rows(queue):
    batch = make_batch()
    attach_positions(batch, RECORDS, ASKED)
    assert [row.tolist() for row in queue[HIDDEN_POSITIONS].unbind()] == [own or [-1] for own in POSITIONS]
    assert set(queue) == {"input_ids", HIDDEN_POSITIONS} and batch.fields is None
    assert batch.extra_info == {"temperature": 0.7, READOUT: (1, 6, 2)}
    assert without_hidden(batch).extra_info == {"temperature": 0.7}
    # A batch that names its fields names this one too, once, and only until it has been read.
    named = make_batch(["input_ids"])
    attach_positions(named, RECORDS, ASKED)
    attach_positions(named, RECORDS, ASKED)
    assert named.fields == ["input_ids", HIDDEN_POSITIONS]
    named.fields.append(HIDDEN_STATES)
    assert without_hidden(named).fields == ["input_ids"]


def test_there_and_back(queue):
    model = build_model("qwen3-untied")
    batch = make_batch()
    attach_positions(batch, RECORDS, ASKED)
    compute(queue, model, batch)
    states = read_hidden(batch)
    for own, trace, positions in zip(states, TRACES, POSITIONS, strict=True):
        assert own.shape == (len(positions), ASKED.dim) and own.dtype == torch.float32
        if positions:
            values = expected(model, trace, positions, ASKED.layer, ASKED.dim, ASKED.seed)
            torch.testing.assert_close(own, values, atol=1e-5, rtol=1e-4)


def test_a_batch_without_any_states(queue):
    batch = make_batch()
    attach_positions(batch, [CreditRecord(NO_PROPOSAL), *[None] * 4], ASKED)
    queue[HIDDEN_STATES] = torch.nested.as_nested_tensor([torch.zeros(1)] * 5, layout=torch.jagged)
    assert [tuple(own.shape) for own in read_hidden(batch)] == [(0, 0)] * 5


def test_a_pass_for_states_alone_leaves_the_batch_as_it_was(queue):
    seen = []
    batch = make_batch()
    attach_positions(batch, RECORDS, ASKED)
    before = dict(batch.extra_info)
    read_hidden_only(SimpleNamespace(compute_log_prob=lambda meta: seen.append(dict(meta.extra_info))), batch, 0.9)
    asked = {PASS: HIDDEN_ONLY, READOUT: (1, 6, 2), "calculate_entropy": False, "compute_loss": False}
    assert seen == [asked | {"temperature": 0.9}]
    assert batch.extra_info == before


@pytest.mark.parametrize("count", [5, 13, 1])
def test_a_row_of_another_length_is_named(queue, count):
    batch = make_batch()
    attach_positions(batch, RECORDS, ASKED)
    rows = [torch.zeros(max(1, 6 * len(own))) for own in POSITIONS]
    rows[1] = torch.zeros(count)
    queue[HIDDEN_STATES] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    with pytest.raises(RuntimeError, match=rf"gave {count} floats for the 3 hidden states of a_1_0, 6 each"):
        read_hidden(batch)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_stop_the_training(queue, bad):
    batch = make_batch()
    attach_positions(batch, RECORDS, ASKED)
    rows = [torch.zeros(max(1, 6 * len(own))) for own in POSITIONS]
    rows[2][3] = bad
    queue[HIDDEN_STATES] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    with pytest.raises(RuntimeError, match="hidden state of b_0_0 is not finite"):
        read_hidden(batch)


def make_config(strategy="fsdp2", **model):
    actor = {"strategy": strategy, "ulysses_sequence_parallel_size": 2}
    return OmegaConf.create({"actor_rollout_ref": {"actor": actor, "model": model}})


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("model", [{}, {"use_fused_kernels": True}, {"model_type": MODEL_TYPE}])
def test_the_fsdp_engines_can(strategy, model):
    assert why_no_hidden(make_config(strategy, **model)) is None


@pytest.mark.parametrize(
    "config, reason",
    [
        (make_config("megatron"), "actor_rollout_ref.actor.strategy=megatron: its layers"),
        (make_config("veomni"), "actor_rollout_ref.actor.strategy=veomni; fsdp and fsdp2 can"),
        (make_config(model_type="value_model"), "actor_rollout_ref.model.model_type=value_model"),
    ],
)
def test_other_engines_cannot_and_the_key_is_named(config, reason):
    assert why_no_hidden(config).startswith(reason)


def test_a_layer_that_the_model_has_not_is_refused_before_any_worker(tmp_path):
    build_model("qwen3-untied").save_pretrained(tmp_path)
    model = {"_target_": "verl.workers.config.HFModelConfig", "path": str(tmp_path), "load_tokenizer": True}
    config = make_config(**model)
    for layer in (0, 2, -3):
        check_layer(config, ReadoutConfig(layer=layer))
    with pytest.raises(ValueError, match=r"algorithm.rredcot.readout.layer=3 .* has 3 decoder layers, .* from -3 to 2"):
        check_layer(config, ReadoutConfig(layer=3))
