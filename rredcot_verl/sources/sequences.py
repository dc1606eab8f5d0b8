"""Whole sequences through verl's `compute_log_prob`, which every training engine has: no prefix is shared."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu

from rredcot_verl.config.schema import PREFIX, RREDCoTConfig
from rredcot_verl.passes.probe_codec import decode
from rredcot_verl.passes.protocol import FIELDS
from rredcot_verl.probes.probe import Probe
from rredcot_verl.sources.base import Workers
from rredcot_verl.sources.queue import put_rows, read_rows

MAX_TOKENS_PER_STEP = 2**26
"""Most tokens of separate sequences that a run may be expected to want for a step: 16 calls of the workers."""


def why_too_many(config: DictConfig, settings: RREDCoTConfig) -> str | None:
    """Why the probes of a run are too many for sequences of their own, with the way out; None where they are not.

    Estimate, of responses of full length and without their prompts: responses of a step * boundaries * answers (one
    reference, or `max_proposals` of a group) * `max_closing_tokens` * half of `data.max_response_length`.
    """
    value, cuts, data = settings.self_value, settings.segmentation, config.data
    num_rows, length = data.train_batch_size * config.actor_rollout_ref.rollout.n, data.max_response_length
    boundaries = min(cuts.num_segments, max(1, length // cuts.min_tokens))
    answers = 1 if value.proposals == "reference" else value.max_proposals
    num_tokens = num_rows * boundaries * answers * value.max_closing_tokens * length // 2
    if num_tokens <= MAX_TOKENS_PER_STEP:
        return None
    return (
        f"every probe would be a sequence of its own, about {num_tokens / 1e6:,.0f} million tokens a step "
        f"({num_rows} responses x {boundaries} boundaries x {answers} answers x {value.max_closing_tokens} closing "
        f"tokens x half of data.max_response_length={length}), more than {MAX_TOKENS_PER_STEP / 1e6:.0f} million; "
        f"share prefixes (FSDP, or Megatron as in docs/self_value.md; {PREFIX}.self_value.share_prefix=true), let the "
        f"server read them (trainer.v1.trainer_mode=sync, {PREFIX}.self_value.engine=rollout), or lower "
        f"{PREFIX}.segmentation.num_segments, {PREFIX}.self_value.max_closing_tokens or data.train_batch_size"
    )


@dataclass(frozen=True)
class SeparateSequences:
    """Log-probabilities of whole sequences, for training engines that cannot do more.

    Attributes:
        workers: The training workers.
    """

    workers: Workers

    MAX_TOKENS_PER_CALL = 2**22

    def read_probes(self, batch: KVBatchMeta, max_closing_tokens: int) -> None:
        """Read the rows' probes, each as a sequence of its own, and store the results where a pass would.

        Only the `max_closing_tokens` likeliest ends of an answer are summed, one sequence each: a lower bound of the
        probability that the answer ends.
        """
        traces = [row.tolist() for row in read_rows(batch, "input_ids")]
        probes = [decode(row.tolist()) for row in read_rows(batch, FIELDS["probes"].payload)]
        # Made as they are sent: all at once they would be many times the batch.
        sequences = (
            (*trace[: probe.position], *probe.token_ids, end)
            for trace, own in zip(traces, probes, strict=True)
            for probe in own
            for end in probe.closing_token_ids[:max_closing_tokens]
        )
        log_probs = self.log_probs(sequences)
        rows = [torch.tensor(_of_probes(own, log_probs, max_closing_tokens) or [0.0]) for own in probes]
        put_rows(batch, FIELDS["probes"].result, rows)

    def log_probs(self, sequences: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """For each sequence the log-probability of every token after the first, nats; its last entry has no meaning."""
        return itertools.chain.from_iterable(self._call(part) for part in self._parts(sequences))

    def _parts(self, sequences: Iterable[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
        part: list[Sequence[int]] = []
        num_tokens = 0
        for sequence in sequences:
            if part and num_tokens + len(sequence) > self.MAX_TOKENS_PER_CALL:
                yield part
                part, num_tokens = [], 0
            part.append(sequence)
            num_tokens += len(sequence)
        if part:
            yield part

    def _call(self, sequences: list[Sequence[int]]) -> list[Tensor]:
        order = self._dealt([len(sequence) for sequence in sequences])
        ids = [torch.tensor(sequences[number]) for number in order]
        fields = {
            "input_ids": ids,
            "position_ids": [torch.arange(len(row)) for row in ids],
            "loss_mask": [torch.ones_like(row) for row in ids],
        }
        nested = {name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in fields.items()}
        data = TensorDict(nested, batch_size=len(ids))
        tu.assign_non_tensor(
            data,
            calculate_entropy=False,
            compute_loss=False,
            temperature=self.workers.temperature,
            use_dynamic_bsz=True,
            max_token_len_per_gpu=max(self.workers.max_tokens, max(len(row) for row in ids)),
        )
        output = self.workers.group.compute_log_prob(data)
        of_number = dict(zip(order, output["log_probs"].unbind(), strict=True))
        return [of_number[number] for number in range(len(sequences))]

    def _dealt(self, lengths: Sequence[int]) -> list[int]:
        """Numbers of the sequences as the ranks get them: verl gives each rank as many, in this order.

        Dealt out by length, so that ranks differ by no more than the longest; the shortest again where some lack.
        """
        ranks = self.workers.num_ranks
        by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
        by_length = by_length[:1] * (-len(lengths) % ranks) + by_length
        return [number for rank in range(ranks) for number in by_length[rank::ranks]]


def _of_probes(probes: Sequence[Probe], log_probs: Iterator[Tensor], max_closing_tokens: int) -> list[float]:
    values: list[float] = []
    for probe in probes:
        rows = list(itertools.islice(log_probs, min(len(probe.closing_token_ids), max_closing_tokens)))
        # Entry i of a sequence is the log-probability of token i + 1; the last one has no meaning.
        first = probe.position + probe.scored_from - 1
        values += rows[0][first:-2].tolist()
        values.append(torch.stack([row[-2] for row in rows]).double().logsumexp(0).item())
    return values
