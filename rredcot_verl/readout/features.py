"""What is known of a state, as columns of the readout's regression.

All choices here are ours. No column reads an outcome: a column says of a state what was known there.
"""

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

PROBE_BLOCK = 0
"""Columns of the probe and of the position: few, and known to matter."""
HIDDEN_BLOCK = 1
"""Columns of the hidden state: many, each knowing little. A prior of their own."""

LOGIT_LIMIT = 7.0
"""Beyond +-7 (a value of 0.001 or 0.999) the logit says how long the answer is rather than how likely R is."""
SMALLEST = 1e-45
"""Below float32's smallest positive number; a value of exactly 0 is read as this one."""


def build_features(
    *, probe_values: Tensor | None = None, positions: Tensor | None = None, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Columns of the features that are given.

    The probe gives its clipped logit, and what the clip cut off below on a logarithmic scale: the joint probability of
    a long answer vanishes, and a plain logit would then spend its whole scale there. With positions the clipped logit
    has a coefficient of its own at the start, the middle and the end of the response, linear in between, because a
    forced answer says little early; the positions enter the same way.

    Args:
        probe_values: `(num_states,)` in [0, 1], the self-values of the probes in units of the rescaled reward.
        positions: `(num_states,)` in [0, 1]: tokens before the boundary over a length that is known there, such as the
            budget or a long response's. Over the response's own length it would know how long the response becomes,
            and beside a column that counts tokens that can tell the outcome.
        hidden: `(num_states, dim)`, projected hidden state at the last token before the boundary.

    Returns:
        features `(num_states, num_features)` float64 and blocks `(num_features,)` int64: which columns share a
        prior. Without any argument both are empty, with 0 states.

    Raises:
        ValueError: Shapes that do not fit each other, or numbers out of range or not finite.
    """
    given = [tensor for tensor in (probe_values, positions, hidden) if tensor is not None]
    num_states = given[0].size(0) if given else 0
    if any(tensor.size(0) != num_states for tensor in given):
        raise ValueError(
            f"the features are of {sorted({tensor.size(0) for tensor in given})} states, expected one count"
        )
    hats = None if positions is None else _hats(_unit(positions, "positions"))
    columns = []
    if probe_values is not None:
        logit = _logit(_unit(probe_values, "probe_values"))
        level = logit.clamp(-LOGIT_LIMIT, LOGIT_LIMIT).unsqueeze(1)
        vanished = (-LOGIT_LIMIT - logit).clamp(min=0.0).log1p().unsqueeze(1)
        columns += [level if hats is None else level * hats, vanished]
    if hats is not None:
        # The three hats add up to 1, the fit's own constant.
        columns.append(hats[:, 1:])
    num_plain = sum(column.size(1) for column in columns)
    if hidden is not None:
        if hidden.ndim != 2 or not bool(hidden.isfinite().all()):
            raise ValueError(f"hidden must be finite numbers (num_states, dim), got shape {tuple(hidden.shape)}")
        columns.append(hidden.double())
    features = torch.cat(columns, dim=1) if columns else torch.zeros(num_states, 0, dtype=torch.float64)
    blocks = torch.full((features.size(1),), HIDDEN_BLOCK)
    blocks[:num_plain] = PROBE_BLOCK
    return features, blocks


def others_differ(rewards: Tensor, index: Sequence[Hashable], final_rows: Tensor) -> Tensor:
    """Whether two of the other rollouts of each row's prompt have different rewards: `(bs,)` bool.

    Such a row's group is mixed, so the row is measured, whatever its own reward. A row whose others agree is measured
    or not by its own reward: in a mixed group that is the one that the others do not have.

    Args:
        rewards: `(bs,)`, neither scaled nor clipped: by them it is decided which groups are measured.
        index: `bs` group labels (uid).
        final_rows: `(bs,)` int64: for each row the row that holds its session's final output (itself, for ordinary
            agent loops). Only final outputs are counted, as in verl's GRPO.
    """
    groups: dict[Hashable, Counter[float]] = {}
    for row in torch.unique(final_rows).tolist():
        groups.setdefault(index[row], Counter())[float(rewards[row])] += 1
    own = rewards[final_rows].tolist()
    distinct = [len(groups[label]) - (groups[label][reward] == 1) for label, reward in zip(index, own, strict=True)]
    return torch.tensor(distinct) > 1


def _logit(values: Tensor) -> Tensor:
    safe = values.clamp(min=SMALLEST, max=1.0 - 1e-12)
    return safe.log() - torch.log1p(-safe)


def _hats(positions: Tensor) -> Tensor:
    """`(num_states, 3)`: weights of start, middle and end that add up to 1 (piecewise linear)."""
    start, end = (1.0 - 2.0 * positions).clamp(min=0.0), (2.0 * positions - 1.0).clamp(min=0.0)
    return torch.stack([start, 1.0 - start - end, end], dim=1)


def _unit(values: Tensor, name: str) -> Tensor:
    if values.ndim != 1 or not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"{name} must be numbers in [0, 1] of shape (num_states,), got shape {tuple(values.shape)}")
    return values.double()
