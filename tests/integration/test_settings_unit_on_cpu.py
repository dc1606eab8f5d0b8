"""Settings against verl's own composed config."""

import copy
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf, open_dict

from rredcot_verl.integration.settings import (
    AGENT_LOOP_MANAGER,
    OUTCOME_ESTIMATORS,
    active_settings,
    max_sequence_length,
    parse_block,
    switch_on,
)
from rredcot_verl.integration.start_up import CheckSettings


@pytest.fixture(scope="module")
def composed():
    with initialize_config_module("rredcot_verl.config", version_base=None):
        return compose("rredcot_trainer", overrides=["actor_rollout_ref.rollout.name=vllm"])


@pytest.fixture
def config(composed):
    return copy.deepcopy(composed)


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


def test_a_config_without_our_block(config):
    with open_dict(config):
        del config.algorithm["rredcot"]
    assert active_settings(config) == parse_block(config)
    assert active_settings(put(config, algorithm__adv_estimator="grpo")) is None
    with pytest.raises(ValueError, match="algorithm.rredcot='on': expected a block"):
        active_settings(put(config, algorithm__rredcot="on"))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"algorithm__use_kl_in_reward": True}, "algorithm.use_kl_in_reward=True.*use_kl_loss=True"),
        ({"actor_rollout_ref__rollout__name": "sglang"}, "rollout.name='sglang'.*rredcot_cpu.*vllm"),
        ({"trainer__v1__trainer_mode": "colocate_async"}, "trainer_mode='colocate_async'.*'sync'"),
        ({"trainer__use_v1": False}, "trainer.use_v1=False"),
        ({"algorithm__rredcot__enable": False}, "enable=False contradicts.*leave it null"),
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
    ],
)
def test_what_does_not_fit_is_named(config, values, message):
    with pytest.raises(ValueError, match=message):
        active_settings(put(config, **values))
    with pytest.raises(SystemExit, match="rredcot: "):
        CheckSettings().on_job_start(config)


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


def test_a_foreign_agent_loop_manager_is_refused(config):
    theirs = "verl.trainer.ppo.v1.agent_loop_tq.AgentLoopManagerTQ"
    put(config, actor_rollout_ref__rollout__agent__agent_loop_manager_class=theirs)
    with pytest.raises(ValueError, match=f"agent_loop_manager_class='{theirs}' must derive from"):
        switch_on(config)


def test_a_temperature_that_vllm_does_not_apply_is_reported(config, caplog):
    active_settings(config)
    assert "temperature" not in caplog.text
    active_settings(put(config, actor_rollout_ref__rollout__temperature=0.6))
    assert "temperature=0.6" in caplog.text


def test_max_sequence_length(config):
    put(config, actor_rollout_ref__rollout__max_model_len=None)
    put(config, actor_rollout_ref__rollout__prompt_length=100, actor_rollout_ref__rollout__response_length=50)
    assert max_sequence_length(config) == 150
    assert max_sequence_length(put(config, actor_rollout_ref__rollout__max_model_len=140)) == 140


@pytest.mark.xfail(strict=True, reason="BUG: the plugin's hook asks the half-imported module for `register`")
def test_the_estimators_module_can_be_imported_first():
    # In a process of its own: here verl is imported already.
    command = [sys.executable, "-c", "import rredcot_verl.integration.estimator"]
    assert subprocess.run(command, capture_output=True).returncode == 0
