"""Leave-one-out: by how much an answer's log-probability falls without a segment. Needs log-probabilities only."""

from collections.abc import Sequence

from rredcot_verl.passes.attribution_task import AttributionTask


def leave_one_out_tasks(task: AttributionTask) -> list[AttributionTask]:
    """The whole trace, then the trace without each of its segments; nothing for a task without segments."""
    if not task.num_segments:
        return []
    whole = AttributionTask(task.token_ids[: task.answer_to], (), task.answer_from, task.answer_to)
    return [whole, *(task.without(segment) for segment in range(task.num_segments))]


def leave_one_out_weights(log_probs: Sequence[float]) -> list[float]:
    """Weight of a segment: by how many nats the answer's log-probability falls when the segment is removed.

    Ours: the rest of the trace closes up (positions too), so a later segment may stand where it never stood; and a rise
    counts as 0.

    Args:
        log_probs: Log-probability of the answer, all its tokens, in each of `leave_one_out_tasks`.

    Returns:
        One weight a segment.
    """
    whole, *without = log_probs or [0.0]
    return [max(0.0, whole - each) for each in without]
