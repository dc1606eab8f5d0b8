"""The data of a run, checked where its trainer starts: nothing of it should come to light at step 300."""

import logging
from typing import Any

from omegaconf import DictConfig

from rredcot_verl.config.schema import PREFIX
from rredcot_verl.preflight.file_checks import check_files
from rredcot_verl.preflight.findings import Findings
from rredcot_verl.rewards.math import close_processes

logger = logging.getLogger(__name__)


def check_data(config: DictConfig, tokenizer: Any) -> None:
    """Check the files a run will train and validate on, before any worker or model is started.

    Raises:
        ValueError: Rows that cannot be trained on, with counts and first examples.
    """
    findings = Findings()
    check_files(config, tokenizer, findings)
    # The trainer's process verifies nothing itself: its verifier's processes are not needed any more.
    close_processes()
    for finding in findings.warnings:
        logger.warning("rredcot: %s", finding)
    if findings.faults:
        raise ValueError(f"{findings.text()}\nIf this is mistaken, {PREFIX}.check_data=False goes on all the same.")
