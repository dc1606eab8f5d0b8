"""What the engines of a run can do, read off its config before any worker is started, and which of them measures."""

import copy
import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from verl.utils.config import omega_conf_to_dataclass

from rredcot_verl.config.blocks import ReadoutConfig
from rredcot_verl.config.schema import PREFIX
from rredcot_verl.passes.hidden_states import layer_index
from rredcot_verl.passes.protocol import MODEL_TYPE
from rredcot_verl.servers import vllm_settings
from rredcot_verl.servers.client import PROBING_BACKENDS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineChoice:
    """Who measures what the values of a run's segments are made of.

    Attributes:
        engine: `actor` (the training engine), `rollout` (the rollout server) or `source` (the source itself).
        share_prefix: For `actor`: passes of our engine; otherwise whole sequences through verl's own.
        reason: Why.
        what: What is measured.
        fuse: For passes that read probes: whether the one that computes `old_log_prob` does.
    """

    engine: str
    share_prefix: bool
    reason: str
    what: str = "probes"
    fuse: bool = False

    @property
    def label(self) -> str:
        """Name for logs and reports."""
        if self.what != "probes":
            return f"{self.engine}, {self.what}"
        if self.engine == "rollout":
            return "rollout"
        return "actor, shared prefix" if self.share_prefix else "actor, separate sequences"


def apply_choice(config: DictConfig, choice: EngineChoice) -> None:
    """Write the choice into verl's config, where the agent loop and the training workers read it.

    For the rollout server, verl is told to start servers that read probes, in this process.
    """
    if choice.engine == "source":
        return
    with open_dict(config):
        OmegaConf.update(config, f"{PREFIX}.self_value.engine", choice.engine, force_add=True)
        OmegaConf.update(config, f"{PREFIX}.self_value.share_prefix", choice.share_prefix, force_add=True)
        OmegaConf.update(config, f"{PREFIX}.self_value.fuse", choice.fuse, force_add=True)
        if choice.share_prefix:
            config.actor_rollout_ref.model.model_type = MODEL_TYPE
    if choice.engine == "rollout" and choice.what == "probes":
        from rredcot_verl.servers.replicas import use_probing_servers

        use_probing_servers(config.actor_rollout_ref.rollout.name)
        if config.actor_rollout_ref.rollout.name == "vllm":
            vllm_settings.warn(config)


def settle_fusing(config: DictConfig, choice: EngineChoice, asked: bool | str) -> EngineChoice:
    """The choice with `fuse` settled and its reason said.

    Probes are read with an attention of ours, and so is `old_log_prob` where they are read in its pass. Only with the
    kernel that the update has is it what the update computes, up to what other micro batches change; with another the
    ratio of the first update is not 1.

    Args:
        config: The run's.
        choice: Who reads the probes.
        asked: `self_value.fuse`.
    """
    setting = f"self_value.fuse={asked}"
    if not choice.share_prefix:
        unread = "" if asked == "auto" else f"; {setting} does not apply"
        return dataclasses.replace(choice, reason=choice.reason + unread)
    if reads_alone(config):
        why = "there is none for old_log_prob" if bypasses_old_log_prob(config) else "old_log_prob is Megatron's"
        unread = " does not apply" if asked is True else ""
        reason = f"{setting}{unread}: in a pass of their own, {why}"
        return dataclasses.replace(choice, reason=f"{choice.reason}; {reason}")
    from rredcot_verl.passes.shared_attention import FLEX_DEVICE

    own = str(hf_config(config.actor_rollout_ref.model)._attn_implementation)
    ours = "flex_attention" if config.trainer.device == FLEX_DEVICE else "sdpa"
    fuse = own == ours if asked == "auto" else bool(asked)
    where = "in the pass that computes old_log_prob" if fuse else "in a pass of their own, old_log_prob is verl's"
    same = f"both attend with {own}" if own == ours else f"the policy attends with {own}, probes with {ours}"
    drift = ", so the ratio of the first update is not exactly 1" if fuse and own != ours else ""
    return dataclasses.replace(choice, fuse=fuse, reason=f"{choice.reason}; {setting}: {where}: {same}{drift}")


def weights_of_probes(config: DictConfig, engine: str) -> str:
    """Under which weights the probes of a run are read, in words; see docs/modes.md."""
    if engine == "rollout":
        return "the rollout server's weights, which are those of the policy in trainer_mode=sync"
    if bypasses_old_log_prob(config):
        return "the current weights: with rollout_correction.bypass_mode there is no pass for old_log_prob"
    if config.trainer.v1.trainer_mode == "separate_async":
        return "the weights of the last synchronisation, as old_log_prob"
    return "the current weights, as old_log_prob"


def bypasses_old_log_prob(config: DictConfig) -> bool:
    """Whether verl takes the rollout's log-probabilities for `old_log_prob` and makes no pass of its own."""
    correction = config.algorithm.get("rollout_correction")
    return bool(correction and correction.get("bypass_mode", False))


def reads_alone(config: DictConfig) -> bool:
    """Whether probes are read in a pass of their own: verl makes none for `old_log_prob`, or it is Megatron's."""
    return bypasses_old_log_prob(config) or config.actor_rollout_ref.actor.strategy == "megatron"


def why_not_shared(config: DictConfig) -> str | None:
    """Why the training engine of a run cannot score probes in one pass with their trace; None where it can."""
    from rredcot_verl.passes.shared_attention import why_not_shared as why_not_this_model

    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    if model.get("model_type", "language_model") not in ("language_model", MODEL_TYPE):
        return f"actor_rollout_ref.model.model_type={model.model_type}"
    if actor.strategy == "megatron":
        return _why_not_shared_on_megatron(actor.megatron, model)
    if actor.strategy not in ("fsdp", "fsdp2"):
        return f"actor_rollout_ref.actor.strategy={actor.strategy}"
    return why_not_this_model(hf_config(model), str(config.trainer.device))


def ulysses_size(actor: DictConfig) -> int:
    """Over how many ranks verl's FSDP engine splits a sequence."""
    key = "ulysses_sequence_parallel_size"
    # As in verl, the older place counts where both say something.
    sizes = (OmegaConf.select(actor, key), OmegaConf.select(actor, f"fsdp_config.{key}"))
    return next((int(size) for size in sizes if size and size > 1), 1)


def _why_not_shared_on_megatron(engine: DictConfig, model: DictConfig) -> str | None:
    """The same for `actor.megatron` and the model; the workers ask the model that is built once more."""
    from rredcot_verl.passes.megatron_model import not_plain, why_not_this_model

    where = "actor_rollout_ref.actor.megatron"
    if engine.context_parallel_size > 1 or engine.dynamic_context_parallel:
        return (
            f"{where}.context_parallel_size={engine.context_parallel_size} (or dynamic_context_parallel) splits traces"
        )
    if engine.use_megatron_fsdp:
        return f"{where}.use_megatron_fsdp=True gathers weights by hooks of its own"
    if engine.router_replay.mode != "disabled":
        return f"{where}.router_replay.mode={engine.router_replay.mode}: nobody recorded routes for probes"
    overrides = not_plain(engine.override_transformer_config)
    if overrides:
        return f"{where}.override_transformer_config.{overrides[0]}"
    if model.mtp.enable:
        return "actor_rollout_ref.model.mtp.enable=True predicts several tokens"
    if model.get("use_fused_kernels"):
        return "actor_rollout_ref.model.use_fused_kernels=True makes no logits"
    return why_not_this_model(hf_config(model))


def why_not_separate(config: DictConfig) -> str | None:
    """Why `compute_log_prob` cannot be given sequences of our own; None where it can."""
    mode = OmegaConf.select(
        config, f"actor_rollout_ref.actor.{config.actor_rollout_ref.actor.strategy}.router_replay.mode"
    )
    if mode in (None, "disabled"):
        return None
    return (
        f"actor_rollout_ref.actor.{config.actor_rollout_ref.actor.strategy}.router_replay.mode={mode}: verl replays "
        "routes that sequences of our own do not have"
    )


def why_server_cannot_score(config: DictConfig) -> str | None:
    """Why the rollout servers of a run cannot score probes; None where they can."""
    rollout, mode = config.actor_rollout_ref.rollout, config.trainer.v1.trainer_mode
    if mode != "sync":
        return (
            f"with trainer.v1.trainer_mode={mode!r} responses are generated ahead, so the server would read their "
            "probes under older weights than those that compute old_log_prob"
        )
    if rollout.name not in PROBING_BACKENDS:
        return f"actor_rollout_ref.rollout.name={rollout.name!r} cannot score probes, only {list(PROBING_BACKENDS)} can"
    if rollout.name == "vllm":
        try:
            vllm_settings.check(config)
        except ValueError as error:
            return str(error)
    if rollout.name == "sglang" and rollout.temperature != 1.0:
        return f"SGLang scores at temperature 1, not at actor_rollout_ref.rollout.temperature={rollout.temperature}"
    if rollout.name == "sglang" and OmegaConf.select(rollout, "disaggregation.enabled"):
        return "actor_rollout_ref.rollout.disaggregation.enabled=True: the server that holds the prefix is another one"
    return None


def why_no_hidden(config: DictConfig) -> str | None:
    """Why the training engine of a run cannot give hidden states; None where it can.

    The pass is verl's own, so flash attention, fused kernels, padding, LoRA and Ulysses are all right, and models whose
    probes cannot share a prefix too.
    """
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    if actor.strategy == "megatron":
        return (
            "actor_rollout_ref.actor.strategy=megatron: its layers lie on pipeline stages of which only the last gives "
            "results, and its tokens are dealt out over tensor- and context-parallel ranks; fsdp and fsdp2 can"
        )
    if actor.strategy not in ("fsdp", "fsdp2"):
        return f"actor_rollout_ref.actor.strategy={actor.strategy}; fsdp and fsdp2 can"
    if model.get("model_type", "language_model") not in ("language_model", MODEL_TYPE):
        return f"actor_rollout_ref.model.model_type={model.model_type}"
    return None


def check_layer(config: DictConfig, readout: ReadoutConfig) -> None:
    """Refuse a layer that the run's model does not have, before any worker is started.

    Raises:
        ValueError: Names the key, the layer and how many there are.
    """
    text_config = hf_config(config.actor_rollout_ref.model).get_text_config(decoder=True)
    layer_index(readout.layer, text_config.num_hidden_layers)


def hf_config(model: DictConfig) -> Any:
    """The model's own config."""
    return omega_conf_to_dataclass(without_tokenizer(model)).hf_config


def without_tokenizer(model: DictConfig) -> DictConfig:
    """verl's config of a model, of which it loads no tokenizer; nor writes a chat template into the one it lacks."""
    model = copy.deepcopy(model)
    with open_dict(model):
        model.load_tokenizer = False
        model.custom_chat_template = None
    return model
