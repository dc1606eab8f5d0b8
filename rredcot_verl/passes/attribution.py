"""Weights of a trace's segments for its answer: attention, gradient, leave-one-out. The peers of self-values.

Plain functions on a transformers causal language model, many traces packed in one sequence. They answer another
question than a self-value does: not how the outlook changed, but what the answer was made of. The RREDCoT paper has
attention attribution, gradient attribution and leave-one-out among its comparisons; how it computes them is not known
to us, so all that no other paper is named for here is ours: which answer, the sum over a segment's tokens, and that the
segment that holds the answer weighs nothing.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rredcot_verl.passes.answer_attention import AnswerAttention
from rredcot_verl.passes.attribution_pack import AttributionPack, Temperature
from rredcot_verl.passes.attribution_task import AttributionTask
from rredcot_verl.passes.input_gradient import gradient_contributions
from rredcot_verl.passes.leave_one_out import leave_one_out_tasks, leave_one_out_weights
from rredcot_verl.passes.shared_attention import shared_prefix, why_not_shared


def answer_attention_by_token(
    model: PreTrainedModel, tasks: Sequence[AttributionTask], *, device: torch.device | None = None
) -> list[Tensor]:
    """Attention that a row predicting the answer pays to each token, mean over the answer's rows, heads and layers.

    Args:
        model: A causal language model that attends through transformers' attention interface, in evaluation mode.
        tasks: At least one; computed in one pass.
        device: See `AttributionPack.build`.

    Returns:
        For each task `(answer_to - 1,)` float32, which sums to 1; empty for a
        task without answer.

    Raises:
        ValueError: The model cannot be read; see `why_not_shared`.
    """
    pack = AttributionPack.build(model, tasks, device)
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    with torch.no_grad(), shared_prefix(model.config, pack.layout) as shared:
        shared.observe = read = AnswerAttention(pack, num_layers)
        pack.logits(model, pack.rows[:1])
    return read.means()


def attention_attribution(
    model: PreTrainedModel, tasks: Sequence[AttributionTask], *, device: torch.device | None = None
) -> list[list[float]]:
    """Weight of a segment: the attention that the tokens predicting the answer pay to its tokens, in [0, 1].

    After Attention Based Credit (Chan et al., "Dense Reward for Free in RLHF", arXiv 2402.00782), which spreads a
    reward model's score over the tokens by that model's own last-layer attention. Ours: the policy's attention in place
    of a reward model's, the rows that predict the answer, the mean over heads and layers, and the sum over a segment's
    tokens.

    Args, errors: see `answer_attention_by_token`.

    Returns:
        For each task `num_segments` weights.
    """
    by_token = answer_attention_by_token(model, tasks, device=device)
    return [task.sums(own).tolist() for task, own in zip(tasks, by_token, strict=True)]


def gradient_attribution(
    model: PreTrainedModel,
    tasks: Sequence[AttributionTask],
    *,
    temperature: Temperature = 1.0,
    device: torch.device | None = None,
) -> list[list[float]]:
    """Weight of a segment: |sum over its tokens of what they contribute to the answer's log-probability|, nats.

    Args, errors: see `gradient_contributions`. The absolute value after the sum is ours.

    Returns:
        For each task `num_segments` weights.
    """
    contributions = gradient_contributions(model, tasks, temperature=temperature, device=device)
    return [task.sums(own).abs().tolist() for task, own in zip(tasks, contributions, strict=True)]


@torch.no_grad()
def answer_log_probs(
    model: PreTrainedModel, tasks: Sequence[AttributionTask], *, temperature: float = 1.0
) -> list[float]:
    """Log-probability of each task's answer, given what stands before it.

    Args:
        model: Any causal language model, in evaluation mode. One that cannot compute a pack gets every task alone.
        tasks: At least one; computed in one pass where the model can.
        temperature: The rollout temperature at which log-probabilities are read.

    Returns:
        One sum over the answer's tokens a task, nats.
    """
    device = next(model.parameters()).device
    if why_not_shared(model.config, device.type) is not None:
        return [_alone(model, task, temperature, device) for task in tasks]
    pack = AttributionPack.build(model, tasks)
    with shared_prefix(model.config, pack.layout):
        logits = pack.logits(model, pack.rows)
    if not len(pack.rows):
        return [0.0] * len(tasks)
    by_token = pack.log_probs(logits, temperature).double()
    return [part.sum().item() for part in torch.split(by_token, [task.num_answer_tokens for task in tasks])]


def _alone(model: PreTrainedModel, task: AttributionTask, temperature: float, device: torch.device) -> float:
    ids = torch.tensor([list(task.token_ids[: task.answer_to])], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, task.answer_from - 1 : task.answer_to - 1]
    log_probs = (logits.float() / temperature).log_softmax(dim=-1)
    return float(log_probs.gather(1, ids[0, task.answer_from :].unsqueeze(1)).double().sum())


def leave_one_out_attribution(
    model: PreTrainedModel,
    tasks: Sequence[AttributionTask],
    *,
    temperature: float = 1.0,
    max_tokens: int = 16384,
) -> list[list[float]]:
    """`leave_one_out_weights` of each task, by passes of at most `max_tokens` tokens (or one sequence) each."""
    variants = [leave_one_out_tasks(task) for task in tasks]
    log_probs = itertools.chain.from_iterable(
        answer_log_probs(model, part, temperature=temperature)
        for part in _parts(itertools.chain.from_iterable(variants), max_tokens)
    )
    return [leave_one_out_weights(list(itertools.islice(log_probs, len(own)))) for own in variants]


def _parts(tasks: Iterable[AttributionTask], max_tokens: int) -> Iterator[list[AttributionTask]]:
    part: list[AttributionTask] = []
    for task in tasks:
        if part and sum(each.answer_to for each in part) + task.answer_to > max_tokens:
            yield part
            part = []
        part.append(task)
    if part:
        yield part
