"""One response, from its tokens to what is left of it for the trainer: segments, then what its source plans."""

import dataclasses
import time

from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.probes.cutting import cut
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
        self._response_length = tools.response_length

    async def record(self, response: Response, group: Group) -> Plan:
        """Wait until the group is decided, then segment the response and plan what is measured.

        Where groups of one reward are measured too, there is nothing to wait for unless the source reads all rollouts.

        Raises:
            Exception: Whatever the source raises.
        """
        ready_time = time.time()
        if self.source.needs_all or not self.settings.measures_uniform_groups:
            await group.decided(needs_all=self.source.needs_all)
        started = time.time()
        plan = await self._plan(response, group)
        self.elicitation.remember(response.answer)
        # What is left for the training engine takes no time here.
        measured = plan.record.status is Status.SCORED and not plan.rows
        now = time.time()
        record = dataclasses.replace(
            plan.record,
            shaping=response.shaping,
            truncated=response.answer is None and len(response.response_ids) >= self._response_length,
            ready_time=ready_time,
            recorded_time=now,
            measuring_seconds=now - started if measured else 0.0,
        )
        return Plan(record, plan.rows)

    async def _plan(self, response: Response, group: Group) -> Plan:
        if not any(response.response_mask):
            return Plan(Record(Status.EMPTY))
        if group.has_no_advantage and not self.settings.measures_uniform_groups:
            return Plan(Record(Status.UNIFORM_GROUP))
        return await self.source.plan(response, group, self.segment(response))

    def segment(self, response: Response) -> list[int]:
        """Segment boundaries of a response: offsets from 0 to its length."""
        return cut(
            self.settings.segmentation,
            self.elicitation,
            response.prompt_ids,
            response.response_ids,
            response.response_mask,
            response.log_probs,
            self._response_length,
        )
