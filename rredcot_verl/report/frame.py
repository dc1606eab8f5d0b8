"""A prompt with and without the chat template around it.

verl's dumps hold what the model saw (``user\\nWhat is 1 + 1?\\nassistant\\n``); credited traces and data files hold the
question. What stands before and after the question is the same for all prompts of a run, so it can be learnt from a
few.
"""

from collections import Counter
from collections.abc import Collection, Sequence

Frame = tuple[str, str]
NO_FRAME: Frame = ("", "")
NUM_INPUTS = 64


def learn_frame(inputs: Sequence[str], questions: Collection[str]) -> Frame:
    """Prefix and suffix of the question in most inputs; both empty where no input contains a question."""
    known = set(questions)
    # The longest comes first: a short question may be a part of another.
    ordered = sorted((question for question in known if question), key=len, reverse=True)
    votes: Counter[Frame] = Counter()
    for text in list(dict.fromkeys(inputs))[:NUM_INPUTS]:
        question = text if text in known else next((question for question in ordered if question in text), None)
        if question is not None:
            prefix, _, suffix = text.rpartition(question)
            votes[prefix, suffix] += 1
    return votes.most_common(1)[0][0] if votes else NO_FRAME


def without_frame(text: str, frame: Frame) -> str:
    """The question of an input; the input itself, stripped, where it does not have this frame."""
    prefix, suffix = frame
    if len(text) > len(prefix) + len(suffix) and text.startswith(prefix) and text.endswith(suffix):
        return text[len(prefix) : len(text) - len(suffix)].strip()
    return text.strip()
