"""All checks of a run, one after the other, and the page that says what they found."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.data.lengths import load_tokenizer
from rredcot_verl.preflight import config_checks, summary
from rredcot_verl.preflight.composition import compose_as_main_ppo
from rredcot_verl.preflight.cpu_memory import FREE_SHARE, OTHERS_GIB, CPUMemory, cpu_memory, machine_gib
from rredcot_verl.preflight.file_checks import check_files, sample_references
from rredcot_verl.preflight.findings import Findings
from rredcot_verl.preflight.log_prob_memory import LogProbMemory, log_prob_memory
from rredcot_verl.preflight.memory import ESTIMATED, ServerMemory, TrainingMemory, server_memory, training_memory
from rredcot_verl.preflight.model_size import ModelFacts, read_facts, why_no_model
from rredcot_verl.preflight.probe_budget import ProbeBudget, probe_budget
from rredcot_verl.preflight.quiet import quiet
from rredcot_verl.preflight.table import Row, section
from rredcot_verl.preflight.verifier_checks import check_loads
from rredcot_verl.run.settings import run_source
from rredcot_verl.sources.engines import EngineChoice

GPU_MEMORY = "GPU_MEMORY_GIB"
"""Environment variable: memory of a GPU for the estimates, in GiB."""

DEFAULT_GPU_MEMORY_GIB = 80.0


@dataclass
class Inspection:
    """What is known of a run; parts stay None where a fault came before them.

    Attributes:
        config: verl's whole config.
        findings: What the checks found.
        settings: RREDCoT's own; None for a run without it.
        facts: The model's sizes.
        tokenizer: The policy's.
        choice: Who reads the probes.
        sections: Settings and estimates for people.
    """

    config: DictConfig
    findings: Findings
    settings: RREDCoTConfig | None = None
    facts: ModelFacts | None = None
    tokenizer: Any = None
    choice: EngineChoice | None = None
    sections: list[str] = field(default_factory=list)


def inspect(arguments: Sequence[str]) -> Inspection:
    """Compose and check a run from the arguments of `verl.trainer.main_ppo`.

    Raises:
        ValueError: The config does not compose.
    """
    found = Inspection(compose_as_main_ppo(arguments), Findings())
    config, findings = found.config, found.findings
    if not config_checks.check_values(config, findings):
        return found
    _read_model(found)
    config_checks.check_names(config, findings)
    found.settings = config_checks.check_settings(config, findings)
    model_is_good = config_checks.check_with_verl(config, findings, with_model=found.facts is not None)
    config_checks.check_cpu_server(config, findings)
    config_checks.check_mode(config, findings)
    config_checks.check_placement(config, findings)
    config_checks.check_lengths(config, found.facts.max_length if found.facts else None, findings)
    # The check of the rows asks the verifier.
    if check_loads(config, findings):
        with quiet():
            check_files(config, found.tokenizer, findings)
    if found.settings is not None and model_is_good:
        with quiet():
            try:
                found.choice = run_source(config, found.settings).choose_engine(config)
            except ValueError as error:
                findings.fault(str(error))
    _note_missing_packages(config, findings)
    rows = summary.settings_rows(config, found.facts) + summary.credit_rows(config, found.settings, found.choice)
    found.sections.append(section("Settings", rows))
    if found.facts is not None:
        found.sections.append(_estimates(found, found.facts))
    return found


def page(found: Inspection) -> str:
    """The whole text: settings, estimates, and what was found."""
    num_warnings = len(found.findings.warnings)
    verdict = "preflight: ok, nothing was started"
    if found.findings.faults:
        verdict = "preflight: not ready"
    elif num_warnings:
        verdict = f"preflight: no faults, {num_warnings} worth a look; nothing was started"
    parts = [*found.sections, found.findings.text(("unchecked", "warning", "fault")), verdict]
    return "\n\n".join(part for part in parts if part)


def _estimates(found: Inspection, facts: ModelFacts) -> str:
    config, findings = found.config, found.findings
    rows: list[Row] = []
    title = "Estimates; formulas in rredcot_verl/preflight, no GPU was measured"
    strategy = str(config.actor_rollout_ref.actor.strategy)
    budget = _probe_budget(found)
    if strategy not in ESTIMATED:
        findings.skip(f"memory: there are no formulas for actor_rollout_ref.actor.strategy={strategy}")
    elif config.trainer.device != "cpu":
        gpu = _gpu_memory(findings)
        training, server = training_memory(config, facts), server_memory(config, facts, gpu)
        log_probs = None
        if strategy != "megatron":
            shares, fuses = (found.choice.share_prefix, found.choice.fuse) if found.choice else (False, False)
            most = budget.most if budget is not None and shares else 0
            log_probs = log_prob_memory(config, facts, training, most, fuses)
        _judge_memory(config, training, log_probs, server, gpu, findings)
        rows += summary.memory_rows(training, log_probs, server, config)
        title = f"{title}; GPUs of {gpu:g} GiB ({GPU_MEMORY})"
    elif not config.actor_rollout_ref.actor.use_dynamic_bsz:
        findings.skip("memory: on CPU there are formulas for actor_rollout_ref.actor.use_dynamic_bsz=true only")
    else:
        rows.append(_cpu_row(cpu_memory(config, facts), config, findings))
    if found.settings is not None:
        source = run_source(config, found.settings)
        generated = source.most_generated_tokens(config.data.max_response_length)
        if generated:
            rows.append(summary.continuation_row(config, generated))
        if budget is not None and found.choice is not None:
            if found.choice.engine == "actor" and not found.choice.share_prefix:
                _warn_of_separate(budget, found.choice, findings)
            rows += summary.probe_rows(config, found.settings, budget, found.choice)
    return section(title, rows)


def _cpu_row(memory: CPUMemory, config: DictConfig, findings: Findings) -> Row:
    """The estimate, with a warning where it is more than this machine has."""
    machine = machine_gib()
    if memory.total > FREE_SHARE * machine:
        fits, key = memory.tokens_within(FREE_SHARE * machine), "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
        longest = config.data.max_prompt_length + config.data.max_response_length
        way_out = f"about {key}={fits} fits" if fits >= longest else "not even one full-length response fits"
        findings.warn(
            f"the run is estimated at {memory.total:.1f} GiB, this machine has {machine:.1f}; with "
            f"{key}={memory.num_tokens} a training pass takes {memory.update:.1f} of them: {way_out}"
        )
    text = (
        f"{memory.total:.1f} GiB of this machine's {machine:.1f}: training worker {memory.training:.1f} (states "
        f"{memory.states:.1f}), server {memory.server:.1f}, for each rank; other processes {OTHERS_GIB:g}"
    )
    return "memory", text


def _probe_budget(found: Inspection) -> ProbeBudget | None:
    settings, choice = found.settings, found.choice
    if settings is None or choice is None or found.tokenizer is None:
        return None
    if not run_source(found.config, settings).reads_probes:
        return None
    separate = choice.engine == "actor" and not choice.share_prefix
    references = sample_references(found.config, settings.self_value.reference_key)
    alone = choice.share_prefix and not choice.fuse
    return probe_budget(
        settings, found.tokenizer, references, shared=choice.share_prefix, separate=separate, alone=alone
    )


def _warn_of_separate(budget: ProbeBudget, choice: EngineChoice, findings: Findings) -> None:
    findings.warn(
        f"probes are scored in sequences of their own, up to {budget.prefix_passes:.0f} more forward passes over "
        f"every trace ({choice.reason}); with trainer.v1.trainer_mode=sync the rollout server can read them"
    )


def _judge_memory(
    config: DictConfig,
    training: TrainingMemory,
    log_probs: LogProbMemory | None,
    server: ServerMemory,
    gpu: float,
    findings: Findings,
) -> None:
    longest = config.data.max_prompt_length + config.data.max_response_length
    if server.cache_tokens < longest:
        findings.warn(
            f"the rollout server's cache is estimated at {server.cache_tokens:,} tokens, less than one full-length "
            f"sequence ({longest:,}); raise actor_rollout_ref.rollout.gpu_memory_utilization or its "
            "tensor_model_parallel_size"
        )
    if training.total > 0.95 * gpu:
        findings.warn(
            f"a training pass is estimated at {training.total:.0f} GiB of {gpu:g}; take more GPUs, LoRA, more model "
            "parallelism or shorter responses"
        )
    if log_probs is not None and log_probs.total > 0.95 * gpu:
        findings.warn(
            f"a pass for log-probabilities or probes is estimated at {log_probs.total:.0f} GiB of {gpu:g}; lower "
            "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu"
        )
    if training.resident + server.budget > 0.95 * gpu:
        findings.warn(
            f"while servers generate, {training.resident:.0f} GiB of weights and optimizer stay beside their "
            f"{server.budget:.0f} GiB, of {gpu:g}; lower gpu_memory_utilization, or set param_offload and "
            "optimizer_offload"
        )


def _gpu_memory(findings: Findings) -> float:
    text = os.environ.get(GPU_MEMORY, "")
    try:
        gpu = float(text or DEFAULT_GPU_MEMORY_GIB)
    except ValueError:
        gpu = -1.0
    if gpu <= 0:
        findings.fault(f"{GPU_MEMORY}={text!r}: expected GiB of a GPU, e.g. 80")
        return DEFAULT_GPU_MEMORY_GIB
    return gpu


def _read_model(found: Inspection) -> None:
    model, findings = found.config.actor_rollout_ref.model, found.findings
    obstacle = why_no_model(str(model.path))
    if obstacle is not None:
        findings.fault(f"actor_rollout_ref.model.path={model.path}: {obstacle}")
        return
    with quiet():
        try:
            found.facts = read_facts(model)
            path = model.get("tokenizer_path") or model.path
            found.tokenizer = load_tokenizer(path, bool(model.trust_remote_code))
        except (OSError, ValueError) as error:
            findings.fault(
                f"actor_rollout_ref.model.path={model.path} cannot be read: {str(error).strip().splitlines()[0]}\n"
                "A hub id needs a network or a filled cache; a folder with config.json and a tokenizer will do here."
            )


def _note_missing_packages(config: DictConfig, findings: Findings) -> None:
    wanted = {str(config.actor_rollout_ref.rollout.name): "the arguments it is started with"}
    if config.actor_rollout_ref.actor.strategy == "megatron":
        wanted["megatron"] = "whether it knows the model, and its own settings"
    for package, what in wanted.items():
        if package in ("vllm", "sglang", "megatron") and importlib.util.find_spec(package) is None:
            findings.skip(f"{package} is not installed here: {what}")
