"""The effective settings of a run and what they may cost, as rows of a table."""

from omegaconf import DictConfig

from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.core.segmentation import spacing_of
from rredcot_verl.preflight.file_checks import files_of, num_rows
from rredcot_verl.preflight.log_prob_memory import LogProbMemory
from rredcot_verl.preflight.memory import SERVER_OVERHEAD_GIB, ServerMemory, TrainingMemory
from rredcot_verl.preflight.model_size import ModelFacts, lora_rank
from rredcot_verl.preflight.probe_budget import ProbeBudget
from rredcot_verl.preflight.table import Row, count, percent, plural
from rredcot_verl.run.settings import run_source
from rredcot_verl.sources.engines import EngineChoice
from rredcot_verl.sources.registry import SOURCES


def settings_rows(config: DictConfig, facts: ModelFacts | None) -> list[Row]:
    """Model, GPUs, lengths, batch and optimizer."""
    data, rollout, actor = config.data, config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    model, trainer = config.actor_rollout_ref.model, config.trainer
    size = ""
    if facts is not None:
        size = f": {count(facts.num_parameters)} parameters, {facts.num_layers} layers, vocabulary {facts.vocab_size:,}"
    rank = lora_rank(model)
    tuning = f"LoRA of rank {rank}" if rank else "all weights"
    if rank and facts is not None:
        tuning += f" ({count(facts.num_trainable_parameters)} parameters)"
    updates = max(1, data.train_batch_size // actor.ppo_mini_batch_size)
    longest = data.max_prompt_length + data.max_response_length
    rows = [
        ("model", f"{model.path}{size}"),
        ("trained", f"{tuning}, {_engine(actor)}, lr {actor.optim.lr:g}"),
        _devices(config),
        ("mode", _mode(config)),
        (
            "rollout",
            f"{rollout.name}, {plural(rollout.tensor_model_parallel_size, _device(config))} a server, temperature "
            f"{rollout.temperature:g}, at most {rollout.max_num_seqs} responses at once",
        ),
        (
            "lengths",
            f"{count(data.max_prompt_length)} prompt + {count(data.max_response_length)} response = {count(longest)} "
            f"tokens; a training pass holds {count(actor.ppo_max_token_len_per_gpu)}"
            + (f", the model {count(facts.max_length)}" if facts is not None and facts.max_length else ""),
        ),
        (
            "batch",
            f"{data.train_batch_size} prompts x {rollout.n} responses = {count(data.train_batch_size * rollout.n)} a "
            f"step, {plural(updates, 'update')}",
        ),
        ("clip", f"{actor.clip_ratio_low:g} below, {actor.clip_ratio_high:g} above; loss {actor.loss_agg_mode}"),
        ("steps", f"{trainer.total_training_steps or f'{trainer.total_epochs} epochs'}; {_intervals(trainer)}"),
    ]
    for key in ("train_files", "val_files"):
        paths = files_of(data[key])
        known = num_rows(paths)
        rows.append((key, ", ".join(paths) + (f" ({plural(known, 'row')})" if known is not None else "")))
    verifier = config.reward.custom_reward_function
    rows.append(("verifier", f"{verifier.path}:{verifier.name}" if verifier.path else "verl's, by data_source"))
    rows.append(("output", str(trainer.default_local_dir)))
    return rows


def credit_rows(config: DictConfig, settings: RREDCoTConfig | None, choice: EngineChoice | None) -> list[Row]:
    """How credit is given, and by whom the probes are read."""
    if settings is None:
        ours = config.algorithm.adv_estimator in SOURCES
        why = "its settings are faulty, see below" if ours else "verl's own, algorithm.rredcot is not used"
        return [("credit", f"{config.algorithm.adv_estimator}: {why}")]
    source, cuts, credit = run_source(config, settings), settings.segmentation, settings.credit
    spacing = spacing_of(cuts.num_segments, config.data.max_response_length, cuts.min_tokens)
    strength = f", beta {credit.beta:g}" if credit.form == "reweight" else ""
    if credit.form in ("td", "critic"):
        strength = f", lambda {config.algorithm.lam if credit.lam is None else credit.lam:g}"
    rows = [
        ("credit", f"{config.algorithm.adv_estimator}: {credit.form}{strength}"),
        ("segments", f"{cuts.method}, at most {cuts.num_segments}, one in {spacing:g} tokens or more"),
        ("values", source.describe()),
    ]
    if source.reads_references():
        rows.append(("references", settings.self_value.reference_key))
    if choice is not None:
        rows.append(("read by", f"{choice.label}: {choice.reason}"))
    return rows


def memory_rows(
    training: TrainingMemory, log_probs: LogProbMemory | None, server: ServerMemory, config: DictConfig
) -> list[Row]:
    """Memory of a training GPU, in its update and in its passes for log-probabilities, and of a server's GPU."""
    longest = config.data.max_prompt_length + config.data.max_response_length
    rollout = config.actor_rollout_ref.rollout
    at_once = min(server.cache_tokens // longest, rollout.max_num_seqs)
    reading: list[Row] = []
    if log_probs is not None:
        text = (
            f"{log_probs.total:.1f} GiB in the largest pass that makes no gradient: states {log_probs.states:.1f}, and "
            f"activations {log_probs.activations:.1f} or logits {log_probs.logits:.1f}"
        )
        reading.append(("its log-probabilities", text))
    return [
        (
            "training GPU",
            f"{training.total:.1f} GiB at its largest: weights {training.weights:.1f}, gradients "
            f"{training.gradients:.1f}, optimizer {training.optimizer:.1f}, gathered layers {training.working:.1f}, "
            f"activations {training.activations:.1f}, logits {training.logits:.1f}",
        ),
        *reading,
        (
            "rollout GPU",
            f"{server.budget:.1f} GiB of it: weights {server.weights:.1f}, overhead {SERVER_OVERHEAD_GIB:.1f} "
            f"(assumed), cache {server.cache:.1f}",
        ),
        (
            "cache of a server",
            f"{count(server.cache_tokens)} tokens: {plural(at_once, 'response')} of full length at once",
        ),
    ]


def probe_rows(config: DictConfig, settings: RREDCoTConfig, budget: ProbeBudget, choice: EngineChoice) -> list[Row]:
    """Probe tokens of a response and their share of the training passes."""
    longest = config.data.max_response_length
    by_actor = choice.engine == "actor"

    def said(tokens: int) -> str:
        text = f"{count(tokens)} tokens a response"
        if not by_actor:
            return f"{text}, {percent(tokens / longest)} of a full-length one"
        full, quarter = (percent(budget.share_of_training(tokens, n)) for n in (longest, longest // 4))
        return f"{text}: a step's training passes grow by {full} at {count(longest)} tokens, {quarter} at a quarter"

    rows = [("probes, at most", said(budget.most))]
    if budget.typical is not None:
        rows.append(("probes, typical", f"{said(budget.typical)} (references of {budget.answer_tokens} tokens)"))
    if budget.prefix_passes:
        if choice.share_prefix:
            rows.append(("their pass", "a pass of their own: 1 more forward pass over every trace"))
        else:
            text = f"up to {budget.prefix_passes:.0f} more forward passes over every trace"
            rows.append(("separate sequences", text))
    elif not by_actor:
        text = "requests run while other responses are generated; none of it is in the training passes"
        rows.append(("hidden", text))
    if not settings.measures_uniform_groups:
        rows.append(("not probed", "groups that are all right or all wrong have no advantage and cost nothing"))
    return rows


def continuation_row(config: DictConfig, most: int) -> Row:
    """Tokens that are generated for a response, beside the response's own, at most."""
    times = most / config.data.max_response_length
    return "continuations, at most", f"{count(most)} tokens for a response of full length, {times:.0f} times its own"


def _engine(actor: DictConfig) -> str:
    if actor.strategy != "megatron":
        return str(actor.strategy).upper()
    sizes = {name: actor.megatron[f"{name}_model_parallel_size"] for name in ("tensor", "pipeline", "expert")}
    return "Megatron " + " ".join(f"{name} {size}" for name, size in sizes.items())


def _device(config: DictConfig) -> str:
    return "rank" if config.trainer.device == "cpu" else "GPU"


def _devices(config: DictConfig) -> Row:
    trainer, rollout, name = config.trainer, config.actor_rollout_ref.rollout, _device(config)
    text = f"{plural(trainer.nnodes, 'node')} x {plural(trainer.n_gpus_per_node, name)}"
    if trainer.v1.trainer_mode == "separate_async":
        text += f" train, {plural(rollout.nnodes, 'node')} x {plural(rollout.n_gpus_per_node, name)} generate"
    else:
        text += ", which train and generate in turn"
    return f"{name}s", text


def _mode(config: DictConfig) -> str:
    v1 = config.trainer.v1
    if v1.trainer_mode == "sync":
        return "sync: the server's weights are the policy's"
    return f"{v1.trainer_mode}: responses may span {v1.sampler.max_off_policy_threshold} versions of the weights"


def _intervals(trainer: DictConfig) -> str:
    names = (("validation", trainer.test_freq), ("checkpoint", trainer.save_freq))
    return ", ".join(f"{name} every {every}" if every > 0 else f"no {name}" for name, every in names)
