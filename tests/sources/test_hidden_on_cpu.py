"""Hidden states asked for and read back: of which tokens, for which rows, and who refuses."""

import pytest
import torch
from omegaconf import OmegaConf

from rredcot_verl.config.blocks import ReadoutConfig
from rredcot_verl.passes.protocol import FIELDS, MODEL_TYPE
from rredcot_verl.sources.base import PassRequest
from rredcot_verl.sources.engines import check_layer
from rredcot_verl.sources.group import Member
from rredcot_verl.sources.record import Record, Status
from rredcot_verl.sources.regression import HIDDEN_FIELD, read_hidden
from tests.passes.architectures import build_model
from tests.sources.world import PROMPT, Agent, World, source_of

HIDDEN = {"self_value": {"form": "hidden"}, "readout": {"layer": 1, "dim": 6, "seed": 2}}
STATES = FIELDS["hidden"].result
DIM = 6
# Two states; three; one; none; padding.
RECORDS = [
    Record(Status.SCORED, [0, 3, 8]),
    Record(Status.SCORED, [0, 1, 9, 16]),
    Record(Status.SCORED, [0, 2]),
    Record(Status.NO_PROPOSAL),
    None,
]
COUNTS = [2, 3, 1, 0, 0]


def given(counts=tuple(COUNTS)) -> list[torch.Tensor]:
    return [torch.arange(1.0, 1 + count * DIM) if count else torch.zeros(1) for count in counts]


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch, RECORDS).put(**{STATES: given()})


def test_the_last_token_before_each_boundary_is_asked_for():
    """State k ends with token b_k - 1 of the response, state 0 with the prompt; after b_K the outcome is known."""
    agent = Agent(block=HIDDEN)
    plan = agent.record()
    cuts = plan.record.segment_boundaries
    assert plan.record.status is Status.SCORED and len(cuts) > 2 and plan.record.payload == {}
    assert plan.rows == {HIDDEN_FIELD: [len(PROMPT) + cut - 1 for cut in cuts[:-1]]}
    assert agent.source.payload_fields == (HIDDEN_FIELD,)
    # Of a group of one reward nothing is fitted to and nothing is credited.
    uniform = agent.record(others=[Member(1.0, "15")])
    assert uniform.record.status is Status.UNIFORM_GROUP and not uniform.rows
    # Neither an answer nor a reference is needed.
    assert agent.record(agent.response("so it goes. but then. so", references=None)).record.status is Status.SCORED


def test_the_pass_that_is_asked_for(world):
    assert source_of("rredcot", **HIDDEN).passes(world.recorded()) == (PassRequest("hidden", (1, 6, 2)),)


def test_the_states_of_each_row(world):
    states = read_hidden(world.rows())
    assert [tuple(own.shape) for own in states] == [(count, DIM) for count in COUNTS]
    for own, flat in zip(states, given(), strict=True):
        assert own.dtype == torch.float32 and torch.equal(own.flatten(), flat[: own.numel()])


def test_a_batch_without_any_states(monkeypatch):
    world = World(monkeypatch, [Record(Status.NO_PROPOSAL), None]).put(**{STATES: given([0, 0])})
    assert [tuple(own.shape) for own in read_hidden(world.rows())] == [(0, 0)] * 2


@pytest.mark.parametrize("count", [5, 13, 1])
def test_a_row_of_another_length_is_named(world, count):
    world.queue.rows["a_1_0"][STATES] = torch.zeros(count)
    with pytest.raises(RuntimeError, match=rf"gave {count} floats for the 3 hidden states of a_1_0, 6 each"):
        read_hidden(world.rows())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_stop_the_training(world, bad):
    world.queue.rows["a_2_0"][STATES][3] = bad
    with pytest.raises(RuntimeError, match="hidden state of a_2_0 is not finite"):
        read_hidden(world.rows())


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_model("qwen3-untied").save_pretrained(folder)
    return folder


@pytest.fixture
def make_config(model_folder):
    def make(strategy="fsdp2", **model):
        actor = {"strategy": strategy, "ulysses_sequence_parallel_size": 2}
        model = {
            "_target_": "verl.workers.config.HFModelConfig",
            "path": str(model_folder),
            "load_tokenizer": True,
        } | model
        return OmegaConf.create({"actor_rollout_ref": {"actor": actor, "model": model}})

    return make


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("model", [{}, {"use_fused_kernels": True}, {"model_type": MODEL_TYPE}])
def test_the_fsdp_engines_can(make_config, strategy, model, caplog):
    choice = source_of("rredcot", **HIDDEN).choose_engine(make_config(strategy, **model))
    assert (choice.engine, choice.share_prefix, choice.label) == ("actor", True, "actor, hidden states")
    assert "rredcot: rredcot: hidden states, by actor; in the pass that computes old_log_prob" in caplog.text


@pytest.mark.parametrize(
    "strategy, model, reason",
    [
        ("megatron", {}, "actor_rollout_ref.actor.strategy=megatron: its layers"),
        ("veomni", {}, "actor_rollout_ref.actor.strategy=veomni; fsdp and fsdp2 can"),
        ("fsdp2", {"model_type": "value_model"}, "actor_rollout_ref.model.model_type=value_model"),
    ],
)
def test_other_engines_cannot_and_the_key_is_named(make_config, strategy, model, reason):
    with pytest.raises(ValueError, match=f"form=hidden: the training engine gives no hidden states: {reason}"):
        source_of("rredcot", **HIDDEN).choose_engine(make_config(strategy, **model))


def test_a_layer_that_the_model_has_not_is_refused_before_any_worker(make_config):
    for layer in (0, 2, -3):
        check_layer(make_config(), ReadoutConfig(layer=layer))
    block = HIDDEN | {"readout": {"layer": 3}}
    with pytest.raises(ValueError, match=r"algorithm.rredcot.readout.layer=3 .* has 3 decoder layers, .* from -3 to 2"):
        source_of("rredcot", **block).choose_engine(make_config())
