"""The ways to compute: each function is one variant, over all traces.

Rows, log-probabilities and entropies are made as verl's engine makes them: logits of every token, the ids rolled by
one as labels, temperature 1. Nothing is compiled but FlexAttention, which the shared pass uses on a GPU. Scores of
probes have shape `(num_traces, num_probes, num_counted + 1)`: the counted tokens of a probe and its answer's end.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

from rredcot_verl.cpu.probing import read_probes as read_on_server
from rredcot_verl.passes.probe_pack import ProbePack, read_probes
from rredcot_verl.passes.shared_attention import shared_prefix
from rredcot_verl.probes.elicitation import Probe
from self_value_bench.work import Work


def _read_trace(logits: Tensor, ids: Tensor) -> Tensor:
    entropy_from_logits(logits)
    return logprobs_from_logits(logits, ids.roll(-1)).float().cpu()


@torch.no_grad()
def plain(model: PreTrainedModel, traces: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probabilities and entropies of the traces, one trace at a time, with the model's stock attention."""
    results = []
    for trace in traces:
        ids = torch.tensor([trace], device=model.device)
        results.append(_read_trace(model(input_ids=ids, use_cache=False).logits[0], ids[0]))
    return results


def update(model: PreTrainedModel, traces: Sequence[Sequence[int]]) -> None:
    """Gradients of a policy-gradient loss, one trace at a time, stock attention; no optimiser step."""
    for trace in traces:
        ids = torch.tensor([trace], device=model.device)
        log_probs = logprobs_from_logits(model(input_ids=ids, use_cache=False).logits[0], ids[0].roll(-1))
        loss = -(log_probs - log_probs.detach()).exp().mean() / len(traces)
        loss.backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def shared(
    model: PreTrainedModel, traces: Sequence[Sequence[int]], probes: Sequence[Sequence[Probe]], budget: int, own: bool
) -> tuple[list[Tensor], Tensor]:
    """The traces with their probes in shared-prefix passes, as `rredcot_verl.passes.engine` makes them.

    Args:
        model: The policy.
        traces: Token ids of each trace, all of one length.
        probes: For each trace its probes, possibly none.
        budget: Most trace tokens in a pass.
        own: Also the traces' own log-probabilities and entropies.
    """
    size = len(traces[0])
    at_once = max(1, budget // size)
    log_probs: list[Tensor] = []
    scores: list[list[float]] = []
    for first in range(0, len(traces), at_once):
        group, group_probes = traces[first : first + at_once], probes[first : first + at_once]
        pack = ProbePack.build([size] * len(group), group_probes)
        rows = pack.rows(all_trace_rows=own)
        ids = torch.cat([torch.tensor(group).flatten(), pack.probe_token_ids]).to(model.device)
        with shared_prefix(model.config) as current:
            current.pack = pack.to(model.device)
            logits = model(
                input_ids=ids[None],
                position_ids=current.pack.positions[None],
                use_cache=False,
                logits_to_keep=rows.to(model.device),
            ).logits[0]
        scores += read_probes(pack, rows, logits, torch.ones(len(group)))
        if own:
            num_tokens = pack.num_trace_tokens
            log_probs += _read_trace(logits[:num_tokens], ids[:num_tokens]).split(size)
        # Not beside the next pass's.
        del logits
    return log_probs, _by_probe(scores, probes)


def _by_probe(scores: Sequence[Sequence[float]], probes: Sequence[Sequence[Probe]]) -> Tensor:
    return torch.tensor(scores).reshape(len(probes), len(probes[0]), -1) if probes[0] else torch.empty(0)


@torch.no_grad()
def naive(model: PreTrainedModel, work: Work) -> Tensor:
    """Every boundary and answer in a sequence of its own, stock attention, logits of the rows that are read only."""
    scores: list[list[float]] = []
    for trace, probes in zip(work.traces, work.probes, strict=True):
        scores.append([])
        for probe in probes:
            ids = torch.tensor([[*trace[: probe.position], *probe.token_ids]], device=model.device)
            counted = probe.token_ids[probe.scored_from :]
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(counted) + 1).logits[0].float()
            log_probs = logits.log_softmax(-1)
            read = [log_probs[row, token] for row, token in enumerate(counted)]
            closing = torch.tensor(probe.closing_token_ids, device=model.device)
            scores[-1] += torch.stack([*read, log_probs[-1, closing].logsumexp(0)]).tolist()
    return _by_probe(scores, work.probes)


def server(model: PreTrainedModel, work: Work, max_batch_tokens: int) -> Tensor:
    """The reading of the embedded CPU rollout server: key-value cache of the traces, probes in batches."""
    results = read_on_server(model, work.traces, work.probes, 1.0, max_batch_tokens)
    scores = [
        [
            score
            for probe, result in zip(probes, own, strict=True)
            for score in (*result["token_log_probs"][probe.scored_from :], result["closing_log_prob"])
        ]
        for probes, own in zip(work.probes, results, strict=True)
    ]
    return _by_probe(scores, work.probes)


@torch.no_grad()
def decode(model: PreTrainedModel, cache: DynamicCache, batch: int, num_tokens: int) -> None:
    """Sample tokens with transformers' key-value cache, one after the other."""
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    for _ in range(num_tokens):
        logits = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
        ids = logits.float().softmax(-1).multinomial(1)


def random_cache(model: PreTrainedModel, batch: int, context: int) -> DynamicCache:
    """A cache of random numbers, `context` tokens of each sequence: sampling from it is as fast as from a real one."""
    config = model.config
    shape = (batch, config.num_key_value_heads, context, config.head_dim)

    def draw() -> Tensor:
        return torch.randn(shape, device=model.device, dtype=model.dtype)

    return DynamicCache([(draw(), draw()) for _ in range(config.num_hidden_layers)])
