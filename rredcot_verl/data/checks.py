"""Checks of a run's data before it starts: verl's whole config against the files it names. No Ray, no model."""

import asyncio
import contextlib
import copy
import importlib
import io
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from rredcot_verl.config.schema import PREFIX, RREDCoTConfig, parse
from rredcot_verl.data.budget_checks import check_budget
from rredcot_verl.data.findings import CheckReport, Finding, Tally
from rredcot_verl.data.load import parquet_paths, read_columns, read_file
from rredcot_verl.data.row_checks import RowChecker, RowFacts, check_rows
from rredcot_verl.sources.registry import SOURCES, make_source

__all__ = ["CheckReport", "Finding", "check_files", "check_rows", "files_of", "verifier_of", "with_template"]

MAX_TRIED = 256
"""Ground truths tried at start-up, for each of training and validation data."""

_VERIFIER = re.compile(r"rredcot_verl[./]rewards[./](math|code)(?:\.py)?$")
_TRIALS = {
    "math": ("\\boxed{1}", "1"),
    "code": ("```python\nprint(1)\n```", '{"kind": "stdin", "inputs": [""], "outputs": ["1\\n"]}'),
}
"""A right response to each verifier, and its ground truth."""


@dataclass(frozen=True)
class _Plan:
    """What of the config the checks of rows need."""

    verifier: str | None
    settings: RREDCoTConfig | None
    options: Mapping[str, Any]


def verifier_of(config: DictConfig) -> str | None:
    """Which of this package's verifiers a run uses: `math`, `code`, or None for another one."""
    path = OmegaConf.select(config, "reward.custom_reward_function.path")
    found = _VERIFIER.search(str(path or ""))
    return found.group(1) if found else None


def files_of(entry: Any) -> list[str]:
    """The files of `data.train_files` or `data.val_files`: none, one or a list."""
    if entry is None or entry == "":
        return []
    return [str(path) for path in entry] if isinstance(entry, list | tuple | ListConfig) else [str(entry)]


def check_files(config: DictConfig, tokenizer: Any) -> CheckReport:
    """Check the data files of a run, and its verifier where it is one of this package's.

    The verifier judges one right response with the run's `reward_kwargs`, and tries a sample of `MAX_TRIED` ground
    truths. Every row is read for its columns, prompt, ground truth and references; of the prompts those that may be
    too long are measured, the longest 512 first.

    Args:
        config: verl's whole config, composed.
        tokenizer: The policy's tokenizer; None: nothing is measured.

    Returns:
        Findings with counts and first examples; a file that is missing or unreadable is one of them.
    """
    report = CheckReport()
    tokenizer = None if tokenizer is None else with_template(config, tokenizer)
    settings = _active_settings(config, report)
    plan = _Plan(verifier_of(config), settings, _row_options(config, settings))
    if OmegaConf.select(config, "data.custom_cls.path"):
        report.unchecked.append("rows: data.custom_cls is set, and its rows are its own")
    if plan.verifier is not None:
        _try_verifier(config, plan.verifier, report)
    if plan.verifier == "math" and settings is not None:
        _compare_formats(config, settings, report)
    facts: dict[str, RowFacts] = {}
    num_rows: dict[str, int] = {}
    for key in ("train_files", "val_files"):
        found, checker = _check_group(config, key, plan, tokenizer)
        report.merge(found, f"data.{key}")
        if checker is not None:
            facts[key], num_rows[key] = checker.facts, checker.report.num_rows
    if num_rows.get("train_files"):
        # Files elsewhere hold rows that were not counted.
        if not any("://" in path for path in files_of(config.data.train_files)):
            _check_batch(config, num_rows["train_files"], facts["train_files"].num_overlong, report)
        _check_probes(config, settings, tokenizer, facts["train_files"], report)
    if len(facts) == 2:
        _check_overlap(facts["train_files"], facts["val_files"], report)
    return report


def _try_verifier(config: DictConfig, verifier: str, report: CheckReport) -> None:
    """Judge one right response with the run's own options: a misspelt one, or no sandbox, shows here."""
    from rredcot_verl.rewards.sandbox.client import SandboxError

    given = OmegaConf.select(config, "reward.custom_reward_function.reward_kwargs")
    options = OmegaConf.to_container(given, resolve=True) if isinstance(given, DictConfig) else dict(given or {})
    assert isinstance(options, dict)
    # The response tried holds no thinking.
    kwargs = {str(name): option for name, option in options.items() if name != "prompt_opens_thinking"}
    compute_score = importlib.import_module(f"rredcot_verl.rewards.{verifier}").compute_score
    response, ground_truth = _TRIALS[verifier]
    try:
        # In a thread of its own, as the caller's may have an event loop.
        with ThreadPoolExecutor(1) as threads:
            result = threads.submit(
                lambda: asyncio.run(compute_score("", response, ground_truth, None, **kwargs))
            ).result()
    except ValueError as error:
        report.errors.append(Finding("verifier_options", 0, (), f"reward.custom_reward_function: {error}"))
        return
    except SandboxError as error:
        report.errors.append(Finding("verifier_cannot_run", 0, (), f"programs cannot be run here: {error}"))
        return
    # Another format of answers than the box is no fault.
    if verifier == "code" and result["acc"] != 1.0:
        late = " in time" if result["timed_out"] else ""
        text = f"a program that prints 1 did not pass its test{late} with reward_kwargs={options}"
        report.errors.append(Finding("verifier_cannot_run", 0, (), text))


def _compare_formats(config: DictConfig, settings: RREDCoTConfig, report: CheckReport) -> None:
    """The verifier and the probes must look for the same answer."""
    key = "reward.custom_reward_function.reward_kwargs.answer_format"
    verified, probed = OmegaConf.select(config, key) or "auto", settings.elicitation.format
    if verified != probed:
        text = f"{key}={verified} and {PREFIX}.elicitation.format={probed}: give both the same"
        # `auto` finds what the other one looks for, unless a response has both.
        findings = report.warnings if "auto" in (verified, probed) else report.errors
        findings.append(Finding("answer_format", 0, (), text))


def with_template(config: DictConfig, tokenizer: Any) -> Any:
    """The tokenizer with the chat template that verl will give it, `actor_rollout_ref.model.custom_chat_template`."""
    template = OmegaConf.select(config, "actor_rollout_ref.model.custom_chat_template")
    if not template:
        return tokenizer
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def _active_settings(config: DictConfig, report: CheckReport) -> RREDCoTConfig | None:
    block = OmegaConf.select(config, PREFIX)
    plain = OmegaConf.to_container(block, resolve=True) if isinstance(block, DictConfig) else None
    try:
        settings = parse(plain)  # type: ignore[arg-type]
    except ValueError as error:
        report.errors.append(Finding("settings", 0, (), str(error)))
        return None
    return settings if config.algorithm.adv_estimator in SOURCES or settings.enable else None


def _row_options(config: DictConfig, settings: RREDCoTConfig | None) -> dict[str, Any]:
    data = config.data
    needs_reference = settings is not None and make_source(settings, config.algorithm.adv_estimator).needs_references()
    kwargs = data.get("apply_chat_template_kwargs") or {}
    return {
        "max_prompt_length": data.max_prompt_length,
        "prompt_key": data.get("prompt_key") or "prompt",
        "source_key": data.get("reward_fn_key") or "data_source",
        "reference_key": settings.self_value.reference_key if settings and needs_reference else None,
        "filters_overlong": bool(data.get("filter_overlong_prompts")),
        "truncates": data.get("truncation", "error") != "error",
        "template_kwargs": OmegaConf.to_container(kwargs) if isinstance(kwargs, DictConfig) else dict(kwargs),
        "max_rows": MAX_TRIED,
    }


def _check_group(config: DictConfig, key: str, plan: _Plan, tokenizer: Any) -> tuple[CheckReport, RowChecker | None]:
    """Check the files of one key together, as verl concatenates them."""
    report = CheckReport()
    files = files_of(config.data.get(key))
    if not files:
        report.errors.append(Finding("no_files", 0, (), f"data.{key} is not set; verl needs at least one file"))
    local = [Path(path).expanduser() for path in files if "://" not in path]
    report.unchecked += [f"{path} is not on this machine" for path in files if "://" in path]
    for path in local:
        if not path.is_file():
            text = f"{path}: no such file; scripts/prepare_math.py and prepare_code.py make data files"
            report.errors.append(Finding("missing_file", 0, (), text))
        elif path.suffix not in (".parquet", ".json", ".jsonl"):
            report.errors.append(Finding("unknown_kind", 0, (), f"{path}: verl reads .parquet, .json and .jsonl"))
    if report.errors or not local or OmegaConf.select(config, "data.custom_cls.path"):
        return report, None
    try:
        columns = list(dict.fromkeys(chain.from_iterable(map(_columns_of, local))))
        wanted = _wanted(plan)
        rows = chain.from_iterable(read_columns(path, wanted) for path in local)
        checker = RowChecker(tokenizer, verifier=plan.verifier, columns=columns, **plan.options)
        checker.run(rows)
    except ValueError as error:
        report.errors.append(Finding("unreadable_file", 0, (), str(error)))
        return report, None
    _check_verls_own_rewards(config, checker.facts, checker.report)
    report.merge(checker.report)
    return report, checker


def _wanted(plan: _Plan) -> list[str]:
    options = plan.options
    wanted = [options["prompt_key"], options["source_key"], "reward_model"]
    return [*wanted, options["reference_key"]] if options["reference_key"] else wanted


def _columns_of(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        return list(dict.fromkeys(name.partition(".")[0] for name in parquet_paths(path)))
    return list(next(read_file(path), {}))


def _check_verls_own_rewards(config: DictConfig, facts: RowFacts, report: CheckReport) -> None:
    """Without a reward function of the user's, verl chooses one by data source and knows few of them."""
    reward = config.get("reward") or {}
    own = OmegaConf.select(config, "reward.custom_reward_function.path") or OmegaConf.select(
        config, "reward.reward_model.enable"
    )
    own_manager = OmegaConf.select(config, "reward.reward_manager.source") not in (None, "register")
    if own or own_manager or not reward:
        return
    from verl.utils.reward_score import default_compute_score

    unknown = Tally()
    for source in sorted(facts.data_sources):
        # Some of its functions print their own tracebacks for a ground truth that is no test.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                default_compute_score(source, "", "")  # type: ignore[no-untyped-call]
            except NotImplementedError:
                unknown.add("data_source", source)
            except Exception:  # noqa: S110
                # It has a function for this source, which wants another ground truth.
                pass
    if unknown.count:
        text = (
            "verl has no reward function for these data sources; set reward.custom_reward_function.path="
            "pkg://rredcot_verl.rewards.math (or .code) and name=compute_score"
        )
        report.errors.append(Finding("unknown_data_source", 0, tuple(unknown.examples), text))


def _check_batch(config: DictConfig, num_rows: int, num_overlong: int, report: CheckReport) -> None:
    data = config.data
    limit = data.get("train_max_samples", -1)
    left = min(num_rows, limit) if limit and limit > 0 else num_rows
    left -= min(num_overlong, left) if data.get("filter_overlong_prompts") else 0
    mode = OmegaConf.select(config, "trainer.v1.trainer_mode") or "sync"
    batch_size = (data.get("gen_batch_size") or data.train_batch_size) if mode == "sync" else 1
    if num_rows and left < batch_size:
        text = (
            f"{left} training rows are left, fewer than a batch of {batch_size} (data.gen_batch_size, else "
            "data.train_batch_size): verl drops an incomplete batch, so there would be none"
        )
        report.errors.append(Finding("fewer_rows_than_batch", 0, (), text))


def _check_probes(
    config: DictConfig, settings: RREDCoTConfig | None, tokenizer: Any, facts: RowFacts, report: CheckReport
) -> None:
    if settings is None or not getattr(tokenizer, "chat_template", None):
        return
    kwargs = _row_options(config, settings)["template_kwargs"]
    found = check_budget(
        settings, tokenizer, facts.references, config.data.max_response_length, facts.sample_prompt, kwargs
    )
    report.merge(found)


def _check_overlap(train: RowFacts, val: RowFacts, report: CheckReport) -> None:
    overlap = Tally()
    for key in sorted(train.keys.keys() & val.keys.keys(), key=train.keys.__getitem__):
        overlap.add(f"train row {train.keys[key]}", f"val row {val.keys[key]}")
    if overlap.count:
        text = "prompts that are in both data.train_files and data.val_files: validation would flatter the model"
        report.warnings.append(overlap.finding("train_val_overlap", text))
