"""Checks of the composed config: verl's own, ours, and what verl would find out only after Ray has started."""

import difflib
import functools
import math
import os
from collections.abc import Callable
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.cpu import ROLLOUT_NAME, check_rollout
from rredcot_verl.preflight.findings import Findings
from rredcot_verl.preflight.quiet import quiet
from rredcot_verl.run.settings import active_settings, expectation_doubts, run_source, unread_settings
from rredcot_verl.sources.engines import ulysses_size, without_tokenizer

_RAISED_BY_VERL = (AssertionError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError, HydraException)
_MODEL = "actor_rollout_ref.model"
_DATACLASSES = ("actor_rollout_ref.rollout", "actor_rollout_ref.rollout.checkpoint_engine", _MODEL)
"""Parts of the config that verl's workers turn into dataclasses, which refuse unknown keys and bad values."""
_COUNTS = (
    "data.train_batch_size",
    "data.max_prompt_length",
    "data.max_response_length",
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "actor_rollout_ref.rollout.data_parallel_size",
    "actor_rollout_ref.rollout.max_num_seqs",
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu",
    "actor_rollout_ref.actor.ppo_mini_batch_size",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "trainer.v1.separate_async.parameter_sync_step",
    "actor_rollout_ref.actor.megatron.tensor_model_parallel_size",
    "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size",
    "actor_rollout_ref.actor.megatron.context_parallel_size",
    "actor_rollout_ref.actor.megatron.expert_model_parallel_size",
)
_NUMBERS = (
    "actor_rollout_ref.actor.optim.lr",
    "actor_rollout_ref.rollout.temperature",
    "actor_rollout_ref.rollout.gpu_memory_utilization",
    "trainer.test_freq",
    "trainer.save_freq",
)

_LEGACY = {
    "custom_reward_function": "reward.custom_reward_function",
    "sandbox_fusion": "reward.sandbox_fusion",
    "reward_model": "reward (reward.reward_manager.name, reward.num_workers, reward.reward_model)",
}
"""Blocks of verl's older trainer, all null by default, and where the V1 trainer reads the same."""
_COMPARES = ("grpo", "grpo_passk", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "gdpo")
"""Estimators of verl's whose baseline is a prompt's other rollouts."""


def check_values(config: DictConfig, findings: Findings) -> bool:
    """Values are set, lead somewhere, and are numbers where they are counted with; False where other checks stumble."""
    unused = () if config.reward.reward_model.enable else ("reward.reward_model.",)
    try:
        missing = sorted(key for key in OmegaConf.missing_keys(config) if not key.startswith(unused))
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        findings.fault(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}")
        return False
    num_faults = len(findings.faults)
    for key in missing:
        findings.fault(f"{key} is not set")
    for key in (*_COUNTS, *_NUMBERS):
        value = OmegaConf.select(config, key, throw_on_missing=False)
        if key in _NUMBERS:
            if not isinstance(value, int | float):
                findings.fault(f"{key}={value!r}: expected a number")
        # The training engine may have no such key.
        elif value is not None and not (isinstance(value, int) and value > 0):
            findings.fault(f"{key}={value!r}: expected a positive whole number")
    return len(findings.faults) == num_faults


def check_settings(config: DictConfig, findings: Findings) -> RREDCoTConfig | None:
    """RREDCoT's own settings; None for a run without it, or with a fault."""
    try:
        settings = active_settings(config)
    except ValueError as error:
        for line in str(error).splitlines():
            findings.fault(line)
        return None
    if settings is not None:
        run = f"algorithm.adv_estimator={config.algorithm.adv_estimator} with credit.form={settings.credit.form}"
        for key in unread_settings(config, settings, run_source(config, settings)):
            findings.warn(f"{key}: {run} does not read it")
        for doubt in expectation_doubts(config, settings):
            findings.warn(doubt)
    return settings


def check_names(config: DictConfig, findings: Findings) -> None:
    """What verl would find unknown at the first update, or composes and never reads."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    name = str(config.algorithm.adv_estimator)
    if name not in ADV_ESTIMATOR_REGISTRY:
        known = sorted(ADV_ESTIMATOR_REGISTRY)
        close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.7)
        meant = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        findings.fault(f"algorithm.adv_estimator={name} is not registered; {meant}")
    for key, place in _LEGACY.items():
        for path in _set_leaves(config.get(key), key):
            findings.fault(f"{path} is not read by verl's V1 trainer; set it under {place}")
    if name in _COMPARES and config.actor_rollout_ref.rollout.n == 1:
        findings.warn(
            f"actor_rollout_ref.rollout.n=1 with algorithm.adv_estimator={name}, which compares the rollouts of a "
            "prompt: there is nothing to compare with, and the advantage is the reward itself"
        )


def _set_leaves(node: Any, key: str) -> list[str]:
    """Dotted keys of what is set below a node."""
    if isinstance(node, DictConfig):
        return [path for name in map(str, node) for path in _set_leaves(node[name], f"{key}.{name}")]
    return [] if node is None else [key]


def check_with_verl(config: DictConfig, findings: Findings, *, with_model: bool) -> bool:
    """verl's `validate_config`, and the dataclasses its workers make of the config.

    The model is left out unless its own config can be read (`with_model`).

    Returns:
        bool: Whether verl could make a model's config of `actor_rollout_ref.model`.
    """
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    def validate() -> None:
        validate_config(config, need_reference_policy(config), need_critic(config))

    attempts: dict[str, Callable[[], Any]] = {"validate_config": validate}
    for key in _DATACLASSES if with_model else _DATACLASSES[:-1]:
        node = OmegaConf.select(config, key)
        if key == _MODEL:
            node = without_tokenizer(node)
        attempts[key] = functools.partial(omega_conf_to_dataclass, node)
    good = with_model
    for name, attempt in attempts.items():
        with quiet():
            try:
                attempt()
            except ImportError as error:
                findings.skip(f"verl's own check of {name} stopped at a missing package: {error}")
            except _RAISED_BY_VERL as error:
                good = good and name != _MODEL
                # Hydra wraps what a dataclass says.
                cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
                findings.fault(f"verl: {name}: {str(cause).strip() or type(cause).__name__}")
    return good


def check_cpu_server(config: DictConfig, findings: Findings) -> None:
    """What the CPU backend's rollout server cannot do."""
    rollout = config.actor_rollout_ref.rollout
    if rollout.name == ROLLOUT_NAME:
        try:
            check_rollout(rollout)
        except ValueError as error:
            findings.fault(f"actor_rollout_ref.{error}")


def check_mode(config: DictConfig, findings: Findings) -> None:
    """What verl's asynchronous trainers want, which it asserts in a Ray worker."""
    if config.trainer.v1.trainer_mode != "separate_async":
        return
    rollout, updates = config.actor_rollout_ref.rollout, config.trainer.v1.separate_async.parameter_sync_step
    batch, mini_batch = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    if batch != updates * mini_batch:
        findings.fault(
            f"data.train_batch_size={batch} must be trainer.v1.separate_async.parameter_sync_step={updates} times "
            f"actor_rollout_ref.actor.ppo_mini_batch_size={mini_batch}"
        )
    for key in ("nnodes", "n_gpus_per_node"):
        if not rollout[key] > 0:
            findings.fault(f"actor_rollout_ref.rollout.{key}={rollout[key]}: separate_async needs GPUs that generate")
    if rollout.checkpoint_engine.backend == "naive":
        findings.fault(
            "actor_rollout_ref.rollout.checkpoint_engine.backend=naive cannot send weights to other GPUs; use nccl"
        )
    quiet_verl = os.environ.get("VERL_LOGGING_LEVEL", "INFO").upper() not in ("INFO", "DEBUG", "NOTSET")
    if not config.actor_rollout_ref.get("hybrid_engine", True) and not quiet_verl:
        findings.fault(
            "actor_rollout_ref.hybrid_engine=False: verl 0.9.1 ends with a TypeError in its own log line; leave it "
            "true, or set VERL_LOGGING_LEVEL=WARN in the environment of every process"
        )
    model = config.actor_rollout_ref.model
    if (model.get("lora_rank", 0) or model.lora.get("rank", 0)) and not model.lora.get("merge"):
        findings.fault(
            "actor_rollout_ref.model.lora.merge=False with separate_async: verl sends the standalone servers the base "
            "weights only, so they would never see the adapter; set it to true"
        )


def check_placement(config: DictConfig, findings: Findings) -> None:
    """GPUs divide into servers and model-parallel groups, and batches into data-parallel ranks."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    num_gpus = config.trainer.nnodes * config.trainer.n_gpus_per_node
    server = rollout.tensor_model_parallel_size * rollout.data_parallel_size
    pools = {"trainer.nnodes * trainer.n_gpus_per_node": num_gpus}
    if config.trainer.v1.trainer_mode == "separate_async":
        pools["actor_rollout_ref.rollout.nnodes * n_gpus_per_node"] = rollout.nnodes * rollout.n_gpus_per_node
    if config.data.train_batch_size < actor.ppo_mini_batch_size:
        findings.fault(
            f"data.train_batch_size={config.data.train_batch_size} is less than actor_rollout_ref.actor."
            f"ppo_mini_batch_size={actor.ppo_mini_batch_size}: not one update a step"
        )
    for key, pool in pools.items():
        if pool % server:
            findings.fault(
                f"{key}={pool} is no multiple of a rollout server's GPUs, actor_rollout_ref.rollout."
                f"tensor_model_parallel_size * data_parallel_size={server}"
            )
    ranks = num_gpus
    if actor.strategy == "megatron":
        megatron = actor.megatron
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        group = math.prod(megatron[size] for size in sizes)
        if num_gpus % group:
            findings.fault(f"{num_gpus} training GPUs are no multiple of {' * '.join(sizes)}={group} of actor.megatron")
            return
        ranks = num_gpus // group
        experts = megatron.expert_model_parallel_size * megatron.pipeline_model_parallel_size
        expert_group = experts * (megatron.expert_tensor_parallel_size or megatron.tensor_model_parallel_size)
        if num_gpus % expert_group:
            findings.fault(
                f"{num_gpus} training GPUs are no multiple of expert_model_parallel_size * expert_tensor_parallel_size "
                f"* pipeline_model_parallel_size={expert_group} of actor.megatron"
            )
    else:
        group = ulysses_size(actor)
        if num_gpus % group:
            findings.fault(f"{num_gpus} training GPUs are no multiple of ulysses_sequence_parallel_size={group}")
            return
        ranks = num_gpus // group
    rows = actor.ppo_mini_batch_size * rollout.n
    if ranks and rows % ranks:
        findings.fault(
            f"actor_rollout_ref.actor.ppo_mini_batch_size * rollout.n={rows} responses are no multiple of the {ranks} "
            "data-parallel ranks"
        )


def check_lengths(config: DictConfig, max_length: int | None, findings: Findings) -> None:
    """Prompt and response fit into the model, the server and a training pass. Lengths in tokens."""
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    longest = config.data.max_prompt_length + config.data.max_response_length
    said = f"data.max_prompt_length + data.max_response_length={longest}"
    if max_length is not None and longest > max_length:
        findings.fault(f"{said} is longer than the model's {max_length} (max_position_embeddings)")
    if rollout.max_model_len is not None:
        if longest > rollout.max_model_len:
            findings.fault(f"{said} is longer than actor_rollout_ref.rollout.max_model_len={rollout.max_model_len}")
        if max_length is not None and rollout.max_model_len > max_length:
            findings.fault(
                f"actor_rollout_ref.rollout.max_model_len={rollout.max_model_len} is longer than the model's "
                f"{max_length}"
            )
    passes = (
        ("actor.ppo_max_token_len_per_gpu", actor.use_dynamic_bsz),
        ("rollout.log_prob_max_token_len_per_gpu", rollout.log_prob_use_dynamic_bsz),
    )
    for key, dynamic in passes:
        budget = OmegaConf.select(config.actor_rollout_ref, key)
        # Megatron's context parallelism and Ulysses split a pass over several GPUs.
        if dynamic and budget * _gpus_per_pass(actor) < longest:
            findings.fault(f"{said} does not fit into a pass of actor_rollout_ref.{key}={budget}")


def _gpus_per_pass(actor: DictConfig) -> int:
    if actor.strategy == "megatron":
        return int(actor.megatron.context_parallel_size)
    return ulysses_size(actor)
