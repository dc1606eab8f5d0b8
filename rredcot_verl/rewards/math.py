"""Verifier for mathematical answers, built on math-verify: verl's `compute_score` signature, as a coroutine.

    reward.custom_reward_function.path=pkg://rredcot_verl.rewards.math
    reward.custom_reward_function.name=compute_score

The answer is found where the probes find it (`answers.grammar`). Plain numbers, words and choices are compared by exact
rules at once, everything else in processes of its own with a time limit; see docs/results/math_verifier.md.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from rredcot_verl.answers.boxed import boxes_in_a_row
from rredcot_verl.answers.grammar import AnswerFormat, find_answer, formats_of, reference_answers
from rredcot_verl.answers.thinking import Thinking
from rredcot_verl.config.blocks import ElicitationConfig
from rredcot_verl.rewards.math_equivalence import MAX_ANSWER_CHARACTERS, Verdict, decide_quickly, simplified
from rredcot_verl.rewards.verifier_processes import LateOrDeadError, VerifierProcesses
from rredcot_verl.rewards.verl_arguments import VERL_ARGUMENTS

TIMEOUT_S = 5.0
NUM_PROCESSES = 2
_MAX_PARTS = 16


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: object,
    extra_info: Mapping[str, Any] | None = None,
    *,
    answer_format: str = "auto",
    opening: str | None = None,
    pattern: str | None = None,
    think_open: str = "<think>",
    think_close: str = "</think>",
    prompt_opens_thinking: bool = False,
    timeout_s: float = TIMEOUT_S,
    num_processes: int = NUM_PROCESSES,
    **kwargs: Any,
) -> dict[str, float | str]:
    """Verify the final answer of a response.

    Everything after the first four arguments comes from `reward.custom_reward_function.reward_kwargs`.

    Args:
        data_source: Not used.
        solution_str: The response, decoded.
        ground_truth: The answer, or a list of answers of which any is right: text or a number.
        extra_info: Not used.
        answer_format: Same names as `algorithm.rredcot.elicitation.format`; keep the two equal.
        opening: `elicitation.opening`, for `custom`.
        pattern: `elicitation.pattern`, for `custom`.
        think_open: `elicitation.think_open`.
        think_close: `elicitation.think_close`.
        prompt_opens_thinking: The chat template ends its prompt with `<think>`: a response without `</think>` has then
            not finished thinking and holds no final answer.
        timeout_s: Seconds that judging one answer may take; a later one counts as wrong.
        num_processes: Processes a reward worker may use; they start when first needed.
        **kwargs: What verl passes to every reward function, see `verl_arguments`; not used.

    Returns:
        `score` and `acc`: 1.0 if the answer is right, else 0.0. `pred`: its canonical text, cut at
        1000 characters, "" without an answer.
        `answer_start`: character offset of its opening, -1.0 without an answer. `timed_out`: 1.0 if judging it took too
        long or used too much memory.

    Raises:
        ValueError: An option is unknown or not allowed, or the ground truth is missing.
        RuntimeError: The judging process cannot be started.
    """
    unknown = sorted(set(kwargs) - set(VERL_ARGUMENTS))
    if unknown:
        raise ValueError(f"reward_kwargs: unknown options {unknown}; allowed: {_option_names()}")
    formats = _formats(answer_format, opening, pattern)
    if not timeout_s > 0:
        raise ValueError(f"reward_kwargs.timeout_s={timeout_s!r} must be greater than 0")
    golds = reference_answers(ground_truth, str.strip)
    if not golds:
        raise ValueError(f"reward_model.ground_truth={ground_truth!r} {why_unusable(ground_truth)}")
    found = find_answer(solution_str, formats, Thinking(think_open, think_close, prompt_opens_thinking))
    if found is None:
        return _result(Verdict(False, ""), -1.0)
    parts = boxes_in_a_row(found.text)
    verdict = _quick_verdict(golds, parts)
    if verdict is not None:
        return _result(verdict, float(found.start))
    request = {"golds": golds, "parts": parts}
    try:
        reply = await _processes(num_processes).call(request, timeout_s)
    except LateOrDeadError:
        return _result(Verdict(False, simplified(parts[0])), float(found.start), timed_out=True)
    return _result(Verdict(reply["is_equal"], reply["canonical"]), float(found.start))


def why_unusable(ground_truth: object, timeout_s: float = TIMEOUT_S) -> str | None:
    """Why answers cannot be verified against a ground truth, for checks before training.

    Args:
        ground_truth: As `compute_score` takes it.
        timeout_s: Seconds that judging one answer may take.

    Returns:
        The reason, to be read after the value; None if it can be used.
    """
    golds = reference_answers(ground_truth, str.strip)
    if not golds:
        if ground_truth is None:
            return "is missing"
        if isinstance(ground_truth, str) or _is_list(ground_truth):
            return "is empty, or not a list of texts and numbers"
        return f"is of type {type(ground_truth).__name__}; expected text, a number or a list of them"
    reasons = [_why_text_unusable(gold, timeout_s) for gold in golds]
    return next((reason for reason in reasons if reason is not None), None)


def close_processes() -> None:
    """End the processes that judge answers for this one; the next answer that needs one starts it again.

    For whoever checks ground truths and then lives on. Not while an answer is being judged.
    """
    while _started:
        _, processes = _started.popitem()
        processes.close()


def _why_text_unusable(gold: str, timeout_s: float) -> str | None:
    if "####" in gold or gold.strip().count("\n") > 8:
        return "holds a whole solution; expected the answer alone"
    if len(gold) > MAX_ANSWER_CHARACTERS:
        return f"has {len(gold)} characters; answers of more than {MAX_ANSWER_CHARACTERS} are not parsed"
    text = simplified(gold)
    if not text:
        return "is empty"
    if text.lower() in (
        "proof",
        "see solution",
        "see the solution",
        "not found",
        "notfound",
        "n/a",
        "none",
        "null",
        "nan",
    ):
        return "names no answer"
    # A wrong answer of another kind shows whether the rules can do without the parser.
    if len(text.split()) > 12 and "\\" not in text:
        return "is prose, which no answer would match"
    if decide_quickly(gold, "123456789") is not None:
        return None
    try:
        reply = _processes(NUM_PROCESSES).call_and_wait({"golds": [gold], "parts": [gold]}, timeout_s)
    except LateOrDeadError:
        return f"takes the parser more than {timeout_s} s"
    return None if reply["is_equal"] else "cannot be read by the parser (math-verify)"


@functools.lru_cache(maxsize=16)
def _formats(answer_format: str, opening: str | None, pattern: str | None) -> dict[str, AnswerFormat]:
    allowed = ElicitationConfig.model_fields["format"].annotation.__args__  # type: ignore[union-attr]
    if answer_format not in allowed or answer_format == "code":
        names = [name for name in allowed if name != "code"]
        raise ValueError(f"reward_kwargs.answer_format={answer_format!r} must be one of {names}")
    return formats_of(ElicitationConfig(format=answer_format, opening=opening, pattern=pattern))  # type: ignore[arg-type]


@functools.cache
def _option_names() -> list[str]:
    parameters = inspect.signature(compute_score).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


_started: dict[int, VerifierProcesses] = {}


def _processes(num_processes: int) -> VerifierProcesses:
    if num_processes not in _started:
        _started[num_processes] = VerifierProcesses("rredcot_verl.rewards.math_worker", num_processes)
    return _started[num_processes]


def _quick_verdict(golds: list[str], parts: list[str]) -> Verdict | None:
    """The verdict by exact rules: right if one ground truth says so, wrong if all do."""
    if sum(map(len, parts)) > MAX_ANSWER_CHARACTERS or len(parts) > _MAX_PARTS:
        return Verdict(False, simplified(parts[0]))
    if len(parts) > 1:
        return None
    verdicts = [decide_quickly(gold, parts[0]) for gold in golds]
    decided = [verdict for verdict in verdicts if verdict is not None]
    right = [verdict for verdict in decided if verdict.is_equal]
    if right:
        return right[0]
    return decided[0] if len(decided) == len(golds) else None


def _is_list(ground_truth: object) -> bool:
    return isinstance(ground_truth, (list, tuple)) or hasattr(ground_truth, "tolist")


def _result(verdict: Verdict, answer_start: float, timed_out: bool = False) -> dict[str, float | str]:
    score = float(verdict.is_equal)
    return {
        "score": score,
        "acc": score,
        "pred": verdict.canonical[:MAX_ANSWER_CHARACTERS],
        "answer_start": answer_start,
        "timed_out": float(timed_out),
    }
