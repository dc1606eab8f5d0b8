"""Wall time: how much may be spent, and what each kind of measurement takes."""

import contextlib
import re
import time
from collections.abc import Iterator

import torch

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smhd])+")


def parse_duration(text: str) -> float:
    """Seconds of a duration such as `90s`, `30m`, `1.5h` or `1h30m`.

    Raises:
        ValueError: It is none, or not positive.
    """
    lowered = text.strip().lower()
    if not _DURATION.fullmatch(lowered):
        raise ValueError(f"--budget {text!r}: expected a duration such as 90s, 30m, 2h or 1h30m")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)([smhd])", lowered))
    if seconds <= 0:
        raise ValueError(f"--budget {text!r}: expected more than 0 seconds")
    return seconds


def describe_duration(seconds: float) -> str:
    """A duration for people, e.g. `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Budget:
    """Wall time since it was made, against a limit.

    Args:
        seconds: The limit; None for none.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._started = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._started

    def allows(self, seconds: float) -> bool:
        """Whether work that takes so long still fits."""
        return self.seconds is None or self.spent + seconds <= self.seconds


class Stopwatch:
    """Seconds by name, on a device whose work may still be under way when a call returns.

    With one CPU thread it counts processor time: the wall time of an idle machine, on a busy one too.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.counts_processor_time = device.type == "cpu" and torch.get_num_threads() == 1
        self._clock = time.process_time if self.counts_processor_time else time.perf_counter
        self.seconds: dict[str, float] = {}
        self.last = 0.0

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time a block; `last` holds its seconds afterwards."""
        self._synchronize()
        started = self._clock()
        yield
        self._synchronize()
        self.last = self._clock() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + self.last

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
