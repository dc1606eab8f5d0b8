"""Who reads the probes: every obstacle, every backend, and what is written where the workers read it."""

import copy
import logging

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf, open_dict
from transformers import Gemma2Config, Qwen3Config

from rredcot_verl.passes.protocol import MODEL_TYPE
from rredcot_verl.run.settings import active_settings, parse_block, run_source
from rredcot_verl.sources.engines import (
    EngineChoice,
    apply_choice,
    reads_alone,
    why_not_shared,
    why_server_cannot_score,
)
from tests.passes.architectures import SHAPE, build_model

SHARED = ("actor", True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model that can share prefixes, and one that can on a GPU only."""
    folder = tmp_path_factory.mktemp("models")
    build_model("qwen3-untied").save_pretrained(folder / "qwen3")
    Gemma2Config(**SHAPE, architectures=["Gemma2ForCausalLM"]).save_pretrained(folder / "gemma2")
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 256}
    Qwen3Config(**SHAPE, rope_parameters=yarn, architectures=["Qwen3ForCausalLM"]).save_pretrained(folder / "yarn")
    for name in ("deepseek-v3-latent", "mistral-sliding", "gemma3-sliding"):
        build_model(name).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def composed():
    with initialize_config_module("rredcot_verl.config", version_base=None):
        return compose("rredcot_trainer", overrides=["actor_rollout_ref.rollout.name=vllm"])


@pytest.fixture
def config(composed, models):
    return put(copy.deepcopy(composed), {"actor_rollout_ref.model.path": str(models / "qwen3")})


def put(config, values):
    with open_dict(config):
        for key, value in values.items():
            OmegaConf.update(config, key, value, force_add=True)
    return config


def choose(config, **self_value) -> EngineChoice:
    put(config, {f"algorithm.rredcot.self_value.{name}": value for name, value in self_value.items()})
    return run_source(config, parse_block(config)).choose_engine(config)


def who(choice: EngineChoice) -> tuple[str, bool]:
    return choice.engine, choice.share_prefix


ACTOR, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.model"
OBSTACLES = [
    ({f"{ACTOR}.strategy": "veomni"}, f"{ACTOR}.strategy=veomni"),
    ({f"{ACTOR}.strategy": "fsdp_turbo"}, f"{ACTOR}.strategy=fsdp_turbo"),
    ({f"{MODEL}.model_type": "value_model"}, f"{MODEL}.model_type=value_model"),
]


@pytest.mark.parametrize(
    "values",
    [
        {f"{ACTOR}.strategy": "fsdp"},
        {f"{ACTOR}.strategy": "fsdp2"},
        {f"{ACTOR}.ulysses_sequence_parallel_size": 2},
        {f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size": 4, f"{MODEL}.use_fused_kernels": True},
    ],
)
def test_a_run_with_fsdp_shares(config, values):
    put(config, values)
    assert why_not_shared(config) is None
    for asked in ("auto", "actor"):
        choice = choose(config, engine=asked)
        assert who(choice) == SHARED and "the training engine can share prefixes; " in choice.reason
    # A run whose choice was written down is one that shares.
    apply_choice(config, choice)
    assert why_not_shared(config) is None


@pytest.mark.parametrize("values, reason", OBSTACLES)
def test_what_keeps_the_training_engine_from_sharing(config, values, reason):
    assert reason in why_not_shared(put(config, values))
    for asked, engine in (("auto", "rollout"), ("actor", "actor")):
        choice = choose(config, engine=asked)
        assert (choice.engine, choice.share_prefix) == (engine, False) and reason in choice.reason


def test_the_model_is_asked_on_the_device_of_the_run(config, models):
    put(config, {f"{MODEL}.path": str(models / "gemma2"), "trainer.device": "cpu"})
    assert "soft-capped" in why_not_shared(config)
    assert why_not_shared(put(config, {"trainer.device": "cuda"})) is None


MEGATRON = f"{ACTOR}.megatron"
OBSTACLES_ON_MEGATRON = [
    ({f"{MEGATRON}.context_parallel_size": 2}, "context_parallel_size=2"),
    ({f"{MEGATRON}.dynamic_context_parallel": True}, "dynamic_context_parallel"),
    ({f"{MEGATRON}.use_megatron_fsdp": True}, "use_megatron_fsdp=True"),
    ({f"{MEGATRON}.override_transformer_config.fp8": "e4m3"}, "override_transformer_config.fp8=e4m3"),
    ({f"{MEGATRON}.override_transformer_config.cuda_graph_impl": "local"}, "cuda_graph_impl=local"),
    ({f"{MODEL}.mtp.enable": True}, f"{MODEL}.mtp.enable=True"),
    ({f"{MODEL}.use_fused_kernels": True}, "use_fused_kernels=True"),
    ({f"{MODEL}.model_type": "value_model"}, f"{MODEL}.model_type=value_model"),
    ("deepseek-v3-latent", "its attention is latent"),
    ("mistral-sliding", "layers of other kinds: ['sliding_window=9']"),
    ("gemma3-sliding", "layers of other kinds: ['sliding_attention']"),
    ("yarn", "its rotary embedding is ['yarn']"),
    ("gemma2", "soft-capped"),
]


@pytest.fixture
def on_megatron(models):
    with initialize_config_module("rredcot_verl.config", version_base=None):
        config = compose("rredcot_megatron_trainer", overrides=["actor_rollout_ref.rollout.name=vllm"])
    return put(config, {f"{MODEL}.path": str(models / "qwen3")})


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
@pytest.mark.parametrize("asked", ["auto", "actor"])
def test_megatron_shares_in_a_pass_of_its_own(on_megatron, mode, asked):
    put(on_megatron, {"trainer.v1.trainer_mode": mode, f"{MEGATRON}.tensor_model_parallel_size": 2})
    put(on_megatron, {f"{MEGATRON}.override_transformer_config.recompute_granularity": "full"})
    choice = choose(on_megatron, engine=asked)
    assert who(choice) == ("actor", True) and not choice.fuse
    assert choice.reason.endswith("in a pass of their own, old_log_prob is Megatron's")
    assert reads_alone(on_megatron)
    apply_choice(on_megatron, choice)
    assert on_megatron.actor_rollout_ref.model.model_type == MODEL_TYPE and why_not_shared(on_megatron) is None


@pytest.mark.parametrize("values, reason", OBSTACLES_ON_MEGATRON)
def test_what_keeps_megatron_from_sharing(on_megatron, models, values, reason):
    if isinstance(values, str):
        values = {f"{MODEL}.path": str(models / values)}
    assert reason in why_not_shared(put(on_megatron, values))
    for asked, engine in (("auto", "rollout"), ("actor", "actor")):
        choice = choose(on_megatron, engine=asked)
        assert (choice.engine, choice.share_prefix) == (engine, False) and reason in choice.reason


@pytest.mark.parametrize("mode", ["R2", "R3"])
def test_routes_are_not_replayed_for_sequences_of_our_own(on_megatron, mode):
    put(on_megatron, {f"{MEGATRON}.router_replay.mode": mode})
    assert choose(on_megatron, engine="auto").engine == "rollout"
    for values in ({"engine": "actor"}, {"engine": "auto", "share_prefix": False}):
        with pytest.raises(ValueError, match=f"router_replay.mode={mode}: .*; set its mode to disabled"):
            choose(on_megatron, **values)
    put(on_megatron, {"algorithm.adv_estimator": "leave_one_out"})
    with pytest.raises(ValueError, match=f"leave_one_out: .*router_replay.mode={mode}"):
        choose(on_megatron)


CANNOT_SCORE = [
    ({"actor_rollout_ref.rollout.name": "trtllm"}, "rollout.name='trtllm' cannot score"),
    ({"actor_rollout_ref.rollout.name": "sglang", "actor_rollout_ref.rollout.temperature": 0.7}, "temperature=0.7"),
    (
        {"actor_rollout_ref.rollout.name": "sglang", "actor_rollout_ref.rollout.disaggregation.enabled": True},
        "disaggregation.enabled=True",
    ),
    ({"actor_rollout_ref.rollout.full_determinism": True}, "full_determinism=True"),
    ({"trainer.v1.trainer_mode": "colocate_async"}, "trainer_mode='colocate_async' responses are generated ahead"),
    ({"trainer.v1.trainer_mode": "separate_async"}, "trainer_mode='separate_async' responses are generated ahead"),
]


@pytest.mark.parametrize("values, reason", CANNOT_SCORE)
def test_servers_that_cannot_score(config, values, reason):
    put(config, values)
    assert reason in why_server_cannot_score(config)
    assert who(choose(config, engine="auto")) == SHARED
    # With no one else to ask, each probe is a sequence of its own.
    put(config, {f"{ACTOR}.strategy": "veomni"})
    choice = choose(config, engine="auto")
    assert (choice.engine, choice.share_prefix) == ("actor", False)
    put(config, {"algorithm.rredcot.self_value.engine": "rollout"})
    with pytest.raises(ValueError, match="self_value.engine=rollout.*use self_value.engine=actor"):
        active_settings(config)


@pytest.mark.parametrize("name", ["rredcot_cpu", "vllm", "sglang"])
def test_servers_that_can_score(config, name):
    put(config, {"actor_rollout_ref.rollout.name": name})
    assert why_server_cannot_score(config) is None
    choice = choose(config, engine="rollout")
    assert (choice.engine, choice.share_prefix) == ("rollout", False)
    assert who(choose(config, engine="auto")) == SHARED
    choice = choose(config, engine="auto", share_prefix=False)
    assert (choice.engine, choice.share_prefix) == ("actor", False) and "share_prefix=False" in choice.reason


def test_the_choice_is_said_once_and_its_cost_where_it_has_one(config, caplog):
    with caplog.at_level(logging.WARNING):
        choose(config, engine="auto")
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("rredcot_verl")]
    assert "self_value.engine=auto" in said and "actor, shared prefix" in said
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        choose(config, engine="actor", share_prefix=False, max_closing_tokens=3)
    said, _, cost = [record.getMessage() for record in caplog.records if record.name.startswith("rredcot_verl")]
    assert "actor, separate sequences" in said and "max_closing_tokens=3" in cost


@pytest.mark.parametrize("road", [{"engine": "rollout"}, {"engine": "actor", "share_prefix": False}])
def test_where_the_groups_spellings_are_not_known_it_is_said_once(config, caplog, road):
    for more, times in (({}, 1), ({"proposals": "union"}, 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            choose(config, **road, max_closing_tokens=1, **more)
        said = [record.getMessage() for record in caplog.records if "as the data spell them" in record.getMessage()]
        assert len(said) == times and all("proposals=union waits" in each for each in said)


@pytest.mark.parametrize(
    "mode, bypass, engine, words",
    [
        ("sync", False, "actor", "the current weights, as old_log_prob"),
        ("sync", False, "rollout", "the rollout server's weights"),
        ("colocate_async", False, "actor", "the current weights, as old_log_prob"),
        ("separate_async", False, "actor", "the weights of the last synchronisation, as old_log_prob"),
        ("separate_async", True, "actor", "the current weights: with rollout_correction.bypass_mode"),
    ],
)
def test_the_weights_are_said(config, caplog, mode, bypass, engine, words):
    put(config, {"trainer.v1.trainer_mode": mode, "algorithm.rollout_correction.bypass_mode": bypass})
    with caplog.at_level(logging.WARNING):
        choose(config, engine=engine)
    assert f"; under {words}" in caplog.text


@pytest.mark.parametrize("asked, model_type", [("auto", MODEL_TYPE), ("rollout", "language_model")])
def test_the_choice_is_written_where_the_workers_read_it(config, asked, model_type):
    # The one server that is installed with the tests.
    put(config, {"actor_rollout_ref.rollout.name": "rredcot_cpu"})
    choice = choose(config, engine=asked)
    apply_choice(config, choice)
    settings = parse_block(config).self_value
    assert (settings.engine, settings.share_prefix) == (choice.engine, choice.share_prefix)
    assert config.actor_rollout_ref.model.get("model_type", "language_model") == model_type


ATTENTION = f"{MODEL}.override_config.attn_implementation"
APART = "in a pass of their own, old_log_prob is verl's: the policy attends with "
FUSED = "in the pass that computes old_log_prob: "


@pytest.mark.parametrize(
    "device, attention, fuse, words",
    [
        # verl's default.
        ("cuda", None, False, f"{APART}flash_attention_2, probes with flex_attention"),
        ("cuda", "sdpa", False, f"{APART}sdpa, probes with flex_attention"),
        ("cuda", "flex_attention", True, f"{FUSED}both attend with flex_attention"),
        ("cpu", "sdpa", True, f"{FUSED}both attend with sdpa"),
        ("cpu", "eager", False, f"{APART}eager, probes with sdpa"),
    ],
)
def test_probes_join_a_pass_of_the_same_attention(config, caplog, device, attention, fuse, words):
    put(config, {"trainer.device": device} | ({} if attention is None else {ATTENTION: attention}))
    choice = choose(config)
    assert choice.fuse is fuse and choice.reason.endswith(f"self_value.fuse=auto: {words}")
    assert words in caplog.text
    apply_choice(config, choice)
    assert parse_block(config).self_value.fuse is fuse


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_asked_of_the_pass_is_done_and_its_price_said(config, asked):
    choice = choose(config, fuse=asked)
    assert choice.fuse is asked and f"self_value.fuse={asked}: in " in choice.reason
    assert ("the ratio of the first update is not exactly 1" in choice.reason) is asked


SEPARATE = {"data.train_batch_size": 64, "actor_rollout_ref.rollout.n": 8, "data.max_response_length": 2048}


@pytest.mark.parametrize(
    "num_segments, proposals, refused", [(32, "reference", False), (33, "reference", True), (9, "union", True)]
)
def test_separate_sequences_are_refused_above_an_estimate(config, num_segments, proposals, refused):
    """512 responses, 4 closing tokens and 1024 tokens each: 2**26 tokens with 32 boundaries and one answer."""
    block = "algorithm.rredcot"
    asked = {f"{block}.segmentation.num_segments": num_segments, f"{block}.self_value.proposals": proposals}
    put(config, SEPARATE | asked | {f"{ACTOR}.strategy": "veomni", "trainer.v1.trainer_mode": "separate_async"})
    if not refused:
        assert who(choose(config)) == ("actor", False)
        return
    with pytest.raises(ValueError, match=f"strategy=veomni: every probe.*{num_segments} boundaries.*num_segments,"):
        choose(config)


def test_what_does_not_apply_is_said(config):
    put(config, {"algorithm.rollout_correction.bypass_mode": True})
    choice = choose(config, fuse=True)
    assert not choice.fuse and choice.reason.endswith(
        "fuse=True does not apply: in a pass of their own, there is none for old_log_prob"
    )
    choice = choose(config, share_prefix=False)
    assert not choice.fuse and choice.reason.endswith("self_value.fuse=True does not apply")
    assert "fuse" not in choose(config, fuse="auto").reason


def test_the_choice_can_be_written_where_the_block_is_not_declared(config):
    with open_dict(config):
        del config.algorithm["rredcot"]
    apply_choice(config, EngineChoice("actor", False, ""))
    settings = parse_block(config).self_value
    assert (settings.engine, settings.share_prefix) == ("actor", False)


WITH_HIDDEN = {"algorithm.rredcot.self_value.calibration": "logistic", "algorithm.rredcot.readout.use_hidden": True}


def test_probes_and_hidden_states_come_from_one_pass(config):
    put(config, WITH_HIDDEN)
    choice = choose(config)
    assert (choice.engine, choice.share_prefix, choice.label) == ("actor", True, "actor, shared prefix")
    assert choice.reason.startswith("hidden states are read in the same pass; ")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"algorithm.rredcot.self_value.engine": "rollout"}, "engine=auto or actor, and share_prefix=true"),
        ({"algorithm.rredcot.self_value.share_prefix": False}, "engine=auto or actor, and share_prefix=true"),
        ({f"{ACTOR}.strategy": "veomni"}, "gives no hidden states: .*strategy=veomni.*; set readout.use_hidden=false"),
        ({f"{MODEL}.path": "gemma2", "trainer.device": "cpu"}, "cannot share prefixes: .*; set self_value.form=hidden"),
        ({"algorithm.rredcot.readout.layer": 3}, "readout.layer=3 .* has 3 decoder layers"),
    ],
)
def test_what_keeps_hidden_states_out_of_the_probes_pass(config, models, values, message):
    path = values.get(f"{MODEL}.path")
    put(config, WITH_HIDDEN | values | ({f"{MODEL}.path": str(models / path)} if path else {}))
    with pytest.raises(ValueError, match=message):
        choose(config)


@pytest.mark.parametrize(
    "estimator, label, said",
    [
        (
            "vineppo",
            "rollout, continuations",
            "rredcot: vineppo: continuations, by rollout; continuations are generated",
        ),
        ("leave_one_out", "actor, leave-one-out", "rredcot: leave_one_out: leave-one-out, by actor; sequences"),
        ("mig", "actor, shared prefix", "self_value.engine=auto: probes are read by actor, shared prefix"),
    ],
)
def test_every_source_says_who_measures(config, caplog, estimator, label, said):
    put(config, {"algorithm.adv_estimator": estimator})
    choice = choose(config)
    assert choice.label == label and said in caplog.text
    # Servers that read probes are for probes alone.
    before = config.actor_rollout_ref.rollout.name
    apply_choice(config, choice)
    assert config.actor_rollout_ref.rollout.name == before
    assert parse_block(config).self_value.engine == choice.engine


def test_a_source_that_measures_itself_leaves_the_config_alone(config):
    before = copy.deepcopy(config)
    apply_choice(config, EngineChoice("source", False, "", "lengths"))
    assert config == before
