"""What one probe is. Imports nothing, so that a pass that reads probes needs torch and transformers only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Probe:
    """One probe: the trace up to `position`, then `token_ids`, then any of `closing_token_ids`.

    An answer may have several probes at a boundary: one that ends after its last token, one whose closing tokens hold
    its last token too ("}}" ends both \\frac{1}{2} and the box around it), and one for each way to write an end of
    several tokens ("</answer>"), the last of which is its closing token. Their probabilities add up, as those of all
    probes of a boundary do: no sequence of tokens is part of two of them.

    Attributes:
        state: Index k of the boundary.
        proposal: Index of the answer.
        position: Length of the prefix, in tokens of prompt and response.
        token_ids: What is forced after the prefix.
        answer_from: Index in `token_ids` where the answer starts, after its opening.
        scored_from: Index in `token_ids` from which log-probabilities count; what comes before is given.
        closing_token_ids: Tokens that end the answer, the ones seen most often first.
    """

    state: int
    proposal: int
    position: int
    token_ids: tuple[int, ...]
    answer_from: int
    scored_from: int
    closing_token_ids: tuple[int, ...]
