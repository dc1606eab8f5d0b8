"""The prompts that a run is weak on: two lists, as figures for ``summary.json``; the page shows the same."""

from collections.abc import Sequence
from typing import Any

from rredcot_verl.report.prompts import Prompt, is_blind, is_guessing, is_learnable
from rredcot_verl.report.thresholds import Thresholds

MOST_SUMMARISED = 100
MOST_CHARACTERS = 200


def guessing_prompts(prompts: Sequence[Prompt], thresholds: Thresholds) -> list[Prompt]:
    """The prompts on which the values say the model is guessing, the flattest first."""
    return sorted((prompt for prompt in prompts if is_guessing(prompt, thresholds)), key=lambda p: (p.spread, p.text))


def blamed_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts whose failures share a blamed segment: least likely by chance first, then most failures."""

    def order(prompt: Prompt) -> tuple[Any, ...]:
        blame = prompt.shared_blame
        assert blame is not None
        # Blame on the last segment is often the outcome's pinned value only: what the values never saw.
        return 2 * blame.num_last > blame.num_sharing, blame.chance, -blame.num_sharing, prompt.text

    return sorted((prompt for prompt in prompts if prompt.shared_blame is not None), key=order)


def summarise_prompts(prompts: Sequence[Prompt], thresholds: Thresholds) -> dict[str, Any]:
    """Counts, thresholds, and at most ``MOST_SUMMARISED`` prompts a list, ready for ``json.dumps``."""
    guessing, blamed = guessing_prompts(prompts, thresholds), blamed_prompts(prompts)
    return {
        "num_prompts": len(prompts),
        "num_with_values": sum(prompt.spread is not None for prompt in prompts),
        "num_learnable": sum(is_learnable(prompt) for prompt in prompts),
        "thresholds": vars(thresholds),
        "num_guessing": len(guessing),
        "num_blind": sum(is_blind(prompt, thresholds) for prompt in prompts),
        "guessing": [
            _row(prompt) | {key: getattr(prompt, key) for key in ("entropy", "spread", "start_value", "mean_value")}
            for prompt in guessing[:MOST_SUMMARISED]
        ],
        "num_with_enough_failures": sum(prompt.num_blamed >= thresholds.min_failures for prompt in prompts),
        "num_shared_blame": len(blamed),
        "shared_blame": [_row(prompt) | _shared_blame(prompt) for prompt in blamed[:MOST_SUMMARISED]],
    }


def _row(prompt: Prompt) -> dict[str, Any]:
    return {
        # Its end: the question comes last.
        "prompt": prompt.text[-MOST_CHARACTERS:],
        "index": prompt.index,
        "num_responses": prompt.num_responses,
        "mean_reward": prompt.mean_reward,
    }


def _shared_blame(prompt: Prompt) -> dict[str, Any]:
    blame = prompt.shared_blame
    assert blame is not None
    return {
        **{key: getattr(blame, key) for key in ("how", "what", "num_failures", "num_sharing")},
        "num_in_last_segment": blame.num_last,
        "mean_credit": blame.mean_credit,
        "chance": blame.chance,
        "examples": [
            {"step": trace.step, "uid": trace.uid, "segment": k, "text": trace.text_of(k)[:MOST_CHARACTERS]}
            for trace, k in blame.examples
        ],
    }
