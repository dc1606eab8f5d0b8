"""Segments of a batch, and the reward redistributed over them with exact return equivalence (RUDDER)."""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SegmentBatch:
    """The segments of a batch of responses, padded to the row with most segments.

    Attributes:
        segment_boundaries: `(bs, num_segments + 1)` int64; a row's last boundary is repeated as padding.
        self_values: `(bs, num_segments + 1)` float64, in units of reward; the value at a row's last boundary is pinned
            to its score and repeated as padding, so a padded segment has length 0 and reward 0.
        outcomes: `(bs,)` float64, R of each response.
        scores: `(bs,)` float64, what the verifier alone gave of it: R less what was added for other reasons, such as a
            penalty for overlong responses.
        scored: `(bs,)` bool, False for a row that is one segment because nothing was probed.
    """

    segment_boundaries: Tensor
    self_values: Tensor
    outcomes: Tensor
    scores: Tensor
    scored: Tensor

    @classmethod
    def from_rows(
        cls,
        boundaries: Sequence[Sequence[int]],
        values: Sequence[Sequence[float]],
        outcomes: Tensor,
        lengths: Sequence[int],
        scores: Tensor | None = None,
    ) -> "SegmentBatch":
        """Pad ragged rows.

        Args:
            boundaries: Per row `num_segments + 1` offsets from 0 to the response length, or nothing where unscored.
            values: Per row the `num_segments` self-values v_0 .. v_{K-1} (v_K is the score), or nothing.
            outcomes: `(bs,)`, R of each response.
            lengths: Number of response tokens of each row.
            scores: `(bs,)`, the verifier's share of R; None: all of it.

        Raises:
            ValueError: A row whose counts, offsets or values do not fit.
        """
        rows = []
        scores = outcomes if scores is None else scores
        for row, (cuts, states, score, length) in enumerate(
            zip(boundaries, values, scores.tolist(), lengths, strict=True)
        ):
            # An unscored row is one segment that starts from nothing: its whole outcome stays where verl put it.
            cuts, states = (list(cuts), [*states, score]) if states else ([0, length], [0.0, score])
            ordered = all(map(operator.lt, cuts, cuts[1:])) or length == 0
            if len(cuts) != len(states) or cuts[0] != 0 or cuts[-1] != length or not ordered:
                raise ValueError(
                    f"row {row}: segment_boundaries {cuts} must rise from 0 to the response length {length}, one more "
                    f"than the {len(states) - 1} self-values"
                )
            rows.append((cuts, states))
        width = max((len(cuts) for cuts, _ in rows), default=2)
        padded_cuts = [cuts + [cuts[-1]] * (width - len(cuts)) for cuts, _ in rows]
        padded_states = [states + [states[-1]] * (width - len(states)) for _, states in rows]
        self_values = torch.tensor(padded_states, dtype=torch.float64).reshape(len(rows), width)
        if not bool(self_values.isfinite().all()):
            raise ValueError("self-values and outcomes must be finite")
        return cls(
            segment_boundaries=torch.tensor(padded_cuts, dtype=torch.int64).reshape(len(rows), width),
            self_values=self_values,
            outcomes=outcomes.double(),
            scores=scores.double(),
            scored=torch.tensor([bool(len(states)) for states in values], dtype=torch.bool),
        )

    @property
    def num_segments(self) -> Tensor:
        """`(bs,)` int64, the number of segments that hold tokens (1 for an empty response)."""
        return (self.segment_boundaries.diff(dim=1) > 0).sum(dim=1).clamp(min=1)

    @property
    def segment_rewards(self) -> Tensor:
        """`(bs, num_segments)` float64, d_k = v_k - v_{k-1} (the paper's; that v_K is the score is ours)."""
        return self.self_values.diff(dim=1)

    def num_tokens(self, response_mask: Tensor) -> Tensor:
        """`(bs, num_segments)` int64: tokens of each segment that the policy wrote."""
        before = self.segment_boundaries.clone()
        for rows, written in _parted(self.segment_boundaries, response_mask):
            before[rows] = written.gather(1, before[rows]).long()
        return before.diff(dim=1)

    def last_written(self, response_mask: Tensor) -> Tensor:
        """`(bs, num_segments + 1)` int64: where the last token that the policy wrote before each boundary stands.

        Before it wrote any, where the first stands; 0 in a row without any.
        """
        places = self.segment_boundaries.clamp(min=1) - 1
        for rows, written in _parted(self.segment_boundaries, response_mask):
            # The n-th written token stands before the first offset with n of them before it.
            ranks = written.gather(1, self.segment_boundaries[rows]).clamp(min=1)
            found = torch.searchsorted(written, ranks).clamp(max=response_mask.size(1)) - 1
            places[rows] = torch.where(written[:, -1:] > 0, found, 0)
        return places


def _parted(segment_boundaries: Tensor, response_mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows that hold tokens the policy did not write, some at a time, so that nothing is as large as the batch.

    Yields:
        Their numbers `(rows,)`, and how many tokens that the policy wrote stand before each offset: int32
        `(rows, response_length + 1)`.
    """
    parted = (response_mask.sum(dim=1) < segment_boundaries[:, -1]).nonzero().flatten()
    for rows in torch.split(parted, max(1, 2**22 // max(1, response_mask.size(1)))):
        written = response_mask[rows].cumsum(dim=1, dtype=torch.int32)
        yield rows, torch.nn.functional.pad(written, (1, 0))


def expand_to_tokens(segment_quantity: Tensor, segment_boundaries: Tensor, response_mask: Tensor) -> Tensor:
    """Give every token that the policy wrote its segment's number, 0 to others and after the last boundary.

    Args:
        segment_quantity: `(bs, num_segments)`.
        segment_boundaries: `(bs, num_segments + 1)` int64.
        response_mask: `(bs, response_length)`, with a response_length of at least the largest boundary.

    Returns:
        `(bs, response_length)`, dtype of `segment_quantity`.
    """
    bs, response_length = response_mask.shape
    tail = response_length - segment_boundaries[:, -1:]
    quantity = torch.nn.functional.pad(segment_quantity, (0, 1))
    repeats = torch.cat([segment_boundaries.diff(dim=1), tail], dim=1)
    # torch's repeat_interleave makes an int64 index of all tokens first.
    tokens = torch.from_numpy(np.repeat(quantity.flatten().numpy(), repeats.flatten().numpy())).view(bs, -1)
    for rows, _ in _parted(segment_boundaries, response_mask):
        tokens[rows] *= response_mask[rows]
    return tokens


def redistribute(segments: SegmentBatch, response_mask: Tensor, pay_start: bool = True) -> Tensor:
    """Token-level rewards: d_k on the last token of segment k, v_0 on the first token (ours; RUDDER's v_{-1} = 0).

    Their sum over a response is R exactly up to float32 rounding, because v_K is pinned to the score; what was added to
    the score is paid on the last token, where verl pays it.

    Args:
        segments: The segments of the batch.
        response_mask: `(bs, response_length)`, 1 for tokens the policy wrote.
        pay_start: Whether v_0 is paid. For an estimator without a group baseline it is not: v_0 depends on the prompt
            alone and is the first token's baseline. The sum is then R - v_0.

    Returns:
        `token_level_rewards`: `(bs, response_length)` float32, zero on every token the policy did not write. A response
        without any such token keeps its outcome on the first position, as verl gives it.
    """
    bs, response_length = response_mask.shape
    rewards = torch.zeros(bs, response_length)
    if response_length == 0:
        return rewards
    places = segments.last_written(response_mask)
    first, last = places[:, :1], places[:, -1:]
    rewards.scatter_add_(1, places[:, 1:].maximum(first), segments.segment_rewards.float())
    rewards.scatter_add_(1, last.maximum(first), (segments.outcomes - segments.scores).float().unsqueeze(1))
    if pay_start:
        rewards.scatter_add_(1, first, segments.self_values[:, :1].float())
    return rewards


def return_error(token_level_rewards: Tensor, returns: Tensor) -> Tensor:
    """`(bs,)` float64: |sum of the redistributed rewards - what they must sum to|, zero but for float32 rounding."""
    return (token_level_rewards.sum(dim=1) - returns.double()).abs()
