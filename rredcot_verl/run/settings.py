"""Settings of a run: `algorithm.rredcot`, checked against the rest of verl's config, and what it switches on."""

import logging
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from rredcot_verl.answers.grammar import formats_of
from rredcot_verl.config.schema import PREFIX, RREDCoTConfig, parse
from rredcot_verl.config.sources import ATTRIBUTIONS, MONTE_CARLO, SOURCES, source_of
from rredcot_verl.core.segmentation import get_segmenter
from rredcot_verl.run.capabilities import why_server_cannot_score
from rredcot_verl.sources.monte_carlo import check_monte_carlo

logger = logging.getLogger(__name__)

AGENT_LOOP_MANAGER = "rredcot_verl.agent.worker.RREDCoTAgentLoopManager"
TRAINER_MODES = ("sync", "colocate_async", "separate_async")
"""Values of `trainer.v1.trainer_mode`."""
OUTCOME_ESTIMATORS = frozenset(
    {"grpo", "grpo_vectorized", "grpo_passk", "gdpo", "reinforce_plus_plus_baseline", "rloo", "rloo_vectorized"}
    | {"opo", "gpg"}
)
"""verl estimators that sum a response's rewards first: where they stand in the response makes no difference to them."""


def parse_block(config: DictConfig) -> RREDCoTConfig:
    """Read the `algorithm.rredcot` block of verl's config; the defaults where it has none.

    `self_value.form=auto` is settled by the estimator.

    Raises:
        ValueError: As `rredcot_verl.config.schema.parse`.
    """
    block = OmegaConf.select(config, PREFIX)
    if block is not None and not isinstance(block, DictConfig):
        raise ValueError(f"{PREFIX}={block!r}: expected a block of settings")
    settings = parse(None if block is None else OmegaConf.to_container(block, resolve=True))  # type: ignore[arg-type]
    if settings.self_value.form != "auto":
        return settings
    form = "geometric" if run_source(config) in ("vps", "mig") else "joint"
    return settings.model_copy(update={"self_value": settings.self_value.model_copy(update={"form": form})})


def run_source(config: DictConfig) -> str:
    """Where a run's segment values come from, one of `config.sources.SOURCES`."""
    return source_of(str(OmegaConf.select(config, "algorithm.adv_estimator")))


def active_settings(config: DictConfig) -> RREDCoTConfig | None:
    """The settings of a run that redistributes; None for a run that does not ask for it.

    Raises:
        ValueError: The block is faulty (also where it is not used: a typing error should not wait for its day), or does
            not fit the rest of the config. The message names key, value and what is allowed.
    """
    settings = parse_block(config)
    estimator = str(config.algorithm.adv_estimator)
    if estimator in SOURCES and settings.enable is False:
        raise ValueError(f"{PREFIX}.enable=False contradicts algorithm.adv_estimator={estimator}; leave it null")
    if estimator not in SOURCES and not settings.enable:
        return None
    if estimator in OUTCOME_ESTIMATORS:
        raise ValueError(
            f"{PREFIX}.enable=True with algorithm.adv_estimator={estimator}: it sums the rewards of a response, so "
            "redistribution would change nothing; use algorithm.adv_estimator=rredcot or one that reads token-level "
            "rewards, e.g. reinforce_plus_plus or gae"
        )
    get_segmenter(settings.segmentation.method)
    formats_of(settings.elicitation)
    _check_source(run_source(config), settings)
    _check_run(config, settings)
    return settings


def _check_source(source: str, settings: RREDCoTConfig) -> None:
    value = settings.self_value
    asked = [
        name
        for name, on in (
            (f"self_value.calibration={value.calibration}", value.calibration != "none"),
            ("self_value.form=hidden", value.form == "hidden"),
        )
        if on
    ]
    if asked and source != "rredcot":
        raise ValueError(
            f"{PREFIX}.{asked[0]} with algorithm.adv_estimator={source}: only rredcot's values are regressed on the "
            "outcome; use algorithm.adv_estimator=rredcot or leave it out"
        )
    if settings.readout.use_hidden and not settings.reads_hidden_states():
        raise ValueError(
            f"{PREFIX}.readout.use_hidden=True with self_value.calibration=none: nothing is regressed; set "
            "self_value.calibration=logistic or self_value.form=hidden"
        )


def unread_settings(config: DictConfig, settings: RREDCoTConfig) -> list[str]:
    """Keys that the config changes and the run's source does not read."""
    source, value = run_source(config), settings.self_value
    default = RREDCoTConfig()
    unused = {
        "monte_carlo": source != MONTE_CARLO,
        "attribution": source not in ATTRIBUTIONS,
        "readout": value.calibration == "none" and value.form != "hidden",
    }
    unused["credit"] = str(config.algorithm.adv_estimator) not in SOURCES
    changed = [name for name, idle in unused.items() if idle and getattr(settings, name) != getattr(default, name)]
    if not settings.reads_probes(source):
        names = ["engine", "share_prefix", "proposals", "max_proposals", "max_answer_tokens", "max_closing_tokens"]
        names += ["score_opening", "timeout_s", "max_concurrency"]
        names += [] if settings.reads_references(source) else ["reference_key"]
        changed += [f"self_value.{n}" for n in names if getattr(value, n) != getattr(default.self_value, n)]
        # Settled by the estimator, so compared with what it settles.
        changed += ["self_value.form"] if value.form not in ("joint", "hidden") else []
    elif settings.regresses() and not settings.reads_hidden_states():
        names = ["layer", "dim"]
        changed += [f"readout.{n}" for n in names if getattr(settings.readout, n) != getattr(default.readout, n)]
    return [f"{PREFIX}.{name}" for name in changed]


def warn_of_unread(config: DictConfig, settings: RREDCoTConfig) -> None:
    """Say once what the config changes for nothing."""
    unread = unread_settings(config, settings)
    if unread:
        logger.warning(
            "rredcot: algorithm.adv_estimator=%s does not read %s, which the config changes",
            config.algorithm.adv_estimator,
            ", ".join(unread),
        )


def _check_run(config: DictConfig, settings: RREDCoTConfig) -> None:
    trainer = config.trainer
    if not trainer.get("use_v1", True):
        raise ValueError("trainer.use_v1=False: RREDCoT needs verl's V1 trainer, set trainer.use_v1=True")
    mode = trainer.v1.trainer_mode
    if mode not in TRAINER_MODES:
        raise ValueError(f"trainer.v1.trainer_mode={mode!r}: RREDCoT supports {', '.join(map(repr, TRAINER_MODES))}")
    obstacle = why_server_cannot_score(config)
    if settings.self_value.engine == "rollout" and obstacle is not None:
        raise ValueError(f"{PREFIX}.self_value.engine=rollout: {obstacle}; use self_value.engine=actor")
    if config.algorithm.use_kl_in_reward:
        raise ValueError(
            "algorithm.use_kl_in_reward=True puts a KL term on every token's reward, which has no place in a "
            "redistributed outcome; use actor_rollout_ref.actor.use_kl_loss=True instead"
        )
    reward_model = config.reward.reward_model
    colocated = reward_model.enable and not reward_model.enable_resource_pool
    samples = run_source(config) == MONTE_CARLO
    if samples:
        check_monte_carlo(config, settings)
    if colocated and samples:
        raise ValueError(
            f"algorithm.adv_estimator={MONTE_CARLO} needs the rewards of its continuations while they are rolled out, "
            "but reward.reward_model.enable_resource_pool=False computes rewards later; use a resource pool"
        )
    needs_rewards = settings.self_value.proposals == "group" or settings.self_value.form == "normalized"
    if colocated and needs_rewards:
        value = settings.self_value
        raise ValueError(
            f"{PREFIX}.self_value.proposals={value.proposals} with form={value.form} needs the reward of a response "
            "while it is rolled out, but reward.reward_model.enable_resource_pool=False computes it later; use "
            "reference and joint, or a resource pool"
        )


def switch_on(config: DictConfig) -> None:
    """Set, in verl's config, what the method needs of rollout and reward. Anything the user chose is kept or refused.

    Raises:
        ValueError: The user's own agent loop manager does not derive from ours.
    """
    rollout, reward_manager = config.actor_rollout_ref.rollout, config.reward.reward_manager
    chosen = rollout.agent.get("agent_loop_manager_class")
    if chosen and chosen != AGENT_LOOP_MANAGER:
        from verl.utils.import_utils import load_class_from_fqn

        ours = load_class_from_fqn(AGENT_LOOP_MANAGER, "AgentLoopManager")
        if not issubclass(load_class_from_fqn(chosen, "AgentLoopManager"), ours):
            raise ValueError(
                f"actor_rollout_ref.rollout.agent.agent_loop_manager_class={chosen!r} must derive from "
                f"{AGENT_LOOP_MANAGER}, which scores the probes"
            )
    if not rollout.calculate_log_probs:
        logger.warning("rredcot: actor_rollout_ref.rollout.calculate_log_probs is switched on, segments need it")
    with open_dict(config):
        rollout.agent.agent_loop_manager_class = chosen or AGENT_LOOP_MANAGER
        rollout.calculate_log_probs = True
        if reward_manager.source == "register" and reward_manager.name == "naive":
            reward_manager.name = "rredcot"
    if reward_manager.name != "rredcot":
        logger.warning(
            "rredcot: reward.reward_manager.name=%s is kept; rewards must lie in %s.self_value.reward_range, and the "
            "diagnostics answer_found and answer_position are not reported",
            reward_manager.name,
            PREFIX,
        )


def max_sequence_length(config: DictConfig, engine: str, max_position_embeddings: int | None) -> int:
    """Longest sequence that can be scored, in tokens.

    The model's own for the training engine; the rollout server's as verl's servers take it, the model's where not set.
    """
    rollout: Any = config.actor_rollout_ref.rollout
    if engine == "actor" and max_position_embeddings:
        return max_position_embeddings
    return int(rollout.max_model_len or max_position_embeddings or rollout.prompt_length + rollout.response_length)


def reward_penalty(config: DictConfig) -> float:
    """How far below the verifier's lowest reward verl's own shaping may go (DAPO's penalty for overlong responses)."""
    penalty = OmegaConf.select(config, "reward.reward_kwargs.overlong_buffer_cfg")
    return float(penalty.penalty_factor) if penalty is not None and penalty.enable else 0.0
