"""What is checked of verl's config before vLLM is asked for probes, and what is registered."""

import logging

import pytest
from omegaconf import OmegaConf
from verl.workers.rollout.replica import RolloutReplicaRegistry

from rredcot_verl.servers import replicas, vllm_settings

ROLLOUT = {
    "name": "vllm",
    "temperature": 1.0,
    "logprobs_mode": "processed_logprobs",
    "enable_prefix_caching": True,
    "data_parallel_size": 1,
    "full_determinism": False,
    "disaggregation": {"enabled": False},
    "mtp": {"enable": False, "enable_rollout": False},
    "engine_kwargs": {"vllm": {}},
}


def verl_config(**rollout):
    return OmegaConf.create({"actor_rollout_ref": {"rollout": ROLLOUT | rollout}})


@pytest.mark.parametrize(
    "rollout",
    [
        {},
        {"temperature": 0.7},
        {"top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1},
        {"logprobs_mode": "raw_logprobs"},
        {"mtp": {"enable": True, "enable_rollout": False}},
    ],
)
def test_what_can_be_scored_passes(rollout):
    vllm_settings.check(verl_config(**rollout))


@pytest.mark.parametrize(
    "rollout, message",
    [
        ({"full_determinism": True}, "full_determinism=True"),
        ({"disaggregation": {"enabled": True}}, "disaggregation.enabled=True"),
        ({"mtp": {"enable": True, "enable_rollout": True}}, "speculatively"),
        ({"engine_kwargs": {"vllm": {"speculative_config": {"method": "ngram"}}}}, "speculatively"),
        ({"temperature": 0.0}, "positive temperature"),
        ({"logprobs_mode": "raw_logprobs", "temperature": 0.7}, "use logprobs_mode=processed_logprobs"),
        ({"engine_kwargs": {"vllm": {"logprobs_mode": "raw_logprobs"}}, "temperature": 0.7}, "raw_logprobs"),
        ({"logprobs_mode": "processed_logits"}, "gives no log-probabilities"),
    ],
)
def test_what_cannot_is_refused_with_the_key(rollout, message):
    with pytest.raises(ValueError, match=message):
        vllm_settings.check(verl_config(**rollout))


@pytest.mark.parametrize(
    "rollout, words",
    [
        ({}, None),
        ({"enable_prefix_caching": False}, "enable_prefix_caching=False"),
        ({"engine_kwargs": {"vllm": {"enable_prefix_caching": False}}}, "enable_prefix_caching=False"),
        ({"data_parallel_size": 2}, "data_parallel_size=2"),
    ],
)
def test_what_makes_scoring_slow_is_logged(rollout, words, caplog):
    with caplog.at_level(logging.WARNING):
        vllm_settings.warn(verl_config(**rollout))
    assert [record.getMessage() for record in caplog.records] == [] if words is None else words in caplog.text


def test_backends_without_a_server_of_ours_are_left_alone():
    before = dict(RolloutReplicaRegistry._registry)
    replicas.use_probing_servers("rredcot_cpu")
    replicas.use_probing_servers("trtllm")
    assert before == RolloutReplicaRegistry._registry


def test_our_server_takes_the_place_of_verls_own(monkeypatch):
    class Stock:
        pass

    monkeypatch.setattr(RolloutReplicaRegistry, "_registry", {"vllm": lambda: Stock, "sglang": lambda: Stock})
    monkeypatch.setattr(replicas, "REPLICAS", {"vllm": ("collections", "OrderedDict")})
    replicas.use_probing_servers("vllm")
    replicas.use_probing_servers("sglang")
    assert RolloutReplicaRegistry.get("vllm").__name__ == "OrderedDict"
    assert RolloutReplicaRegistry.get("sglang") is Stock
