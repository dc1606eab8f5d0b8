"""Settings of a run: `algorithm.rredcot`, checked against the rest of verl's config, and what it switches on."""

import logging
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from rredcot_verl.answers.grammar import formats_of
from rredcot_verl.config.schema import PREFIX, RREDCoTConfig, parse
from rredcot_verl.core.segmentation import get_segmenter
from rredcot_verl.sources.base import Source
from rredcot_verl.sources.registry import DEFAULT, SOURCES, SPECIFIC, make_source

logger = logging.getLogger(__name__)

AGENT_LOOP_MANAGER = "rredcot_verl.agent.worker.RREDCoTAgentLoopManager"
TELLING_AGENT_LOOP_MANAGER = "rredcot_verl.agent.worker.TellingAgentLoopManager"
TRAINER_MODES = ("sync", "colocate_async", "separate_async")
"""Values of `trainer.v1.trainer_mode`."""
OUTCOME_ESTIMATORS = frozenset(
    {"grpo", "grpo_vectorized", "grpo_passk", "gdpo", "reinforce_plus_plus_baseline", "rloo", "rloo_vectorized"}
    | {"opo", "gpg"}
)
"""verl estimators that sum a response's rewards first: where they stand in the response makes no difference to them."""


def parse_block(config: DictConfig) -> RREDCoTConfig:
    """Read the `algorithm.rredcot` block of verl's config; the defaults where it has none.

    Returns:
        RREDCoTConfig: Its form of credit and its calibration are settled: `auto` is no value of theirs any more.

    Raises:
        ValueError: As `rredcot_verl.config.schema.parse`.
    """
    block = OmegaConf.select(config, PREFIX)
    if block is not None and not isinstance(block, DictConfig):
        raise ValueError(f"{PREFIX}={block!r}: expected a block of settings")
    plain = None if block is None else OmegaConf.to_container(block, resolve=True)
    return _settled(parse(plain), config)  # type: ignore[arg-type]


def _settled(settings: RREDCoTConfig, config: DictConfig) -> RREDCoTConfig:
    """The form of credit and the calibration, where they are left to the run."""
    value, credit = settings.self_value, settings.credit
    probed = OmegaConf.select(config, "algorithm.adv_estimator") == DEFAULT and settings.source is None
    hidden = value.form == "hidden"
    if credit.form == "auto":
        filtered = OmegaConf.select(config, "algorithm.filter_groups.enable")
        estimated = hidden or value.calibration != "none"
        own = "critic" if estimated and not filtered else "td"
        credit = credit.model_copy(update={"form": own if probed else "reweight"})
    if value.calibration == "auto":
        regressed = probed and not hidden and credit.form in ("critic", "td")
        value = value.model_copy(update={"calibration": "logistic" if regressed else "none"})
    return settings.model_copy(update={"self_value": value, "credit": credit})


def run_source(config: DictConfig, settings: RREDCoTConfig) -> Source:
    """Where a run's segment values come from.

    Raises:
        ValueError: As `make_source`.
    """
    return make_source(settings, str(OmegaConf.select(config, "algorithm.adv_estimator")))


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
    _check_run(config)
    source = run_source(config, settings)
    obstacle = source.check(config) or _why_no_critic(config, settings, source) or _why_no_td(config, settings, source)
    if obstacle is not None:
        raise ValueError(obstacle)
    return settings


def _why_no_critic(config: DictConfig, settings: RREDCoTConfig, source: Source) -> str | None:
    if settings.credit.form != "critic":
        return None
    if not source.estimates_reward:
        return (
            f"{PREFIX}.credit.form=critic takes v_0 for the mean reward of a prompt, and the values of {source.name!r} "
            f"are none: set {PREFIX}.self_value.calibration=logistic where the estimator is rredcot, "
            f"estimates_reward=True in the class of a source of your own if they are, or {PREFIX}.credit.form=td"
        )
    if OmegaConf.select(config, "algorithm.filter_groups.enable"):
        return (
            f"algorithm.filter_groups.enable=True with {PREFIX}.credit.form=critic: it learns from groups of one "
            "reward too, and rows chosen by their reward would bias it; set algorithm.filter_groups.enable=False, or "
            f"{PREFIX}.credit.form=td"
        )
    return None


def _why_no_td(config: DictConfig, settings: RREDCoTConfig, source: Source) -> str | None:
    num_rollouts = config.actor_rollout_ref.rollout.n
    if settings.credit.form != "td":
        return None
    lam = config.algorithm.lam if settings.credit.lam is None else settings.credit.lam
    if source.weighs and lam != 0:
        return (
            f"{PREFIX}.credit.form=td with lam={lam}: the values of {source.name!r} are made of the reward itself, so "
            f"none is a baseline; set {PREFIX}.credit.form=reweight, or credit.lam=0.0, which pays each its share"
        )
    if num_rollouts > 2:
        return None
    return (
        f"{PREFIX}.credit.form=td with actor_rollout_ref.rollout.n={num_rollouts}: it needs the deviation of two other "
        f"rollouts or more, so all credit would be GRPO's; set n=3 or more, or {PREFIX}.credit.form=critic (without "
        "algorithm.filter_groups)"
    )


def unread_settings(config: DictConfig, settings: RREDCoTConfig, source: Source) -> list[str]:
    """Keys that the config changes and the run's source, or its form of credit, does not read.

    They are reported and not refused: a run is compared with its peers by changing the estimator alone.
    """
    idle = [name for name in SPECIFIC if name not in source.reads()]
    if str(config.algorithm.adv_estimator) not in SOURCES:
        idle.append("credit")
    idle += [f"credit.{name}" for name in sorted(settings.credit.unread())]
    default = _settled(RREDCoTConfig(), config)
    changed = [name for name in idle if _at(settings, name) != _at(default, name)]
    # A block that is named whole needs no line for a key in it.
    return [f"{PREFIX}.{name}" for name in changed if name.partition(".")[0] not in changed or "." not in name]


def _at(settings: RREDCoTConfig, name: str) -> Any:
    found: Any = settings
    for part in name.split("."):
        found = getattr(found, part)
    return found


def warn_of_unread(config: DictConfig, settings: RREDCoTConfig, source: Source) -> None:
    """Say once what the config changes for nothing."""
    unread = unread_settings(config, settings, source)
    if unread:
        logger.warning(
            "rredcot: algorithm.adv_estimator=%s with credit.form=%s does not read %s, which the config changes",
            config.algorithm.adv_estimator,
            settings.credit.form,
            ", ".join(unread),
        )


def expectation_doubts(config: DictConfig, settings: RREDCoTConfig) -> list[str]:
    """What the config sets beside the credit that may take from it what it is in expectation, see docs/method.md.

    They are reported and not refused: of values that are right, or nearly, nothing is lost.
    """
    form = settings.credit.form
    if str(config.algorithm.adv_estimator) not in SOURCES or form == "reweight":
        return []
    actor, doubts = "actor_rollout_ref.actor", []
    mode, loss = (OmegaConf.select(config, f"{actor}.{name}") for name in ("loss_agg_mode", "policy_loss.loss_mode"))
    divides = None
    if loss == "sapo":
        divides = f"{actor}.policy_loss.loss_mode=sapo"
    elif mode == "seq-mean-token-mean":
        divides = f"{actor}.loss_agg_mode={mode}"
    elif mode == "seq-mean-token-sum-norm" and OmegaConf.select(config, f"{actor}.loss_scale_factor") is None:
        divides = f"{actor}.loss_agg_mode={mode} without {actor}.loss_scale_factor"
    if divides:
        doubts.append(
            f"{divides} divides by a response's own length, so that with {PREFIX}.credit.form={form} values that are "
            f"too low pay for short answers; {actor}.loss_agg_mode=token-mean does not"
        )
    sampler = "trainer.v1.sampler.custom_sampler.path"
    if form == "critic" and OmegaConf.select(config, sampler):
        doubts.append(
            f"{sampler} is set: if it leaves groups out by their rewards, {PREFIX}.credit.form=critic is biased; "
            f"use {PREFIX}.credit.form=td then"
        )
    return doubts


def _check_run(config: DictConfig) -> None:
    trainer = config.trainer
    if not trainer.get("use_v1", True):
        raise ValueError("trainer.use_v1=False: RREDCoT needs verl's V1 trainer, set trainer.use_v1=True")
    mode = trainer.v1.trainer_mode
    if mode not in TRAINER_MODES:
        raise ValueError(f"trainer.v1.trainer_mode={mode!r}: RREDCoT supports {', '.join(map(repr, TRAINER_MODES))}")
    if config.algorithm.use_kl_in_reward:
        raise ValueError(
            "algorithm.use_kl_in_reward=True puts a KL term on every token's reward, which has no place in a "
            "redistributed outcome; use actor_rollout_ref.actor.use_kl_loss=True instead"
        )
    if config.algorithm.get("use_pf_ppo") and config.algorithm.adv_estimator == "gae":
        raise ValueError(
            "algorithm.use_pf_ppo=True with algorithm.adv_estimator=gae draws rows anew, and verl's V1 trainer writes "
            "their advantages to the rows that stood there before; set algorithm.use_pf_ppo=False"
        )
    if OmegaConf.select(config, "actor_rollout_ref.actor.policy_loss.loss_mode") == "geo_mean":
        raise ValueError(
            "actor_rollout_ref.actor.policy_loss.loss_mode='geo_mean' takes the mean of a response's advantages, so "
            "that credit by segments would be lost; use another, e.g. 'vanilla' or 'gspo'"
        )
    correction = config.algorithm.get("rollout_correction") or {}
    rejected = str(correction.get("rollout_rs") or "")
    # In bypass mode the actor rejects, when advantages are made.
    before = "token" in rejected and not correction.get("bypass_mode")
    if before and config.algorithm.adv_estimator not in SOURCES:
        raise ValueError(
            f"algorithm.rollout_correction.rollout_rs={rejected!r} with {PREFIX}.enable=True: rewards on rejected "
            "tokens would be lost, and with them part of R; use a criterion of whole responses, e.g. 'seq_mean_k3', or "
            "algorithm.adv_estimator=rredcot"
        )


def switch_on(config: DictConfig) -> None:
    """Set, in the config, what the method needs of rollout and reward. Anything the user chose is kept or refused.

    An estimator of verl's that compares no rollouts of a prompt has a gradient in uniform groups too: left out of the
    measuring, right answers to easy prompts would be told from others by their outcome.

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
    if config.algorithm.adv_estimator not in SOURCES:
        OmegaConf.update(config, f"{PREFIX}.self_value.probe_uniform_groups", True, force_add=True)
    if reward_manager.name != "rredcot":
        logger.warning(
            "rredcot: reward.reward_manager.name=%s is kept; rewards must lie in %s.self_value.reward_range, the "
            "diagnostics answer_found and answer_position are not reported, and its verifier sees what tools wrote and "
            "no tag of thinking that is a special token",
            reward_manager.name,
            PREFIX,
        )


def tell_whose_words(config: DictConfig) -> None:
    """Let the reward manager `rredcot` know what the model wrote in a run that does not redistribute, too."""
    agent, manager = config.actor_rollout_ref.rollout.agent, config.reward.reward_manager
    if manager.source == "register" and manager.name == "rredcot" and not agent.get("agent_loop_manager_class"):
        with open_dict(config):
            agent.agent_loop_manager_class = TELLING_AGENT_LOOP_MANAGER


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
