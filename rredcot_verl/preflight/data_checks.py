"""The data files of a run: what is wrong with them, how large they are, and the references in their rows."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rredcot_verl.answers.grammar import look_up
from rredcot_verl.data.checks import check_files, files_of
from rredcot_verl.data.load import num_parquet_rows, read_columns
from rredcot_verl.preflight.findings import Findings
from rredcot_verl.preflight.quiet import quiet

NUM_SAMPLED_ROWS = 256
"""Rows whose references the probe estimate reads."""


def check_data(config: DictConfig, tokenizer: Any, findings: Findings) -> None:
    """Files, rows, prompts, ground truths and references, as `rredcot_verl.data.checks` sees them.

    Args:
        config: verl's whole config.
        tokenizer: The policy's; None where the model cannot be read: prompts are not measured then.
        findings: Gets what was found.
    """
    with quiet():
        report = check_files(config, tokenizer)
    # Faulty settings have been reported already.
    findings.fault(*(found.text() for found in report.errors if not found.kind.endswith("settings")))
    findings.warn(*(found.text() for found in report.warnings))
    findings.skip(*report.unchecked)


def num_rows(paths: Sequence[str]) -> int | None:
    """Rows of Parquet files; None where one is none or is not here."""
    total = 0
    for path in paths:
        file = Path(path).expanduser()
        if file.suffix != ".parquet" or not file.is_file():
            return None
        try:
            total += num_parquet_rows(file)
        except ValueError:
            return None
    return total


def sample_references(config: DictConfig, reference_key: str) -> list[Any]:
    """What the first rows of the first training file hold under a dotted key; nothing if it cannot be read here."""
    paths = files_of(config.data.train_files)[:1]
    try:
        rows = [row for path in paths for row in islice(read_columns(Path(path), [reference_key]), NUM_SAMPLED_ROWS)]
    except ValueError:
        # The check of the files says so.
        return []
    return [look_up(row, reference_key) for row in rows]
