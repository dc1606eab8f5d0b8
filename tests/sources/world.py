"""Both halves of a run without Ray: a training batch in a stand-in of the TransferQueue, and an agent loop worker."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from rredcot_verl.agent.segmenting import ResponseRecorder
from rredcot_verl.config.schema import parse
from rredcot_verl.probes.elicitation import Elicitation
from rredcot_verl.probes.vocabulary import Vocabulary
from rredcot_verl.sources import queue
from rredcot_verl.sources.base import Source, Workers
from rredcot_verl.sources.group import Group, Member
from rredcot_verl.sources.queue import RecordedBatch, Rows, read_recorded, read_rewards
from rredcot_verl.sources.record import KEY, Plan, Record
from rredcot_verl.sources.registry import make_source
from rredcot_verl.sources.response import AgentTools, Response
from rredcot_verl.trainer import traces
from tests import PATIENCE_S
from tests.fake_queue import FakeQueue
from tests.passes.table_model import FakeServer, TableModel
from tests.probes.tiny_tokenizers import byte_level, encode

TEMPERATURE = 0.7


class World:
    """A batch as verl's trainer has it.

    Args:
        monkeypatch: Takes the queue back after the test.
        records: One a row; None for padding (keys that start with "pad") and for outputs before a session's last. Such
            a row holds a copy of the first record, as verl leaves it.
        keys: Row keys; by default one group "a", and padding.
        rewards: R of each row, on its last token; 0 by default.
        lengths: Response lengths; by default the last boundary, or 4.
        fields: Names that the batch says it holds, for its next readers.
        columns: What else is stored: a value a row, where lists become tensors.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        records: Sequence[Record | None],
        keys: Sequence[str] | None = None,
        rewards: Sequence[float] | None = None,
        lengths: Sequence[int] | None = None,
        fields: Sequence[str] | None = None,
        **columns: Sequence[Any],
    ) -> None:
        self.keys = list(keys or [f"{'a' if record else 'pad'}_{row}_0" for row, record in enumerate(records)])
        copied = next((record for record in records if record is not None), None)
        stored: dict[str, dict[str, Any]] = {}
        for row, (key, record) in enumerate(zip(self.keys, records, strict=True)):
            cuts = record.segment_boundaries if record else []
            length = lengths[row] if lengths else (cuts[-1] if cuts else 4)
            scores = torch.zeros(length)
            scores[-1:] = rewards[row] if rewards is not None else 0.0
            held = record or copied
            stored[key] = {
                "uid": key.rsplit("_", 2)[0],
                "response_mask": torch.ones(length, dtype=torch.int64),
                "rm_scores": scores,
                "extra_fields": {"other": 1} if held is None else {KEY: held.to_dict(), "other": 1},
            }
            stored[key] |= {name: _value(column[row]) for name, column in columns.items()}
        self.queue = FakeQueue(stored).stand_in(monkeypatch, queue, traces)
        tags = [{"is_padding": True} if key.startswith("pad") else {} for key in self.keys]
        tags = [tag | {"seq_len": 20} for tag in tags]
        self.batch = KVBatchMeta(
            keys=self.keys, tags=tags, partition_id="train", fields=fields, extra_info={"temperature": 0.1}
        )

    def recorded(self) -> RecordedBatch:
        """The batch with its records, read anew."""
        return read_recorded(self.batch)

    def rows(self, step: int = 1) -> Rows:
        """The batch with records and rewards, read anew."""
        return read_rewards(self.recorded(), step)

    def column(self, field: str) -> list[list[Any]]:
        """What is stored in a field."""
        return [self.queue.rows[key][field].tolist() for key in self.keys]

    def put(self, **columns: Sequence[Any]) -> "World":
        """Store fields, as a pass does."""
        for name, column in columns.items():
            for key, value in zip(self.keys, column, strict=True):
                self.queue.rows[key][name] = _value(value)
        return self


def _value(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return torch.tensor(value, dtype=torch.int64 if all(isinstance(each, int) for each in value) else torch.float32)


class SequenceWorkers:
    """`compute_log_prob` of verl's actor workers for whole sequences, with a model's true log-probabilities."""

    def __init__(self, model: Any, num_ranks: int = 1) -> None:
        self.model = model
        self.num_ranks = num_ranks
        self.calls: list[list[list[int]]] = []

    @torch.no_grad()
    def compute_log_prob(self, data: TensorDict) -> dict[str, Any]:
        """See verl; every setting that it reads is checked."""
        assert len(data) % self.num_ranks == 0
        rows = [row.tolist() for row in data["input_ids"].unbind()]
        assert [row.tolist() for row in data["position_ids"].unbind()] == [list(range(len(row))) for row in rows]
        assert max(map(len, rows)) <= data["max_token_len_per_gpu"] and data["use_dynamic_bsz"]
        assert not data["calculate_entropy"] and not data["compute_loss"]
        self.calls.append(rows)
        log_probs = []
        for row in rows:
            logits = self.model(torch.tensor([row])).logits[0].float() / data["temperature"]
            # As verl's: entry i is for token i + 1, the last one for whatever follows in the batch.
            log_probs.append(logits.log_softmax(-1)[torch.arange(len(row)), torch.tensor([*row[1:], 0])])
        return {"log_probs": torch.nested.as_nested_tensor(log_probs, layout=torch.jagged)}

    def as_workers(self) -> Workers:
        """As the trainer hands them to a source."""
        return Workers(group=self, num_ranks=self.num_ranks, temperature=TEMPERATURE, max_tokens=10)


PROMPT = encode(byte_level(), "What is 12 + 3?\n")
TEXT = "First, 12 + 3 = 15.\n\nWait, let me see, but so 3.\nSo the answer is \\boxed{15}.\n"
SEGMENTS = {"segmentation": {"min_tokens": 2, "num_segments": 18}}
ONE_WRONG = (Member(0.0, "16"),)


class Agent:
    """An agent loop worker's half of a run: what it has, its source, and the recorder.

    Args:
        estimator: `algorithm.adv_estimator`.
        block: The `algorithm.rredcot` block, over short segments.
        tokenizer: The policy's; byte-level BPE by default.
        generate: `LLMServerClient.generate`; by default that of a table for a model.
        tools: Other attributes of `AgentTools`.
    """

    def __init__(
        self,
        estimator: str = "rredcot",
        block: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        generate: Any = None,
        **tools: Any,
    ) -> None:
        self.settings = parse(SEGMENTS | dict(block or {}))
        self.tokenizer = tokenizer or byte_level()
        self.source = make_source(self.settings, estimator)
        defaults = {"max_length": 10**6, "response_length": 128, "temperature": 1.0, "rollout_name": "rredcot_cpu"}
        self.tools = AgentTools(
            elicitation=Elicitation(Vocabulary(self.tokenizer, self.settings.segmentation.keywords), self.settings),
            generate=generate or FakeServer(TableModel(len(self.tokenizer))).generate,
            **(defaults | tools),
        )
        self.source.start(self.tools)
        self.recorder = ResponseRecorder(self.settings, self.source, self.tools)

    def response(self, text: str = TEXT, **fields: Any) -> Response:
        """A verified response of this text; fields win."""
        ids = fields.get("response_ids", encode(self.tokenizer, text))
        defaults = {
            "prompt_ids": PROMPT,
            "response_ids": ids,
            "response_mask": [1] * len(ids),
            "log_probs": [-0.1 * (n % 7) for n in range(len(ids))],
            "reward": 1.0,
            "references": "15",
            "request_id": "request-1",
            "answer": self.tools.elicitation.read(ids) if ids else None,
        }
        return Response(**(defaults | fields))

    def record(self, response: Response | None = None, others: Sequence[Member] = ONE_WRONG) -> Plan:
        """What is left of the response, after the others of its group have arrived."""
        response = response or self.response()

        async def run() -> Plan:
            group = Group(1 + len(others))
            for number, member in enumerate(others):
                await group.arrive(number + 1, member)
            await group.arrive(0, response.as_member())
            return await self.recorder.record(response, group)

        return asyncio.run(asyncio.wait_for(run(), timeout=PATIENCE_S))


def source_of(estimator: str, **block: Any) -> Source:
    """The source of a run with this `algorithm.rredcot` block, not started."""
    return make_source(parse(block), estimator)
