"""Rows of integers: how what a pass is asked for travels from the agent loop to the training engine."""

import itertools
from collections.abc import Sequence


class PayloadReader:
    """Takes a row apart from its start; lists are written as their length and their entries.

    Args:
        row: The integers.
        what: What they are, for messages.
    """

    def __init__(self, row: Sequence[int], what: str) -> None:
        self._numbers = iter(row)
        self._what, self._length = what, len(row)

    def take(self, count: int) -> tuple[int, ...]:
        """The next integers.

        Raises:
            ValueError: There are fewer.
        """
        taken = tuple(itertools.islice(self._numbers, count))
        if len(taken) != count:
            raise ValueError(f"a row of {self._what} ends early: {self._length} integers")
        return taken

    def take_list(self) -> tuple[int, ...]:
        """The entries of a list."""
        return self.take(self.take(1)[0])

    def end(self) -> None:
        """Nothing may follow.

        Raises:
            ValueError: Something does.
        """
        if list(self._numbers):
            raise ValueError(f"a row of {self._what} is too long: {self._length} integers")
