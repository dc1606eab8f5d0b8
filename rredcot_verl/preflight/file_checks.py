"""Checks of a run's data files: verl's whole config against the rows they hold. No Ray, no model."""

import copy
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from rredcot_verl.answers.grammar import look_up
from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.data.lengths import render
from rredcot_verl.data.load import columns_of, num_parquet_rows, read_columns
from rredcot_verl.data.tally import Tally
from rredcot_verl.preflight.findings import Findings
from rredcot_verl.preflight.probe_budget import check_budget
from rredcot_verl.preflight.row_checks import RowFacts, RowRules, check_rows
from rredcot_verl.preflight.verifier_checks import (
    check_data_sources,
    check_prompt,
    check_verifier,
    plain_options,
    verifier_of,
)
from rredcot_verl.run.settings import parse_block, run_source
from rredcot_verl.sources.registry import SOURCES

NUM_SAMPLED_ROWS = 256
"""Rows whose references the probe estimate reads."""


def check_files(config: DictConfig, tokenizer: Any, findings: Findings) -> None:
    """Check the data files of a run, and its verifier where it is one of this package's.

    The verifier judges one right response with the run's `reward_kwargs`, and tries a sample of ground truths. Every
    row is read for its columns, prompt, ground truth and references; of the prompts those that may be too long are
    measured, the longest first.

    Args:
        config: verl's whole config, composed.
        tokenizer: The policy's tokenizer; None: nothing is measured.
        findings: Gets what was found; a file that is missing or unreadable is a fault.
    """
    tokenizer = None if tokenizer is None else with_template(config, tokenizer)
    settings = _active_settings(config, findings)
    rules = _rules(config, settings)
    own_rows = bool(OmegaConf.select(config, "data.custom_cls.path"))
    if own_rows:
        findings.skip("rows: data.custom_cls is set, and its rows are its own")
    check_verifier(config, settings, findings)
    train, val = (
        _check_group(config, key, None if own_rows else rules, tokenizer, findings.at(f"data.{key}"))
        for key in ("train_files", "val_files")
    )
    if train is not None and train.num_rows:
        # Files elsewhere hold rows that were not counted.
        if not any("://" in path for path in files_of(config.data.train_files)):
            _check_batch(config, train, findings)
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if has_template and train.sample_prompt is not None:
            check_prompt(config, render(tokenizer, train.sample_prompt, rules.template_kwargs), findings)
        if settings is not None and has_template:
            max_length, prompt = config.data.max_response_length, train.sample_prompt
            check_budget(settings, tokenizer, train.references, max_length, prompt, rules.template_kwargs, findings)
    if train is not None and val is not None:
        overlap = Tally()
        for key in sorted(train.keys.keys() & val.keys.keys(), key=train.keys.__getitem__):
            overlap.add(f"train row {train.keys[key]}", f"val row {val.keys[key]}")
        text = "prompts that are in both data.train_files and data.val_files: validation would flatter the model"
        findings.warn("train_val_overlap", text, overlap)


def files_of(entry: Any) -> list[str]:
    """The files of `data.train_files` or `data.val_files`: none, one or a list."""
    if entry is None or entry == "":
        return []
    return [str(path) for path in entry] if isinstance(entry, list | tuple | ListConfig) else [str(entry)]


def with_template(config: DictConfig, tokenizer: Any) -> Any:
    """The tokenizer with the chat template that verl will give it, `actor_rollout_ref.model.custom_chat_template`."""
    template = OmegaConf.select(config, "actor_rollout_ref.model.custom_chat_template")
    if not template:
        return tokenizer
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def num_rows(paths: Sequence[str]) -> int | None:
    """Rows of Parquet files; None where one is none or is not here."""
    files = [Path(path).expanduser() for path in paths]
    try:
        return sum(map(num_parquet_rows, files)) if all(file.suffix == ".parquet" for file in files) else None
    except ValueError:
        return None


def sample_references(config: DictConfig, reference_key: str) -> list[Any]:
    """What the first rows of the first training file hold under a dotted key; nothing if it cannot be read here."""
    paths = files_of(config.data.train_files)[:1]
    try:
        rows = [row for path in paths for row in islice(read_columns(Path(path), [reference_key]), NUM_SAMPLED_ROWS)]
    except ValueError:
        # The check of the files says so.
        return []
    return [look_up(row, reference_key) for row in rows]


def _active_settings(config: DictConfig, findings: Findings) -> RREDCoTConfig | None:
    """The settings of a run that redistributes, as far as they can be read."""
    try:
        settings = parse_block(config)
    except ValueError as error:
        for line in str(error).splitlines():
            findings.fault(line)
        return None
    return settings if config.algorithm.adv_estimator in SOURCES or settings.enable else None


def _rules(config: DictConfig, settings: RREDCoTConfig | None) -> RowRules:
    data = config.data
    needs_references = settings is not None and run_source(config, settings).needs_references()
    return RowRules(
        verifier=verifier_of(config),
        max_prompt_length=data.max_prompt_length,
        prompt_key=data.get("prompt_key") or "prompt",
        source_key=data.get("reward_fn_key") or "data_source",
        reference_key=settings.self_value.reference_key if settings and needs_references else None,
        filters_overlong=bool(data.get("filter_overlong_prompts")),
        truncates=data.get("truncation", "error") != "error",
        template_kwargs=plain_options(data.get("apply_chat_template_kwargs")),
    )


def _check_group(
    config: DictConfig, key: str, rules: RowRules | None, tokenizer: Any, findings: Findings
) -> RowFacts | None:
    """Check the files of one key together, as verl concatenates them; None where their rows were not read."""
    files = files_of(config.data.get(key))
    num_faults = len(findings.faults)
    if not files:
        findings.fault("no_files", f"data.{key} is not set; verl needs at least one file")
    local = [Path(path).expanduser() for path in files if "://" not in path]
    for path in files:
        if "://" in path:
            findings.skip(f"{path} is not on this machine")
    for file in local:
        if not file.is_file():
            text = f"{file}: no such file; scripts/prepare_math.py and prepare_code.py make data files"
            findings.fault("missing_file", text)
        elif file.suffix not in (".parquet", ".json", ".jsonl"):
            findings.fault("unknown_kind", f"{file}: verl reads .parquet, .json and .jsonl")
    if len(findings.faults) > num_faults or not local or rules is None:
        return None
    try:
        columns = list(dict.fromkeys(chain.from_iterable(map(columns_of, local))))
        rows = chain.from_iterable(read_columns(file, rules.columns) for file in local)
        facts = check_rows(rows, tokenizer, rules, findings, columns)
    except ValueError as error:
        findings.fault("unreadable_file", str(error))
        return None
    check_data_sources(config, facts.data_sources, findings)
    return facts


def _check_batch(config: DictConfig, train: RowFacts, findings: Findings) -> None:
    data = config.data
    limit = data.get("train_max_samples", -1)
    left = min(train.num_rows, limit) if limit and limit > 0 else train.num_rows
    left -= min(train.num_overlong, left) if data.get("filter_overlong_prompts") else 0
    mode = OmegaConf.select(config, "trainer.v1.trainer_mode") or "sync"
    batch_size = (data.get("gen_batch_size") or data.train_batch_size) if mode == "sync" else 1
    if left < batch_size:
        text = (
            f"{left} training rows are left, fewer than a batch of {batch_size} (data.gen_batch_size, else "
            "data.train_batch_size): verl drops an incomplete batch, so there would be none"
        )
        findings.fault("fewer_rows_than_batch", text)
