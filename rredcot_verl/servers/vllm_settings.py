"""Checks of verl's config for runs in which vLLM reads the probes. Imports no vllm: they run before Ray starts."""

import logging
from typing import Any

from omegaconf import DictConfig, OmegaConf

logger = logging.getLogger(__name__)

_ROLLOUT = "actor_rollout_ref.rollout"


def check(config: DictConfig) -> None:
    """Check verl's rollout settings. Changes nothing: reading probes needs no engine argument.

    Args:
        config: verl's whole config.

    Raises:
        ValueError: vLLM would give log-probabilities of another distribution than the one sampled from, or none.
    """
    rollout = config.actor_rollout_ref.rollout
    for key in ("full_determinism", "disaggregation.enabled"):
        if OmegaConf.select(rollout, key):
            raise ValueError(
                f"{_ROLLOUT}.{key}=True: probes need requests of their own on the server that holds the trace's "
                "prefix; RREDCoT does not support it"
            )
    mtp = OmegaConf.select(rollout, "mtp.enable") and OmegaConf.select(rollout, "mtp.enable_rollout")
    if mtp or _engine_value(rollout, "speculative_config", None):
        raise ValueError(
            f"{_ROLLOUT}: vLLM gives no log-probabilities of chosen tokens (logprob_token_ids) while it decodes "
            "speculatively; switch mtp.enable_rollout and engine_kwargs.vllm.speculative_config off"
        )
    mode = _engine_value(rollout, "logprobs_mode", "processed_logprobs")
    if rollout.temperature <= 0:
        raise ValueError(f"{_ROLLOUT}.temperature={rollout.temperature}: probes need a positive temperature")
    if mode == "raw_logprobs" and rollout.temperature != 1.0:
        raise ValueError(
            f"{_ROLLOUT}.logprobs_mode=raw_logprobs reads probes at temperature 1, but "
            f"{_ROLLOUT}.temperature={rollout.temperature}; use logprobs_mode=processed_logprobs, verl's default"
        )
    if mode not in ("processed_logprobs", "raw_logprobs"):
        raise ValueError(
            f"{_ROLLOUT}.logprobs_mode={mode} gives no log-probabilities; use processed_logprobs, verl's default"
        )


def warn(config: DictConfig) -> None:
    """Log what makes reading probes slow. To be called once a run."""
    rollout = config.actor_rollout_ref.rollout
    if not _engine_value(rollout, "enable_prefix_caching", True):
        logger.warning("rredcot: %s.enable_prefix_caching=False, so every probe computes its whole prefix", _ROLLOUT)
    if rollout.data_parallel_size > 1:
        logger.warning(
            "rredcot: %s.data_parallel_size=%s: vLLM spreads the probes of a trace over its ranks, each of which "
            "computes the trace once more; see rredcot's recomputed tokens",
            _ROLLOUT,
            rollout.data_parallel_size,
        )


def _engine_value(rollout: DictConfig, key: str, default: Any) -> Any:
    """A setting as vLLM gets it: `engine_kwargs.vllm` stands above verl's own key."""
    for path in (f"engine_kwargs.vllm.{key}", key):
        value = OmegaConf.select(rollout, path)
        if value is not None:
            return value
    return default
