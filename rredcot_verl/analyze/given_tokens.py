"""Tokens of traces that are given as text, and where the steps of a labelled one end in them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rredcot_verl.analyze.problems import GivenTrace, Label
from rredcot_verl.analyze.records import LabelRecord
from rredcot_verl.probes.vocabulary import Vocabulary


@dataclass(frozen=True)
class GivenTokens:
    """A given trace in tokens.

    Attributes:
        number: Which.
        given: Its text.
        prompt_ids, response_ids: Its tokens; a labelled trace that is too long has none in its response.
        boundaries: Of a labelled trace, 0, the ends of its steps, and its length: the token that ends the sequence is a
            segment of its own, so that the value after the last step is read, and not pinned to the outcome.
    """

    number: int
    given: GivenTrace
    prompt_ids: list[int]
    response_ids: list[int]
    boundaries: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def label_record(self, label: Label, entropies: Tensor) -> LabelRecord:
        """What the folder keeps of its label.

        Args:
            label: Its label.
            entropies: `(num_tokens,)` of its response, nats.
        """
        steps = itertools.pairwise(self.boundaries[:-1])
        means = [float(entropies[start:end].mean()) for start, end in steps]
        outcome = "assumed" if label.is_assumed else "verified" if label.final_correct is None else "given"
        return LabelRecord(self.number, self.boundaries, label.first_wrong, outcome, label.generator, means)


def encode_steps(vocabulary: Vocabulary, response: str, ends: Sequence[int]) -> tuple[list[int], list[int]]:
    """Tokens of a response, and the offsets in them where its steps end, the last their number.

    A token on both sides of an end belongs to the step that ends. A tokenizer that does not give the text back is asked
    for step after step.

    Args:
        vocabulary: Of the policy's tokenizer.
        response: The text.
        ends: Ends of the steps in it, in characters.

    Raises:
        ValueError: There are fewer tokens than steps.
    """

    def encode(text: str) -> list[int]:
        return list(vocabulary.tokenizer.encode(text, add_special_tokens=False))

    ids = encode(response)
    text = vocabulary.decode(ids)
    if text == response:
        offsets = [vocabulary.offset_of(ids, text, max(end - 1, 0)) + 1 for end in ends]
    else:
        parts = [encode(response[start:end]) for start, end in itertools.pairwise([0, *ends])]
        ids = list(itertools.chain.from_iterable(parts))
        offsets = list(itertools.accumulate(map(len, parts)))
    if len(ids) < len(ends):
        raise ValueError(f"{len(ends)} steps in {len(ids)} tokens: every step needs one")
    offsets[-1] = len(ids)
    # Two steps in one token: the first has it, and those after it the next ones.
    for k in range(1, len(offsets)):
        offsets[k] = max(offsets[k], offsets[k - 1] + 1)
    for k in range(len(offsets)):
        offsets[k] = max(1, min(offsets[k], len(ids) - (len(offsets) - 1 - k)))
    return ids, offsets
