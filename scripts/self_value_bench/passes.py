"""The ways to compute: each function is one variant, over all traces.

Rows, log-probabilities and entropies are made as verl's engine makes them: logits of every token, the ids rolled by
one as labels, temperature 1. Nothing is compiled but FlexAttention, which the shared pass uses on a GPU.
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
from self_value_bench.work import Work, pack_traces

ProbeScores = list[list[float]]
"""For each trace, probe by probe, the log-probabilities of the counted tokens and of the answer's end."""


def _read_traces(logits: Tensor, ids: Tensor, with_entropy: bool = True) -> Tensor:
    log_probs = logprobs_from_logits(logits, ids.roll(-1))
    if with_entropy:
        entropy_from_logits(logits)
    return log_probs


@torch.no_grad()
def plain(model: PreTrainedModel, traces: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probabilities and entropies of the traces, one trace at a time, with the model's stock attention."""
    results = []
    for trace in traces:
        ids = torch.tensor([trace], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0]
        results.append(_read_traces(logits, ids[0]).float().cpu())
    return results


def update(model: PreTrainedModel, traces: Sequence[Sequence[int]]) -> None:
    """Gradients of a policy-gradient loss, one trace at a time, stock attention; no optimiser step."""
    for trace in traces:
        ids = torch.tensor([trace], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0]
        log_probs = _read_traces(logits, ids[0], with_entropy=False)
        loss = -(log_probs - log_probs.detach()).exp().mean() / len(traces)
        loss.backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def shared(
    model: PreTrainedModel,
    traces: Sequence[Sequence[int]],
    probes: Sequence[Sequence[Probe]],
    budget: int,
    own: bool,
) -> tuple[list[Tensor], ProbeScores]:
    """The traces with their probes in shared-prefix passes, as `rredcot_verl.passes.engine` makes them.

    Args:
        model: The policy.
        traces: Token ids of each trace.
        probes: For each trace its probes, possibly none.
        budget: Most trace tokens in a pass.
        own: Also the traces' own log-probabilities and entropies.
    """
    log_probs: list[Tensor] = []
    scores: ProbeScores = []
    for group in pack_traces([len(trace) for trace in traces], budget):
        pack = ProbePack.build([len(traces[trace]) for trace in group], [probes[trace] for trace in group])
        rows = pack.rows(all_trace_rows=own)
        ids = torch.cat([torch.tensor([token for trace in group for token in traces[trace]]), pack.probe_token_ids])
        ids = ids.to(model.device)
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
            found = _read_traces(logits[:num_tokens], ids[:num_tokens]).float().cpu()
            log_probs += found.split([len(traces[trace]) for trace in group])
        # Not beside the next pass's.
        del logits
    return log_probs, scores


@torch.no_grad()
def naive(model: PreTrainedModel, work: Work) -> ProbeScores:
    """Every boundary and answer in a sequence of its own, stock attention, logits of the rows that are read only."""
    scores: ProbeScores = []
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
    return scores


def server(model: PreTrainedModel, work: Work, max_batch_tokens: int) -> ProbeScores:
    """The reading of the embedded CPU rollout server: key-value cache of the traces, probes in batches."""
    results = read_on_server(model, work.traces, work.probes, 1.0, max_batch_tokens)
    return [
        [
            score
            for probe, result in zip(probes, own, strict=True)
            for score in (*result["token_log_probs"][probe.scored_from :], result["closing_log_prob"])
        ]
        for probes, own in zip(work.probes, results, strict=True)
    ]


class Decoder:
    """Sampling with transformers' key-value cache, from a cache of random numbers: its speed is that of a real one.

    Args:
        model: The policy.
        batch: Sequences sampled together.
        context: Tokens of each in the cache at the start.
    """

    def __init__(self, model: PreTrainedModel, batch: int, context: int) -> None:
        config = model.config
        shape = (batch, config.num_key_value_heads, context, config.head_dim)
        self._model = model
        self._batch = batch
        self._cache = DynamicCache(
            [
                tuple(torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2))
                for _ in range(config.num_hidden_layers)
            ]
        )

    @torch.no_grad()
    def __call__(self, num_tokens: int) -> None:
        """Sample tokens, one after the other."""
        ids = torch.zeros(self._batch, 1, dtype=torch.int64, device=self._model.device)
        for _ in range(num_tokens):
            logits = self._model(ids, past_key_values=self._cache, use_cache=True).logits[:, -1]
            ids = logits.float().softmax(-1).multinomial(1)
