"""Probes on the training engine, from the trainer's side: sent with the rows, read back as self-values."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu

from rredcot_verl.config.blocks import SelfValueConfig
from rredcot_verl.passes.probe_codec import NO_PROBES, decode
from rredcot_verl.passes.protocol import PASS, PROBE_LOG_PROBS, PROBES, PROBES_ONLY
from rredcot_verl.probes.elicitation import Probe
from rredcot_verl.probes.values import ProbeScore, state_values
from rredcot_verl.sources.record import PLANNED, SCORED, CreditRecord
from rredcot_verl.trainer.batch import put_rows

Records = Sequence[CreditRecord | None]


def any_planned(records: Records) -> bool:
    """Whether any response waits for its probes."""
    return any(record is not None and record.status == PLANNED for record in records)


def attach_probes(batch: KVBatchMeta, records: Records) -> None:
    """Store each row's probes beside it; padding rows and rows without probes get none."""
    rows = [_encoded(record) for record in records]
    put_rows(batch, PROBES, [torch.tensor(row, dtype=torch.int64) for row in rows])


def read_probes_only(worker_group: Any, batch: KVBatchMeta, temperature: float) -> None:
    """A pass for nothing but the probes; the rows' own fields stay as they are."""
    before = dict(batch.extra_info)
    batch.extra_info.update(
        {PASS: PROBES_ONLY, "calculate_entropy": False, "compute_loss": False, "temperature": temperature}
    )
    worker_group.compute_log_prob(batch)
    batch.extra_info.clear()
    batch.extra_info.update(before)


def scored(batch: KVBatchMeta, records: Records, settings: SelfValueConfig) -> list[CreditRecord | None]:
    """The records with the self-values that a pass has read."""
    if not any_planned(records):
        return list(records)
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=[PROBE_LOG_PROBS])
    rows = data[PROBE_LOG_PROBS].unbind()
    return [
        _scored(key, record, row.tolist(), settings) for key, record, row in zip(batch.keys, records, rows, strict=True)
    ]


def without_probes(batch: KVBatchMeta) -> KVBatchMeta:
    """The same batch, with nothing of ours for its next readers to fetch."""
    if batch.fields is not None:
        batch.fields = [field for field in batch.fields if field not in (PROBES, PROBE_LOG_PROBS)]
    return batch


def _encoded(record: CreditRecord | None) -> Sequence[int]:
    return record.probes if record is not None and record.status == PLANNED else NO_PROBES


def _scored(
    key: str, record: CreditRecord | None, log_probs: list[float], settings: SelfValueConfig
) -> CreditRecord | None:
    if record is None or record.status != PLANNED:
        return record
    probes = decode(record.probes)
    expected = sum(len(probe.token_ids) - probe.scored_from + 1 for probe in probes)
    if len(log_probs) != expected:
        raise RuntimeError(
            f"a pass gave {len(log_probs)} log-probabilities of the probes of {key}, expected {expected}"
        )
    values = iter(log_probs)
    scores = []
    for probe in probes:
        counted = list(itertools.islice(values, len(probe.token_ids) - probe.scored_from))
        scores.append(ProbeScore([0.0] * probe.scored_from + counted, next(values), 0))
    return dataclasses.replace(
        record, status=SCORED, self_values=state_values(settings, probes, scores, record.utilities)
    )


@dataclass(frozen=True)
class SeparateSequences:
    """Every probe as a sequence of its own, for training engines that cannot share a prefix.

    Through verl's `compute_log_prob`, which every engine has. Only the `max_closing_tokens` likeliest ends of an answer
    are summed, one sequence each: a lower bound of the probability that the answer ends.

    Attributes:
        worker_group: verl's actor workers.
        num_ranks: Data-parallel ranks; a call's sequences are a multiple of it.
        temperature: Of the rollout.
        max_closing_tokens: See above.
        max_tokens: Tokens of one rank's pass.
    """

    worker_group: Any
    num_ranks: int
    temperature: float
    max_closing_tokens: int
    max_tokens: int

    MAX_TOKENS_PER_CALL = 2**22

    def read(self, batch: KVBatchMeta, records: Records) -> None:
        """Score the rows' probes and store the results where a shared pass would have left them."""
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["input_ids"])
        traces = [row.tolist() for row in data["input_ids"].unbind()]
        probes = [decode(_encoded(record)) for record in records]
        # Made as they are sent: all at once they would be many times the batch.
        sequences = (
            (*trace[: probe.position], *probe.token_ids, end)
            for trace, own in zip(traces, probes, strict=True)
            for probe in own
            for end in self._ends(probe)
        )
        log_probs = itertools.chain.from_iterable(self._log_probs(part) for part in self._parts(sequences))
        rows = [torch.tensor(self._read(own, log_probs) or [0.0]) for own in probes]
        put_rows(batch, PROBE_LOG_PROBS, rows)

    def _ends(self, probe: Probe) -> tuple[int, ...]:
        return probe.closing_token_ids[: self.max_closing_tokens]

    def _read(self, probes: Sequence[Probe], log_probs: Iterator[Tensor]) -> list[float]:
        values: list[float] = []
        for probe in probes:
            rows = list(itertools.islice(log_probs, len(self._ends(probe))))
            # Entry i of a sequence is the log-probability of token i + 1; the last one has no meaning.
            first = probe.position + probe.scored_from - 1
            values += rows[0][first:-2].tolist()
            values.append(torch.stack([row[-2] for row in rows]).double().logsumexp(0).item())
        return values

    def _parts(self, sequences: Iterable[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        part: list[tuple[int, ...]] = []
        num_tokens = 0
        for sequence in sequences:
            if part and num_tokens + len(sequence) > self.MAX_TOKENS_PER_CALL:
                yield part
                part, num_tokens = [], 0
            part.append(sequence)
            num_tokens += len(sequence)
        if part:
            yield part

    def _log_probs(self, sequences: list[tuple[int, ...]]) -> list[Tensor]:
        missing = -len(sequences) % self.num_ranks
        ids = [torch.tensor(sequence) for sequence in [*sequences, *sequences[:1] * missing]]
        nested = torch.nested.as_nested_tensor(ids, layout=torch.jagged)
        positions = torch.nested.as_nested_tensor([torch.arange(len(row)) for row in ids], layout=torch.jagged)
        ones = torch.nested.as_nested_tensor([torch.ones_like(row) for row in ids], layout=torch.jagged)
        data = TensorDict({"input_ids": nested, "position_ids": positions, "loss_mask": ones}, batch_size=len(ids))
        tu.assign_non_tensor(
            data,
            calculate_entropy=False,
            compute_loss=False,
            temperature=self.temperature,
            use_dynamic_bsz=True,
            max_token_len_per_gpu=max(self.max_tokens, max(len(row) for row in ids)),
        )
        output = self.worker_group.compute_log_prob(data)
        return list(output["log_probs"].unbind())[: len(sequences)]
