"""The data of a run, checked where its trainer starts: nothing of it should come to light at step 300."""

import logging
from typing import Any

from omegaconf import DictConfig

from rredcot_verl.config.schema import PREFIX
from rredcot_verl.data.checks import check_files
from rredcot_verl.rewards.math import close_processes

logger = logging.getLogger(__name__)


def check_data(config: DictConfig, tokenizer: Any) -> None:
    """Check the files a run will train and validate on, before any worker or model is started.

    Raises:
        ValueError: Rows that cannot be trained on, with counts and first examples.
    """
    report = check_files(config, tokenizer)
    # The trainer's process verifies nothing itself: its verifier's processes are not needed any more.
    close_processes()
    for finding in report.warnings:
        logger.warning("rredcot: %s", finding.text())
    if report.errors:
        raise ValueError(f"{report.text()}\nIf this is mistaken, {PREFIX}.check_data=False goes on all the same.")
