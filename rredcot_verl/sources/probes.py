"""Known answers, forced at every boundary: RREDCoT's own source, and two peers that read the same probes."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
from omegaconf import DictConfig

from rredcot_verl.config.schema import PREFIX, RREDCoTConfig
from rredcot_verl.core.groups import from_unit, to_unit
from rredcot_verl.core.values import new_highs
from rredcot_verl.passes.probe_codec import encode, num_probe_tokens
from rredcot_verl.passes.protocol import FIELDS
from rredcot_verl.probes.probe import Probe
from rredcot_verl.probes.proposals import Proposal, build_proposals
from rredcot_verl.probes.values import ProbePlace, self_values, values_of_log_probs
from rredcot_verl.servers.client import ProbeReader, make_probe_reader
from rredcot_verl.sources.base import NOTHING_REGRESSED, PassRequest, Source, Workers, why_not_regressed
from rredcot_verl.sources.engines import (
    EngineChoice,
    check_layer,
    settle_fusing,
    weights_of_probes,
    why_no_hidden,
    why_not_separate,
    why_not_shared,
    why_server_cannot_score,
)
from rredcot_verl.sources.group import Group, Member
from rredcot_verl.sources.queue import RecordedBatch, Rows
from rredcot_verl.sources.record import Plan, Record, Status
from rredcot_verl.sources.regression import HIDDEN_FIELD, Regression, hidden_positions, hidden_request
from rredcot_verl.sources.response import AgentTools, Response
from rredcot_verl.sources.sequences import SeparateSequences, why_too_many

logger = logging.getLogger(__name__)

FIELD = FIELDS["probes"].payload


class Probes(Source):
    """RREDCoT: v_k from the probability of known answers after boundary k (arXiv 2606.06475), see `core.self_value`.

    With `self_value.calibration=logistic` (ours) that is a feature of a regression on verified outcomes; see
    `sources.regression`.

    A record's payload: `utilities` of the answers; and `places` of the probes (`probes.values.ProbePlace`, three
    integers each) that the training engine reads, or the `values` that the rollout server has given.
    """

    default_form = "joint"
    reads_probes = True

    def __init__(self, settings: RREDCoTConfig, name: str) -> None:
        super().__init__(settings, name)
        value = settings.self_value
        self.form = self.default_form if value.form == "auto" else value.form
        self.needs_all = _waits_for_group(value.proposals, value.engine, value.share_prefix)
        self._regression: Regression | None = None
        if value.calibration == "logistic":
            self._regression = Regression(settings, self.form if settings.readout.use_probe else None)
        self.estimates_reward = self._regression is not None
        self._reads_hidden = self._regression is not None and settings.readout.use_hidden
        self.payload_fields = (FIELD, HIDDEN_FIELD) if self._reads_hidden else (FIELD,)
        self._reader: ProbeReader | None = None

    # Before anything starts

    def reads(self) -> frozenset[str]:
        """See `Source`."""
        names = ["engine", "share_prefix", "fuse", "form", "calibration", "proposals", "reference_key", "max_proposals"]
        names += ["max_answer_tokens", "max_closing_tokens", "score_opening", "timeout_s", "max_concurrency"]
        readout = {"readout"} if self._regression is not None else set()
        layer = {"readout.layer", "readout.dim"} if self._reads_hidden else set()
        return super().reads() | {f"self_value.{name}" for name in names} | readout | layer

    def reads_references(self) -> bool:
        """See `Source`."""
        return self.settings.self_value.proposals != "group"

    def needs_references(self) -> bool:
        """See `Source`."""
        return self.settings.self_value.proposals == "reference"

    def check(self, config: DictConfig) -> str | None:
        """See `Source`."""
        value = self.settings.self_value
        if self.settings.readout.use_hidden and self._regression is None:
            return NOTHING_REGRESSED
        obstacle = why_server_cannot_score(config)
        if value.engine == "rollout" and obstacle is not None:
            return f"{PREFIX}.self_value.engine=rollout: {obstacle}; use self_value.engine=actor"
        reward_model = config.reward.reward_model
        colocated = reward_model.enable and not reward_model.enable_resource_pool
        if colocated and (value.proposals == "group" or self.form == "normalized"):
            return (
                f"{PREFIX}.self_value.proposals={value.proposals} with form={self.form} needs the reward of a response "
                "while it is rolled out, but reward.reward_model.enable_resource_pool=False computes it later; use "
                "reference and joint, or a resource pool"
            )
        return None

    def choose_engine(self, config: DictConfig) -> EngineChoice:
        """Settle `self_value.engine`, `share_prefix` and `fuse` for a run, and say so once.

        Raises:
            ValueError: Hidden states or the probes are not to be had so.
        """
        value = self.settings.self_value
        choice = self._with_hidden_states(config) if self._reads_hidden else self._choose(config)
        obstacle = why_not_separate(config) if choice.engine == "actor" and not choice.share_prefix else None
        if obstacle is not None:
            raise ValueError(
                f"{PREFIX}.self_value.engine={value.engine} with {choice.reason}: probes would be sequences of their "
                f"own, but {obstacle}; set its mode to disabled, or self_value.engine=rollout"
            )
        choice = settle_fusing(config, choice, value.fuse)
        logger.warning(
            "rredcot: self_value.engine=%s: probes are read by %s; %s; under %s",
            value.engine,
            choice.label,
            choice.reason,
            weights_of_probes(config, choice.engine),
        )
        waits = _waits_for_group(value.proposals, choice.engine, choice.share_prefix)
        if not waits and self.settings.elicitation.format != "code":
            logger.warning(
                "rredcot: self_value.proposals=reference with probes read by %s: answers are probed as the data spell "
                "them, not as the other responses of the group did, for which a probe would have to wait; "
                "self_value.proposals=union waits",
                choice.label,
            )
        if choice.engine == "actor" and not choice.share_prefix:
            obstacle = why_too_many(config, self.settings)
            if obstacle is not None:
                raise ValueError(f"{choice.reason}: {obstacle}")
            logger.warning(
                "rredcot: every probe is a sequence of its own for compute_log_prob, and one more for each further "
                "closing token: with K segments about K/2 forward passes over the traces for each of them "
                "(max_closing_tokens=%s)",
                value.max_closing_tokens,
            )
        return choice

    def _choose(self, config: DictConfig) -> EngineChoice:
        asked = self.settings.self_value.engine
        if asked == "rollout":
            return EngineChoice("rollout", False, "set by the config")
        if not self.settings.self_value.share_prefix:
            return EngineChoice("actor", False, f"{PREFIX}.self_value.share_prefix=False")
        obstacle = why_not_shared(config)
        if obstacle is None:
            return EngineChoice("actor", True, "the training engine can share prefixes")
        by_server = asked == "auto" and why_server_cannot_score(config) is None
        engine = "rollout" if by_server else "actor"
        return EngineChoice(engine, False, f"the training engine cannot share prefixes: {obstacle}")

    def _with_hidden_states(self, config: DictConfig) -> EngineChoice:
        """Probes and hidden states come from one pass, so the training engine has to share prefixes."""
        value = self.settings.self_value
        if value.engine == "rollout" or not value.share_prefix:
            raise ValueError(
                f"{PREFIX}.readout.use_hidden=True reads hidden states and probes in one pass of the training engine; "
                f"it needs {PREFIX}.self_value.engine=auto or actor, and share_prefix=true"
            )
        obstacle = why_no_hidden(config)
        if obstacle is not None:
            raise ValueError(
                f"{PREFIX}.readout.use_hidden=True: the training engine gives no hidden states: {obstacle}; set "
                "readout.use_hidden=false"
            )
        obstacle = why_not_shared(config)
        if obstacle is not None:
            raise ValueError(
                f"{PREFIX}.readout.use_hidden=True: the training engine cannot share prefixes: {obstacle}; set "
                "self_value.form=hidden, which needs no probes, or readout.use_hidden=false"
            )
        check_layer(config, self.settings.readout)
        return EngineChoice("actor", True, "hidden states are read in the same pass")

    def describe(self) -> str:
        """See `Source`."""
        value = self.settings.self_value
        calibrated = "" if self._regression is None else f", {value.calibration} calibration"
        return (
            f"probes: {value.proposals}, at most {value.max_proposals} answers of {value.max_answer_tokens} tokens; "
            f"{self.form} value{calibrated}; format {self.settings.elicitation.format}"
        )

    def way_out(self) -> str:
        """See `Source`."""
        check = "check algorithm.rredcot.elicitation.format"
        if self.reads_references():
            check = f"check algorithm.rredcot.self_value.reference_key={self.settings.self_value.reference_key}"
        return f"{check}, or set algorithm.rredcot.self_value.proposals=union"

    # In an agent loop worker

    def start(self, tools: AgentTools) -> None:
        """See `Source`."""
        super().start(tools)
        value = self.settings.self_value
        if value.engine != "actor":
            self._reader = make_probe_reader(tools.rollout_name, tools.generate, value, tools.temperature)

    async def plan(self, response: Response, group: Group, boundaries: list[int]) -> Plan:
        """See `Source`.

        Raises:
            Exception: Whatever the rollout client raises; `ProbingTimeout` for a server that stands still.
        """
        settings, elicitation = self.settings.self_value, self.tools.elicitation
        others = [member for _, member in sorted(group.members.items())]
        # The own answer, known to be right or wrong, would tell the own outcome at every boundary.
        others.remove(response.as_member())
        answers = self._answers(others)
        spellings = answers if self.needs_all else []
        known = build_proposals(self.settings, response.references, answers, self.form, spellings)
        answer_format = elicitation.usual_format()
        proposals = [proposal for proposal in known if elicitation.can_append(proposal.text, answer_format)]
        probes = elicitation.probes(
            response.prompt_ids,
            response.response_ids,
            boundaries,
            proposals,
            answer_format,
            response_mask=response.response_mask,
        )
        proposals, probes = _drop_long_answers(proposals, probes, settings.max_answer_tokens)
        num_dropped = len(known) - len(proposals)
        if not any(proposal.utility > 0 for proposal in proposals):
            return Plan(Record(Status.NO_PROPOSAL, num_dropped_answers=num_dropped))
        all_boundaries = boundaries
        boundaries, probes = _drop_boundaries(boundaries, probes, self.tools.max_length)
        record = Record(
            Status.SCORED if probes else Status.TOO_LONG,
            segment_boundaries=boundaries if probes else [],
            num_probes=len(probes),
            num_dropped_answers=num_dropped,
            num_dropped_boundaries=len(all_boundaries) - len(boundaries) if probes else len(all_boundaries) - 1,
        )
        if not probes:
            return Plan(record)
        utilities = [proposal.utility for proposal in proposals]
        if self._reader is None:
            return self._for_the_engine(response, record, probes, utilities)
        trace_ids = response.prompt_ids + response.response_ids
        reading = await self._reader.read(response.request_id, trace_ids, probes)
        scores = reading.scores
        values = from_unit(self_values(self.form, probes, scores, utilities).double(), settings.reward_range)
        return Plan(
            dataclasses.replace(
                record,
                payload={"values": values.tolist()},
                num_probe_tokens=sum(score.num_forward_tokens for score in scores),
                num_recomputed_tokens=sum(score.num_recomputed_tokens for score in scores),
                waiting_seconds=reading.waiting_seconds,
                lost_closing_mass=max(score.lost_closing_mass for score in scores),
            )
        )

    def _answers(self, members: Sequence[Member]) -> list[tuple[str, float]]:
        """Text and utility of the answers that are verified."""
        reward_range = self.settings.self_value.reward_range
        return [
            (member.answer, to_unit(member.reward - member.shaping, reward_range))
            for member in members
            if member.answer is not None and member.reward is not None
        ]

    def _for_the_engine(
        self, response: Response, record: Record, probes: Sequence[Probe], utilities: Sequence[float]
    ) -> Plan:
        settings, encoded = self.settings.self_value, encode(probes)
        num_tokens = num_probe_tokens(encoded)
        if not settings.share_prefix:
            # A sequence for each of the closing tokens that are summed.
            num_tokens = sum(
                (probe.position + len(probe.token_ids) + 1)
                * min(len(probe.closing_token_ids), settings.max_closing_tokens)
                for probe in probes
            )
        places = [number for probe in probes for number in ProbePlace.of(probe)]
        payload = {"utilities": list(utilities), "places": places}
        record = dataclasses.replace(record, payload=payload, num_probe_tokens=num_tokens)
        return Plan(record, {FIELD: encoded, **self._hidden_row(response, record.segment_boundaries)})

    def _hidden_row(self, response: Response, boundaries: list[int]) -> dict[str, list[int]]:
        return {HIDDEN_FIELD: hidden_positions(response, boundaries)} if self._reads_hidden else {}

    # In the trainer's step

    def _waiting(self, recorded: RecordedBatch) -> bool:
        return any(record is not None and "places" in record.payload for record in recorded.records)

    def measure(self, recorded: RecordedBatch, workers: Workers) -> None:
        """See `Source`: probes as sequences of their own."""
        settings = self.settings.self_value
        if not settings.share_prefix and self._waiting(recorded):
            SeparateSequences(workers).read_probes(recorded.batch, settings.max_closing_tokens)

    def passes(self, recorded: RecordedBatch) -> tuple[PassRequest, ...]:
        """See `Source`."""
        settings = self.settings.self_value
        asked = settings.share_prefix and self._waiting(recorded)
        probes = (PassRequest("probes", fuses=settings.fuse is True),) if asked else ()
        hidden = (hidden_request(self.settings.readout),) if self._reads_hidden else ()
        return probes + hidden

    def values(self, rows: Rows) -> list[list[float]]:
        """See `Source`."""
        values: list[list[float]] = [[] for _ in rows.keys]
        read = rows.read(FIELDS["probes"].result) if self._waiting(rows.recorded) else ()
        for row in rows.scored:
            record = rows.records[row]
            assert record is not None
            measured = record.payload.get("values")
            values[row] = measured or self._of_log_probs(rows.keys[row], record, read[row].tolist())
        if self._regression is not None:
            return self._regression.fitted(rows, values)
        return values

    def _of_log_probs(self, key: str, record: Record, log_probs: list[float]) -> list[float]:
        places = np.array(record.payload["places"]).reshape(-1, len(ProbePlace._fields))
        expected = places[:, -1].sum()
        if len(log_probs) != expected:
            raise RuntimeError(
                f"a pass gave {len(log_probs)} log-probabilities of the probes of {key}, expected {expected}"
            )
        values = values_of_log_probs(self.form, places, log_probs, record.payload["utilities"])
        return list(from_unit(values.double(), self.settings.self_value.reward_range).tolist())

    def metrics(self, records: Sequence[Record]) -> dict[str, float]:
        """See `Source`."""
        del records
        return {} if self._regression is None else self._regression.metrics()

    def save(self, folder: str) -> None:
        """See `Source`."""
        if self._regression is not None:
            self._regression.save(folder)

    def load(self, folder: str) -> None:
        """See `Source`."""
        if self._regression is not None:
            self._regression.load(folder)


class ReferenceProgress(Probes):
    """Segments are credited with the change of the reference answer's probability.

    GRPO-VPS (arXiv 2604.20659) appends the correct answer at every segment boundary and takes the change of its
    conditional probability as the segment's progress; IGPO (arXiv 2510.14967) does so for an agent's turns with
    exp(mean log-probability), which is our form `geometric` and the default here, and pays the outcome to the last
    turn. Ours: RREDCoT's segments and how progress becomes advantages; with `credit.pinned=false` the answer's own
    segment makes none, as in GRPO-VPS. Costs what RREDCoT costs.
    """

    default_form = "geometric"
    forecasts = False

    def check(self, config: DictConfig) -> str | None:
        """See `Source`."""
        return why_not_regressed(self.settings, self.name) or super().check(config)


class NewHighs(ReferenceProgress):
    """As `ReferenceProgress`, but only new highs of the probability pay.

    Step-wise marginal information gain (arXiv 2602.01034) measures a step against a monotonic historical watermark.
    Ours: the same as there; its masking of rewards to parts of the completion and its supervised objective are not
    built. Costs what RREDCoT costs.
    """

    def values(self, rows: Rows) -> list[list[float]]:
        """See `Source`."""
        return [new_highs(own) for own in super().values(rows)]


def _waits_for_group(proposals: str, engine: str, share_prefix: bool) -> bool:
    """Whether a response is probed when all of its group are there, whose answers and spellings are then known.

    Who is there before depends on how long the response itself is. For the reference alone a server that reads beside
    generation does not wait, and sequences of their own are not made for more than one spelling.
    """
    return proposals != "reference" or (engine == "actor" and share_prefix)


def _drop_long_answers(
    proposals: Sequence[Proposal], probes: Sequence[Probe], max_tokens: int
) -> tuple[list[Proposal], list[Probe]]:
    """Leave out answers of more than `max_tokens` tokens before anything is written.

    Behind an opening of the response's own an answer may have a token more or less, and whether one is written must not
    decide what earlier states are asked.
    """
    first = [probe for probe in probes if probe.state == 0]
    too_long = {probe.proposal for probe in first if len(probe.token_ids) - probe.answer_from > max_tokens}
    kept = [number for number in range(len(proposals)) if number not in too_long]
    renumbered = {number: place for place, number in enumerate(kept)}
    short = [
        dataclasses.replace(probe, proposal=renumbered[probe.proposal])
        for probe in probes
        if probe.proposal in renumbered
    ]
    return [proposals[number] for number in kept], short


def _drop_boundaries(boundaries: list[int], probes: Sequence[Probe], max_length: int) -> tuple[list[int], list[Probe]]:
    """Leave out boundaries at which a probe would not fit.

    Room is needed for the token that ends the answer, and for the one that vLLM insists on generating.
    """
    too_long = {probe.state for probe in probes if probe.position + len(probe.token_ids) + 2 > max_length}
    if not too_long:
        return boundaries, list(probes)
    # Probes grow with the prefix: what does not fit is at the end, and its segments join the last one that does.
    first = min(too_long)
    return boundaries[:first] + boundaries[-1:], [probe for probe in probes if probe.state < first]
