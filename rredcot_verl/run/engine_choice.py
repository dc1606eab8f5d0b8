"""Who measures the segments' values: the training engine or the rollout server. Decided once, before any worker is
started."""

import logging
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf, open_dict

from rredcot_verl.config.schema import PREFIX, RREDCoTConfig
from rredcot_verl.config.sources import ATTRIBUTIONS, LEAVE_ONE_OUT, MONTE_CARLO, source_of
from rredcot_verl.passes.protocol import MODEL_TYPE
from rredcot_verl.run.capabilities import (
    bypasses_old_log_prob,
    check_layer,
    why_no_attribution,
    why_no_hidden,
    why_not_shared,
    why_server_cannot_score,
)
from rredcot_verl.servers import vllm_settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineChoice:
    """Who measures the values of a run's segments.

    Attributes:
        engine: `actor` or `rollout`.
        share_prefix: For `actor`: one pass for a trace and its probes; otherwise one sequence a probe.
        reason: Why.
        what: What is measured.
    """

    engine: str
    share_prefix: bool
    reason: str
    what: str = "probes"

    @property
    def label(self) -> str:
        """Name for logs and reports."""
        if self.what != "probes":
            return f"{self.engine}, {self.what}"
        if self.engine == "rollout":
            return "rollout"
        return "actor, shared prefix" if self.share_prefix else "actor, separate sequences"


def choose_engine(config: DictConfig, settings: RREDCoTConfig) -> EngineChoice:
    """Settle `self_value.engine` and `self_value.share_prefix` for a run, and say so once.

    The settings have been checked: `rollout` is asked for only where the server can score.

    Raises:
        ValueError: What the run's source needs of the training engine, its engine cannot do.
    """
    if not settings.reads_probes(source_of(config.algorithm.adv_estimator)):
        return _choose_without_probes(config, settings)
    asked = settings.self_value.engine
    if settings.reads_hidden_states():
        choice = _with_hidden_states(config, settings)
    elif asked == "rollout":
        choice = EngineChoice("rollout", False, "set by the config")
    elif not settings.self_value.share_prefix:
        choice = EngineChoice("actor", False, f"{PREFIX}.self_value.share_prefix=False")
    else:
        obstacle = why_not_shared(config)
        if obstacle is None:
            choice = EngineChoice("actor", True, "the training engine can share prefixes")
        elif asked == "auto" and why_server_cannot_score(config) is None:
            choice = EngineChoice("rollout", False, f"the training engine cannot share prefixes: {obstacle}")
        else:
            choice = EngineChoice("actor", False, f"the training engine cannot share prefixes: {obstacle}")
    logger.warning(
        "rredcot: self_value.engine=%s: probes are read by %s; %s; under %s",
        asked,
        choice.label,
        choice.reason,
        weights_of_probes(config, choice.engine),
    )
    if choice.engine == "actor" and not choice.share_prefix:
        logger.warning(
            "rredcot: every probe is a sequence of its own for compute_log_prob, and one more for each further closing "
            "token: with K segments about K/2 forward passes over the traces for each of them (max_closing_tokens=%s)",
            settings.self_value.max_closing_tokens,
        )
    return choice


def _with_hidden_states(config: DictConfig, settings: RREDCoTConfig) -> EngineChoice:
    """Probes and hidden states come from one pass, so the training engine has to share prefixes."""
    if settings.self_value.engine == "rollout" or not settings.self_value.share_prefix:
        raise ValueError(
            f"{PREFIX}.readout.use_hidden=True reads hidden states and probes in one pass of the training engine; it "
            f"needs {PREFIX}.self_value.engine=auto or actor, and share_prefix=true"
        )
    obstacle = why_not_shared(config)
    if obstacle is not None:
        raise ValueError(
            f"{PREFIX}.readout.use_hidden=True: the training engine cannot share prefixes: {obstacle}; set "
            "self_value.form=hidden, which needs no probes, or readout.use_hidden=false"
        )
    check_layer(config, settings.readout)
    return EngineChoice("actor", True, "hidden states are read in the same pass")


def _choose_without_probes(config: DictConfig, settings: RREDCoTConfig) -> EngineChoice:
    source = source_of(config.algorithm.adv_estimator)
    if source == MONTE_CARLO:
        choice = EngineChoice("rollout", False, "continuations are generated", "continuations")
    elif source == LEAVE_ONE_OUT:
        choice = EngineChoice("actor", False, "sequences without one segment each", "leave-one-out")
    elif source in ATTRIBUTIONS:
        obstacle = why_no_attribution(config, source)
        if obstacle is not None:
            raise ValueError(obstacle)
        choice = EngineChoice("actor", True, "a pass of its own over the traces", source.replace("_", " "))
    else:
        obstacle = why_no_hidden(config)
        if obstacle is not None:
            raise ValueError(f"{PREFIX}.self_value.form=hidden: the training engine gives no hidden states: {obstacle}")
        check_layer(config, settings.readout)
        choice = EngineChoice("actor", True, "in the pass that computes old_log_prob", "hidden states")
    logger.warning("rredcot: %s: %s, by %s; %s", source, choice.what, choice.engine, choice.reason)
    return choice


def weights_of_probes(config: DictConfig, engine: str) -> str:
    """Under which weights the probes of a run are read, in words; see docs/modes.md."""
    if engine == "rollout":
        return "the rollout server's weights, which are those of the policy in trainer_mode=sync"
    if bypasses_old_log_prob(config):
        return "the current weights: with rollout_correction.bypass_mode there is no pass for old_log_prob"
    if config.trainer.v1.trainer_mode == "separate_async":
        return "the weights of the last synchronisation, as old_log_prob"
    return "the current weights, as old_log_prob"


def apply_choice(config: DictConfig, choice: EngineChoice) -> None:
    """Write the choice into verl's config, where the agent loop and the training workers read it.

    For the rollout server, verl is told to start servers that score, in this process.
    """
    with open_dict(config):
        OmegaConf.update(config, f"{PREFIX}.self_value.engine", choice.engine, force_add=True)
        OmegaConf.update(config, f"{PREFIX}.self_value.share_prefix", choice.share_prefix, force_add=True)
        if choice.share_prefix:
            config.actor_rollout_ref.model.model_type = MODEL_TYPE
    if choice.engine == "rollout" and choice.what == "probes":
        from rredcot_verl.servers.replicas import use_probing_servers

        use_probing_servers(config.actor_rollout_ref.rollout.name)
        if config.actor_rollout_ref.rollout.name == "vllm":
            vllm_settings.warn(config)
