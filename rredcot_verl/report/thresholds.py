"""When a prompt is put on one of the report's lists."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """When a prompt is listed; every field is an option of the command line.

    Attributes:
        min_responses: Guessing: fewest responses.
        min_entropy: Guessing: least entropy of solved against failed, in bits (0.8: a quarter to three quarters
            solved).
        max_spread: Guessing: largest spread of the self-values.
        max_gap: Guessing: largest difference between mean self-value and mean reward.
        min_fall: Shared blame: a failed response is counted if its largest fall is at least this.
        min_failures: Shared blame: fewest such responses.
        min_share: Shared blame: least share of them that has the segment in common.
        max_chance: Shared blame: how often so much agreement may come about by chance.
        num_alike: Shared blame: two segments start alike if so many visible characters are the same.
    """

    min_responses: int = 4
    min_entropy: float = 0.8
    max_spread: float = 0.1
    max_gap: float = 0.2
    min_fall: float = 0.1
    min_failures: int = 3
    min_share: float = 0.5
    max_chance: float = 0.05
    num_alike: int = 16
