"""Settings against verl's own composed config."""

import copy
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf, open_dict

from rredcot_verl.run.settings import (
    AGENT_LOOP_MANAGER,
    OUTCOME_ESTIMATORS,
    TELLING_AGENT_LOOP_MANAGER,
    active_settings,
    expectation_doubts,
    max_sequence_length,
    parse_block,
    reward_penalty,
    run_source,
    switch_on,
    tell_whose_words,
    unread_settings,
    warn_of_unread,
)
from rredcot_verl.run.start_up import CheckSettings
from rredcot_verl.sources.registry import SOURCES, SPECIFIC
from tests import PATIENCE_S


@pytest.fixture(scope="module")
def composed():
    with initialize_config_module("rredcot_verl.config", version_base=None):
        return compose("rredcot_trainer", overrides=["actor_rollout_ref.rollout.name=vllm"])


@pytest.fixture
def config(composed):
    return put(copy.deepcopy(composed), actor_rollout_ref__rollout__n=4)


def put(config, **values):
    """Set keys, dots as double underscores."""
    with open_dict(config):
        for key, value in values.items():
            OmegaConf.update(config, key.replace("__", "."), value)
    return config


def test_the_overlay_composes_with_verls_config_and_switches_the_method_on(config):
    assert config.algorithm.adv_estimator == "rredcot" and config.trainer.v1.trainer_mode == "sync"
    assert active_settings(config) == parse_block(config)
    put(config, algorithm__rredcot__credit__beta=3, algorithm__rredcot__self_value__reward_range=[-1, 1])
    settings = active_settings(config)
    assert settings.credit.beta == 3.0 and settings.self_value.reward_range == (-1.0, 1.0)


@pytest.mark.parametrize("estimator", ["grpo", "gae", "rloo"])
@pytest.mark.parametrize("enable", [None, False])
def test_other_estimators_run_as_they_are(config, estimator, enable):
    put(config, algorithm__adv_estimator=estimator, algorithm__rredcot__enable=enable)
    # Nothing of ours is asked of such a run.
    put(config, trainer__v1__trainer_mode="async", actor_rollout_ref__rollout__name="sglang")
    assert active_settings(config) is None


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
@pytest.mark.parametrize("engine", ["auto", "actor"])
def test_every_mode_of_verls_is_taken(config, mode, engine):
    put(config, trainer__v1__trainer_mode=mode, algorithm__rredcot__self_value__engine=engine)
    assert active_settings(config) is not None


def test_a_config_without_our_block(config):
    with open_dict(config):
        del config.algorithm["rredcot"]
    assert active_settings(config) == parse_block(config)
    assert active_settings(put(config, algorithm__adv_estimator="grpo")) is None
    with pytest.raises(ValueError, match="algorithm.rredcot='on': expected a block"):
        active_settings(put(config, algorithm__rredcot="on"))


BY_SERVER = {"algorithm__rredcot__self_value__engine": "rollout"}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"algorithm__use_kl_in_reward": True}, "algorithm.use_kl_in_reward=True.*use_kl_loss=True"),
        (BY_SERVER | {"actor_rollout_ref__rollout__name": "trtllm"}, "rollout.name='trtllm'.*rredcot_cpu.*vllm"),
        ({"trainer__v1__trainer_mode": "async"}, "trainer_mode='async'.*'sync', 'colocate_async', 'separate_async'"),
        ({"trainer__use_v1": False}, "trainer.use_v1=False"),
        ({"algorithm__rredcot__enable": False}, "enable=False contradicts.*leave it null"),
        (
            {"algorithm__rredcot__credit__form": "td", "actor_rollout_ref__rollout__n": 2},
            "credit.form=td with actor_rollout_ref.rollout.n=2",
        ),
        (
            {"algorithm__adv_estimator": "leave_one_out", "algorithm__rredcot__credit__form": "td"},
            "credit.form=td with lam=1.0: the values of 'leave_one_out' are made of the reward itself",
        ),
        ({"actor_rollout_ref__actor__policy_loss__loss_mode": "geo_mean"}, "loss_mode='geo_mean' takes the mean"),
        (
            {
                "algorithm__adv_estimator": "gae",
                "algorithm__rredcot__enable": True,
                "algorithm__use_pf_ppo": True,
            },
            "use_pf_ppo=True with algorithm.adv_estimator=gae draws rows anew",
        ),
        (
            {
                "algorithm__adv_estimator": "reinforce_plus_plus",
                "algorithm__rredcot__enable": True,
                "algorithm__rollout_correction": {"rollout_rs": "seq_mean_k3,token_k1"},
            },
            "rollout_rs='seq_mean_k3,token_k1' with .*enable=True.*adv_estimator=rredcot",
        ),
        ({"algorithm__rredcot__credit__beta": -1}, "algorithm.rredcot.credit.beta=-1"),
        ({"algorithm__rredcot__sed": 1}, "algorithm.rredcot.sed=1: unknown key"),
        ({"algorithm__rredcot__segmentation__method": "lines"}, "segmentation.method='lines'.*keyword_entropy"),
        (
            {"algorithm__rredcot__elicitation": {"format": "custom", "opening": "R:", "pattern": "R: .+"}},
            "elicitation.pattern='R: .+' needs the answer in a group",
        ),
        (
            {
                "reward__reward_model__enable": True,
                "reward__reward_model__enable_resource_pool": False,
                "algorithm__rredcot__self_value__proposals": "group",
            },
            "proposals=group.*enable_resource_pool",
        ),
        (
            {
                "reward__reward_model__enable": True,
                "reward__reward_model__enable_resource_pool": False,
                "algorithm__rredcot__self_value__proposals": "union",
                "algorithm__rredcot__self_value__form": "normalized",
            },
            "proposals=union with form=normalized.*enable_resource_pool=False",
        ),
    ],
)
def test_what_does_not_fit_is_named(config, values, message):
    with pytest.raises(ValueError, match=message):
        active_settings(put(config, **values))
    with pytest.raises(SystemExit, match="rredcot: "):
        CheckSettings().on_job_start(config)


def test_the_cpu_server_is_asked_for_what_it_can_do_before_ray_starts(config):
    rollout = {"name": "rredcot_cpu", "tensor_model_parallel_size": 1, "dtype": "float16"}
    put(config, **{f"actor_rollout_ref__rollout__{key}": value for key, value in rollout.items()})
    with pytest.raises(SystemExit, match="rredcot: .*dtype of float32, bfloat16, got float16"):
        CheckSettings().on_job_start(config)


def test_td_with_shares_of_the_reward_pays_each_its_own(config):
    put(config, algorithm__adv_estimator="leave_one_out")
    put(config, algorithm__rredcot={"credit": {"form": "td", "lam": 0.0}})
    assert active_settings(config).credit.lam == 0.0


def test_rejection_that_loses_no_reward_is_taken(config):
    """Of whole responses, in the actor, or before our own estimator, which sums nothing over tokens."""
    assert {"rollout_rs", "bypass_mode"} <= config.algorithm.rollout_correction.keys()
    assert "loss_mode" in config.actor_rollout_ref.actor.policy_loss
    put(config, algorithm__rollout_correction__rollout_rs="token_k1")
    assert active_settings(config) is not None
    put(config, algorithm__adv_estimator="gae", algorithm__rredcot__enable=True)
    for key, value in (("bypass_mode", True), ("rollout_rs", "seq_mean_k3"), ("rollout_rs", None)):
        kept = copy.deepcopy(config)
        assert active_settings(put(kept, **{f"algorithm__rollout_correction__{key}": value})) is not None


@pytest.mark.parametrize(
    "pool, proposals, form",
    [
        (False, "reference", "joint"),
        (False, "reference", "geometric"),
        (False, "union", "joint"),
        (True, "group", "joint"),
        (True, "union", "normalized"),
    ],
)
def test_a_reward_model_that_does_not_get_in_the_way(config, pool, proposals, form):
    put(config, reward__reward_model__enable=True, reward__reward_model__enable_resource_pool=pool)
    put(config, algorithm__rredcot__self_value__proposals=proposals, algorithm__rredcot__self_value__form=form)
    assert active_settings(config) is not None


@pytest.mark.parametrize(
    ("estimator", "block", "works"),
    [
        ("rredcot", {"self_value": {"calibration": "none"}}, False),
        ("rredcot", {}, True),
        ("rredcot", {"self_value": {"form": "hidden"}}, True),
        ("rredcot", {"source": "recipes.quickstart.oracle:Oracle"}, True),
        ("vps", {}, False),
        ("attention_attribution", {}, False),
        ("vineppo", {}, True),
    ],
)
def test_critic_needs_values_that_estimate_the_reward_and_rows_not_chosen_by_it(config, estimator, block, works):
    put(config, algorithm__adv_estimator=estimator, actor_rollout_ref__rollout__free_cache_engine=False)
    put(config, algorithm__rredcot={"credit": {"form": "critic"}, **block})
    if works:
        settings = active_settings(config)
        assert settings.measures_uniform_groups
        put(config, algorithm__filter_groups={"enable": True})
        with pytest.raises(ValueError, match="filter_groups.enable=True with .*critic"):
            active_settings(config)
    else:
        with pytest.raises(ValueError, match="credit.form=critic takes v_0 for the mean reward"):
            active_settings(config)


@pytest.mark.parametrize(
    ("estimator", "block", "filtered", "form", "calibration"),
    [
        ("rredcot", {}, False, "critic", "logistic"),
        ("rredcot", {}, True, "td", "logistic"),
        ("rredcot", {"self_value": {"calibration": "none"}}, False, "td", "none"),
        ("rredcot", {"self_value": {"form": "hidden"}}, False, "critic", "none"),
        ("rredcot", {"credit": {"form": "reweight"}}, False, "reweight", "none"),
        ("rredcot", {"credit": {"form": "td"}}, False, "td", "logistic"),
        ("rredcot", {"source": "recipes.quickstart.oracle:Oracle"}, False, "reweight", "none"),
        ("vps", {}, False, "reweight", "none"),
        ("vineppo", {}, False, "reweight", "none"),
    ],
)
def test_form_and_calibration_are_settled_for_the_run(config, estimator, block, filtered, form, calibration):
    put(config, algorithm__adv_estimator=estimator, actor_rollout_ref__rollout__free_cache_engine=False)
    put(config, algorithm__rredcot=block, algorithm__filter_groups={"enable": filtered})
    settings = active_settings(config)
    assert (settings.credit.form, settings.self_value.calibration) == (form, calibration)
    assert settings == parse_block(config)


@pytest.mark.parametrize("estimator", sorted(OUTCOME_ESTIMATORS))
def test_enable_is_refused_for_estimators_that_sum_first(config, estimator):
    put(config, algorithm__adv_estimator=estimator, algorithm__rredcot__enable=True)
    with pytest.raises(ValueError, match=f"adv_estimator={estimator}: it sums the rewards"):
        active_settings(config)


def test_the_estimators_that_sum_first_are_verls():
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    assert set(OUTCOME_ESTIMATORS) <= set(ADV_ESTIMATOR_REGISTRY)


@pytest.mark.parametrize("estimator", ["rredcot", "gae", "reinforce_plus_plus"])
def test_enable_for_estimators_that_read_tokens(config, estimator):
    put(config, algorithm__adv_estimator=estimator, algorithm__rredcot__enable=True)
    assert active_settings(config) is not None


def test_a_faulty_block_is_told_even_where_it_is_not_used(config):
    put(config, algorithm__adv_estimator="grpo", algorithm__rredcot__credit__beta="much")
    with pytest.raises(ValueError, match="credit.beta='much'"):
        active_settings(config)


def test_switching_on_sets_what_is_needed_and_keeps_what_was_chosen(config, caplog):
    switch_on(config)
    assert config.actor_rollout_ref.rollout.agent.agent_loop_manager_class == AGENT_LOOP_MANAGER
    assert config.actor_rollout_ref.rollout.calculate_log_probs is True
    assert config.reward.reward_manager.name == "rredcot"
    assert caplog.text == ""
    put(config, reward__reward_manager__name="dapo")
    switch_on(config)
    assert config.reward.reward_manager.name == "dapo"
    assert "reward.reward_manager.name=dapo is kept" in caplog.text


def test_the_manager_that_asks_whose_words_they_are_is_told_in_runs_that_do_not_redistribute_too(config):
    agent = config.actor_rollout_ref.rollout.agent
    for name, own, expected in [
        ("naive", None, None),
        ("rredcot", None, TELLING_AGENT_LOOP_MANAGER),
        ("rredcot", "a.B", "a.B"),
    ]:
        put(config, reward__reward_manager__name=name, actor_rollout_ref__rollout__agent__agent_loop_manager_class=own)
        tell_whose_words(config)
        assert agent.agent_loop_manager_class == expected


def test_a_foreign_agent_loop_manager_is_refused(config):
    theirs = "verl.trainer.ppo.v1.agent_loop_tq.AgentLoopManagerTQ"
    put(config, actor_rollout_ref__rollout__agent__agent_loop_manager_class=theirs)
    with pytest.raises(ValueError, match=f"agent_loop_manager_class='{theirs}' must derive from"):
        switch_on(config)


@pytest.mark.parametrize("declared", [True, False])
def test_an_estimator_without_a_group_baseline_has_uniform_groups_measured(config, declared):
    """On the plain command the block holds what the user wrote and nothing else."""
    if not declared:
        with open_dict(config):
            config.algorithm.rredcot = {"enable": True}
    switch_on(put(config, algorithm__adv_estimator="gae", algorithm__rredcot__enable=True))
    assert parse_block(config).self_value.probe_uniform_groups
    with open_dict(config):
        config.algorithm.rredcot = {}
    switch_on(put(config, algorithm__adv_estimator="rredcot"))
    assert not parse_block(config).self_value.probe_uniform_groups


def test_log_probabilities_that_are_switched_on_are_reported(config, caplog):
    switch_on(put(config, actor_rollout_ref__rollout__calculate_log_probs=False))
    assert config.actor_rollout_ref.rollout.calculate_log_probs is True
    assert caplog.text.count("actor_rollout_ref.rollout.calculate_log_probs is switched on") == 1
    switch_on(config)
    assert caplog.text.count("is switched on") == 1


def test_max_sequence_length(config):
    put(config, actor_rollout_ref__rollout__max_model_len=None)
    put(config, actor_rollout_ref__rollout__prompt_length=100, actor_rollout_ref__rollout__response_length=50)
    for engine in ("rollout", "actor"):
        assert max_sequence_length(config, engine, None) == 150
        assert max_sequence_length(config, engine, 4096) == 4096
    # The server's own limit is not the training engine's.
    put(config, actor_rollout_ref__rollout__max_model_len=140)
    assert max_sequence_length(config, "rollout", 4096) == 140
    assert max_sequence_length(config, "actor", 4096) == 4096
    assert max_sequence_length(config, "actor", None) == 140


@pytest.mark.parametrize("key", ["full_determinism", "disaggregation__enabled"])
def test_rollout_modes_in_which_probes_would_go_wrong_are_refused(config, key):
    put(config, **{f"actor_rollout_ref__rollout__{key}": True})
    # Nothing is asked of the server while the training engine can read the probes.
    assert active_settings(config) is not None
    with pytest.raises(ValueError, match=key.replace("__", ".")):
        active_settings(put(config, **BY_SERVER))


def test_verls_own_penalty_widens_the_range(config):
    assert reward_penalty(config) == 0.0
    with open_dict(config):
        config.reward.reward_kwargs = {"overlong_buffer_cfg": {"enable": True, "penalty_factor": 1.5}}
    assert reward_penalty(config) == 1.5
    config.reward.reward_kwargs.overlong_buffer_cfg.enable = False
    assert reward_penalty(config) == 0.0


FIRST_IMPORT = """
import rredcot_verl.{module}
import verl.trainer.ppo.v1
from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
from rredcot_verl.trainer.estimator import compute_rredcot_advantage
from rredcot_verl.agent.reward_manager import RREDCoTRewardManager
from rredcot_verl.trainer.trainer import RREDCoTTrainerMixin
assert get_adv_estimator_fn("rredcot") is compute_rredcot_advantage
assert get_reward_manager_cls("rredcot") is RREDCoTRewardManager
assert set(TRAINER_REGISTRY) >= {{"sync"}}
# Once each: a stand-in of a stand-in would redistribute twice.
for trainer in TRAINER_REGISTRY.values():
    assert trainer.__mro__[1] is RREDCoTTrainerMixin and not issubclass(trainer.__mro__[2], RREDCoTTrainerMixin)
"""


def test_any_module_that_registers_can_be_imported_first():
    """In processes of their own (here verl is imported already), all at once to save time."""
    modules = ["trainer.estimator", "agent.reward_manager", "trainer.trainer", "agent.worker"]
    running = {
        module: subprocess.Popen(
            [sys.executable, "-c", FIRST_IMPORT.format(module=module)], stderr=subprocess.PIPE, text=True
        )
        for module in modules
    }
    failed = {}
    for module, process in running.items():
        _, errors = process.communicate(timeout=PATIENCE_S)
        if process.returncode:
            failed[module] = errors[-1000:]
    assert failed == {}


@pytest.mark.parametrize("estimator", SOURCES)
def test_every_peer_is_switched_on_by_its_name(config, estimator):
    put(config, algorithm__adv_estimator=estimator)
    settings = active_settings(config)
    assert settings is not None and run_source(config, settings).name == estimator
    put(config, algorithm__rredcot__enable=False)
    with pytest.raises(ValueError, match=f"contradicts algorithm.adv_estimator={estimator}"):
        active_settings(config)


@pytest.mark.parametrize("estimator", SOURCES)
def test_hidden_states_without_a_regression_are_refused(config, estimator):
    put(config, algorithm__adv_estimator=estimator, algorithm__rredcot__readout__use_hidden=True)
    put(config, algorithm__rredcot__self_value__calibration="none")
    with pytest.raises(ValueError, match="use_hidden=True with self_value.calibration=none"):
        active_settings(config)
    if estimator == "rredcot":
        put(config, algorithm__rredcot__self_value__calibration="auto")
        assert active_settings(config) is not None


def test_a_source_of_ones_own_is_named_in_the_config(config):
    put(config, algorithm__rredcot__source="tests.sources.test_every_source_on_cpu:Lengths")
    with open_dict(config):
        config.algorithm.rredcot.source_options = {"scale": 0.5}
    source = run_source(config, active_settings(config))
    assert type(source).__name__ == "Lengths" and source.options.scale == 0.5
    put(config, algorithm__rredcot__source="tests.nowhere:Lengths")
    with pytest.raises(ValueError, match="source='tests.nowhere:Lengths' cannot be imported"):
        active_settings(config)


CHANGED = {
    "source_options": {"scale": 2},
    "monte_carlo": {"num_rollouts": 3},
    "readout": {"window": 3},
    "readout.layer": -1,
    "readout.dim": 3,
    "self_value.engine": "actor",
    "self_value.share_prefix": False,
    "self_value.fuse": True,
    "self_value.form": "geometric",
    "self_value.calibration": "logistic",
    "self_value.proposals": "union",
    "self_value.reference_key": "extra_info.answer",
    "self_value.max_proposals": 2,
    "self_value.max_answer_tokens": 9,
    "self_value.max_closing_tokens": 9,
    "self_value.score_opening": True,
    "self_value.timeout_s": 9.0,
    "self_value.max_concurrency": 9,
}
BLOCKS = [{"self_value": {"form": "hidden"}}, {"self_value": {"calibration": "none"}}]
RUNS = [*((estimator, {}) for estimator in SOURCES), *(("rredcot", block) for block in BLOCKS)]


@pytest.mark.parametrize("estimator, block", RUNS)
def test_changed_settings_that_are_not_read_are_told_for_every_source(estimator, block):
    """All others are read, or refused."""
    assert set(CHANGED) == set(SPECIFIC)

    def config_of(block):
        return OmegaConf.create({"algorithm": {"adv_estimator": estimator, "rredcot": block}})

    config = config_of(block)
    source = run_source(config, parse_block(config))
    assert unread_settings(config, parse_block(config), source) == []
    for key, value in CHANGED.items():
        part, _, name = key.partition(".")
        changed = block | {part: block.get(part, {}) | {name: value} if name else value}
        # A block that is named whole needs no line for a key in it.
        named = part if part == "readout" and part not in source.reads() else key
        found = unread_settings(config, parse_block(config_of(changed)), source)
        assert found == ([] if key in source.reads() else [f"algorithm.rredcot.{named}"]), key


@pytest.mark.parametrize(
    "estimator, values, named",
    [
        ("rredcot", {"monte_carlo__num_rollouts": 3}, ["monte_carlo"]),
        ("rredcot", {"readout__dim": 3, "readout__window": 3, "self_value__calibration": "none"}, ["readout"]),
        (
            "vineppo",
            {"self_value__proposals": "union", "readout__dim": 3, "self_value__form": "geometric"},
            ["readout", "self_value.form", "self_value.proposals"],
        ),
        ("leave_one_out", {"monte_carlo__num_rollouts": 3, "readout__layer": 3}, ["monte_carlo", "readout"]),
        ("gae", {"credit__beta": 3.0, "enable": True}, ["credit"]),
        (
            "rredcot",
            {"credit__form": "td", "credit__beta": 3.0, "credit__pinned": False},
            ["credit.beta", "credit.pinned"],
        ),
        ("vps", {"credit__lam": 0.5, "credit__beta": 2.0}, ["credit.lam"]),
    ],
)
def test_they_are_said_once_and_together(config, caplog, estimator, values, named):
    put(config, algorithm__adv_estimator=estimator, **{f"algorithm__rredcot__{k}": v for k, v in values.items()})
    settings = active_settings(config)
    warn_of_unread(config, settings, run_source(config, settings))
    (record,) = caplog.records
    keys = ", ".join(f"algorithm.rredcot.{name}" for name in named)
    run = f"adv_estimator={estimator} with credit.form={settings.credit.form}"
    assert f"{run} does not read {keys}, which the config changes" in record.getMessage()


@pytest.mark.parametrize("form, doubtful", [("critic", True), ("td", True), ("reweight", False)])
@pytest.mark.parametrize(
    "values, named",
    [
        ({}, None),
        ({"loss_agg_mode": "seq-mean-token-sum"}, None),
        ({"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 1024}, None),
        ({"loss_agg_mode": "seq-mean-token-sum-norm"}, "loss_agg_mode=seq-mean-token-sum-norm without"),
        ({"loss_agg_mode": "seq-mean-token-mean"}, "loss_agg_mode=seq-mean-token-mean divides"),
        ({"policy_loss__loss_mode": "sapo"}, "policy_loss.loss_mode=sapo divides"),
    ],
)
def test_a_loss_that_divides_by_the_own_length_is_told(config, form, doubtful, values, named):
    put(
        config,
        algorithm__rredcot__credit__form=form,
        **{f"actor_rollout_ref__actor__{k}": v for k, v in values.items()},
    )
    found = expectation_doubts(config, active_settings(config))
    assert len(found) == int(named is not None and doubtful)
    assert all(f"actor_rollout_ref.actor.{named}" in doubt for doubt in found)


def test_a_sampler_of_ones_own_may_choose_by_the_reward(config):
    put(config, trainer__v1__sampler__custom_sampler__path="mine.py")
    (doubt,) = expectation_doubts(config, active_settings(config))
    assert "trainer.v1.sampler.custom_sampler.path" in doubt and "credit.form=td" in doubt
    put(config, algorithm__rredcot__credit__form="td")
    assert expectation_doubts(config, active_settings(config)) == []
