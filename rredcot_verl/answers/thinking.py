"""What of a response is thinking, and what is said."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Thinking:
    """How a response marks what it only thinks.

    Attributes:
        open: Tag that opens a thinking block, as in `elicitation.think_open`.
        close: Tag that closes it, as in `elicitation.think_close`.
        prompt_opens: The chat template ends its prompt with the opening tag, so that it is not in the response.
    """

    open: str = "<think>"
    close: str = "</think>"
    prompt_opens: bool = False


def final_part_start(text: str, thinking: Thinking) -> int | None:
    """Offset from which a final answer counts, None while the response is still thinking.

    What a reasoning model writes inside its thinking block is not said to the user: it may be tried and dropped again.
    So what follows the last closing tag counts; a block that is never closed holds no final answer. A response without
    either tag counts as a whole.

    Args:
        text: The response.
        thinking: The tags.
    """
    close = text.rfind(thinking.close)
    if text.rfind(thinking.open) > close:
        return None
    if close >= 0:
        return close + len(thinking.close)
    return None if thinking.prompt_opens else 0
