"""One response, from its tokens to what is left of it for the trainer: segments, then what its source plans."""

import dataclasses
import time

import torch

from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.core.segmentation import Trace, get_segmenter, segment
from rredcot_verl.sources.base import Source
from rredcot_verl.sources.group import Group
from rredcot_verl.sources.record import Plan, Record, Status
from rredcot_verl.sources.response import AgentTools, Response


class ResponseRecorder:
    """Cuts responses into segments and lets the run's source plan what is measured of them.

    Args:
        settings: The `algorithm.rredcot` block.
        source: The run's, started.
        tools: What an agent loop worker has.
    """

    def __init__(self, settings: RREDCoTConfig, source: Source, tools: AgentTools) -> None:
        self.settings = settings
        self.source = source
        self.elicitation = tools.elicitation
        self._segmenter = get_segmenter(settings.segmentation.method)
        self._response_length = tools.response_length

    async def record(self, response: Response, group: Group) -> Plan:
        """Wait until the group is decided, then segment the response and plan what is measured.

        Raises:
            Exception: Whatever the source raises.
        """
        ready_time = time.time()
        await group.decided(needs_all=self.source.needs_all)
        started = time.time()
        plan = await self._plan(response, group)
        # What is left for the training engine takes no time here.
        measured = plan.record.status is Status.SCORED and not plan.rows
        record = dataclasses.replace(
            plan.record,
            truncated=response.answer is None and len(response.response_ids) >= self._response_length,
            ready_time=ready_time,
            recorded_time=time.time(),
            measuring_seconds=time.time() - started if measured else 0.0,
        )
        return Plan(record, plan.rows)

    async def _plan(self, response: Response, group: Group) -> Plan:
        if not any(response.response_mask):
            return Plan(Record(Status.EMPTY))
        if group.has_no_advantage and not self.settings.self_value.probe_uniform_groups:
            if self.source.segments_uniform_groups:
                return self.source.plan_uniform(response, self.segment(response))
            return Plan(Record(Status.UNIFORM_GROUP))
        return await self.source.plan(response, group, self.segment(response))

    def segment(self, response: Response) -> list[int]:
        """Segment boundaries of a response: offsets from 0 to its length."""
        ids = torch.tensor(response.response_ids, dtype=torch.int64)
        surprisal = -torch.tensor(response.log_probs if response.log_probs else [0.0] * len(ids))
        vocabulary = self.elicitation.vocabulary
        trace = Trace(
            response_mask=torch.tensor(response.response_mask, dtype=torch.bool),
            uncertainty=surprisal.nan_to_num(nan=0.0, posinf=1e4, neginf=0.0),
            newline=vocabulary.newlines(ids),
            keyword=vocabulary.keyword_starts(ids),
            answer_start=response.answer_start,
            think_end=self.elicitation.think_end(response.response_ids),
        )
        rule = self.settings.segmentation
        cuts: list[int] = segment(trace, self._segmenter, rule.num_segments, rule.min_tokens, rule.max_tokens).tolist()
        return cuts
