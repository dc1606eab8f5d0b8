"""Lines from a pipe, up to a deadline."""

import os
import select
import time


class LineReader:
    """Reads lines from another process.

    Args:
        file: File descriptor to read from.
        max_bytes: More without a newline is no line.
    """

    def __init__(self, file: int, max_bytes: int = 2**24) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._held = b""
        # Not select: it fails on file descriptors above 1023, which a trainer has.
        self._poll = select.poll()
        self._poll.register(file, select.POLLIN)

    def read_line(self, deadline: float) -> bytes:
        """The next line, without its end.

        Raises:
            TimeoutError: It did not come before `time.monotonic()` passed the deadline.
            EOFError: It will not come: the other side is gone, or writes no lines.
        """
        while b"\n" not in self._held:
            if not self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            part = os.read(self._file, 65536)
            if not part or len(self._held) > self._max_bytes:
                raise EOFError
            self._held += part
        line, _, self._held = self._held.partition(b"\n")
        return line
