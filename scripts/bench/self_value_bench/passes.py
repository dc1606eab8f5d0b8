"""The ways to compute: each function is one variant, over all traces.

Rows, log-probabilities and entropies are made as verl's engine makes them: logits of every token, the ids rolled by
one as labels, temperature 1. On a GPU entropies are compiled, as verl's are by default, and log-probabilities, which
verl has a kernel of flash attention for, so that neither copies the logits; and the shared pass's attention.
Scores of probes are numbers of each trace, probe by probe: the counted tokens and the answer's end.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rredcot_verl.cpu.probing import read_probes as read_on_server
from rredcot_verl.passes.probe_pack import ProbePack, read_probes
from rredcot_verl.passes.shared_attention import shared_prefix
from rredcot_verl.probes.probe import Probe
from self_value_bench.work import Work


def log_probs_of(logits: Tensor, labels: Tensor) -> Tensor:
    """`(n,)` float32 log-probabilities of labels `(n,)` under logits `(n, vocab_size)`."""
    return logits.gather(1, labels.unsqueeze(1)).squeeze(1).float() - logits.float().logsumexp(1)


def entropies_of(logits: Tensor) -> Tensor:
    """`(n,)` entropies of logits `(n, vocab_size)`, by verl's formula."""
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)


def _read(function: Callable[..., Tensor], logits: Tensor, *more: Tensor) -> Tensor:
    return (_compiled(function) if logits.is_cuda else function)(logits, *more)


def _read_trace(logits: Tensor, ids: Tensor) -> Tensor:
    _read(entropies_of, logits)
    return _read(log_probs_of, logits, ids.roll(-1)).cpu()


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
        log_probs = _read(log_probs_of, model(input_ids=ids, use_cache=False).logits[0], ids[0].roll(-1))
        loss = -(log_probs - log_probs.detach()).exp().mean() / len(traces)
        loss.backward()
    model.zero_grad(set_to_none=True)


def groups_of(traces: Sequence[Sequence[int]], budget: int) -> Iterator[slice]:
    """Neighbouring traces that a pass can hold: at most `budget` tokens, but one trace at least."""
    first = size = 0
    for number, trace in enumerate(traces):
        if number > first and size + len(trace) > budget:
            yield slice(first, number)
            first, size = number, 0
        size += len(trace)
    yield slice(first, len(traces))


@torch.no_grad()
def shared(
    model: PreTrainedModel, traces: Sequence[Sequence[int]], probes: Sequence[Sequence[Probe]], budget: int, own: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The traces with their probes in shared-prefix passes, as `rredcot_verl.passes.engine` makes them.

    Args:
        model: The policy.
        traces: Token ids of each trace.
        probes: For each trace its probes, possibly none.
        budget: Most trace tokens in a pass.
        own: Also the traces' own log-probabilities and entropies.
    """
    log_probs: list[Tensor] = []
    scores: list[list[float]] = []
    for group in groups_of(traces, budget):
        lengths = [len(trace) for trace in traces[group]]
        pack = ProbePack.build(lengths, probes[group])
        rows = pack.rows(all_trace_rows=own)
        ids = torch.cat([*map(torch.tensor, traces[group]), pack.probe_token_ids]).to(model.device)
        with shared_prefix(model.config) as current:
            current.pack = pack.to(model.device)
            logits = model(
                input_ids=ids[None],
                position_ids=current.pack.positions[None],
                use_cache=False,
                logits_to_keep=rows.to(model.device),
            ).logits[0]
        scores += read_probes(pack, rows, logits, torch.ones(len(lengths)))
        if own:
            num_tokens = pack.num_trace_tokens
            log_probs += _read_trace(logits[:num_tokens], ids[:num_tokens]).split(lengths)
        # Not beside the next pass's.
        del logits
    return log_probs, [torch.tensor(each) for each in scores]


@torch.no_grad()
def naive(model: PreTrainedModel, traces: Sequence[Sequence[int]], probes: Sequence[Sequence[Probe]]) -> list[Tensor]:
    """Every boundary and answer in a sequence of its own, stock attention, logits of the rows that are read only."""
    scores: list[Tensor] = []
    for trace, own in zip(traces, probes, strict=True):
        read = []
        for probe in own:
            ids = torch.tensor([[*trace[: probe.position], *probe.token_ids]], device=model.device)
            counted = torch.tensor(probe.token_ids[probe.scored_from :], device=model.device)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(counted) + 1).logits[0].float()
            log_probs = logits.log_softmax(-1)
            closing = torch.tensor(probe.closing_token_ids, device=model.device)
            read += [log_probs[:-1].gather(1, counted.unsqueeze(1))[:, 0], log_probs[-1:, closing].logsumexp(1)]
        scores.append(torch.cat(read).cpu())
    return scores


def server(model: PreTrainedModel, work: Work, max_batch_tokens: int) -> list[Tensor]:
    """The reading of the embedded CPU rollout server: key-value cache of the traces, probes in batches."""
    results = read_on_server(model, work.traces, work.probes, 1.0, max_batch_tokens)
    return [
        torch.tensor(
            [
                score
                for probe, result in zip(probes, own, strict=True)
                for score in (*result["token_log_probs"][probe.scored_from :], result["closing_log_prob"])
            ]
        )
        for probes, own in zip(work.probes, results, strict=True)
    ]


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
