"""Rows of a pass that reads probes: what of its trace each needs, and a row in parts where its probes do not fit."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rredcot_verl.passes.probe_codec import decode, encode, num_probe_tokens
from rredcot_verl.passes.protocol import NOTHING
from rredcot_verl.probes.probe import Probe

LEAST_ROOM = 4
"""A trace as long as a pass may go over it by this share, one in so many, for its probes: else it would be computed
once for each of them."""


@dataclass(frozen=True)
class Part:
    """Some probes of a row, and the beginning of its trace.

    Attributes:
        row: Number of the row in its batch.
        num_tokens: Tokens of the trace that are computed.
        payload: The probes, encoded.
    """

    row: int
    num_tokens: int
    payload: Tensor

    @property
    def num_pass_tokens(self) -> int:
        """Tokens it adds to a pass."""
        return self.num_tokens + num_probe_tokens(self.payload)


def parts_of_row(row: int, num_tokens: int, payload: Tensor, budget: int | None, whole: bool) -> list[Part]:
    """Cut a row into parts that a pass can hold, in the order of its probes.

    Args:
        row: Its number.
        num_tokens: Tokens of its trace.
        payload: Its probes, encoded.
        budget: Tokens of a pass; None for any number.
        whole: Whether all of the trace is wanted; the first part then has it. Otherwise no part has more of it than its
            probes see, and a row without any has a single token.
    """
    nothing = num_probe_tokens(payload) == 0
    limit = None if budget is None else max(budget, num_tokens + budget // LEAST_ROOM)
    fits = limit is None or num_tokens + num_probe_tokens(payload) <= limit
    if whole and (nothing or fits):
        return [Part(row, num_tokens, payload)]
    if nothing:
        return [Part(row, 1, payload)]
    probes = decode(payload.tolist())
    if fits:
        return [Part(row, max(probe.position for probe in probes), payload)]
    assert limit is not None
    parts = []
    for own in _split(probes, limit, num_tokens if whole else 0):
        seen = max(probe.position for probe in own)
        encoded = torch.tensor(encode(own), dtype=payload.dtype, device=payload.device)
        parts.append(Part(row, num_tokens if whole and not parts else seen, encoded))
    return parts


def filler(payload: Tensor) -> Part:
    """The first token of a batch's first row, for ranks whose batch has fewer parts than another's."""
    return Part(0, 1, payload.new_tensor(NOTHING))


def _split(probes: Sequence[Probe], limit: int, first: int) -> list[list[Probe]]:
    """Runs of probes that have room within the limit together with the trace they see, the first with `first` of it."""
    parts: list[list[Probe]] = [[]]
    seen, used = first, 0
    for probe in probes:
        before = [other.token_ids for other in parts[-1] if other.position == probe.position]
        shared = max((len(os.path.commonprefix([ids, probe.token_ids])) for ids in before), default=0)
        new = len(probe.token_ids) - shared
        seen = max(seen, probe.position)
        if parts[-1] and seen + used + new > limit:
            parts.append([])
            seen, used, new = probe.position, 0, len(probe.token_ids)
        parts[-1].append(probe)
        used += new
    return parts
