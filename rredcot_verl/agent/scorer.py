"""One response, from its tokens to its credit record: segments, then values from the run's source."""

import dataclasses
import time
from typing import Any

import torch
from omegaconf import DictConfig

from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.config.sources import ATTRIBUTIONS, MONTE_CARLO
from rredcot_verl.core.segmentation import Trace, get_segmenter, segment
from rredcot_verl.probes.elicitation import Elicitation
from rredcot_verl.probes.vocabulary import Vocabulary
from rredcot_verl.run.settings import run_source
from rredcot_verl.servers.client import Generate, make_probe_reader
from rredcot_verl.sources.attribution import AttributionSource
from rredcot_verl.sources.group import Group
from rredcot_verl.sources.monte_carlo import MonteCarloSource
from rredcot_verl.sources.probes import ProbeSource
from rredcot_verl.sources.record import EMPTY, READOUT, SCORED, UNIFORM_GROUP, CreditRecord
from rredcot_verl.sources.response import Response, Source


class ResponseScorer:
    """Gives responses their segments and what their values are made of.

    Args:
        config: verl's whole config.
        settings: The `algorithm.rredcot` block.
        tokenizer: The policy's tokenizer.
        generate: `LLMServerClient.generate`.
        max_length: Longest sequence that can be scored, tokens.
    """

    def __init__(
        self, config: DictConfig, settings: RREDCoTConfig, tokenizer: Any, generate: Generate, max_length: int
    ) -> None:
        self.settings = settings
        self.vocabulary = Vocabulary(tokenizer, settings.segmentation.keywords)
        self.elicitation = Elicitation(self.vocabulary, settings)
        self._segmenter = get_segmenter(settings.segmentation.method)
        self._source = make_source(config, settings, self.elicitation, generate, max_length)
        self._segments_all = settings.reads_hidden_states()
        self._response_length = int(config.actor_rollout_ref.rollout.response_length)

    async def credit(self, response: Response, group: Group) -> CreditRecord:
        """Wait until the group is decided, then segment and value the response.

        Raises:
            Exception: Whatever the source raises.
        """
        ready_time = time.time()
        await group.decided(needs_all=self._source.needs_all)
        started = time.time()
        record = await self._record(response, group)
        return dataclasses.replace(
            record,
            truncated=response.answer is None and len(response.response_ids) >= self._response_length,
            ready_time=ready_time,
            scored_time=time.time(),
            scoring_seconds=time.time() - started if record.status == SCORED else 0.0,
        )

    async def _record(self, response: Response, group: Group) -> CreditRecord:
        if not any(response.response_mask):
            return CreditRecord(EMPTY)
        if group.has_no_advantage and not self.settings.self_value.probe_uniform_groups:
            # The readout learns from every response, whether it will be credited or not.
            boundaries = self.segment(response) if self._segments_all else []
            return CreditRecord(UNIFORM_GROUP, segment_boundaries=boundaries)
        return await self._source.record(response, group, self.segment(response))

    def segment(self, response: Response) -> list[int]:
        """Segment boundaries of a response: offsets from 0 to its length."""
        ids = torch.tensor(response.response_ids, dtype=torch.int64)
        surprisal = -torch.tensor(response.log_probs if response.log_probs else [0.0] * len(ids))
        trace = Trace(
            response_mask=torch.tensor(response.response_mask, dtype=torch.bool),
            uncertainty=surprisal.nan_to_num(nan=0.0, posinf=1e4, neginf=0.0),
            newline=self.vocabulary.newlines(ids),
            keyword=self.vocabulary.keyword_starts(ids),
            answer_start=response.answer_start,
            think_end=self.elicitation.think_end(response.response_ids),
        )
        rule = self.settings.segmentation
        cuts: list[int] = segment(trace, self._segmenter, rule.num_segments, rule.min_tokens, rule.max_tokens).tolist()
        return cuts


class HiddenStateSource:
    """No probes: the trainer values the states by the policy's own hidden states (`readout.readout`)."""

    needs_all = False

    async def record(self, response: Response, group: Group, boundaries: list[int]) -> CreditRecord:
        """See `Source`."""
        return CreditRecord(READOUT, segment_boundaries=boundaries)


def make_source(
    config: DictConfig, settings: RREDCoTConfig, elicitation: Elicitation, generate: Generate, max_length: int
) -> Source:
    """The source that `algorithm.adv_estimator` names; see `config.sources.SOURCES`."""
    rollout, source = config.actor_rollout_ref.rollout, run_source(config)
    if source == MONTE_CARLO:
        return MonteCarloSource(settings.monte_carlo, generate, int(rollout.response_length), max_length)
    if source in ATTRIBUTIONS:
        return AttributionSource(settings, source, elicitation, max_length)
    if settings.self_value.form == "hidden":
        return HiddenStateSource()
    reader = None
    if settings.self_value.engine != "actor":
        reader = make_probe_reader(rollout.name, generate, settings.self_value, float(rollout.temperature))
    return ProbeSource(settings, elicitation, reader, max_length)
