"""The readout in a training run: values of a batch regressed on its verified outcomes, its state in checkpoints."""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import transfer_queue as tq
from torch import Tensor
from transfer_queue import KVBatchMeta

from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.readout.features import build_features, leave_one_out_means
from rredcot_verl.readout.readout import Readout, States
from rredcot_verl.sources.record import READOUT, SCORED, UNIFORM_GROUP
from rredcot_verl.trainer.batch import Rows

logger = logging.getLogger(__name__)

FILE = "rredcot_readout.pt"
"""The readout's state in a checkpoint's folder."""
LONG_RESPONSE = 0.9
"""Positions are measured against this quantile of the batch's response lengths, not against the own length."""


class Calibrator:
    """Turns the values of a batch into honest estimates of E[R | s_k], see `readout.readout`.

    Args:
        settings: The `algorithm.rredcot` block; `self_value.calibration=logistic` or `self_value.form=hidden`.
    """

    def __init__(self, settings: RREDCoTConfig) -> None:
        self._settings = settings
        readout, value = settings.readout, settings.self_value
        self._reads_hidden = settings.reads_hidden_states()
        self._reads_probes = value.form != "hidden" and readout.use_probe
        columns = [value.form if self._reads_probes else "", "position" if readout.use_position else ""]
        columns += [f"layer {readout.layer}, {readout.dim}"] if self._reads_hidden else []
        self.readout = Readout(readout, tag="; ".join(filter(None, columns)))

    def calibrate(self, rows: Rows, prompts: Sequence[str], hidden: Sequence[Tensor], step: int) -> Rows:
        """The rows with their fitted values.

        Args:
            rows: One training batch.
            prompts: Name of each row's prompt, the same whenever the prompt comes again.
            hidden: For each row `(num_states, dim)` float32, where hidden states are read; otherwise not used.
            step: The trainer's step.
        """
        used = [number for number, record in enumerate(rows.records) if self._is_used(record)]
        if not used:
            self.readout.report = {}
            return rows
        counts = [len(rows.records[number].segment_boundaries) - 1 for number in used]  # type: ignore[union-attr]
        low, high = self._settings.self_value.reward_range
        outcomes = ((rows.outcomes - low) / (high - low)).clamp(0.0, 1.0)
        means, others = leave_one_out_means(outcomes, rows.index.tolist(), rows.final_rows)
        features, blocks = build_features(
            probe_values=self._probe_values(rows, used) if self._reads_probes else None,
            positions=_positions(rows, used) if self._settings.readout.use_position else None,
            hidden=torch.cat([hidden[number] for number in used]) if self._reads_hidden else None,
        )
        row_of_state = torch.tensor(used).repeat_interleave(torch.tensor(counts))
        states = States(
            features=features,
            group_means=means[row_of_state],
            outcomes=outcomes[row_of_state],
            groups=[prompts[row] for row in row_of_state.tolist()],
            rows=row_of_state,
            blocks=blocks,
            num_others=others[row_of_state],
        )
        values = (low + (high - low) * self.readout.fit_predict(states, step)).split(counts)
        records = list(rows.records)
        for number, own in zip(used, values, strict=True):
            record = records[number]
            assert record is not None
            # A group without an advantage teaches, and is not credited.
            if record.status != UNIFORM_GROUP:
                records[number] = dataclasses.replace(record, status=SCORED, self_values=own.tolist())
        return dataclasses.replace(rows, records=records)

    def save(self, folder: str) -> None:
        """Write the state into a checkpoint's folder, before verl declares the checkpoint complete."""
        os.makedirs(folder, exist_ok=True)
        torch.save(self.readout.state_dict(), os.path.join(folder, FILE))

    def load(self, folder: str) -> None:
        """Restore the state from a checkpoint's folder; without one the readout starts anew, and says so."""
        path = os.path.join(folder, FILE)
        if os.path.exists(path):
            self.readout.load_state_dict(torch.load(path, weights_only=True))
        else:
            logger.warning("rredcot: %s: no such file; the readout starts without earlier steps", path)

    def _is_used(self, record: Any) -> bool:
        if record is None or len(record.segment_boundaries) < 2:
            return False
        return record.status in ((SCORED,) if self._settings.self_value.form != "hidden" else (READOUT, UNIFORM_GROUP))

    def _probe_values(self, rows: Rows, used: Sequence[int]) -> Tensor:
        low, high = self._settings.self_value.reward_range
        values = [value for number in used for value in rows.records[number].self_values]  # type: ignore[union-attr]
        return ((torch.tensor(values, dtype=torch.float64) - low) / (high - low)).clamp(0.0, 1.0)


def _positions(rows: Rows, used: Sequence[int]) -> Tensor:
    """Tokens before each boundary over a long response's length, at most 1."""
    lengths = torch.tensor([rows.lengths[number] for number in used], dtype=torch.float64)
    starts = [start for number in used for start in rows.records[number].segment_boundaries[:-1]]  # type: ignore[union-attr]
    return (torch.tensor(starts, dtype=torch.float64) / lengths.quantile(LONG_RESPONSE)).clamp(max=1.0)


def name_prompts(batch: KVBatchMeta, index: Sequence[Hashable]) -> list[str]:
    """A name for each row's prompt that is the same in a later epoch; verl's uid is not.

    Args:
        batch: The batch.
        index: Group of each row. Rows of a group have one name, though a session's later outputs have longer prompts.
    """
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["prompts"])
    names: dict[Hashable, str] = {}
    for group, ids in zip(index, data["prompts"].unbind(), strict=True):
        # The shortest is the prompt itself.
        name = f"{len(ids):08d} {hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]}"
        names[group] = min(name, names.get(group, name))
    return [names[group] for group in index]


def checkpoint_folder(config: Any, step: int, resumes: bool = False) -> str:
    """verl's folder of a step's checkpoint.

    Args:
        config: verl's `trainer` node.
        step: The trainer's step.
        resumes: The one that the run resumes from, which may be another run's.
    """
    if resumes and config.resume_mode == "resume_path":
        return str(config.resume_from_path)
    return os.path.join(config.default_local_dir, f"global_step_{step}")
