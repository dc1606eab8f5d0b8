"""What a response's segments are weighed for, and how it travels to the training engine: as a flat row of integers."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rredcot_verl.passes.payload import PayloadReader
from rredcot_verl.passes.protocol import NOTHING


@dataclass(frozen=True)
class AttributionTask:
    """One trace, its segments and the answer they are weighed for.

    Attributes:
        token_ids: Prompt and response up to the end of the answer; what follows is ignored.
        boundaries: Offsets in `token_ids` where the `num_segments` segments start, and where the last one ends. What
            lies between there and the answer (its opening) weighs nothing.
        answer_from: Offset of the answer's first token.
        answer_to: Offset after its last one.

    Raises:
        ValueError: The offsets are not in this order, or nothing stands before a segment or the answer.
    """

    token_ids: Sequence[int]
    boundaries: Sequence[int]
    answer_from: int
    answer_to: int

    def __post_init__(self) -> None:
        offsets = [1, *self.boundaries, self.answer_from, self.answer_to, len(self.token_ids)]
        if any(before > after for before, after in itertools.pairwise(offsets)):
            raise ValueError(
                f"boundaries={list(self.boundaries)}, answer_from={self.answer_from} and answer_to={self.answer_to} of "
                f"a task with {len(self.token_ids)} tokens must be at least 1 and in ascending order"
            )

    @property
    def num_segments(self) -> int:
        """Segments that can carry weight."""
        return max(0, len(self.boundaries) - 1)

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of the answer."""
        return self.answer_to - self.answer_from

    def sums(self, by_token: Tensor) -> Tensor:
        """`(num_segments,)` sums over the segments' tokens of a `(num_tokens,)` tensor."""
        parts = [by_token[start:end].sum() for start, end in itertools.pairwise(self.boundaries)]
        return torch.stack(parts) if parts else by_token.new_zeros(0)

    def without(self, segment: int) -> "AttributionTask":
        """The same answer without one segment; what follows it closes up."""
        start, end = self.boundaries[segment], self.boundaries[segment + 1]
        return AttributionTask(
            (*self.token_ids[:start], *self.token_ids[end : self.answer_to]),
            (),
            self.answer_from - (end - start),
            self.answer_to - (end - start),
        )


@dataclass(frozen=True)
class AttributionPlan:
    """A task without its tokens, which the row has: those up to `answer_to`, prompt included.

    Attributes:
        boundaries, answer_from, answer_to: As in `AttributionTask`.
    """

    boundaries: tuple[int, ...]
    answer_from: int
    answer_to: int

    def task(self, token_ids: Sequence[int]) -> AttributionTask:
        """The task for a row of tokens."""
        return AttributionTask(token_ids[: self.answer_to], self.boundaries, self.answer_from, self.answer_to)


def encode_plan(plan: AttributionPlan) -> list[int]:
    """Write a plan as integers: where the answer starts and ends, the number of boundaries, and these."""
    return [plan.answer_from, plan.answer_to, len(plan.boundaries), *plan.boundaries]


def decode_plan(row: Sequence[int]) -> AttributionPlan | None:
    """Read what `encode_plan` wrote; None for `NOTHING`.

    Raises:
        ValueError: The row is cut off or too long.
    """
    if tuple(row) == NOTHING:
        return None
    reader = PayloadReader(row, "an encoded attribution")
    answer_from, answer_to = reader.take(2)
    boundaries = reader.take_list()
    reader.end()
    return AttributionPlan(boundaries, answer_from, answer_to)
