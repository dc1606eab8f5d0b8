"""What the run says of single prompts: how hard they are, where the model is guessing, where its failures share a
segment.

All of it is ours. A prompt is its text, over all the steps that were read: its responses come from different states of
the policy, so for a long run narrow the steps. Its mean reward is that of verl's rollout dumps where they hold it
(every response of a step), else of the traces (which may be a selection). Values are in units of reward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rredcot_verl.report.data import Run
from rredcot_verl.report.frame import learn_frame, without_frame
from rredcot_verl.report.shared_blame import SharedBlame, blamed_segments, place_of, shared_blame
from rredcot_verl.report.thresholds import Thresholds
from rredcot_verl.report.trace import Response, Trace


@dataclass(frozen=True)
class Prompt:
    """One prompt and its figures; those that cannot be known are none.

    Attributes:
        text: Its text.
        uids: Its groups in the run.
        index: Its ``extra_info.index`` in the data, if the traces know it.
        num_responses: Responses that the rewards are taken from.
        num_scored: Traces with self-values.
        mean_reward: Mean reward.
        solved: Share of responses that are solved.
        start_value: Mean self-value before the first token, v_0.
        mean_value: Mean of the self-values before the outcome is known.
        spread: Standard deviation of v_0 .. v_{K-1} along a trace, averaged over the traces with at least two segments:
            how far the outlook moves while the model writes.
        num_blamed: Its failed traces that have a blamed segment.
        shared_blame: The segment that they share, if they do.
    """

    text: str
    uids: tuple[str, ...]
    index: str | None
    num_responses: int
    num_scored: int
    mean_reward: float
    solved: float
    start_value: float | None
    mean_value: float | None
    spread: float | None
    num_blamed: int = 0
    shared_blame: SharedBlame | None = None

    @property
    def entropy(self) -> float:
        """Entropy of solved against failed, in bits."""
        shares = [share for share in (self.solved, 1.0 - self.solved) if share > 0.0]
        return -sum(share * float(np.log2(share)) for share in shares) + 0.0


def is_guessing(prompt: Prompt, thresholds: Thresholds) -> bool:
    """Whether the values say that the model is guessing.

    Its outcomes differ, nothing it writes moves the outlook (the self-values stay flat), and the outlook is that of the
    outcomes (the mean self-value is near the mean reward). Where values are no forecast (``vps``, ``mig``) the last is
    not asked.
    """
    return _is_flat(prompt, thresholds) and not _is_off(prompt, thresholds)


def is_blind(prompt: Prompt, thresholds: Thresholds) -> bool:
    """Whether the values see nothing: flat beside mixed outcomes as in ``is_guessing``, but far from the mean reward.

    For example near 0 throughout, where the probed answer is too long to have any probability.
    """
    return _is_flat(prompt, thresholds) and _is_off(prompt, thresholds)


def _is_flat(prompt: Prompt, thresholds: Thresholds) -> bool:
    return (
        prompt.spread is not None
        and prompt.num_responses >= thresholds.min_responses
        and prompt.entropy >= thresholds.min_entropy
        and prompt.spread <= thresholds.max_spread
    )


def _is_off(prompt: Prompt, thresholds: Thresholds) -> bool:
    return prompt.mean_value is not None and abs(prompt.mean_value - prompt.mean_reward) > thresholds.max_gap


def is_learnable(prompt: Prompt) -> bool:
    """Whether some responses are solved and some failed, so that GRPO has an advantage to give."""
    return 0.0 < prompt.solved < 1.0


def prompts_of(run: Run, thresholds: Thresholds | None = None, seed: int = 0) -> list[Prompt]:
    """The prompts of a run, in order of their first appearance.

    The thresholds are those of the shared blame; the seed draws the segments for ``SharedBlame.chance``.
    """
    thresholds = thresholds or Thresholds()
    traces: dict[str, list[Trace]] = {}
    for trace in run.traces:
        traces.setdefault(trace.prompt.strip(), []).append(trace)
    rollouts = _rollouts_by_prompt(run, traces)
    texts = dict.fromkeys([*traces, *rollouts])
    blamed = {text: blamed_segments(traces.get(text, []), thresholds.min_fall) for text in texts}
    places = np.array([place_of(trace, k) for pairs in blamed.values() for trace, k in pairs])
    owners = np.repeat(np.arange(len(texts)), [len(pairs) for pairs in blamed.values()])
    return [
        _prompt(
            text,
            traces.get(text, []),
            rollouts.get(text, []),
            len(blamed[text]),
            shared_blame(blamed[text], thresholds, places[owners != number], seed),
        )
        for number, text in enumerate(texts)
    ]


def _rollouts_by_prompt(run: Run, traces: dict[str, list[Trace]]) -> dict[str, list[Response]]:
    """Dumps hold the prompt inside the chat template and traces hold the question: brings them together."""
    question = {(trace.step, trace.uid): text for text, members in traces.items() for trace in members}
    frame = learn_frame([response.prompt for response in run.rollouts], traces)
    grouped: dict[str, list[Response]] = {}
    for response in run.rollouts:
        text = question.get((response.step, response.uid)) or without_frame(response.prompt, frame)
        grouped.setdefault(text, []).append(response)
    return grouped


def _prompt(
    text: str, traces: Sequence[Trace], rollouts: Sequence[Response], num_blamed: int, blame: SharedBlame | None
) -> Prompt:
    responses: Sequence[Response] = rollouts or traces
    scored = [trace for trace in traces if trace.is_scored]
    forecasts = [trace for trace in scored if trace.is_forecast]
    # The spread does not mind a level that knows the outcome, but weights of segments make one of their own.
    moving = [trace for trace in scored if not trace.weighs and len(trace.segments) > 1]
    spreads = [float(np.std(trace.measured_values)) for trace in moving]
    return Prompt(
        text=text,
        uids=tuple(dict.fromkeys([*(trace.uid for trace in traces), *(response.uid for response in rollouts)])),
        index=next((trace.index for trace in traces if trace.index is not None), None),
        num_responses=len(responses),
        num_scored=len(scored),
        mean_reward=float(np.mean([response.reward for response in responses])),
        solved=float(np.mean([not response.is_failed for response in responses])),
        start_value=float(np.mean([trace.start_value for trace in forecasts])) if forecasts else None,
        mean_value=float(np.mean([np.mean(trace.measured_values) for trace in forecasts])) if forecasts else None,
        spread=float(np.mean(spreads)) if spreads else None,
        num_blamed=num_blamed,
        shared_blame=blame,
    )
