"""Values regressed on verified outcomes (ours, see `readout`): what is known of each state, the fit, its state."""

import hashlib
import logging
import os
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from rredcot_verl.config.blocks import ReadoutConfig
from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.core.groups import from_unit, leave_one_out_means, to_unit
from rredcot_verl.passes.protocol import FIELDS
from rredcot_verl.readout.features import build_features, others_differ
from rredcot_verl.readout.readout import Readout, States
from rredcot_verl.sources.base import PassRequest
from rredcot_verl.sources.queue import Rows
from rredcot_verl.sources.record import Status
from rredcot_verl.sources.response import Response

logger = logging.getLogger(__name__)

HIDDEN_FIELD = FIELDS["hidden"].payload
FILE = "rredcot_readout.pt"
"""The regression's state in a checkpoint's folder."""
LONG_RESPONSE = 0.9
"""Positions are measured against this quantile of the step before's response lengths, not against the own length."""


def hidden_request(readout: ReadoutConfig) -> PassRequest:
    """The pass that reads hidden states."""
    return PassRequest("hidden", (readout.layer, readout.dim, readout.seed))


def hidden_positions(response: Response, boundaries: Sequence[int]) -> list[int]:
    """Where the states s_0 .. s_{K-1} of a response end, as indices in its prompt and response laid end to end."""
    return [len(response.prompt_ids) + boundary - 1 for boundary in boundaries[:-1]]


class Regression:
    """Turns what is known of the states of a batch into honest estimates of E[R | s_k], see `readout`.

    Args:
        settings: The `algorithm.rredcot` block.
        form: Form of the probes' values that are a feature; None: there are none.
        hidden: Whether hidden states are a feature; None: `readout.use_hidden` says so.
    """

    def __init__(self, settings: RREDCoTConfig, form: str | None, hidden: bool | None = None) -> None:
        readout = settings.readout
        self._settings = readout
        self._measures_all = settings.measures_uniform_groups
        self._reward_range = settings.self_value.reward_range
        self._reads_probes = form is not None
        self._reads_hidden = readout.use_hidden if hidden is None else hidden
        columns = [form or "", "position" if readout.use_position else "", f"rewards {self._reward_range}"]
        if form is not None:
            value, elicitation = settings.self_value, settings.elicitation
            columns += [value.proposals, value.reference_key, elicitation.format, f"opening {value.score_opening}"]
        columns += [f"layer {readout.layer}, {readout.dim}"] if self._reads_hidden else []
        self._readout = Readout(readout, tag="; ".join(filter(None, columns)))
        self._long_response: float | None = None

    def fitted(self, rows: Rows, values: Sequence[Sequence[float]]) -> list[list[float]]:
        """For each row its fitted values, in units of reward; nothing for a row that is not scored.

        Args:
            rows: One training batch.
            values: For each row the probes' values; read where they are a feature.
        """
        used = rows.scored
        found: list[list[float]] = [[] for _ in rows.keys]
        if not used:
            self._readout.report = {}
            return found
        boundaries = [record.segment_boundaries for row in used if (record := rows.records[row]) is not None]
        counts = [len(own) - 1 for own in boundaries]
        outcomes = to_unit(rows.scores, self._reward_range)
        means, others = leave_one_out_means(outcomes, rows.index.tolist(), rows.final_rows)
        probe_values, positions, hidden = None, None, None
        if self._reads_probes:
            known = [value for row in used for value in values[row]]
            probe_values = to_unit(torch.tensor(known, dtype=torch.float64), self._reward_range)
        if self._settings.use_position:
            positions = self._positions([rows.lengths[row] for row in used], boundaries)
        if self._reads_hidden:
            states = read_hidden(rows)
            hidden = torch.cat([states[row] for row in used])
        features, blocks = build_features(probe_values=probe_values, positions=positions, hidden=hidden)
        row_of_state = torch.tensor(used).repeat_interleave(torch.tensor(counts))
        prompts = name_prompts(rows)
        teaching = torch.ones(len(rows.keys), dtype=torch.bool) if self._measures_all else _free_of_selection(rows)
        fit = self._readout.fit_predict(
            States(
                features=features,
                group_means=means[row_of_state],
                outcomes=outcomes[row_of_state],
                groups=[prompts[row] for row in row_of_state.tolist()],
                rows=row_of_state,
                counts=teaching[row_of_state],
                blocks=blocks,
                num_others=others[row_of_state],
            ),
            rows.step,
        )
        for row, own in zip(used, torch.split(from_unit(fit, self._reward_range), counts), strict=True):
            found[row] = own.tolist()
        return found

    def _positions(self, lengths: Sequence[int], boundaries: Sequence[Sequence[int]]) -> Tensor:
        """Tokens before each boundary over a long response's length, at most 1."""
        long = float(torch.tensor(lengths, dtype=torch.float64).quantile(LONG_RESPONSE))
        # Of the step before, or it would know something of the response's own length.
        known, self._long_response = self._long_response or long, long
        starts = [start for own in boundaries for start in own[:-1]]
        return (torch.tensor(starts, dtype=torch.float64) / known).clamp(max=1.0)

    def metrics(self) -> dict[str, float]:
        """Scalars of the last fit."""
        return {f"rredcot/{name}": value for name, value in self._readout.report.items()}

    def save(self, folder: str) -> None:
        """Write the state into a checkpoint's folder, before verl declares the checkpoint complete."""
        os.makedirs(folder, exist_ok=True)
        state = {**self._readout.state_dict(), "long_response": self._long_response}
        torch.save(state, os.path.join(folder, FILE))

    def load(self, folder: str) -> None:
        """Restore the state from a checkpoint's folder; without one the fit starts anew, and says so."""
        path = os.path.join(folder, FILE)
        if os.path.exists(path):
            state = torch.load(path, weights_only=True)
            self._long_response = state.pop("long_response", None)
            self._readout.load_state_dict(state)
        else:
            logger.warning("rredcot: %s: no such file; the readout starts without earlier steps", path)


def read_hidden(rows: Rows) -> list[Tensor]:
    """The states that a pass has read: for each row `(num_states, dim)` float32; none for a row without segments.

    Raises:
        RuntimeError: A row has another number of floats than its states make, or one of them is not finite.
    """
    counts = [0 if record is None else max(0, len(record.segment_boundaries) - 1) for record in rows.records]
    read = [row.float() for row in rows.read(FIELDS["hidden"].result)]
    dim = next((len(row) // count for row, count in zip(read, counts, strict=True) if count), 0)
    states = []
    for key, row, count in zip(rows.keys, read, counts, strict=True):
        if len(row) != max(1, count * dim):
            raise RuntimeError(f"a pass gave {len(row)} floats for the {count} hidden states of {key}, {dim} each")
        if not bool(torch.isfinite(row).all()):
            raise RuntimeError(f"a hidden state of {key} is not finite, and without it its credit would be wrong")
        states.append(row[: count * dim].reshape(count, dim))
    return states


def name_prompts(rows: Rows) -> list[str]:
    """A name for each row's prompt that is the same in a later epoch; verl's uid is not.

    Rows of a group have one name, though a session's later outputs have longer prompts.
    """
    names: dict[Hashable, str] = {}
    for group, ids in zip(rows.index.tolist(), rows.read("prompts"), strict=True):
        # The shortest is the prompt itself.
        name = f"{len(ids):08d} {hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]}"
        names[group] = min(name, names.get(group, name))
    return [names[group] for group in rows.index.tolist()]


def _free_of_selection(rows: Rows) -> Tensor:
    """Rows that were measured whatever their own reward: `(bs,)` bool.

    Groups of one reward are not measured, so those are the rows whose others differ; where they agree, the others'
    mean is the better baseline anyway. A response without others is free unless, by the records, such were left out.
    """
    index = rows.index.tolist()
    # Groups may be chosen by the reward or, by a filter, by the score alone.
    differ = others_differ(rows.outcomes, index, rows.final_rows) & others_differ(rows.scores, index, rows.final_rows)
    alone = rows.groups.count == 1
    uniform = [record is not None and record.status is Status.UNIFORM_GROUP for record in rows.records]
    return differ | alone & ~(alone & torch.tensor(uniform)).any()
