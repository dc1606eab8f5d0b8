"""How often something was found, and where first."""

from dataclasses import dataclass, field
from typing import Any

NUM_EXAMPLES = 3
_WIDTH = 160


@dataclass
class Tally:
    """Counts a kind of fault and keeps its first examples: where, and the value."""

    count: int = 0
    examples: list[tuple[str, Any]] = field(default_factory=list)

    def add(self, where: str, value: Any) -> None:
        """Count one."""
        self.count += 1
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append((where, value))

    def lines(self) -> list[str]:
        """The examples for people."""
        return [f"{where}: {_shorten(value)}" for where, value in self.examples]


def _shorten(value: Any) -> str:
    """A value on one line."""
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
