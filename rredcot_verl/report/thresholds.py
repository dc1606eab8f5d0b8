"""When a prompt is put on one of the report's lists."""

from dataclasses import dataclass, field
from typing import Any


def _field(default: float, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Thresholds:
    """When a prompt is listed; every field is an option of the command line, and its help says what it means."""

    min_responses: int = _field(4, "guessing: fewest responses of a prompt")
    # 0.8: a quarter to three quarters solved.
    min_entropy: float = _field(0.8, "guessing: least entropy of solved against failed, in bits")
    max_spread: float = _field(0.1, "guessing: largest standard deviation of the self-values along a trace")
    max_gap: float = _field(0.2, "guessing: largest difference between mean self-value and mean reward")
    min_fall: float = _field(0.1, "shared blame: least fall of the self-value in a failed response's blamed segment")
    min_failures: int = _field(3, "shared blame: fewest such responses of a prompt")
    min_share: float = _field(0.5, "shared blame: least share of them that has the segment in common")
    max_chance: float = _field(0.05, "shared blame: how often so much agreement may come about by chance")
    num_alike: int = _field(16, "shared blame: visible characters by which two segments start alike")
